//! llama.cpp's converter is the reference: what it made of PEFT's files is read as PEFT's files are,
//! and written again to the bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_format::codec::gguf;
use lora_format::container::gguf::GgufFile;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_format::model::{AdapterFormat, Form, Scaling, ScalingRule};
use lora_format::{Adapter, Dtype, Tensor, WriteOptions, Written};
use lora_tests::fixture;

use super::{assert_same, config, low_rank, with_base, writing};
use crate::{check_table, entries, name, read};

fn cases() -> Vec<PathBuf> {
    let mut cases = entries(&fixture("gguf"), "");
    cases.retain(|case| name(case) != "raw");
    assert_eq!(cases.len(), 14);
    cases
}

fn write(adapter: &Adapter, path: &Path, options: &WriteOptions) -> lora_format::Result<Written> {
    gguf::write(adapter, path, options, Overwrite::Never, Durability::Cached)
}

/// Every tensor of a file: name → (dtype, row-major shape, bytes).
fn tensors(file: &GgufFile) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let of = |tensor: Tensor| (tensor.dtype, tensor.shape.clone(), tensor.bytes().to_vec());
    file.tensors().iter().map(|info| (info.name.clone(), of(file.tensor(info).unwrap()))).collect()
}

#[test]
fn converted_adapters_are_read_as_the_originals() {
    for case in cases() {
        let original = read(&case.join("adapter")).unwrap();
        let options = with_base(&case.join("base/config.json"));
        let converted = lora_format::read(&case.join("adapter.gguf"), &options).unwrap();
        assert_eq!(converted.format, AdapterFormat::Gguf);
        // The converter takes the base's name from a model card, which is not here.
        assert_eq!(converted.base.name, None);
        assert_same(&original, &converted);
    }
}

#[test]
fn what_is_written_is_what_the_converter_writes() {
    let scratch = tempfile::tempdir().unwrap();
    for case in cases() {
        let original = read(&case.join("adapter")).unwrap();
        let path = scratch.path().join(name(&case));
        let options = writing(&case.join("base/config.json"));
        assert_eq!(write(&original, &path, &options).unwrap(), Written::default());
        let (ours, theirs) =
            (GgufFile::open(&path).unwrap(), GgufFile::open(&case.join("adapter.gguf")).unwrap());
        assert_eq!(tensors(&ours), tensors(&theirs), "{}", case.display());
        for (key, value) in ours.values() {
            // The converter takes the base's name from a model card, which is not here.
            if !key.starts_with("general.base_model.") {
                assert_eq!(Some(value), theirs.value(key), "{key}");
            }
        }
        let more: Vec<&str> = theirs
            .values()
            .iter()
            .map(|entry| entry.0.as_str())
            .filter(|key| ours.value(key).is_none())
            .collect();
        assert_eq!(more, ["general.name"]);
    }
}

#[test]
fn there_and_back_to_the_byte() {
    let scratch = tempfile::tempdir().unwrap();
    for case in cases() {
        let base = case.join("base/config.json");
        let first = lora_format::read(&case.join("adapter.gguf"), &with_base(&base)).unwrap();
        let paths = ["1", "2"].map(|turn| scratch.path().join(format!("{}.{turn}", name(&case))));
        write(&first, &paths[0], &writing(&base)).unwrap();
        let second = lora_format::read(&paths[0], &with_base(&base)).unwrap();
        assert_same(&first, &second);
        assert_eq!(first.metadata, second.metadata);
        write(&second, &paths[1], &writing(&base)).unwrap();
        assert_eq!(std::fs::read(&paths[0]).unwrap(), std::fs::read(&paths[1]).unwrap());
    }
}

