//! Nothing is overwritten without `--force`, and nothing dear even with it.

use crate::Scratch;
use crate::support::listing;

#[test]
fn a_file_is_replaced_only_on_request() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base-merged.safetensors"), "mine").unwrap();
    let before = listing(scratch.root());
    let text = scratch.cli(&["merge", "base.safetensors", "lora"]).refused(scratch.root());
    assert_eq!(
        text,
        "error: base-merged.safetensors: already exists\n\
         hint: choose another -o, or replace it with --force\n"
    );
    assert_eq!(listing(scratch.root()), before);
    scratch.cli(&["merge", "base.safetensors", "lora", "--force"]).done();
    let merged = std::fs::metadata(scratch.path("base-merged.safetensors")).unwrap();
    assert!(merged.len() > 4);
}

#[cfg(unix)]
#[test]
fn a_dangling_link_is_in_the_way_too() {
    let scratch = Scratch::new();
    let link = scratch.path("base-merged.safetensors");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let text = scratch.cli(&["merge", "base.safetensors", "lora"]).refused(scratch.root());
    assert!(text.starts_with("error: base-merged.safetensors: already exists\n"), "{text}");
    assert!(link.symlink_metadata().unwrap().is_symlink());
}

#[test]
fn a_directory_is_replaced_only_on_request() {
    let scratch = Scratch::with_directory();
    scratch.cli(&["merge", "base", "lora"]).done();
    let before = listing(scratch.root());
    let text = scratch.cli(&["merge", "base", "lora", "--scale", "0"]).refused(scratch.root());
    assert!(text.contains("error: base-merged: already exists\n"), "{text}");
    assert_eq!(listing(scratch.root()), before);
    let read = |path: &str| std::fs::read(scratch.path(path)).unwrap();
    let first = read("base-merged/model.safetensors");
    scratch.cli(&["merge", "base", "lora", "--scale", "0", "--force"]).done();
    assert_eq!(listing(scratch.root()), before, "the old directory left something");
    assert_ne!(read("base-merged/model.safetensors"), first);
}

#[test]
fn an_input_is_never_replaced() {
    let scratch = Scratch::with_directory();
    std::fs::create_dir(scratch.path("inner")).unwrap();
    let before = listing(scratch.root());
    let root = scratch.root().to_str().unwrap();
    for (base, output) in [
        ("base.safetensors", "base.safetensors"),
        ("base.safetensors", "./inner/../base.safetensors"),
        ("base.safetensors", "lora/adapter_model.safetensors"),
        ("base.safetensors", "lora/adapter_config.json"),
        ("base", "base"),
        ("base", "base/"),
        ("base", "lora"),
        ("base", "inner/.."),
        ("base", root),
    ] {
        for force in [&["--force"][..], &[]] {
            let arguments = [&["merge", base, "lora", "-o", output][..], force].concat();
            let text = scratch.cli(&arguments).refused(scratch.root());
            let said = text.contains("the output would replace or change the input");
            assert!(said, "{base} → {output}: {text}");
            assert_eq!(listing(scratch.root()), before, "{base} → {output}");
        }
    }
}

#[cfg(unix)]
#[test]
fn an_input_is_recognised_behind_links() {
    let scratch = Scratch::with_directory();
    std::os::unix::fs::symlink("base", scratch.path("link")).unwrap();
    std::os::unix::fs::symlink("base.safetensors", scratch.path("link.safetensors")).unwrap();
    for (base, output) in [
        ("base", "link"),
        ("link", "base"),
        ("base.safetensors", "link.safetensors"),
        ("link.safetensors", "base.safetensors"),
    ] {
        let text =
            scratch.cli(&["merge", base, "lora", "-o", output, "--force"]).refused(scratch.root());
        assert!(text.contains("replace or change the input"), "{base} → {output}: {text}");
    }
}

#[test]
fn what_no_merge_wrote_is_not_replaced() {
    let scratch = Scratch::with_directory();
    std::fs::create_dir(scratch.path("empty")).unwrap();
    std::fs::create_dir(scratch.path("photos")).unwrap();
    std::fs::write(scratch.path("photos/cat.jpg"), "x").unwrap();
    std::fs::write(scratch.path("notes.txt"), "x").unwrap();
    for (name, file) in [("trained", "optimizer.pt"), ("cloned", ".gitattributes")] {
        scratch.model(name);
        std::fs::write(scratch.path(name).join(file), "x").unwrap();
    }
    let before = listing(scratch.root());
    for (base, output, reason) in [
        ("base", "empty", "it holds no model"),
        ("base", "photos", "it holds no model"),
        ("base", "trained", "it holds optimizer.pt, which no merge writes"),
        ("base", "cloned", "it holds .gitattributes, which no merge writes"),
        ("base", "notes.txt", "it is a file, and the output is a directory"),
        ("base.safetensors", "empty", "it is a directory, and the output is a file"),
        ("base.safetensors", "base", "it is a directory, and the output is a file"),
    ] {
        let arguments = ["merge", base, "lora", "-o", output, "--force"];
        let text = scratch.cli(&arguments).refused(scratch.root());
        let expected = format!(
            "error: {output}: not replaced: {reason}\n\
             hint: choose another -o, or remove it yourself\n"
        );
        assert!(text.ends_with(&expected), "{base} → {output}: {text}");
        assert_eq!(listing(scratch.root()), before, "{output}");
    }
}

