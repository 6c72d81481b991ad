//! The main measurement: merges beside copies of the same model, in turn.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use lora_format::container::safetensors::Header;

use crate::Result;
use crate::child::{Runner, Usage};
use crate::model::{Adapter, Base};
use crate::table::{Summary, Table};
use crate::{machine, scratch};

const PEFT_SCRIPT: &str = include_str!("peft.py");
/// A tensor that every merge changes.
const WITNESS: &str = "model.layers.0.self_attn.q_proj.weight";

/// What is run, and how often.
pub(crate) struct Comparison<'a> {
    pub(crate) cli: &'a Path,
    pub(crate) threads: &'a [usize],
    pub(crate) runs: usize,
    /// Also compare what has reached the disk.
    pub(crate) fsync: bool,
    /// A Python that imports torch, transformers and peft.
    pub(crate) peft: Option<&'a OsStr>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Case {
    Copy { fsync: bool },
    Merge { threads: usize, fsync: bool },
    Peft,
}

impl Case {
    fn name(self) -> String {
        let flushed = |fsync| if fsync { " + fsync" } else { "" };
        match self {
            Case::Copy { fsync } => format!("cp{}", flushed(fsync)),
            Case::Merge { threads, fsync } => {
                format!("merge{}, {threads} thread{}", flushed(fsync), plural(threads))
            }
            Case::Peft => "PEFT, whole process".into(),
        }
    }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// The arguments of `lora-cli` for one merge.
pub(crate) fn merge_arguments(
    base: &Path,
    adapter: &Path,
    out: &Path,
    threads: usize,
    fsync: bool,
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["merge".into(), base.into(), adapter.into()];
    arguments.extend(["-o".into(), out.into(), "--quiet".into()]);
    arguments.extend(["--threads".into(), threads.to_string().into()]);
    if !fsync {
        arguments.push("--no-fsync".into());
    }
    arguments
}

impl Comparison<'_> {
    fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for fsync in [false, true] {
            if fsync && !self.fsync {
                continue;
            }
            cases.push(Case::Copy { fsync });
            cases.extend(self.threads.iter().map(|&threads| Case::Merge { threads, fsync }));
        }
        cases.extend(self.peft.map(|_| Case::Peft));
        cases
    }

    /// Runs every case in turn, `runs` times, and prints the table.
    pub(crate) fn run(
        &self,
        runner: &Runner,
        base: &Base,
        adapter: &Adapter,
        rank: usize,
        markdown: bool,
    ) -> Result<()> {
        let out = output_path(base);
        let cases = self.cases();
        println!();
        println!(
            "base: {:.2} GB in {} file{}, rank {rank}, {}",
            base.bytes as f64 / 1e9,
            base.files.len(),
            plural(base.files.len()),
            machine::file_system(&base.directory),
        );
        if machine::available_memory().is_some_and(|available| base.bytes * 2 > available) {
            println!("note: base and output do not fit into memory together: reads are not cached");
        }
        for &case in &cases {
            if case == Case::Peft {
                continue;
            }
            let (program, arguments) = self.command(case, base, adapter, &out);
            let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
            println!("{:24} {} {}", case.name(), program.to_string_lossy(), words.join(" "));
        }
        for file in base.files.iter().chain([&adapter.file]) {
            scratch::warm(file)?;
        }
        let mut samples: Vec<Vec<Usage>> = vec![Vec::new(); cases.len()];
        for round in 0..=self.runs {
            for (&case, samples) in cases.iter().zip(&mut samples) {
                scratch::remove(&out)?;
                let usage = self.once(runner, case, base, adapter, &out)?;
                if round > 0 {
                    samples.push(usage);
                } else {
                    // The first round is for checking only: it finds memory that a virtual
                    // machine does not have yet.
                    check(case, base, &out)?;
                }
            }
        }
        scratch::remove(&out)?;
        println!("{}", table(base, rank, &cases, &samples).render(markdown));
        for (&case, samples) in cases.iter().zip(&samples) {
            if case == Case::Peft {
                print_phases(base, samples, markdown)?;
            }
        }
        Ok(())
    }

    fn command(
        &self,
        case: Case,
        base: &Base,
        adapter: &Adapter,
        out: &Path,
    ) -> (OsString, Vec<OsString>) {
        match case {
            Case::Copy { .. } => {
                let mut arguments: Vec<OsString> = Vec::new();
                if base.argument().is_dir() {
                    arguments.push("-r".into());
                }
                arguments.extend([base.argument().into(), out.into()]);
                ("cp".into(), arguments)
            }
            Case::Merge { threads, fsync } => {
                let (base, adapter) = (base.argument(), &adapter.directory);
                let arguments = merge_arguments(base, adapter, out, threads, fsync);
                (self.cli.into(), arguments)
            }
            Case::Peft => {
                let python = self.peft.unwrap_or_default().to_owned();
                let (base, adapter) = (base.directory.as_os_str(), adapter.directory.as_os_str());
                let script = OsStr::new(PEFT_SCRIPT);
                let arguments = [OsStr::new("-c"), script, base, adapter, out.as_os_str()];
                (python, arguments.map(OsStr::to_owned).to_vec())
            }
        }
    }

    fn once(
        &self,
        runner: &Runner,
        case: Case,
        base: &Base,
        adapter: &Adapter,
        out: &Path,
    ) -> Result<Usage> {
        let (program, arguments) = self.command(case, base, adapter, out);
        let mut usage = runner.run(&program, &arguments)?;
        if case == (Case::Copy { fsync: true }) {
            let started = Instant::now();
            scratch::fsync(out)?;
            usage.seconds += started.elapsed().as_secs_f64();
        }
        Ok(usage)
    }
}