#[test]
fn without_the_base_rows_of_heads_cannot_be_ordered() {
    for case in cases() {
        let paired = ["llama", "mistral", "mixtral", "granite", "smollm3"].contains(&&*name(&case));
        let message = match read(&case.join("adapter.gguf")) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        assert_eq!(message.contains("the base's config.json is needed"), paired, "{message}");
    }
    let llama = fixture("gguf/llama/adapter.gguf");
    let wrong = |edit: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let mut options = with_base(&fixture("gguf/llama/base/config.json"));
        edit(options.base_config.as_mut().unwrap());
        let message = lora_format::read(&llama, &options).unwrap_err().to_string();
        message.split_once(": ").unwrap().1.to_owned()
    };
    assert_eq!(
        wrong(&|it| drop(it.insert("architectures".to_owned(), ["Qwen2ForCausalLM"].into()))),
        "the adapter is for the architecture `llama`, the base's config.json is of \
         `Qwen2ForCausalLM`"
    );
    assert_eq!(
        wrong(&|it| drop(it.insert("num_attention_heads".to_owned(), 16.into()))),
        "`model.layers.1.self_attn.q_proj`: 16 rows of B do not divide into 16 heads of even size"
    );
    assert_eq!(
        wrong(&|it| drop(it.insert("num_key_value_heads".to_owned(), (-1).into()))),
        "the base's config.json: `num_key_value_heads` must be a count, found -1"
    );
    assert_eq!(
        wrong(&|it| drop(it.remove("architectures"))),
        "the base's config.json: `architectures` must be a list that begins with the model's \
         class, found nothing"
    );
}

#[test]
fn files_of_the_python_package() {
    let table = [
        ("no-alpha.gguf", crate::OK),
        ("zero-alpha.gguf", crate::OK),
        (
            "alora.gguf",
            "alora.gguf: the adapter uses what this version does not implement: adapter.alora.invocation_tokens: an activated LoRA acts only after certain tokens; it cannot be merged",
        ),
        (
            "big-endian.gguf",
            "big-endian.gguf: not a valid GGUF file: big-endian files are not read",
        ),
        (
            "model.gguf",
            "model.gguf: not a valid GGUF file: `general.type` must be `adapter`, found `model`",
        ),
        (
            "norm.gguf",
            "norm.gguf: the adapter uses what this version does not implement: blk.0.attn_norm.weight: a whole norm, which llama.cpp passes over: what was trained is not what it computes",
        ),
        (
            "q8.gguf",
            "q8.gguf: the adapter uses what this version does not implement: blk.0.attn_v.weight.lora_a: stored as Q8_0; factors are read as F32, F16 or BF16",
        ),
        (
            "stranger.gguf",
            "stranger.gguf: the adapter is malformed, in 2 places:\n  - `blk.0.attn_x.weight.lora_a` belongs to no component\n  - `blk.0.attn_x.weight.lora_b` belongs to no component",
        ),
        (
            "unknown-architecture.gguf",
            "unknown-architecture.gguf: GGUF names for the architecture `nonesuch` are not known",
        ),
        (
            "unpaired.gguf",
            "unpaired.gguf: the adapter is malformed: `blk.0.attn_v.weight.lora_a` has no partner `blk.0.attn_v.weight.lora_b`",
        ),
    ];
    let folder = fixture("gguf/raw");
    check_table(&folder, &entries(&folder, ".gguf"), &table, read);
    for name in ["no-alpha.gguf", "zero-alpha.gguf"] {
        let adapter = read(&folder.join(name)).unwrap();
        assert_eq!(low_rank(&adapter.components[0]).scale(), 1.0);
    }
    let adapter = read(&folder.join("no-alpha.gguf")).unwrap();
    let found = low_rank(&adapter.components[0]);
    assert_eq!((found.a.dtype, found.b.dtype), (Dtype::F16, Dtype::Bf16));
    let path = tempfile::tempdir().unwrap().path().join("x");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    write(&adapter, &path, &writing(&fixture("gguf/qwen2/base/config.json"))).unwrap();
    assert_same(&adapter, &read(&path).unwrap());
}

/// The llama fixture with other scales and ranks.
fn changed(edit: impl Fn(usize, &mut Scaling)) -> Adapter {
    let mut adapter = read(&fixture("gguf/qwen2/adapter")).unwrap();
    for (index, component) in adapter.components.iter_mut().enumerate() {
        if let Form::LowRank(low_rank) = &mut component.form {
            edit(index, &mut low_rank.scaling);
        }
    }
    adapter
}

