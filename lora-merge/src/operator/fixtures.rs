//! PEFT's own numbers: the cases of `fixtures/features`, whose forms are put together here by hand
//! from the tensors' names, without any codec.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_format::model::{
    Bounded, Butterfly, Cores, Form, Gain, GainAxis, GainStored, Grid, Hadamard, Kronecker,
    KroneckerSide, Layer, LowRank, Reflections, Rotation, Scaling, ScalingRule, Sparse, Tiled,
    TiledRule,
};
use lora_format::{Dtype, Tensor};
use serde_json::Value;

use super::Matrix;
use super::testing::change;
use crate::orientation::Orientation;

fn features() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/features")
}

/// Tensors by name: dtype, shape and bytes.
type File = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

fn file(path: &Path) -> File {
    let bytes = std::fs::read(path).unwrap();
    let (length, rest) = bytes.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap();
    let entries = header.into_iter().filter(|entry| entry.0 != "__metadata__");
    let list = |value: &Value| -> Vec<usize> {
        value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
    };
    entries
        .map(|(name, info)| {
            let offsets = list(&info["data_offsets"]);
            let bytes = data[offsets[0]..offsets[1]].to_vec();
            (name, (info["dtype"].as_str().unwrap().to_owned(), list(&info["shape"]), bytes))
        })
        .collect()
}

fn tensor(name: &str, (dtype, shape, bytes): &(String, Vec<usize>, Vec<u8>)) -> Tensor {
    let dtype = match dtype.as_str() {
        "F32" => Dtype::F32,
        "F16" => Dtype::F16,
        "BF16" => Dtype::Bf16,
        "I32" => Dtype::I32,
        other => panic!("{name} is {other}"),
    };
    Tensor::new(name.to_owned(), dtype, shape.clone(), bytes.clone()).unwrap()
}

/// The tensors of one module, less what their names have in common.
struct Module<'a> {
    tensors: BTreeMap<String, Tensor>,
    name: &'a str,
    config: &'a Value,
}

