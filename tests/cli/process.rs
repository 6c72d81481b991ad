//! Streams, signals and a full disk.

use std::io::Read;
use std::process::Stdio;

use lora_format::Dtype;
use serde_json::json;

use crate::support::{Factors, Prng, Tensor, listing, write_adapter, write_tensors};
use crate::{Ran, Scratch, cli, command, peft};

/// The statuses that the help text promises.
#[test]
fn exit_statuses() {
    let scratch = Scratch::new();
    assert_eq!(scratch.cli(&["merge", "base.safetensors", "lora"]).code, Some(0));
    assert_eq!(scratch.cli(&["merge", "base.safetensors", "lora"]).code, Some(2));
    assert_eq!(scratch.cli(&["merge", "nowhere", "lora"]).code, Some(2));
    assert_eq!(scratch.cli(&["merge"]).code, Some(2));
    assert_eq!(scratch.cli(&["no-such-command"]).code, Some(2));
    assert_eq!(scratch.cli(&["merge", "base.safetensors", "lora", "--dtype", "f8"]).code, Some(2));
    let help = scratch.cli(&["--help"]);
    assert_eq!(help.code, Some(0));
    assert!(help.stdout.contains("0 done, 1 a check found something, 2 an error, 130 interrupted"));
    assert_eq!(scratch.cli(&["--version"]).code, Some(0));
}

#[test]
fn bad_numbers_are_usage_errors() {
    let scratch = Scratch::with_directory();
    let before = scratch.names();
    for arguments in [
        &["--scale", "much"][..],
        &["--scale", "NaN"],
        &["--scale", "inf"],
        &["--max-shard-size", "0"],
        &["--max-shard-size", "5 parsecs"],
        &["--max-shard-size", "-1GB"],
        &["--seed", "-1"],
        &["--threads", "x"],
    ] {
        let ran = scratch.cli(&[&["merge", "base", "lora"][..], arguments].concat());
        assert_eq!(ran.code, Some(2), "{arguments:?}");
        assert!(ran.stderr.starts_with("error: "), "{arguments:?}: {}", ran.stderr);
        assert_eq!(scratch.names(), before, "{arguments:?}");
    }
    // A negative scale subtracts the adapter.
    scratch.cli(&["merge", "base", "lora", "--scale", "-1"]).done();
}

/// stdout carries reports, stderr talk; a pipe gets no progress bar and no escape codes.
#[test]
fn streams() {
    let scratch = Scratch::new();
    let ran = scratch.cli(&["merge", "base.safetensors", "lora"]).done();
    assert!(!ran.stderr.contains(['\x1b', '\r', '█', '░']), "{}", ran.stderr);
    let lines = ran.stderr.lines().count();
    assert!(lines <= 4, "{}", ran.stderr);
    for arguments in [&["inspect", "lora"][..], &["inspect", "base.safetensors"]] {
        let ran = scratch.cli(arguments);
        assert!(!ran.stdout.is_empty() && ran.stderr.is_empty(), "{ran:?}");
        assert!(!ran.stdout.contains('\x1b'));
    }
}

/// `lora-cli inspect … | head -1`: the reader goes away, and that is no failure.
#[test]
fn a_closed_stdout_is_no_failure() {
    let directory = std::env::temp_dir();
    for format in [&[][..], &["--json"]] {
        let mut child = command(&directory)
            .args([&["inspect", &peft("llama-vanilla/base")][..], format].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let status = child.wait().unwrap();
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!((status.code(), stderr.as_str()), (Some(0), ""));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_stdout_is_a_failure() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let directory = std::env::temp_dir();
    let output = command(&directory)
        .args(["inspect", &peft("llama-vanilla/base")])
        .stdout(full)
        .output()
        .unwrap();
    let ran = Ran::of(&output);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.starts_with("error: cannot write to stdout: "), "{}", ran.stderr);
}

/// A merge that takes a while: one thread, tiny tiles.
#[cfg(unix)]
fn slow(scratch: &Scratch) -> Vec<&'static str> {
    let mut prng = Prng::new(5);
    let shape = [4096, 2048];
    let base: Vec<Tensor> = (0..3)
        .map(|layer| Tensor::zeros(&format!("m.{layer}.q.weight"), Dtype::F32, &shape))
        .collect();
    let factors: Vec<Factors> = (0..3)
        .map(|layer| {
            let module = format!("m.{layer}.q");
            Factors::random(&mut prng, &module, (4096, 2048, 16), Dtype::F32, 0.1)
        })
        .collect();
    write_adapter(&scratch.path("slow"), &factors, &json!({}));
    std::fs::create_dir(scratch.path("large")).unwrap();
    write_tensors(&scratch.path("large/model.safetensors"), &base, &[]);
    write_tensors(&scratch.path("large.safetensors"), &base, &[]);
    vec!["slow", "--threads", "1", "--tile-bytes", "64", "--no-fsync"]
}

