//! Which way of moving a model's bytes is fastest: the same file copied by several strategies.
//!
//! Nothing is computed, so each line is the floor under a merge that moves its bytes that way.
//! Every output is removed before its run and the file system flushed, so that no run pays for
//! the pages that another one left dirty.

mod map;

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;

use crate::Result;
use crate::machine::processor_seconds;
use crate::scratch;
use crate::table::{Summary, Table};

const KILO: usize = 1 << 10;
const MEGA: usize = 1 << 20;

/// How the input's bytes are reached.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    Read,
    /// Through a mapping; `populate` maps a tile's pages in one call.
    Map {
        populate: bool,
    },
    /// Not at all.
    Nothing,
}

/// How the output's bytes get there.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sink {
    Write,
    /// `fallocate` first, then writes.
    AllocateWrite,
    /// `fallocate` first, then through a mapping, whose tiles are populated for writing.
    Map {
        huge_pages: bool,
    },
    /// `copy_file_range`: the source is not used.
    InKernel,
    Nothing,
}

/// When the output is flushed to the disk.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Flush {
    Never,
    AtEnd,
    /// A further thread calls `fdatasync` again and again while the others write.
    Meanwhile,
}

#[derive(Clone, Copy, Debug)]
struct Strategy {
    source: Source,
    sink: Sink,
    tile: usize,
    threads: usize,
    flush: Flush,
}

impl Strategy {
    fn name(&self) -> String {
        let source = match self.source {
            Source::Read => "pread",
            Source::Map { populate: true } => "mmap (populated)",
            Source::Map { populate: false } => "mmap",
            Source::Nothing => "",
        };
        let sink = match self.sink {
            Sink::Write => "pwrite",
            Sink::AllocateWrite => "fallocate, pwrite",
            Sink::Map { huge_pages: false } => "mmap (fallocate, populated)",
            Sink::Map { huge_pages: true } => "mmap (fallocate, huge pages)",
            Sink::InKernel => return "copy_file_range".into(),
            Sink::Nothing => return format!("{source} only"),
        };
        match source {
            "" => format!("{sink} only"),
            _ => format!("{source} → {sink}"),
        }
    }
}

fn strategies() -> Vec<Strategy> {
    let mut all = Vec::new();
    let mut add = |source, sink, tile, flush| {
        for threads in [1, 2] {
            all.push(Strategy { source, sink, tile, threads, flush });
        }
    };
    let populated = Source::Map { populate: true };
    let mapped = Sink::Map { huge_pages: false };
    let never = Flush::Never;
    add(Source::Nothing, Sink::InKernel, 8 * MEGA, never);
    for tile in [512 * KILO, MEGA, 4 * MEGA] {
        add(Source::Read, Sink::Write, tile, never);
    }
    for tile in [512 * KILO, MEGA, 4 * MEGA] {
        add(populated, Sink::Write, tile, never);
    }
    add(Source::Map { populate: false }, Sink::Write, MEGA, never);
    add(Source::Read, Sink::AllocateWrite, MEGA, never);
    add(populated, mapped, MEGA, never);
    add(populated, mapped, 4 * MEGA, never);
    add(Source::Read, mapped, 4 * MEGA, never);
    add(Source::Read, Sink::Map { huge_pages: true }, 4 * MEGA, never);
    add(Source::Read, Sink::Nothing, 512 * KILO, never);
    add(populated, Sink::Nothing, 512 * KILO, never);
    add(Source::Nothing, Sink::Write, 512 * KILO, never);
    add(Source::Read, Sink::Write, MEGA, Flush::AtEnd);
    add(Source::Read, Sink::Write, MEGA, Flush::Meanwhile);
    add(Source::Read, Sink::AllocateWrite, MEGA, Flush::AtEnd);
    add(Source::Nothing, Sink::InKernel, 8 * MEGA, Flush::AtEnd);
    add(Source::Nothing, Sink::InKernel, 8 * MEGA, Flush::Meanwhile);
    all
}

/// Copies `input` into the directory of `output` by every strategy, `runs` times in turn.
pub(crate) fn run(input: &Path, output: &Path, runs: usize, flushes: bool) -> Result<Table> {
    let bytes = input.metadata()?.len() as usize;
    let mut strategies = strategies();
    if !flushes {
        strategies.retain(|strategy| strategy.flush == Flush::Never);
    }
    let mut samples = vec![Samples::default(); strategies.len()];
    let mut plain_copy = Samples::default();
    for round in 0..=runs {
        scratch::remove(output)?;
        plain_copy.measure(|| {
            let copied = std::process::Command::new("cp").arg(input).arg(output).status()?;
            if copied.success() { Ok(()) } else { Err("cp failed".into()) }
        })?;
        for (strategy, samples) in strategies.iter().zip(&mut samples) {
            scratch::remove(output)?;
            samples.measure(|| copy(input, output, bytes, *strategy))?;
        }
        if round == 0 {
            // The first round finds memory that a virtual machine does not have yet.
            plain_copy = Samples::default();
            samples.fill(Samples::default());
        }
    }
    scratch::remove(output)?;

    let reference = Summary::of(&plain_copy.seconds);
    let mut table = Table::new(&[
        "strategy", "tile", "threads", "flush", "min s", "median s", "÷ cp", "GB/s", "cpu s",
    ]);
    let mut row = |name: String, tile: String, threads: String, flush: &str, samples: &Samples| {
        let summary = Summary::of(&samples.seconds);
        table.push(vec![
            name,
            tile,
            threads,
            flush.into(),
            format!("{:.3}", summary.minimum),
            format!("{:.3}", summary.median),
            format!("{:.2}", summary.median / reference.median),
            format!("{:.2}", bytes as f64 / 1e9 / summary.median),
            format!("{:.2}", Summary::of(&samples.processor).median),
        ]);
    };
    row("cp".into(), String::new(), "1".into(), "", &plain_copy);
    for (strategy, samples) in strategies.iter().zip(&samples) {
        let tile = match strategy.tile {
            tile if tile < MEGA => format!("{} KiB", tile / KILO),
            tile => format!("{} MiB", tile / MEGA),
        };
        let flush = match strategy.flush {
            Flush::Never => "",
            Flush::AtEnd => "fsync",
            Flush::Meanwhile => "meanwhile + fsync",
        };
        row(strategy.name(), tile, strategy.threads.to_string(), flush, samples);
    }
    Ok(table)
}