impl Module<'_> {
    fn get(&self, suffix: &str) -> Option<Tensor> {
        let names = [suffix.to_owned(), format!("{suffix}.weight")];
        names.iter().find_map(|name| self.tensors.get(name).cloned())
    }

    fn need(&self, suffix: &str) -> Tensor {
        self.get(suffix).unwrap()
    }

    /// The value of a pattern that matches, or the default.
    fn setting(&self, patterns: &str, default: &str) -> f64 {
        let patterns = self.config[patterns].as_object();
        let matching = |key: &str| format!(".{}", self.name).ends_with(&format!(".{key}"));
        let own = patterns.and_then(|all| all.iter().find(|entry| matching(entry.0)));
        own.map_or(&self.config[default], |entry| entry.1).as_f64().unwrap()
    }

    fn flag(&self, name: &str) -> bool {
        self.config[name].as_bool().unwrap_or_default()
    }

    fn scaling(&self, alpha: &str) -> (Scaling, usize) {
        let rule = match self.flag("use_rslora") {
            true => ScalingRule::AlphaOverSqrtRank,
            false => ScalingRule::AlphaOverRank,
        };
        let rank = self.setting("rank_pattern", "r") as usize;
        (Scaling { alpha: self.setting("alpha_pattern", alpha), rule }, rank)
    }

    fn form(&self, base: &[usize]) -> Form {
        let layer = if base.len() > 2 { Layer::Convolution } else { Layer::Linear };
        if let Some(magnitude) = self.get("lora_magnitude_vector") {
            let embedding = self.get("lora_embedding_A").is_some();
            let [a, b] = match embedding {
                true => ["lora_embedding_A", "lora_embedding_B"],
                false => ["lora_A", "lora_B"],
            };
            let layer = if embedding { Layer::Embedding } else { layer };
            let (scaling, _) = self.scaling("lora_alpha");
            let plain = LowRank::linear(self.need(a), self.need(b), scaling);
            return Form::LowRank(LowRank { layer, magnitude: Some(magnitude), ..plain });
        }
        let cores = |b: &str, a: &str, t: &str| Cores {
            b: self.need(b),
            a: self.need(a),
            core: self.get(t),
        };
        if self.get("hada_w1_a").is_some() {
            let (scaling, rank) = self.scaling("alpha");
            let first = cores("hada_w1_a", "hada_w1_b", "hada_t1");
            let second = cores("hada_w2_a", "hada_w2_b", "hada_t2");
            return Form::Hadamard(Hadamard { first, second, scaling, rank });
        }
        if let Some(gain) = self.get("ia3_l") {
            let feedforward = self.config["feedforward_modules"].as_array().unwrap();
            let inner = feedforward.iter().any(|name| {
                format!(".{}", self.name).ends_with(&format!(".{}", name.as_str().unwrap()))
            });
            let axis = if inner { GainAxis::In } else { GainAxis::Out };
            return Form::Gain(Gain { gain, axis, stored: GainStored::Whole });
        }
        if let Some(generators) = self.get("oft_R").or(self.get("oft_embedding_R")) {
            let terms = self.config["num_cayley_neumann_terms"].as_u64().map(|n| n as usize);
            let pairs = generators.shape[1];
            return Form::Rotation(Rotation {
                block: (1..).find(|b| b * (b - 1) / 2 == pairs).unwrap(),
                generators,
                layer: if self.get("oft_R").is_some() { layer } else { Layer::Embedding },
                neumann_terms: terms.filter(|_| self.flag("use_cayley_neumann")),
                radius: self.config["eps"].as_f64().filter(|_| self.flag("coft")),
            });
        }
        if let Some(block) = self.get("miss_block") {
            let bat = self.config["init_weights"] == "bat";
            let rule = if bat { TiledRule::Bat } else { TiledRule::Add };
            return Form::Tiled(Tiled { block, rule });
        }
        let hira = self.get("hira_A").or(self.get("hira_embedding_A"));
        if let Some((a, b)) = hira.zip(self.get("hira_B").or(self.get("hira_embedding_B"))) {
            let scaling = Scaling { alpha: 1.0, rule: ScalingRule::Direct };
            return Form::Proportional(LowRank::linear(a, b, scaling));
        }
        if let Some(vectors) = self.get("hra_u") {
            let orthogonal = self.flag("apply_GS");
            return Form::Reflections(Reflections { vectors, orthogonal });
        }
        if let Some(generators) = self.get("boft_R") {
            return Form::Butterfly(Butterfly { generators, gain: self.need("boft_s") });
        }
        if let Some(indices) = self.get("shira_indices") {
            return Form::Sparse(Sparse { indices, values: self.need("shira_weight") });
        }
        if let Some(kernels) = self.get("c3a_kernel") {
            return Form::Circulant(kernels);
        }
        if let Some(norms) = self.get("delora_w_norm") {
            let (a, b) = (self.need("delora_A"), self.need("delora_B"));
            return Form::Bounded(Bounded { a, b, bound: self.need("delora_lambda"), norms });
        }
        if let Some(a) = self.get("gralora_A") {
            let b = self.need("gralora_B");
            let (scaling, rank) = self.scaling("alpha");
            return Form::Grid(Grid { a, b, scaling, rank });
        }
        let side = |full: &str, b: &str, a: &str, t: &str| match self.get(full) {
            Some(tensor) => KroneckerSide::Full(tensor),
            None => KroneckerSide::Product(cores(b, a, t)),
        };
        let (scaling, rank) = self.scaling("alpha");
        Form::Kronecker(Kronecker {
            left: side("lokr_w1", "lokr_w1_a", "lokr_w1_b", "none"),
            right: side("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            scaling,
            rank,
        })
    }
}

/// What marks a tensor as one of a method that has an operator.
const MARKS: [&str; 13] = [
    "lora_", "hada_", "lokr_", "ia3_l", "oft_", "miss_", "hira_", "hra_u", "boft_", "shira_",
    "c3a_", "delora_", "gralora_",
];

