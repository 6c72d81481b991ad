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
/// work to stop; after it, it stops the writing of files, as [`interruptible`] does.
pub(crate) fn watch<T>(
    total: u64,
    quiet: bool,
    progress: &Arc<Progress>,
    work: impl FnOnce() -> T,
) -> T {
    let signal = Arc::new(Signal::default());
    let (on_signal, asked) = (Arc::clone(&signal), Arc::clone(progress));
    // Fails only if a handler is set already; then that one cancels the same way.
    let _already_set = ctrlc::set_handler(move || {
        asked.cancel();
        if on_signal.came() {
            atomic::interrupt();
        }
    });
    let result = shown(total, quiet, progress, work);
    if signal.work_is_done() {
        atomic::interrupt();
    }
    result
}

/// Whether a signal came, and whether there still is work that looks for it: the writing of files does
/// not, and has to be stopped. Of a signal that comes as the work ends, one of the two sides notices.
#[derive(Default)]
struct Signal {
    came: AtomicBool,
    done: AtomicBool,
}

impl Signal {
    /// Whether it came after the work.
    fn came(&self) -> bool {
        self.came.store(true, Ordering::SeqCst);
        self.done.load(Ordering::SeqCst)
    }

    /// Whether a signal came before.
    fn work_is_done(&self) -> bool {
        self.done.store(true, Ordering::SeqCst);
        self.came.load(Ordering::SeqCst)
    }
}

fn shown<T>(total: u64, quiet: bool, progress: &Progress, work: impl FnOnce() -> T) -> T {
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

#[cfg(test)]
mod tests {
    use super::Signal;

    #[test]
    fn a_signal_stops_what_comes_after_the_work() {
        let during = Signal::default();
        assert!(!during.came());
        assert!(during.work_is_done());
        let after = Signal::default();
        assert!(!after.work_is_done());
        assert!(after.came());
    }
}