#[test]
fn one_alpha_for_all() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("adapter.gguf");
    let mut options = writing(&fixture("gguf/qwen2/base/config.json"));
    // Half of one alpha: B is halved, exactly.
    let halved = changed(|index, scaling| {
        if index == 0 {
            scaling.alpha /= 2.0;
        }
    });
    let written = write(&halved, &path, &options).unwrap();
    assert_eq!(
        written.changes,
        ["the scale 1.5 of `model.layers.1.mlp.down_proj`, where the file's gives 3: B is \
          multiplied by the quotient, exactly (0.5)"]
    );
    let again = read(&path).unwrap();
    for (one, other) in halved.components.iter().zip(&again.components) {
        let product = |it| {
            let low_rank = low_rank(it);
            low_rank
                .b
                .to_f32()
                .unwrap()
                .into_iter()
                .map(|b| f64::from(b) * low_rank.scale())
                .collect::<Vec<f64>>()
        };
        assert_eq!(product(one), product(other));
    }
    // A third is none.
    let third = changed(|index, scaling| {
        if index == 0 {
            scaling.alpha /= 3.0;
        }
    });
    let path = scratch.path().join("third.gguf");
    let message = write(&third, &path, &options).unwrap_err().to_string();
    assert!(message.contains("would have to be rounded"), "{message}");
    assert!(!path.exists());
    options.allow_lossy = true;
    let written = write(&third, &path, &options).unwrap();
    assert!(written.changes[0].ends_with("and rounded"), "{:?}", written.changes);
    // An alpha that no f32 is.
    options.allow_lossy = false;
    let tenth = changed(|_, scaling| scaling.alpha = 0.1);
    let path = scratch.path().join("tenth.gguf");
    assert!(write(&tenth, &path, &options).is_err());
    // A scale of a power of two needs no alpha, nor does one of alpha over √rank that is none.
    let root = changed(|_, scaling| scaling.rule = ScalingRule::AlphaOverSqrtRank);
    assert!(write(&root, &path, &options).is_err());
    let direct = changed(|_, scaling| *scaling = Scaling { alpha: 0.5, rule: ScalingRule::Direct });
    assert_eq!(write(&direct, &path, &options).unwrap(), Written::default());
    assert_same(&direct, &read(&path).unwrap());
}

#[test]
fn what_gguf_cannot_hold() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("adapter.gguf");
    let options = writing(&fixture("gguf/llama/base/config.json"));
    let refusal = |adapter: &Adapter, options: &WriteOptions| {
        let message = write(adapter, &path, options).unwrap_err().to_string();
        assert!(!path.exists());
        message.split_once(": ").unwrap().1.to_owned()
    };
    let llama = read(&fixture("gguf/llama/adapter")).unwrap();
    assert_eq!(
        refusal(&llama, &WriteOptions::default()),
        "the base's config.json is needed: its architecture decides the names in a GGUF file"
    );
    let dora = read(&fixture("mlx/dora")).unwrap();
    assert_eq!(
        refusal(&dora, &options),
        "GGUF cannot hold a change of `model.layers.1.mlp.down_proj.weight` by DoRA"
    );
    let full = read(&fixture("mlx/full")).unwrap();
    assert!(refusal(&full, &options).ends_with("by replaced"));
    let phi3 = read(&fixture("gguf/phi3/adapter")).unwrap();
    assert_eq!(
        refusal(&phi3, &options),
        "GGUF cannot hold a change of `model.layers.1.mlp.gate_up_proj`: llama has no such tensor"
    );
    let mut unknown = options.clone();
    let fields = unknown.base_config.as_mut().unwrap();
    fields.insert("architectures".to_owned(), ["NoneSuch"].into());
    assert_eq!(
        refusal(&llama, &unknown),
        "GGUF names for the architecture `NoneSuch` are not known"
    );
}

#[test]
fn experts_without_a_change_are_zeros() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("adapter.gguf");
    let base = fixture("gguf/qwen3moe/base/config.json");
    let mut adapter = read(&fixture("gguf/qwen3moe/adapter")).unwrap();
    adapter.components.retain(|it| it.target.module.contains("experts.1.up_proj"));
    assert_eq!(adapter.components.len(), 1);
    let written = write(&adapter, &path, &writing(&base)).unwrap();
    assert_eq!(
        written.changes,
        ["`blk.1.ffn_up_exps`: zeros stand for the 2 experts without a change, exactly"]
    );
    let again = lora_format::read(&path, &with_base(&base)).unwrap();
    assert_eq!(again.components.len(), 3);
    for component in &again.components {
        let kept = component.target == adapter.components[0].target;
        assert_eq!(low_rank(component).b.bytes().iter().any(|&byte| byte != 0), kept);
    }
    let mut uncounted = writing(&base);
    let mut fields = config(&base);
    fields.retain(|key, _| !key.ends_with("_experts"));
    uncounted.base_config = Some(fields);
    let path = scratch.path().join("other.gguf");
    let message = write(&adapter, &path, &uncounted).unwrap_err().to_string();
    assert!(message.ends_with("`num_experts` must be a count, found nothing"), "{message}");
}