/// The largest difference of a case, relative to 1 and the size of the value.
fn difference(case: &str) -> f64 {
    let directory = features().join(case);
    let json =
        |path: PathBuf| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let about = json(directory.join("case.json"));
    let base = file(&directory.join(about["base"].as_str().unwrap()).join("model.safetensors"));
    let expected = file(&directory.join("expected_f64.safetensors"));
    let config = json(directory.join("adapter/adapter_config.json"));
    let gpt2 = about["base"].as_str().unwrap().ends_with("gpt2");

    let mut modules: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
    for (name, entry) in &file(&directory.join("adapter/adapter_model.safetensors")) {
        let short = name.strip_prefix("base_model.model.").unwrap();
        let at = MARKS.iter().find_map(|mark| short.find(&format!(".{mark}"))).unwrap();
        let (module, suffix) = (short[..at].to_owned(), short[at + 1..].to_owned());
        modules.entry(module).or_default().insert(suffix, tensor(name, entry));
    }
    let (mut most, mut compared) = (0.0_f64, 0);
    for (name, tensors) in modules {
        let module = Module { tensors, name: &name, config: &config };
        let weight = format!("{name}.weight");
        let mut parameters = vec![weight.clone()];
        let form = module.form(&base[&weight].1);
        let bias = format!("{name}.bias");
        if matches!(&form, Form::Gain(gain) if gain.axis == GainAxis::Out)
            && base.contains_key(&bias)
        {
            parameters.push(bias);
        }
        for parameter in parameters {
            let (shape, stored) = (&base[&parameter].1, tensor(&parameter, &base[&parameter]));
            let embedding = parameter.contains("embed");
            let matrix = match shape[..] {
                [length] => (1, length, Orientation::InOut, 1),
                [rows, cols] if gpt2 || embedding => (rows, cols, Orientation::InOut, 1),
                [rows, cols] => (rows, cols, Orientation::OutIn, 1),
                [rows, channels, ref kernel @ ..] => {
                    let kernel = kernel.iter().product();
                    (rows, channels * kernel, Orientation::OutIn, kernel)
                }
                [] => panic!("{parameter} is a scalar"),
            };
            let (rows, cols, orientation, kernel) = matrix;
            let matrix = Matrix { rows, cols, orientation, kernel };
            let values = stored.to_f32().unwrap();
            let changed = change(&form, matrix, &values);
            let expected = &expected[&parameter].2;
            for ((w, change), bytes) in values.iter().zip(changed).zip(expected.chunks_exact(8)) {
                let found = f64::from(*w) + change;
                let expected = f64::from_le_bytes(bytes.try_into().unwrap());
                most = most.max((found - expected).abs() / (1.0 + expected.abs()));
                compared += 1;
            }
        }
    }
    assert_eq!(compared, expected.values().map(|entry| entry.2.len() / 8).sum::<usize>(), "{case}");
    most
}

/// The differences left are those of the kernels' f32 chains; without any, of f64.
#[test]
fn operators_agree_with_the_closed_forms() {
    let mut problems = Vec::new();
    for (tolerance, cases) in [
        (
            1e-7,
            &[
                "dora-conv1d",
                "dora-conv1d-gpt2",
                "dora-conv2d",
                "dora-conv3d",
                "dora-embedding",
                "dora-linear",
                "dora-linear-bf16",
                "dora-linear-bias",
                "delora",
                "dora-rslora",
                "hira",
                "hira-conv1d-gpt2",
                "hira-embedding",
                "loha",
                "loha-conv",
                "loha-conv-effective",
                "lokr",
                "lokr-conv",
                "lokr-conv-effective",
                "lokr-decompose-both",
                "lokr-decompose-factor",
                "lokr-patterns",
            ][..],
        ),
        (
            1e-14,
            &[
                "boft",
                "boft-butterfly",
                "boft-conv2d",
                "c3a",
                "coft",
                "gralora",
                "gralora-conv1d-gpt2",
                "hra",
                "hra-gram-schmidt",
                "ia3",
                "ia3-conv",
                "ia3-conv1d-gpt2",
                "lokr-conv-full",
                "lokr-conv1d-full",
                "lokr-full",
                "miss",
                "miss-bat",
                "miss-mini",
                "miss-ragged",
                "oft",
                "oft-block-share",
                "oft-conv2d",
                "oft-embedding",
                "oft-r",
                "oft-terms",
                "shira",
            ],
        ),
    ] {
        for case in cases {
            let difference = difference(case);
            if difference > tolerance {
                problems.push(format!("{case}: {difference:e} > {tolerance:e}"));
            }
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
}
