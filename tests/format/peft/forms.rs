//! What each adapter is read as: a line per component, with target, form and shapes.

use std::fmt::Write as _;
use std::path::Path;

use lora_format::codec::loralib::{self, Expansions};
use lora_format::model::{Cores, Experts, Form, KroneckerSide, LowRank};
use lora_format::{Adapter, ReadOptions, Tensor};
use lora_tests::fixture;

use crate::{entries, name};

fn shape(tensor: &Tensor) -> String {
    format!("{:?}", tensor.shape)
}

fn low_rank(form: &LowRank) -> String {
    let mut text =
        format!("{:?} {}·{} by {}", form.layer, shape(&form.b), shape(&form.a), form.scale());
    if let Some(gain) = &form.rank_gain {
        write!(text, " E {}", shape(gain)).unwrap();
    }
    if let Some(magnitude) = &form.magnitude {
        write!(text, " m {}", shape(magnitude)).unwrap();
    }
    text
}

fn experts(form: &Experts) -> String {
    let mut text = format!("Experts {}·{} at depth {}", shape(&form.b), shape(&form.a), form.depth);
    for candidate in &form.candidates {
        let scale = candidate.scaling.scale(candidate.rank);
        write!(text, ", {} rank {} by {scale}", candidate.parameter, candidate.rank).unwrap();
    }
    text
}

fn cores(cores: &Cores) -> String {
    let core = cores.core.as_ref().map_or(String::new(), |core| format!("·{}", shape(core)));
    format!("{}·{}{core}", shape(&cores.b), shape(&cores.a))
}

fn side(side: &KroneckerSide) -> String {
    match side {
        KroneckerSide::Full(tensor) => shape(tensor),
        KroneckerSide::Product(product) => format!("({})", cores(product)),
    }
}

fn form(form: &Form) -> String {
    match form {
        Form::LowRank(form) => low_rank(form),
        Form::Experts(form) => experts(form),
        Form::Shared(form) => format!(
            "Shared {}·{}, λb {} λd {}",
            shape(&form.b),
            shape(&form.a),
            shape(&form.out_gain),
            shape(&form.in_gain)
        ),
        Form::Hadamard(form) => {
            let scale = form.scaling.scale(form.rank);
            format!("Hadamard {} ⊙ {} by {scale}", cores(&form.first), cores(&form.second))
        }
        Form::Kronecker(form) => {
            let scale = form.scaling.scale(form.rank);
            format!("Kronecker {} ⊗ {} by {scale}", side(&form.left), side(&form.right))
        }
        Form::Gain(form) => format!("Gain {:?} {}", form.axis, shape(&form.gain)),
        Form::Rotation(form) => format!(
            "Rotation {:?} {} of blocks {}, terms {:?}, radius {:?}",
            form.layer,
            shape(&form.generators),
            form.block,
            form.neumann_terms,
            form.radius
        ),
        Form::Tiled(form) => format!("Tiled {:?} {}", form.rule, shape(&form.block)),
        Form::Reflections(form) => {
            format!("Reflections {}, orthogonal {}", shape(&form.vectors), form.orthogonal)
        }
        Form::Butterfly(form) => {
            format!("Butterfly {} s {}", shape(&form.generators), shape(&form.gain))
        }
        Form::Proportional(form) => format!("Proportional {}", low_rank(form)),
        Form::Sparse(form) => {
            format!(
                "Sparse {} at {:?} {}",
                shape(&form.values),
                form.indices.dtype,
                shape(&form.indices)
            )
        }
        Form::Circulant(kernels) => format!("Circulant {}", shape(kernels)),
        Form::Bounded(form) => format!(
            "Bounded {}·{} λ {} n {}",
            shape(&form.b),
            shape(&form.a),
            shape(&form.bound),
            shape(&form.norms)
        ),
        Form::Grid(form) => {
            let scale = form.scaling.scale(form.rank);
            format!("Grid {} {} by {scale}", shape(&form.a), shape(&form.b))
        }
        Form::Added { tensor, scale } => format!("Added {} by {scale}", shape(tensor)),
        Form::Replaced(tensor) => format!("Replaced {}", shape(tensor)),
        Form::Rows { indices, rows } => format!("Rows {indices:?} {}", shape(rows)),
        Form::Base(tensor) => format!("Base {}", shape(tensor)),
        other => format!("{other:?}"),
    }
}