/// Beside the base: on the same file system.
fn output_path(base: &Base) -> PathBuf {
    let name = if base.argument().is_dir() { "out" } else { "out.safetensors" };
    base.directory.with_file_name(name)
}

/// Refuses to time a program that did not do its work.
fn check(case: Case, base: &Base, out: &Path) -> Result<()> {
    let mut files = vec![out.to_owned()];
    if out.is_dir() {
        files = Vec::new();
        for entry in fs::read_dir(out)? {
            files.push(entry?.path());
        }
    }
    let before = witness(&base.files)?;
    let after = witness(&files)?;
    let changed = before != after;
    let expected = !matches!(case, Case::Copy { .. });
    if before.len() != after.len() || changed != expected {
        return Err(
            format!("{}: {WITNESS} in the output is not what it should be", case.name()).into()
        );
    }
    Ok(())
}

/// The bytes of one merged tensor.
fn witness(files: &[PathBuf]) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    for path in files.iter().filter(|path| path.extension() == Some(OsStr::new("safetensors"))) {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let header = Header::read(path, &mut file, length)?;
        if let Some(tensor) = header.tensor(WITNESS) {
            let mut bytes = vec![0; tensor.bytes() as usize];
            file.read_exact_at(&mut bytes, header.data_start + tensor.start)?;
            return Ok(bytes);
        }
    }
    Err(format!("no {WITNESS} among {files:?}").into())
}

fn seconds(samples: &[Usage]) -> Summary {
    Summary::of(&samples.iter().map(|usage| usage.seconds).collect::<Vec<_>>())
}

fn table(base: &Base, rank: usize, cases: &[Case], samples: &[Vec<Usage>]) -> Table {
    let mut table = Table::new(&[
        "case",
        "min s",
        "median s",
        "÷ cp, min",
        "÷ cp, median",
        "GB/s",
        "GFLOP/s",
        "user s",
        "sys s",
        "peak MiB",
    ]);
    let gigabytes = base.bytes as f64 / 1e9;
    let gigaflop = base.shape.operations(rank) / 1e9;
    for (&case, own) in cases.iter().zip(samples) {
        let fsync = matches!(case, Case::Copy { fsync: true } | Case::Merge { fsync: true, .. });
        let copy = cases.iter().position(|&case| case == Case::Copy { fsync });
        let copy = seconds(copy.and_then(|index| samples.get(index)).map_or(&[], Vec::as_slice));
        let summary = seconds(own);
        let median = |value: fn(&Usage) -> f64| {
            Summary::of(&own.iter().map(value).collect::<Vec<_>>()).median
        };
        let peak = own.iter().map(|usage| usage.peak_bytes).max().unwrap_or(0);
        let flops = match case {
            Case::Merge { .. } => format!("{:.0}", gigaflop / summary.median),
            Case::Copy { .. } | Case::Peft => String::new(),
        };
        table.push(vec![
            case.name(),
            format!("{:.3}", summary.minimum),
            format!("{:.3}", summary.median),
            format!("{:.2}", summary.minimum / copy.minimum),
            format!("{:.2}", summary.median / copy.median),
            format!("{:.2}", gigabytes / summary.median),
            flops,
            format!("{:.2}", median(|usage| usage.user)),
            format!("{:.2}", median(|usage| usage.system)),
            format!("{:.0}", peak as f64 / f64::from(1 << 20)),
        ]);
    }
    table
}

/// PEFT's phases: a user who has Python running already pays for the last three.
fn print_phases(base: &Base, samples: &[Usage], markdown: bool) -> Result<()> {
    let mut table = Table::new(&["PEFT phase", "min s", "median s", "GB/s"]);
    let reports = samples
        .iter()
        .map(|usage| {
            // transformers may print before it; ours is the last line.
            let line = usage.stdout.lines().last().unwrap_or_default();
            Ok(serde_json::from_str(line)?)
        })
        .collect::<Result<Vec<serde_json::Value>>>()?;
    let phases = ["import", "load", "merge", "save"];
    let of = |names: &[&str]| {
        let sum = |report: &serde_json::Value| {
            names.iter().map(|name| report[*name].as_f64().unwrap_or(f64::NAN)).sum()
        };
        Summary::of(&reports.iter().map(sum).collect::<Vec<f64>>())
    };
    let mut row = |name: &str, summary: Summary| {
        table.push(vec![
            name.to_owned(),
            format!("{:.3}", summary.minimum),
            format!("{:.3}", summary.median),
            format!("{:.2}", base.bytes as f64 / 1e9 / summary.median),
        ]);
    };
    for phase in phases {
        row(phase, of(&[phase]));
    }
    row("load + merge + save", of(&["load", "merge", "save"]));
    println!("{}", table.render(markdown));
    Ok(())
}
