//! Runs a program and says what it took: wall time, processor time, peak memory.
//!
//! Peak memory is the kernel's own maximum of the resident set, mapped pages included. GNU time
//! hands it over exactly; without it, `/proc` is polled, which can miss the last moments.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::Result;

const GNU_TIME: &str = "/usr/bin/time";

/// What one run took.
#[derive(Clone, Debug)]
pub(crate) struct Usage {
    pub(crate) seconds: f64,
    /// Seconds in the program and in the kernel; NaN if not known.
    pub(crate) user: f64,
    pub(crate) system: f64,
    pub(crate) peak_bytes: u64,
    pub(crate) stdout: String,
}

/// Runs programs, always in the same way.
pub(crate) struct Runner {
    /// Where GNU time writes; none if there is no GNU time.
    report: Option<PathBuf>,
}

impl Runner {
    /// `scratch` is a directory that may be written to.
    pub(crate) fn new(scratch: &Path) -> Runner {
        let report = scratch.join("usage.txt");
        let works = Command::new(GNU_TIME)
            .args(["--quiet", "-f", "%U %S %M", "-o"])
            .arg(&report)
            .arg("true")
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        Runner { report: works.then_some(report) }
    }

    /// How peak memory is measured.
    pub(crate) fn method(&self) -> &'static str {
        match self.report {
            Some(_) => "maximum resident set by GNU time, exact",
            None => "VmHWM, polled every 2 ms (no GNU time here); processor time unknown",
        }
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// Also if the program fails.
    pub(crate) fn run(&self, program: &OsStr, arguments: &[OsString]) -> Result<Usage> {
        let mut command = match &self.report {
            Some(report) => {
                let mut command = Command::new(GNU_TIME);
                command.args(["--quiet", "-f", "%U %S %M", "-o"]).arg(report).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let child = command.spawn()?;
        let status = PathBuf::from(format!("/proc/{}/status", child.id()));
        let poll = self.report.is_none();
        let (output, seconds, polled) = std::thread::scope(|scope| -> Result<_> {
            let poller = poll.then(|| scope.spawn(|| poll_peak(&status)));
            let output = child.wait_with_output()?;
            let seconds = started.elapsed().as_secs_f64();
            let polled = poller.and_then(|poller| poller.join().ok());
            Ok((output, seconds, polled))
        })?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{program:?} failed ({}): {message}", output.status).into());
        }
        let (mut user, mut system, mut peak) = (f64::NAN, f64::NAN, polled.unwrap_or(0));
        if let Some(report) = &self.report {
            let text = fs::read_to_string(report)?;
            let mut fields = text.split_whitespace();
            let mut field = || fields.next().ok_or("GNU time wrote too little");
            user = field()?.parse()?;
            system = field()?.parse()?;
            peak = field()?.parse::<u64>()? * 1024;
        }
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(Usage { seconds, user, system, peak_bytes: peak, stdout })
    }
}

/// The largest `VmHWM` seen until the process is gone.
fn poll_peak(status: &Path) -> u64 {
    let mut peak = 0;
    // Of a process that has ended the line is missing, even before it is waited for.
    while let Some(kibibytes) = fs::read_to_string(status).ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    }) {
        peak = peak.max(kibibytes * 1024);
        std::thread::sleep(Duration::from_millis(2));
    }
    peak
}