/// A line per component.
pub(super) fn describe(adapter: &Adapter) -> Vec<String> {
    let line = |component: &lora_format::model::Component| {
        format!("{}: {}", component.target.name(), form(&component.form))
    };
    adapter.components.iter().map(line).collect()
}

/// The options that a case's adapter needs.
pub(super) fn options(case: &serde_json::Value) -> ReadOptions {
    let given = &case["options"];
    ReadOptions {
        alpha: given["alpha"].as_f64(),
        enable_lora: given["enable_lora"]
            .as_array()
            .map(|flags| flags.iter().map(|flag| flag.as_bool().unwrap()).collect()),
        ..ReadOptions::default()
    }
}

pub(super) fn case(folder: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(folder.join("case.json")).unwrap()).unwrap()
}

/// Compares what is read at each path with the rows of a table; prints all rows where they differ.
fn check(rows: &[(&str, &[&str])], read: impl Fn(&str) -> lora_format::Result<Adapter>) {
    let mut found = String::new();
    let mut wrong = Vec::new();
    for &(key, expected) in rows {
        let lines = match read(key) {
            Ok(adapter) => describe(&adapter),
            Err(error) => vec![error.to_string()],
        };
        writeln!(found, "    ({key:?}, &{lines:#?}),").unwrap();
        if lines != expected {
            wrong.push(key);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}\n\nall that was found:\n{found}");
}

/// PEFT's adapters of one feature each.
#[test]
fn peft_adapters_become_these_components() {
    let folder = fixture("peft/unsupported");
    check(PEFT, |key| crate::read(&folder.join(key)));
}

/// The variants of each method, and loralib.
#[test]
fn features_become_these_components() {
    let folder = fixture("features");
    check(FEATURES, |key| {
        let case = case(&folder.join(key));
        let adapter = case["adapters"][0]["path"].as_str().unwrap();
        lora_format::read(&folder.join(key).join(adapter), &options(&case))
    });
}

/// Every adapter of every case is read, unless the case is refused or its method not implemented.
#[test]
fn no_case_is_refused_for_another_reason_than_it_should() {
    for folder in entries(&fixture("features"), "") {
        if name(&folder) == "bases" {
            continue;
        }
        let case = case(&folder);
        for adapter in case["adapters"].as_array().unwrap() {
            let path = folder.join(adapter["path"].as_str().unwrap());
            let Err(error) = lora_format::read(&path, &options(&case)) else { continue };
            let message = error.to_string();
            let refused = !case["refused"].is_null();
            let other_method = message.contains("peft_type") && message.contains("not implemented");
            let kasa = name(&folder) == "kasa";
            assert!(refused || other_method || kasa, "{message}");
        }
    }
}

/// The rearranged factors of loralib and BD-LoRA multiply to the difference that training made.
#[test]
fn rearranged_factors_mean_the_same() {
    for key in ["bd-lora", "loralib-merged-linear", "loralib-merged-linear-all", "loralib-conv2d"] {
        let folder = fixture("features").join(key);
        let case = case(&folder);
        let path = folder.join(case["adapters"][0]["path"].as_str().unwrap());
        let adapter = lora_format::read(&path, &options(&case)).unwrap();
        let base = folder.join(case["base"].as_str().unwrap());
        let base = tensors(&base.join("model.safetensors"));
        let merged = tensors(&folder.join("expected.safetensors"));
        for component in &adapter.components {
            let Form::LowRank(form) = &component.form else { panic!("{component:?}") };
            let name = component.target.name();
            let (shape, before) = &base[&name];
            let converted = (shape.len() == 4)
                .then(|| loralib::convolution(form, shape, &mut Expansions::of(&adapter)).unwrap());
            let form = converted.as_ref().unwrap_or(form);
            let delta = product(form);
            assert_eq!(delta.len(), before.len(), "{key} {name}");
            let after = &merged[&name].1;
            for ((delta, before), after) in delta.iter().zip(before).zip(after) {
                assert!((before + delta - after).abs() < 1e-6, "{key} {name}");
            }
        }
    }
}

/// s·B·A, row by row.
fn product(form: &LowRank) -> Vec<f32> {
    let (a, b) = (form.a.to_f32().unwrap(), form.b.to_f32().unwrap());
    let (rank, columns) = (form.rank(), form.in_features());
    let element = |row: usize, column: usize| -> f64 {
        let terms =
            (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * columns + column]));
        terms.sum::<f64>() * form.scale()
    };
    let rows = 0..form.out_features();
    rows.flat_map(|row| (0..columns).map(move |column| element(row, column) as f32)).collect()
}