/// What the runs of one strategy took.
#[derive(Clone, Debug, Default)]
struct Samples {
    seconds: Vec<f64>,
    /// Seconds of processor time, program and kernel.
    processor: Vec<f64>,
}

impl Samples {
    fn measure(&mut self, run: impl FnOnce() -> Result<()>) -> Result<()> {
        let (user, system) = processor_seconds();
        let started = Instant::now();
        run()?;
        self.seconds.push(started.elapsed().as_secs_f64());
        let (user_after, system_after) = processor_seconds();
        self.processor.push(user_after - user + system_after - system);
        Ok(())
    }
}

fn copy(input: &Path, output: &Path, bytes: usize, strategy: Strategy) -> Result<()> {
    let source = File::open(input)?;
    let sink = OpenOptions::new().read(true).write(true).create_new(true).open(output)?;
    if matches!(strategy.sink, Sink::AllocateWrite | Sink::Map { .. }) {
        rustix::fs::fallocate(&sink, FallocateFlags::empty(), 0, bytes as u64)?;
    }
    let worker = Worker {
        source: &source,
        map: map::Input::new(&source)?,
        sink: &sink,
        bytes,
        strategy,
        next: AtomicUsize::new(0),
    };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> io::Result<()> {
        if strategy.flush == Flush::Meanwhile {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(50));
                    // The flush at the end reports what fails here.
                    let _early = sink.sync_data();
                }
            });
        }
        let others: Vec<_> = (1..strategy.threads).map(|_| scope.spawn(|| worker.work())).collect();
        let mut result = worker.work();
        for other in others {
            let joined =
                other.join().unwrap_or_else(|_| Err(io::Error::other("a worker panicked")));
            result = result.and(joined);
        }
        done.store(true, Ordering::Relaxed);
        result
    })?;
    if strategy.flush != Flush::Never {
        sink.sync_all()?;
    }
    Ok(())
}

struct Worker<'a> {
    source: &'a File,
    map: map::Input,
    sink: &'a File,
    bytes: usize,
    strategy: Strategy,
    next: AtomicUsize,
}

impl Worker<'_> {
    fn work(&self) -> io::Result<()> {
        let mut buffer = vec![1; self.strategy.tile];
        loop {
            let start = self.next.fetch_add(self.strategy.tile, Ordering::Relaxed);
            if start >= self.bytes {
                return Ok(());
            }
            let range = start..self.bytes.min(start + self.strategy.tile);
            if self.strategy.sink == Sink::InKernel {
                copy_in_kernel(self.source, self.sink, range)?;
                continue;
            }
            if let Sink::Map { huge_pages } = self.strategy.sink {
                let mut window = map::output_window(self.sink, &range, huge_pages)?;
                if self.strategy.source == Source::Read {
                    self.source.read_exact_at(&mut window, range.start as u64)?;
                } else {
                    self.through_map(&range, |bytes| {
                        window.copy_from_slice(bytes);
                        Ok(())
                    })?;
                }
                continue;
            }
            match self.strategy.source {
                Source::Read => {
                    let tile = &mut buffer[..range.len()];
                    self.source.read_exact_at(tile, range.start as u64)?;
                    self.write(tile, range.start)?;
                }
                Source::Map { .. } => {
                    // A merge's kernel writes into a buffer; so does this, for the same traffic.
                    let tile = &mut buffer[..range.len()];
                    self.through_map(&range, |bytes| {
                        tile.copy_from_slice(bytes);
                        Ok(())
                    })?;
                    self.write(black_box(tile), range.start)?;
                }
                Source::Nothing => self.write(&buffer[..range.len()], range.start)?,
            }
        }
    }

    fn through_map(
        &self,
        range: &Range<usize>,
        take: impl FnOnce(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.strategy.source == (Source::Map { populate: true }) {
            self.map.populate(range)?;
        }
        take(self.map.bytes(range.clone()))?;
        self.map.release(range)
    }

    fn write(&self, tile: &[u8], offset: usize) -> io::Result<()> {
        if self.strategy.sink == Sink::Nothing {
            black_box(tile);
            return Ok(());
        }
        self.sink.write_all_at(tile, offset as u64)
    }
}

fn copy_in_kernel(source: &File, sink: &File, range: Range<usize>) -> io::Result<()> {
    let (mut from, mut to) = (range.start as u64, range.start as u64);
    while from < range.end as u64 {
        let left = range.end - from as usize;
        if rustix::fs::copy_file_range(source, Some(&mut from), sink, Some(&mut to), left)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}