/// Ctrl-C: status 130, and nothing is left behind; the same for SIGTERM.
#[cfg(unix)]
#[test]
fn an_interrupt_leaves_nothing() {
    let scratch = Scratch::new();
    let arguments = slow(&scratch);
    let before = listing(scratch.root());
    for (signal, base, json) in
        [("-INT", "large.safetensors", false), ("-INT", "large", true), ("-TERM", "large", false)]
    {
        let json: &[&str] = if json { &["--json"] } else { &[] };
        let child = command(scratch.root())
            .args([&["merge", base][..], &arguments, json].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Once something is staged, the handler is set.
        let began = std::time::Instant::now();
        while listing(scratch.root()).len() == before.len() {
            assert!(began.elapsed().as_secs() < 60, "the merge did not begin");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        let sent = std::process::Command::new("kill")
            .args([signal, &child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
        let ran = Ran::of(&child.wait_with_output().unwrap());
        assert_eq!(ran.code, Some(130), "{base} {signal}: {}", ran.stderr);
        assert_eq!(ran.stdout, "");
        assert!(ran.stderr.ends_with("interrupted; no output was written\n"), "{}", ran.stderr);
        assert_eq!(listing(scratch.root()), before, "{base} {signal}");
    }
}

/// A disk that is too small is found before the start.
#[cfg(target_os = "linux")]
#[test]
fn a_small_disk_is_found_before_the_start() {
    let scratch = Scratch::new();
    slow(&scratch);
    std::fs::create_dir(scratch.path("disk")).unwrap();
    let disk = scratch.path("disk");
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(&disk)
        .output();
    if !mount.is_ok_and(|output| output.status.success()) {
        println!("skipped: mounting a file system is not permitted here");
        return;
    }
    let file = scratch.cli(&["merge", "large.safetensors", "slow", "-o", "disk/out.safetensors"]);
    let directory = scratch.cli(&["merge", "large", "slow", "-o", "disk/out"]);
    let dry = scratch.cli(&["merge", "large", "slow", "-o", "disk/out", "--dry-run"]);
    let left = listing(&disk);
    let unmounted = std::process::Command::new("umount").arg(&disk).status().unwrap();
    assert!(unmounted.success());
    for ran in [file, directory, dry] {
        let text = ran.refused(scratch.root());
        let expected = "error: disk: the output needs 100.66 MB and 1.05 MB are free\n\
                        hint: write to another file system with -o\n";
        assert!(text.ends_with(expected), "{text}");
    }
    assert_eq!(left, []);
}

/// Errors that the merge meets while it writes leave nothing behind either.
#[test]
fn an_overflow_names_the_tensor_and_leaves_nothing() {
    let scratch = Scratch::new();
    let mut tensors = crate::support::read_tensors(&scratch.path("base.safetensors"));
    tensors.insert("z".to_owned(), Tensor::new("z", Dtype::Bf16, &[2], &[1.0, 1e6]));
    let tensors: Vec<Tensor> = tensors.into_values().collect();
    write_tensors(&scratch.path("base.safetensors"), &tensors, &[]);
    let before = scratch.names();
    let arguments = ["merge", "base.safetensors", "lora", "--dtype", "f16"];
    assert_eq!(
        scratch.cli(&arguments).refused(scratch.root()),
        "error: tensor `z`: at least 1 finite values become infinite in F16, whose largest is \
         65504\nhint: choose a dtype with a larger range: --dtype bf16 or f32\n"
    );
    assert_eq!(scratch.names(), before);
}

#[test]
fn the_same_bytes_with_any_options_of_the_machine() {
    let scratch = tempfile::tempdir().unwrap();
    let (base, adapter) = (peft("llama-sharded/base"), peft("llama-sharded/adapter"));
    let mut first = None;
    for (number, machine) in [
        &["--threads", "1"][..],
        &["--threads", "5", "--tile-bytes", "64"],
        &["--isa", "scalar"],
        &["--no-fsync"],
    ]
    .iter()
    .enumerate()
    {
        let output = number.to_string();
        let merge = ["merge", &base, &adapter, "-q", "-o", &output];
        cli(scratch.path(), &[&merge[..], machine].concat()).done();
        let files: Vec<Vec<u8>> = crate::support::names(&scratch.path().join(&output))
            .iter()
            .map(|name| std::fs::read(scratch.path().join(&output).join(name)).unwrap())
            .collect();
        assert!(*first.get_or_insert(files.clone()) == files, "{machine:?}");
    }
    let ran = cli(scratch.path(), &["merge", &base, &adapter, "--isa", "abacus", "-o", "x"]);
    assert_eq!(ran.refused(scratch.path()), "error: --isa abacus: not on this machine\n");
}