type Contents = std::collections::BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The F32 tensors of a file.
fn tensors(path: &Path) -> Contents {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |data: &[u8]| {
        data.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
    };
    let tensors = file.tensors().into_iter();
    tensors.map(|(name, view)| (name, (view.shape().to_vec(), floats(view.data())))).collect()
}

pub(super) const PEFT: &[(&str, &[&str])] = &[
    (
        "adalora",
        &[
            "model.layers.0.self_attn.q_proj.weight: Linear [16, 3]·[3, 16] by 2.666657777807407 E [3]",
        ],
    ),
    ("bdlora", &["model.layers.0.self_attn.q_proj.weight: Linear [16, 2]·[2, 16] by 2"]),
    (
        "bias-all",
        &[
            "model.layers.0.self_attn.k_proj.bias: Replaced [8]",
            "model.layers.0.self_attn.o_proj.bias: Replaced [16]",
            "model.layers.0.self_attn.q_proj.bias: Replaced [16]",
            "model.layers.0.self_attn.q_proj.weight: Linear [16, 2]·[2, 16] by 2",
            "model.layers.0.self_attn.v_proj.bias: Replaced [8]",
        ],
    ),
    (
        "bias-lora-only",
        &[
            "model.layers.0.self_attn.q_proj.bias: Replaced [16]",
            "model.layers.0.self_attn.q_proj.weight: Linear [16, 2]·[2, 16] by 2",
        ],
    ),
    (
        "conv2d",
        &[
            "conv.weight: Convolution [6, 2, 1, 1]·[2, 3, 3, 3] by 2",
            "head.weight: Linear [4, 2]·[2, 6] by 2",
        ],
    ),
    ("dora", &["model.layers.0.self_attn.q_proj.weight: Linear [16, 2]·[2, 16] by 2 m [16]"]),
    (
        "embedding",
        &[
            "model.embed_tokens.weight: Base [20, 16]",
            "model.embed_tokens.weight: Embedding [16, 2]·[2, 20] by 2",
            "model.layers.0.self_attn.q_proj.weight: Linear [16, 2]·[2, 16] by 2",
        ],
    ),
    (
        "ia3",
        &[
            "model.layers.0.mlp.down_proj.weight: Gain In [1, 24]",
            "model.layers.0.self_attn.k_proj.bias: Gain Out [8, 1]",
            "model.layers.0.self_attn.k_proj.weight: Gain Out [8, 1]",
        ],
    ),
    (
        "loha",
        &[
            "model.layers.0.self_attn.q_proj.weight: Hadamard [16, 2]·[2, 16] ⊙ [16, 2]·[2, 16] by 2",
        ],
    ),
    ("lokr", &["model.layers.0.self_attn.q_proj.weight: Kronecker [4, 4] ⊗ [4, 4] by 2"]),
    (
        "lora-bias",
        &[
            "model.layers.0.self_attn.q_proj.bias: Added [16] by 2",
            "model.layers.0.self_attn.q_proj.weight: Linear [16, 2]·[2, 16] by 2",
        ],
    ),
    (
        "modules-to-save",
        &[
            "lm_head.weight: Replaced [20, 16]",
            "model.layers.0.self_attn.q_proj.weight: Linear [16, 2]·[2, 16] by 2",
        ],
    ),
    (
        "multihead-attention",
        &[
            "mha.in_proj_weight: Linear [24, 2]·[2, 8] by 2",
            "mha.out_proj.weight: Linear [8, 2]·[2, 8] by 4",
        ],
    ),
    (
        "target-parameters",
        &[
            "model.layers.0.mlp.experts.down_proj|gate_up_proj: Experts [48, 6]·[6, 16] at depth 0, down_proj rank 2 by 2, gate_up_proj rank 2 by 2",
            "model.layers.0.mlp.experts.down_proj|gate_up_proj: Experts [16, 6]·[6, 24] at depth 1, down_proj rank 2 by 2, gate_up_proj rank 2 by 2",
            "model.layers.0.self_attn.q_proj.weight: Linear [16, 2]·[2, 16] by 2",
        ],
    ),
    (
        "trainable-token-indices",
        &[
            "model.embed_tokens.weight: Rows [1, 3] [2, 16]",
            "model.layers.0.self_attn.q_proj.weight: Linear [16, 2]·[2, 16] by 2",
        ],
    ),
    ("vera", &["model.layers.0.self_attn.q_proj.weight: Shared [16, 4]·[4, 16], λb [16] λd [4]"]),
];