#[test]
fn the_parent_must_exist() {
    let scratch = Scratch::new();
    let before = scratch.names();
    let text = scratch
        .cli(&["merge", "base.safetensors", "lora", "-o", "no/such/out.safetensors"])
        .refused(scratch.root());
    let expected = "error: no/such: no such directory\n\
                    hint: create it first, or choose another -o\n";
    assert_eq!(text, expected);
    assert_eq!(scratch.names(), before);
}

/// `convert` and `stamp` keep the same promise.
#[test]
fn the_other_commands_do_not_overwrite_either() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("there.safetensors"), "mine").unwrap();
    std::fs::create_dir(scratch.path("there")).unwrap();
    for arguments in [
        &["convert", "lora", "--to", "lora", "-o", "there.safetensors"][..],
        &["convert", "lora", "--to", "peft", "-o", "there"],
        &["stamp", "lora", "--base", "base.safetensors", "-o", "there.safetensors"],
    ] {
        let text = scratch.cli(arguments).refused(scratch.root());
        assert!(text.contains(": already exists\nhint: "), "{text}");
    }
    assert_eq!(std::fs::read_to_string(scratch.path("there.safetensors")).unwrap(), "mine");
    scratch.cli(&["convert", "lora", "--to", "lora", "-o", "there.safetensors", "--force"]).done();
}

#[test]
fn a_conversion_replaces_nothing_but_an_adapter() {
    let scratch = Scratch::new();
    scratch.cli(&["convert", "lora", "--to", "lora", "-o", "own.safetensors"]).done();
    scratch.cli(&["convert", "own.safetensors", "--to", "peft", "-o", "again"]).done();
    std::fs::create_dir(scratch.path("photos")).unwrap();
    std::fs::write(scratch.path("photos/cat.jpg"), "x").unwrap();
    std::fs::write(scratch.path("notes.txt"), "x").unwrap();
    scratch.cli(&["convert", "own.safetensors", "--to", "peft", "-o", "carded"]).done();
    std::fs::write(scratch.path("carded/README.md"), "x").unwrap();
    let before = listing(scratch.root());
    for (input, format, output, reason) in [
        ("own.safetensors", "peft", "photos", "it holds no adapter"),
        ("own.safetensors", "peft", "carded", "it holds README.md, which is no part of an adapter"),
        ("own.safetensors", "peft", "notes.txt", "it is a file, and the output is a directory"),
        ("lora", "lora", "photos", "it is a directory, and the output is a file"),
    ] {
        let arguments = ["convert", input, "--to", format, "-o", output, "--force"];
        let text = scratch.cli(&arguments).refused(scratch.root());
        let expected = format!(
            "error: {output}: not replaced: {reason}\n\
             hint: choose another -o, or remove it yourself\n"
        );
        assert_eq!(text, expected);
        assert_eq!(listing(scratch.root()), before, "{output}");
    }
    scratch.cli(&["convert", "own.safetensors", "--to", "peft", "-o", "again", "--force"]).done();
    assert_eq!(listing(scratch.root()), before);
}

#[test]
fn conversions_and_stamps_do_not_replace_their_inputs() {
    let scratch = Scratch::with_directory();
    scratch.cli(&["convert", "lora", "--to", "lora", "-o", "own.safetensors"]).done();
    let before = listing(scratch.root());
    for arguments in [
        &["convert", "lora", "--to", "peft", "-o", "lora"][..],
        &["convert", "lora/adapter_model.safetensors", "--to", "peft", "-o", "lora"],
        &["convert", "lora", "--to", "lora", "-o", "lora/adapter_model.safetensors"],
        &["convert", "own.safetensors", "--to", "lora", "-o", "own.safetensors"],
        &["stamp", "lora", "--base", "base", "-o", "lora/adapter_model.safetensors"],
        &["stamp", "lora", "--base", "base", "-o", "base/model.safetensors"],
        &["stamp", "lora", "--base", "base.safetensors", "-o", "base.safetensors"],
    ] {
        let text = scratch.cli(&[arguments, &["--force"]].concat()).refused(scratch.root());
        let said = text.contains(": the output would replace or change the input ");
        assert!(said, "{arguments:?}: {text}");
        assert_eq!(listing(scratch.root()), before, "{arguments:?}");
    }
    let stamp = ["stamp", "own.safetensors", "--base", "base", "-o", "own.safetensors", "--force"];
    scratch.cli(&stamp).done();
    let ran = scratch.cli(&["inspect", "own.safetensors", "--json"]);
    assert!(ran.stdout.contains("\"base_fingerprint\": true"), "{}", ran.stdout);
}
