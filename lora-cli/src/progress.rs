//! A progress bar on a terminal; nothing in a pipe.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lora_format::io::atomic;
use lora_merge::engine::Progress;

const STYLE: &str = "{bar:30} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta}";

/// Lets Ctrl-C stop the writing of an adapter, which then removes what it has written.
pub(crate) fn interruptible() {
    // Fails only if a handler is set already, and one command sets one.
    let _already_set = ctrlc::set_handler(atomic::interrupt);
}

/// Runs `work` while a bar shows how much of `total` bytes `progress` has done. Ctrl-C asks the
/// work to stop.
pub(crate) fn watch<T>(
    total: u64,
    quiet: bool,
    progress: &Arc<Progress>,
    work: impl FnOnce() -> T,
) -> T {
    let on_signal = Arc::clone(progress);
    // Fails only if a handler is set already; then that one cancels the same way.
    let _already_set = ctrlc::set_handler(move || on_signal.cancel());
    if quiet || !std::io::stderr().is_terminal() {
        return work();
    }
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(STYLE) {
        bar.set_style(style);
    }
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ticker = scope.spawn(|| {
            while !finished.load(Ordering::Relaxed) {
                bar.set_position(progress.done());
                std::thread::park_timeout(Duration::from_millis(100));
            }
        });
        let result = work();
        finished.store(true, Ordering::Relaxed);
        ticker.thread().unpark();
        bar.finish_and_clear();
        result
    })
}
