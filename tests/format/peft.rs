//! PEFT directories: what is read, what survives the way to our format and back, what is refused.

mod forms;
mod refused;
mod written;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_format::codec::peft::{CONFIG_FILE, MODEL_FILE, write_directory};
use lora_format::container::safetensors::SafetensorsFile;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_format::model::{AdapterFormat, Component, Form, Note, Scaling, ScalingRule};
use lora_format::native;
use lora_format::{Adapter, ReadOptions};
use lora_tests::fixture;
use serde_json::Value;

use crate::{check_table, entries, name, read};

/// The cases whose adapters are read.
pub(crate) fn cases() -> Vec<PathBuf> {
    let mut cases = entries(&fixture("peft"), "");
    cases.retain(|case| name(case) != "unsupported" && name(case) != SAVED_HEAD);
    assert_eq!(cases.len(), 14);
    cases
}

/// PEFT saved a copy of the base's head with this adapter: it is no plain LoRA.
const SAVED_HEAD: &str = "gpt2-mixed-saved-head";

/// The copy comes first: it is what the other changes of the head are changes of.
#[test]
fn a_saved_copy_of_a_base_layer_is_read() {
    let adapter = read(&fixture("peft").join(SAVED_HEAD).join("adapter")).unwrap();
    let [Component { target: first, form: Form::Base(copy) }, second, ..] = &adapter.components[..]
    else {
        panic!("{:?}", adapter.components)
    };
    assert_eq!((first, &*first.name()), (&second.target, "lm_head.weight"));
    assert_eq!((&copy.shape[..], second.form.method()), (&[64, 24][..], "LoRA"));
    let scratch = tempfile::tempdir().unwrap();
    let written = scratch.path().join("adapter");
    assert_eq!(
        write_directory(&adapter, &written, Overwrite::Never, Durability::Cached)
            .unwrap_err()
            .to_string(),
        format!(
            "{}: PEFT cannot hold a change of `lm_head.weight` by base copy",
            adapter.path.display()
        )
    );
    assert!(!written.exists());
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Every tensor of a file: name → (dtype, shape, bytes).
fn contents(path: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let file = SafetensorsFile::open(path).unwrap();
    let bytes = std::fs::read(path).unwrap();
    let data = &bytes[file.header().data_start as usize..];
    let tensors = file.header().tensors.iter().map(|tensor| {
        let bytes = data[tensor.start as usize..tensor.end as usize].to_vec();
        (tensor.name.clone(), (tensor.dtype.to_string(), tensor.shape.clone(), bytes))
    });
    tensors.collect()
}

/// F12: the scales are those that PEFT computed, to the last bit.
#[test]
fn ranks_alphas_and_scales_are_those_of_peft() {
    for case in cases() {
        let adapter = read(&case.join("adapter")).unwrap();
        assert_eq!(adapter.format, AdapterFormat::Peft);
        let expected = json(&case.join("case.json"));
        let mut expected: BTreeMap<&str, [f64; 3]> = expected["targets"]
            .as_array()
            .unwrap()
            .iter()
            .map(|target| {
                let number = |key: &str| target[key].as_f64().unwrap();
                let prefix = target["adapter_prefix"].as_str().unwrap();
                let module = prefix.strip_prefix("base_model.model.").unwrap_or(prefix);
                (module, [number("rank"), number("alpha"), number("scale")])
            })
            .collect();
        for component in &adapter.components {
            let Form::LowRank(factors) = &component.form else { panic!("{component:?}") };
            let found = [factors.rank() as f64, factors.scaling.alpha, factors.scale()];
            let module = component.target.module.as_str();
            assert_eq!(expected.remove(module), Some(found), "{} {module}", name(&case));
        }
        assert!(expected.is_empty(), "{}: {expected:?}", name(&case));
    }
}

/// F15: PEFT → our format → PEFT loses no bit of a factor and no field of the configuration.
#[test]
fn round_trip_through_the_native_format() {
    let scratch = tempfile::tempdir().unwrap();
    let mut cases: Vec<_> = cases().iter().map(|case| case.join("adapter")).collect();
    cases.push(fixture("real/minilm-l6-r4"));
    for (number, original) in cases.iter().enumerate() {
        let adapter = read(original).unwrap();
        let native = scratch.path().join(format!("{number}.safetensors"));
        native::write(&adapter, &native, Overwrite::Never, Durability::Cached).unwrap();

        let again = read(&native).unwrap();
        assert_eq!(again.format, AdapterFormat::Native);
        assert_eq!(again.base, adapter.base);
        assert_eq!(again.source, adapter.source);
        assert_eq!(again.fan_in_fan_out, adapter.fan_in_fan_out);
        for (before, after) in adapter.components.iter().zip(&again.components) {
            let (Form::LowRank(x), Form::LowRank(y)) = (&before.form, &after.form) else {
                panic!()
            };
            assert_eq!((&before.target, x.scaling), (&after.target, y.scaling));
        }

        let back = scratch.path().join(number.to_string());
        write_directory(&again, &back, Overwrite::Never, Durability::Cached).unwrap();
        let names = |keys: BTreeMap<String, _>| -> BTreeMap<String, _> {
            // An adapter saved without the wrapper's prefix gets it.
            let wrapped = |key: String| {
                format!("base_model.model.{}", key.trim_start_matches("base_model.model."))
            };
            keys.into_iter().map(|(key, value)| (wrapped(key), value)).collect()
        };
        assert_eq!(
            names(contents(&back.join(MODEL_FILE))),
            names(contents(&original.join(MODEL_FILE)))
        );
        assert_eq!(json(&back.join(CONFIG_FILE)), json(&original.join(CONFIG_FILE)));
        let metadata = |folder: &Path| {
            let file = SafetensorsFile::open(&folder.join(MODEL_FILE)).unwrap();
            file.header().metadata.iter().cloned().collect::<BTreeMap<_, _>>()
        };
        let mut expected = metadata(original);
        expected.insert("format".into(), "pt".into());
        assert_eq!(metadata(&back), expected);
    }
}

/// Rewrites `adapter` as PEFT, and returns what is read from there, with its configuration.
fn through_peft(adapter: &Adapter) -> (Adapter, Value) {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("adapter");
    write_directory(adapter, &folder, Overwrite::Never, Durability::Cached).unwrap();
    (read(&folder).unwrap(), json(&folder.join(CONFIG_FILE)))
}

fn scales(adapter: &Adapter) -> Vec<(String, usize, u64)> {
    let scale = |component: &Component| {
        let Form::LowRank(factors) = &component.form else { panic!("{component:?}") };
        (component.target.module.clone(), factors.rank(), factors.scale().to_bits())
    };
    adapter.components.iter().map(scale).collect()
}

/// F15: where the configuration that came along says otherwise than the file, the file holds.
#[test]
fn a_source_that_disagrees_is_corrected() {
    let original = read(&fixture("real/minilm-l6-r4")).unwrap();
    let config = original.source.clone().unwrap().config;

    let mut scaled = original.clone();
    for (index, component) in scaled.components.iter_mut().enumerate() {
        let Form::LowRank(factors) = &mut component.form else { panic!() };
        // Divided by 4 these are exact, so PEFT can say them.
        let (alpha, rule) = [
            (32.0, ScalingRule::AlphaOverRank),
            (0.5, ScalingRule::Direct),
            (16.0, ScalingRule::AlphaOverSqrtRank),
        ][index % 3];
        factors.scaling = Scaling { alpha, rule };
    }
    let (again, found) = through_peft(&scaled);
    assert_eq!(scales(&again), scales(&scaled));
    assert_eq!(found["target_modules"], config["target_modules"]);
    assert_eq!(found["lora_dropout"], config["lora_dropout"]);
    assert_eq!(again.base, original.base);

    let mut other = original.clone();
    other.base.name = Some("elsewhere".into());
    other.base.revision = Some("abc".into());
    other.fan_in_fan_out = Some(true);
    let (again, found) = through_peft(&other);
    assert_eq!((again.base, again.fan_in_fan_out), (other.base, Some(true)));
    assert_eq!(found["lora_alpha"], config["lora_alpha"]);

    let mut foreign = original.clone();
    let fields = &mut foreign.source.as_mut().unwrap().config;
    for (field, value) in [
        ("use_dora", Value::from(true)),
        ("layer_replication", serde_json::json!([[0, 2], [1, 2]])),
        ("lora_alpha", Value::from("many")),
        ("peft_type", Value::from("VERA")),
    ] {
        fields.insert(field.into(), value);
    }
    let (again, found) = through_peft(&foreign);
    assert_eq!(scales(&again), scales(&original));
    assert_eq!((&found["use_dora"], &found["peft_type"]), (&false.into(), &"LORA".into()));
}

/// A pattern that is made of a module's name matches that module alone, whatever the name holds.
#[test]
fn odd_module_names_keep_their_scales() {
    let mut adapter = read(&fixture("real/minilm-l6-r4")).unwrap();
    adapter.source = None;
    let template = adapter.components[0].clone();
    let names =
        ["a+b", "a.b", "axb", "x.a.b", "(a|b)", "[ab]", "a{2}", r"a\b", "^a$", "a*?", "a<b>"];
    adapter.components = names
        .iter()
        .map(|name| name.to_string())
        // More modules of their own than there may be true regular expressions.
        .chain((0..400).map(|index| format!("m.{index}")))
        .enumerate()
        .map(|(index, name)| {
            let mut component = template.clone();
            component.target.module = name;
            let Form::LowRank(factors) = &mut component.form else { panic!() };
            factors.scaling.alpha = 1.0 + index as f64;
            component
        })
        .collect();
    adapter.components.sort_by(|x, y| x.target.cmp(&y.target));
    let (again, _) = through_peft(&adapter);
    assert_eq!(scales(&again), scales(&adapter));
}

/// What the user says of an adapter is refused where the adapter leaves nothing to say.
#[test]
fn options_that_mean_nothing_are_refused() {
    let path = fixture("native/plain.safetensors");
    let refused = |options: ReadOptions| {
        let message = lora_format::read(&path, &options).unwrap_err().to_string();
        message.replace(&format!("{}: ", path.display()), "")
    };
    assert_eq!(
        refused(ReadOptions { alpha: Some(8.0), ..ReadOptions::default() }),
        "no alpha can be given for it: the file records its own"
    );
    let ignored = ReadOptions { ignore_fields: vec!["x".into()], ..ReadOptions::default() };
    assert_eq!(
        refused(ignored),
        "no field to ignore can be given for it: a file of this format has no unknown fields to \
         pass over"
    );
}

/// A field that is known to change the result is not passed over on anyone's word.
#[test]
fn only_unknown_fields_are_ignored() {
    let ignoring = |path: PathBuf, field: &str| {
        let ignore_fields = vec![field.to_owned()];
        lora_format::read(&path, &ReadOptions { ignore_fields, ..ReadOptions::default() })
    };
    let adapter = ignoring(fixture("bad/adapter/config-key-unknown"), "use_mystery").unwrap();
    assert_eq!(adapter.source.unwrap().config["use_mystery"], true);
    for (case, field) in [
        ("alora", "alora_invocation_tokens"),
        ("kasa", "kasa_config"),
        ("layer-replication", "layer_replication"),
        ("pissa", "init_lora_weights"),
    ] {
        let error = ignoring(fixture("peft/unsupported").join(case), field).unwrap_err();
        assert!(error.to_string().contains(&format!("`{field}`")), "{error}");
    }
}

/// An alpha that the configuration lacks completes it; the rest of it is kept.
#[test]
fn a_given_alpha_completes_the_configuration() {
    let folder = fixture("bad/adapter/config-missing-lora-alpha");
    let options = ReadOptions { alpha: Some(3.0), ..ReadOptions::default() };
    let adapter = lora_format::read(&folder, &options).unwrap();
    let mut expected = json(&folder.join(CONFIG_FILE));
    expected["lora_alpha"] = 3.0.into();
    let (again, found) = through_peft(&adapter);
    assert_eq!(found, expected);
    assert_eq!(scales(&again), scales(&adapter));
}

/// A file that is written to while an adapter is held is noticed.
#[test]
fn a_changed_adapter_is_noticed() {
    let scratch = tempfile::tempdir().unwrap();
    let native_file = scratch.path().join("a.safetensors");
    std::fs::copy(fixture("native/plain.safetensors"), &native_file).unwrap();
    let folder = scratch.path().join("peft");
    let original = read(&native_file).unwrap();
    write_directory(&original, &folder, Overwrite::Never, Durability::Cached).unwrap();
    for (path, file) in [(&native_file, &native_file), (&folder, &folder.join(MODEL_FILE))] {
        let held = read(path).unwrap();
        held.ensure_unchanged().unwrap();
        let opened = std::fs::File::options().append(true).open(file).unwrap();
        opened.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let message = held.clone().ensure_unchanged().unwrap_err().to_string();
        assert!(message.contains("was changed while it was being read"), "{message}");
        read(path).unwrap().ensure_unchanged().unwrap();
    }
}

/// What is not implemented is refused, and named. What the other adapters there become is in
/// `forms`.
#[test]
fn unsupported_adapters_are_refused_by_name() {
    let folder = fixture("peft/unsupported");
    let paths: Vec<PathBuf> = UNSUPPORTED.iter().map(|row| folder.join(row.0)).collect();
    check_table(&folder, &paths, UNSUPPORTED, read);
    let all = entries(&folder, "").into_iter().filter(|path| path.is_dir()).count();
    assert_eq!(UNSUPPORTED.len() + forms::PEFT.len(), all);
}

/// An adapter that belongs to a changed base is read on the user's word, and it is said.
#[test]
fn residual_bases_are_taken_on_the_users_word() {
    for (case, init) in [("pissa", "pissa"), ("olora", "olora")] {
        let options = ReadOptions { residual_base: true, ..ReadOptions::default() };
        let adapter = lora_format::read(&fixture("peft/unsupported").join(case), &options).unwrap();
        assert_eq!(adapter.notes, [Note::ResidualBase { init: init.into() }]);
        let (again, found) = through_peft(&adapter);
        assert_eq!(scales(&again), scales(&adapter));
        assert_eq!(found["init_lora_weights"], true);
    }
}

const UNSUPPORTED: &[(&str, &str)] = &[
    (
        "alora",
        "alora/adapter_config.json: the adapter uses what this version does not implement: `alora_invocation_tokens`: [5,6]: an activated LoRA acts only after its invocation tokens; it has no merged weight",
    ),
    (
        "kasa",
        "kasa/adapter_config.json: the adapter uses what this version does not implement: `kasa_config`: {\"beta\":0.0001,\"gamma\":0.001}: KaSA truncates the singular values of the base before it adds: not implemented",
    ),
    (
        "layer-replication",
        "layer-replication/adapter_config.json: the adapter uses what this version does not implement: `layer_replication`: [[0,2],[1,2]]: layers that share weights receive different adapters, so no single weight can hold the result",
    ),
    (
        "non-default-name",
        "non-default-name: the directory holds no adapter_model.safetensors, but `non-default-name/style` does",
    ),
    (
        "olora",
        "olora/adapter_config.json: the adapter uses what this version does not implement: `init_lora_weights`: \"olora\": this initialisation changes the base model itself, so the factors are only valid on that changed base; convert the adapter with PEFT's `path_initial_model_for_weight_conversion`, or give the changed base and --residual-base",
    ),
    (
        "pissa",
        "pissa/adapter_config.json: the adapter uses what this version does not implement: `init_lora_weights`: \"pissa\": this initialisation changes the base model itself, so the factors are only valid on that changed base; convert the adapter with PEFT's `path_initial_model_for_weight_conversion`, or give the changed base and --residual-base",
    ),
    (
        "prompt-tuning",
        "prompt-tuning/adapter_config.json: the adapter uses what this version does not implement: peft_type PROMPT_TUNING: trained context (virtual tokens) is not a change of any weight, so nothing can be merged; serve the adapter with the model",
    ),
];
