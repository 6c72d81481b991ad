//! Where the numbers come from: processor, kernel, memory, date, file systems.

use std::fs;
use std::path::Path;
use std::process::Command;

/// One line each: date, processor, memory, kernel, load.
pub(crate) fn describe() -> Vec<String> {
    let unknown = || "unknown".to_owned();
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(file).ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let line = |file: &str| fs::read_to_string(file).map(|text| text.trim().to_owned());
    let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    let date = date.map_or_else(
        |_| unknown(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    );
    let cpu = field("/proc/cpuinfo", "model name").unwrap_or_else(unknown);
    let flags = field("/proc/cpuinfo", "flags").unwrap_or_default();
    let has = |name: &&str| flags.split(' ').any(|flag| flag == *name);
    let vectors: Vec<&str> =
        ["avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"].into_iter().filter(has).collect();
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    vec![
        format!("date: {date}"),
        format!("cpu: {cpu}, {cores} cores, {}", vectors.join(" ")),
        format!("memory: {}", field("/proc/meminfo", "MemTotal").unwrap_or_else(unknown)),
        format!("kernel: {}", line("/proc/sys/kernel/osrelease").unwrap_or_else(|_| unknown())),
        format!("load: {}", line("/proc/loadavg").unwrap_or_else(|_| unknown())),
    ]
}

/// Bytes that can be had without swapping, page cache included.
pub(crate) fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// The type of the file system that holds `path`.
pub(crate) fn file_system(path: &Path) -> String {
    let Ok(path) = path.canonicalize() else { return "unknown".into() };
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut found = ("unknown", 0);
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(point), Some(kind)) = (fields.next(), fields.next()) else { continue };
        // The deepest mount point wins; of two on one place, the later.
        if path.starts_with(point) && point.len() >= found.1 {
            found = (kind, point.len());
        }
    }
    found.0.to_owned()
}

/// Seconds of processor time, in the program and in the kernel, that this process and the
/// children it waited for have used. The kernel counts in hundredths.
pub(crate) fn processor_seconds() -> (f64, f64) {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field is the program's name, which may hold spaces; it ends at the last `)`.
    let fields: Vec<f64> = text
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0.0))
        .collect();
    let ticks = |field: usize| fields.get(field - 3).copied().unwrap_or(0.0) / 100.0;
    (ticks(14) + ticks(16), ticks(15) + ticks(17))
}