const FEATURES: &[(&str, &[&str])] = &[
    (
        "adalora-allocated",
        &[
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.499996250009375 E [3]",
            "model.layers.0.self_attn.k_proj.weight: Linear [6, 2]·[2, 12] by 1.499996250009375 E [2]",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 1]·[1, 12] by 1.499996250009375 E [1]",
        ],
    ),
    ("adalora-conv2d", &["conv2.weight: Linear [6, 3]·[3, 36] by 1.9999933333555555 E [3]"]),
    (
        "adalora-rank-zero",
        &[
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.499996250009375 E [3]",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 1]·[1, 12] by 1.499996250009375 E [1]",
        ],
    ),
    (
        "bd-lora",
        &[
            "model.layers.0.mlp.down_proj.weight: Linear [12, 4]·[4, 18] by 1.5",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 4]·[4, 12] by 1.5",
        ],
    ),
    (
        "bias-all-modules-to-save",
        &[
            "conv1.bias: Replaced [6]",
            "conv2.bias: Replaced [6]",
            "conv3.bias: Replaced [4]",
            "conv_grouped.bias: Replaced [6]",
            "head.bias: Replaced [4]",
            "head.weight: Replaced [4, 10]",
            "linear.bias: Replaced [10]",
            "linear.weight: Linear [10, 3]·[3, 12] by 1.6666666666666667",
            "norm.bias: Replaced [10]",
            "pointwise.bias: Replaced [4]",
        ],
    ),
    (
        "bias-lora-only-lora-bias",
        &[
            "model.layers.0.mlp.down_proj.bias: Replaced [12]",
            "model.layers.0.mlp.down_proj.bias: Added [12] by 1.6666666666666667",
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.bias: Replaced [12]",
            "model.layers.0.self_attn.q_proj.bias: Added [12] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "bone",
        &[
            "model.layers.0.mlp.down_proj.weight: Tiled Add [6, 12]",
            "model.layers.0.self_attn.k_proj.weight: Tiled Add [6, 6]",
        ],
    ),
    (
        "bone-bat",
        &[
            "model.layers.0.mlp.down_proj.weight: Tiled Bat [2, 6, 6]",
            "model.layers.0.self_attn.k_proj.weight: Tiled Bat [1, 6, 6]",
        ],
    ),
    (
        "coft",
        &[
            "model.layers.0.mlp.down_proj.weight: Rotation Linear [3, 15] of blocks 6, terms Some(5), radius Some(0.2)",
            "model.layers.0.self_attn.k_proj.weight: Rotation Linear [2, 15] of blocks 6, terms Some(5), radius Some(0.2)",
        ],
    ),
    (
        "conv1d",
        &[
            "conv1.weight: Convolution [6, 3, 1]·[3, 4, 3] by 1.6666666666666667",
            "conv1_plain.weight: Convolution [4, 3, 1]·[3, 6, 2] by 1.6666666666666667",
        ],
    ),
    (
        "conv3d",
        &[
            "conv3.weight: Convolution [4, 3, 1, 1, 1]·[3, 2, 3, 3, 3] by 1.6666666666666667",
            "conv3_plain.weight: Convolution [3, 3, 1, 1, 1]·[3, 4, 2, 2, 2] by 1.6666666666666667",
        ],
    ),
    (
        "dora-conv2d",
        &[
            "conv2.weight: Convolution [6, 3, 1, 1]·[3, 4, 3, 3] by 1.6666666666666667 m [6]",
            "conv2_plain.weight: Convolution [8, 3, 1, 1]·[3, 6, 3, 3] by 1.6666666666666667 m [8]",
            "pointwise.weight: Convolution [4, 3, 1, 1]·[3, 6, 1, 1] by 1.6666666666666667 m [4]",
        ],
    ),
    (
        "dora-conv1d-gpt2",
        &[
            "transformer.h.0.attn.c_attn.weight: Linear [36, 3]·[3, 12] by 1.6666666666666667 m [36]",
            "transformer.h.0.attn.c_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667 m [12]",
        ],
    ),
    ("dora-embedding", &["embedding.weight: Embedding [6, 3]·[3, 15] by 1.6666666666666667 m [6]"]),
    (
        "embedding-saved-base",
        &[
            "lm_head.weight: Base [16, 12]",
            "lm_head.weight: Linear [16, 3]·[3, 12] by 1.6666666666666667",
            "model.embed_tokens.weight: Base [16, 12]",
            "model.embed_tokens.weight: Embedding [12, 3]·[3, 16] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "ia3-conv",
        &[
            "conv2.bias: Gain Out [1, 6, 1, 1]",
            "conv2.weight: Gain Out [1, 6, 1, 1]",
            "conv2_plain.weight: Gain In [1, 6, 1, 1]",
            "conv3.bias: Gain Out [1, 4, 1, 1, 1]",
            "conv3.weight: Gain Out [1, 4, 1, 1, 1]",
        ],
    ),
    (
        "ia3-conv1d-gpt2",
        &[
            "transformer.h.0.attn.c_attn.bias: Gain Out [36, 1]",
            "transformer.h.0.attn.c_attn.weight: Gain Out [36, 1]",
            "transformer.h.0.mlp.c_proj.weight: Gain In [1, 20]",
        ],
    ),
    (
        "ln-tuning-bias",
        &[
            "transformer.h.0.ln_1.bias: Replaced [12]",
            "transformer.h.0.ln_1.weight: Replaced [12]",
            "transformer.ln_f.bias: Replaced [12]",
            "transformer.ln_f.weight: Replaced [12]",
        ],
    ),
    (
        "loha",
        &[
            "model.layers.0.mlp.down_proj.weight: Hadamard [12, 2]·[2, 18] ⊙ [12, 2]·[2, 18] by 2.5",
            "model.layers.0.self_attn.q_proj.weight: Hadamard [12, 3]·[3, 12] ⊙ [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "loha-conv",
        &[
            "conv1.weight: Hadamard [6, 3]·[3, 12] ⊙ [6, 3]·[3, 12] by 1.6666666666666667",
            "conv2.weight: Hadamard [6, 3]·[3, 36] ⊙ [6, 3]·[3, 36] by 1.6666666666666667",
            "pointwise.weight: Hadamard [4, 3]·[3, 6] ⊙ [4, 3]·[3, 6] by 1.6666666666666667",
        ],
    ),
    (
        "loha-conv-effective",
        &[
            "conv1.weight: Hadamard [3, 6]·[3, 4]·[3, 3, 3, 1] ⊙ [3, 6]·[3, 4]·[3, 3, 3, 1] by 1.6666666666666667",
            "conv2.weight: Hadamard [3, 6]·[3, 4]·[3, 3, 3, 3] ⊙ [3, 6]·[3, 4]·[3, 3, 3, 3] by 1.6666666666666667",
            "pointwise.weight: Hadamard [4, 3]·[3, 6] ⊙ [4, 3]·[3, 6] by 1.6666666666666667",
        ],
    ),
    (
        "lokr",
        &[
            "model.layers.0.mlp.down_proj.weight: Kronecker [3, 3] ⊗ ([4, 1]·[1, 6]) by 5",
            "model.layers.0.self_attn.q_proj.weight: Kronecker [3, 3] ⊗ ([4, 1]·[1, 4]) by 5",
        ],
    ),
    (
        "lokr-conv-effective",
        &["conv_wide.weight: Kronecker [2, 2] ⊗ ([2, 6]·[2, 4]·[2, 2, 3, 3]) by 2.5"],
    ),
    ("lokr-conv1d-full", &["conv1.weight: Kronecker [2, 2] ⊗ [3, 2, 3] by 1.25"]),
    (
        "lokr-decompose-both",
        &[
            "model.layers.0.mlp.down_proj.weight: Kronecker ([3, 1]·[1, 3]) ⊗ ([4, 1]·[1, 6]) by 5",
            "model.layers.0.self_attn.q_proj.weight: Kronecker ([3, 1]·[1, 3]) ⊗ ([4, 1]·[1, 4]) by 5",
        ],
    ),
    (
        "lokr-patterns",
        &[
            "model.layers.0.mlp.down_proj.weight: Kronecker [3, 3] ⊗ [4, 6] by 0.7142857142857143",
            "model.layers.0.self_attn.q_proj.weight: Kronecker [3, 3] ⊗ ([4, 1]·[1, 4]) by 3",
        ],
    ),
    (
        "lora-bias-conv",
        &[
            "conv1.bias: Added [6] by 1.6666666666666667",
            "conv1.weight: Convolution [6, 3, 1]·[3, 4, 3] by 1.6666666666666667",
            "conv2.bias: Added [6] by 1.6666666666666667",
            "conv2.weight: Convolution [6, 3, 1, 1]·[3, 4, 3, 3] by 1.6666666666666667",
            "conv3.bias: Added [4] by 1.6666666666666667",
            "conv3.weight: Convolution [4, 3, 1, 1, 1]·[3, 2, 3, 3, 3] by 1.6666666666666667",
        ],
    ),
    ("loralib-conv2d", &["conv.weight: Linear [18, 6]·[6, 12] by 1"]),
    ("loralib-embedding", &["emb.weight: Linear [6, 2]·[2, 10] by 3"]),
    (
        "loralib-linear-bias",
        &["dense.bias: Replaced [8]", "dense.weight: Linear [8, 2]·[2, 6] by 3"],
    ),
    ("loralib-merged-linear", &["qkv.weight: Linear [18, 4]·[4, 6] by 3"]),
    ("loralib-merged-linear-all", &["all.weight: Linear [18, 6]·[6, 6] by 3"]),
    (
        "mica",
        &[
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "miss",
        &[
            "model.layers.0.mlp.down_proj.weight: Tiled Add [6, 12]",
            "model.layers.0.self_attn.q_proj.weight: Tiled Add [6, 12]",
        ],
    ),
    (
        "miss-bat",
        &[
            "model.layers.0.mlp.down_proj.weight: Tiled Bat [2, 6, 6]",
            "model.layers.0.self_attn.q_proj.weight: Tiled Bat [2, 6, 6]",
        ],
    ),
    (
        "miss-mini",
        &[
            "model.layers.0.mlp.down_proj.weight: Tiled Add [6, 4]",
            "model.layers.0.self_attn.q_proj.weight: Tiled Add [6, 4]",
        ],
    ),
    (
        "modules-to-save-classifier",
        &[
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
            "score.weight: Replaced [2, 12]",
        ],
    ),
    (
        "modules-to-save-embedding",
        &[
            "model.embed_tokens.weight: Replaced [16, 12]",
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.6666666666666667",
            "model.layers.0.post_attention_layernorm.weight: Replaced [12]",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "moe-down-only",
        &[
            "model.layers.0.mlp.experts.down_proj: Experts [8, 6]·[6, 10] at depth 0, down_proj rank 2 by 2.5",
            "model.layers.0.self_attn.q_proj.weight: Linear [8, 2]·[2, 8] by 2.5",
        ],
    ),
    (
        "moe-mixtral-v4-targets",
        &[
            "model.layers.0.mlp.experts.down_proj: Experts [8, 6]·[6, 10] at depth 1, down_proj rank 2 by 2.5",
            "model.layers.0.mlp.experts.down_proj|gate_up_proj: Experts [20, 12]·[12, 8] at depth 0, down_proj rank 2 by 2.5, gate_up_proj rank 4 by 2.5",
            "model.layers.0.mlp.gate.weight: Linear [3, 2]·[2, 8] by 2.5",
            "model.layers.0.self_attn.q_proj.weight: Linear [8, 2]·[2, 8] by 2.5",
        ],
    ),
    (
        "moe-qwen3-moe",
        &[
            "model.layers.0.mlp.experts.down_proj|gate_up_proj: Experts [20, 6]·[6, 8] at depth 0, down_proj rank 2 by 2.5, gate_up_proj rank 2 by 2.5",
            "model.layers.0.mlp.experts.down_proj|gate_up_proj: Experts [8, 6]·[6, 10] at depth 1, down_proj rank 2 by 2.5, gate_up_proj rank 2 by 2.5",
            "model.layers.0.self_attn.q_proj.weight: Linear [8, 2]·[2, 8] by 2.5",
        ],
    ),
    (
        "moe-rslora",
        &[
            "model.layers.0.mlp.experts.down_proj: Experts [8, 9]·[9, 10] at depth 1, down_proj rank 3 by 2.886751345948129",
            "model.layers.0.mlp.experts.down_proj|gate_up_proj: Experts [20, 6]·[6, 8] at depth 0, down_proj rank 3 by 2.886751345948129, gate_up_proj rank 2 by 3.5355339059327373",
            "model.layers.0.self_attn.q_proj.weight: Linear [8, 2]·[2, 8] by 3.5355339059327373",
        ],
    ),
    (
        "monteclora",
        &["model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667"],
    ),
    (
        "multihead-attention-lora-bias",
        &[
            "mha.in_proj_weight: Linear [24, 3]·[3, 8] by 1.6666666666666667",
            "mha.out_proj.bias: Added [8] by 1.6666666666666667",
            "mha.out_proj.weight: Linear [8, 3]·[3, 8] by 3.3333333333333335",
        ],
    ),
    (
        "oft-block-share",
        &[
            "model.layers.0.mlp.down_proj.weight: Rotation Linear [1, 15] of blocks 6, terms Some(5), radius None",
            "model.layers.0.self_attn.k_proj.weight: Rotation Linear [1, 15] of blocks 6, terms Some(5), radius None",
        ],
    ),
    (
        "oft-conv2d",
        &[
            "conv2.weight: Rotation Linear [6, 15] of blocks 6, terms Some(5), radius None",
            "linear.weight: Rotation Linear [2, 15] of blocks 6, terms Some(5), radius None",
        ],
    ),
    (
        "oft-embedding",
        &["embedding.weight: Rotation Embedding [2, 3] of blocks 3, terms Some(5), radius None"],
    ),
    (
        "oft-r",
        &[
            "model.layers.0.mlp.down_proj.weight: Rotation Linear [3, 15] of blocks 6, terms None, radius None",
            "model.layers.0.self_attn.k_proj.weight: Rotation Linear [4, 3] of blocks 3, terms None, radius None",
        ],
    ),
    (
        "oft-terms",
        &[
            "model.layers.0.mlp.down_proj.weight: Rotation Linear [6, 3] of blocks 3, terms Some(3), radius None",
            "model.layers.0.self_attn.k_proj.weight: Rotation Linear [3, 6] of blocks 4, terms Some(3), radius None",
        ],
    ),
    (
        "olora-converted",
        &[
            "model.layers.0.mlp.down_proj.weight: Linear [12, 6]·[6, 18] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 6]·[6, 12] by 1.6666666666666667",
        ],
    ),
    (
        "orthogonal",
        &[
            "model.layers.0.mlp.down_proj.weight: Linear [12, 4]·[4, 18] by 1.25",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 4]·[4, 12] by 1.25",
        ],
    ),
    (
        "target-parameter-2d",
        &[
            "head.weight: Linear [3, 3]·[3, 6] by 1.6666666666666667",
            "inner.weight: Linear [6, 3]·[3, 10] by 1.6666666666666667",
        ],
    ),
    (
        "tokens-named",
        &[
            "lm_head.weight: Rows [3] [1, 12]",
            "model.embed_tokens.weight: Rows [1, 4] [2, 12]",
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    ("tokens-only", &["model.embed_tokens.weight: Rows [0, 5] [2, 12]"]),
    (
        "tokens-tied",
        &[
            "model.embed_tokens.weight: Rows [2, 7] [2, 12]",
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "velora",
        &[
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "vera",
        &[
            "model.layers.0.mlp.down_proj.weight: Shared [12, 4]·[4, 18], λb [12] λd [4]",
            "model.layers.0.self_attn.k_proj.weight: Shared [12, 4]·[4, 18], λb [6] λd [4]",
            "model.layers.0.self_attn.q_proj.weight: Shared [12, 4]·[4, 18], λb [12] λd [4]",
        ],
    ),
    (
        "vera-conv1d-gpt2",
        &[
            "transformer.h.0.attn.c_attn.weight: Shared [36, 4]·[4, 20], λb [36] λd [4]",
            "transformer.h.0.mlp.c_proj.weight: Shared [36, 4]·[4, 20], λb [12] λd [4]",
        ],
    ),
    (
        "vocabulary",
        &[
            "lm_head.weight: Replaced [20, 12]",
            "model.embed_tokens.weight: Replaced [20, 12]",
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "vocabulary-lora",
        &[
            "lm_head.weight: Base [20, 12]",
            "lm_head.weight: Linear [20, 3]·[3, 12] by 1.6666666666666667",
            "model.embed_tokens.weight: Base [20, 12]",
            "model.embed_tokens.weight: Embedding [12, 3]·[3, 20] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "vocabulary-modules-to-save",
        &[
            "lm_head.weight: Replaced [20, 12]",
            "model.embed_tokens.weight: Replaced [20, 12]",
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "vocabulary-tokens",
        &[
            "lm_head.weight: Replaced [20, 12]",
            "model.embed_tokens.weight: Base [20, 12]",
            "model.embed_tokens.weight: Rows [16, 17, 18, 19] [4, 12]",
            "model.layers.0.mlp.down_proj.weight: Linear [12, 3]·[3, 18] by 1.6666666666666667",
            "model.layers.0.self_attn.q_proj.weight: Linear [12, 3]·[3, 12] by 1.6666666666666667",
        ],
    ),
    (
        "boft",
        &[
            "model.layers.0.mlp.down_proj.weight: Butterfly [1, 3, 6, 6] s [12, 1]",
            "model.layers.0.self_attn.k_proj.weight: Butterfly [1, 2, 6, 6] s [6, 1]",
        ],
    ),
    (
        "boft-butterfly",
        &[
            "model.layers.0.self_attn.k_proj.weight: Butterfly [2, 2, 6, 6] s [6, 1]",
            "model.layers.0.self_attn.q_proj.weight: Butterfly [2, 2, 6, 6] s [12, 1]",
        ],
    ),
    ("boft-conv2d", &["conv2.weight: Butterfly [1, 6, 6, 6] s [1, 6]"]),
    (
        "c3a",
        &[
            "model.layers.0.mlp.down_proj.weight: Circulant [2, 3, 6]",
            "model.layers.0.self_attn.k_proj.weight: Circulant [1, 2, 6]",
        ],
    ),
    (
        "delora",
        &[
            "model.layers.0.mlp.down_proj.weight: Bounded [12, 3]·[3, 18] λ [1] n [18]",
            "model.layers.0.self_attn.k_proj.weight: Bounded [6, 3]·[3, 12] λ [1] n [12]",
        ],
    ),
    (
        "gralora",
        &[
            "model.layers.0.mlp.down_proj.weight: Grid [2, 9, 4] [2, 4, 6] by 1.5",
            "model.layers.0.self_attn.k_proj.weight: Grid [2, 6, 4] [2, 4, 3] by 1.5",
        ],
    ),
    (
        "gralora-hybrid",
        &[
            "model.layers.0.mlp.down_proj.weight: Grid [2, 9, 4] [2, 4, 6] by 1",
            "model.layers.0.mlp.down_proj.weight: Linear [12, 2]·[2, 18] by 1",
            "model.layers.0.self_attn.k_proj.weight: Grid [2, 6, 4] [2, 4, 3] by 1",
            "model.layers.0.self_attn.k_proj.weight: Linear [6, 2]·[2, 12] by 1",
        ],
    ),
    (
        "hira",
        &[
            "conv2.weight: Proportional Convolution [6, 3, 1, 1]·[3, 4, 3, 3] by 1",
            "linear.weight: Proportional Linear [10, 3]·[3, 12] by 1",
            "plain.weight: Proportional Linear [12, 3]·[3, 10] by 1",
        ],
    ),
    ("hira-embedding", &["embedding.weight: Proportional Embedding [6, 3]·[3, 15] by 1"]),
    (
        "hra",
        &[
            "conv2.weight: Reflections [36, 3], orthogonal false",
            "linear.weight: Reflections [12, 3], orthogonal false",
        ],
    ),
    (
        "hra-gram-schmidt",
        &[
            "conv2.weight: Reflections [36, 3], orthogonal true",
            "linear.weight: Reflections [12, 3], orthogonal true",
        ],
    ),
    (
        "shira",
        &[
            "model.layers.0.mlp.down_proj.weight: Sparse [60] at I32 [2, 60]",
            "model.layers.0.self_attn.k_proj.weight: Sparse [36] at I32 [2, 36]",
        ],
    ),
    (
        "tied-ensured",
        &[
            "lm_head.weight: Linear [16, 3]·[3, 12] by 1.6666666666666667",
            "model.embed_tokens.weight: Embedding [12, 3]·[3, 16] by 1.6666666666666667",
        ],
    ),
];
