//! A property: for random shapes, ranks, dtypes, kinds of layer, variants and numbers of adapters,
//! a merge is the closed form, computed here in f64 and on its own.

use lora_format::checkpoint::Checkpoint;
use lora_format::{Dtype, ReadOptions};
use lora_merge::engine::RunOptions;
use lora_merge::{MergeOptions, MergePlan, WeightedAdapter};
use serde_json::json;

use crate::support::{Prng, Tensor, least, read_model, unit_roundoff, write_json, write_tensors};
use crate::{TokenizerSource, write};

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// A kind of layer: how its parameter and its factors are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Linear,
    Conv1D,
    Embedding,
    Convolution,
}

/// A parameter as out × columns, where the columns of a convolution are inputs and kernel.
struct Layer {
    kind: Kind,
    out: usize,
    columns: usize,
    shape: Vec<usize>,
    kernel: Vec<usize>,
}

impl Layer {
    fn random(prng: &mut Prng) -> Layer {
        let kind = prng.pick(&[Kind::Linear, Kind::Conv1D, Kind::Embedding, Kind::Convolution]);
        let out = prng.between(1, 60);
        // Never square: orientation is tested elsewhere.
        let input = if prng.below(2) == 0 { out + prng.between(1, 70) } else { out.max(2) - 1 };
        let dimensions = if kind == Kind::Convolution { prng.between(1, 3) } else { 0 };
        let kernel: Vec<usize> = (0..dimensions).map(|_| prng.between(1, 3)).collect();
        let shape = match kind {
            Kind::Linear => vec![out, input],
            Kind::Conv1D | Kind::Embedding => vec![input, out],
            Kind::Convolution => [vec![out, input], kernel.clone()].concat(),
        };
        let columns = input * kernel.iter().product::<usize>();
        Layer { kind, out, columns, shape, kernel }
    }

    /// The place in the stored tensor of an output and a column.
    fn at(&self, out: usize, column: usize) -> usize {
        match self.kind {
            Kind::Linear | Kind::Convolution => out * self.columns + column,
            Kind::Conv1D | Kind::Embedding => column * self.out + out,
        }
    }

    fn name(&self) -> &'static str {
        if self.kind == Kind::Embedding { "table.word_embeddings" } else { "block.0.layer" }
    }
}

/// One adapter of one layer: its tensors as PEFT stores them, and its factors in f64.
struct Trained {
    tensors: Vec<Tensor>,
    a: Vec<f64>,
    b: Vec<f64>,
    rank: usize,
    scale: f64,
    magnitude: Option<Vec<f64>>,
    weight: f64,
}

impl Trained {
    fn random(prng: &mut Prng, layer: &Layer, dora: bool) -> Trained {
        let rank = if prng.below(5) == 0 { prng.between(60, 70) } else { prng.between(1, 9) };
        let alpha = prng.pick(&[1.0, 2.0, 8.0, 3.0, 0.7]);
        let (a_dtype, b_dtype) = (prng.pick(&FLOATS), prng.pick(&FLOATS));
        let prefix = format!("base_model.model.{}", layer.name());
        let names = match layer.kind {
            Kind::Embedding => {
                [format!("{prefix}.lora_embedding_A"), format!("{prefix}.lora_embedding_B")]
            }
            _ => [format!("{prefix}.lora_A.weight"), format!("{prefix}.lora_B.weight")],
        };
        let input = layer.columns / layer.kernel.iter().product::<usize>();
        let a_shape = [vec![rank, input], layer.kernel.clone()].concat();
        let b_shape = [vec![layer.out, rank], vec![1; layer.kernel.len()]].concat();
        let a = Tensor::random(prng, &names[0], a_dtype, &a_shape, 0.5);
        let b = Tensor::random(prng, &names[1], b_dtype, &b_shape, 0.1);
        let magnitude = dora.then(|| {
            let shape = match layer.kind {
                Kind::Convolution => [vec![1, layer.out], vec![1; layer.kernel.len()]].concat(),
                _ => vec![layer.out],
            };
            let name = format!("{prefix}.lora_magnitude_vector");
            Tensor::random(prng, &name, Dtype::F32, &shape, 3.0)
        });
        Trained {
            a: a.values(),
            b: b.values(),
            rank,
            scale: alpha / rank as f64,
            weight: prng.pick(&[1.0, 0.5, 0.3, -0.7]),
            tensors: [Some(a), Some(b), magnitude.clone()].into_iter().flatten().collect(),
            magnitude: magnitude.map(|magnitude| magnitude.values()),
        }
    }

    /// s·B·A at an output and a column, and the sum of the magnitudes of its terms.
    fn delta(&self, layer: &Layer, out: usize, column: usize) -> (f64, f64) {
        let terms = (0..self.rank)
            .map(|k| self.scale * self.b[out * self.rank + k] * self.a[k * layer.columns + column]);
        let terms: Vec<f64> = terms.collect();
        (terms.iter().sum(), terms.iter().map(|term| term.abs()).sum())
    }
}

#[test]
fn every_kind_of_layer_is_its_closed_form() {
    let mut prng = Prng::new(31);
    for number in 0..400 {
        one(&mut prng, number);
    }
}

fn one(prng: &mut Prng, number: usize) {
    let layer = Layer::random(prng);
    let base_dtype = prng.pick(&FLOATS);
    let dtype = prng.pick(&[None, Some(Dtype::F32), Some(Dtype::Bf16)]);
    let count = prng.between(1, 3);
    let dora = prng.below(3) == 0;
    let trained: Vec<Trained> =
        (0..count).map(|index| Trained::random(prng, &layer, dora && index == 0)).collect();
    let name = format!("{}.weight", layer.name());
    let base = Tensor::random(prng, &name, base_dtype, &layer.shape, 1.0);
    let label = format!(
        "{number}: {:?} {:?} {base_dtype}→{dtype:?}, {count} adapters, DoRA {dora}",
        layer.kind, layer.shape
    );

    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    write_tensors(&path("base.safetensors"), std::slice::from_ref(&base), &[("format", "pt")]);
    let mut adapters = Vec::new();
    for (index, one) in trained.iter().enumerate() {
        let directory = path(&format!("adapter-{index}"));
        std::fs::create_dir(&directory).unwrap();
        let weights = directory.join("adapter_model.safetensors");
        write_tensors(&weights, &one.tensors, &[("format", "pt")]);
        let config = json!({
            "peft_type": "LORA", "r": one.rank, "lora_alpha": one.scale * one.rank as f64,
            "bias": "none", "use_dora": one.magnitude.is_some(),
        });
        write_json(&directory.join("adapter_config.json"), &config);
        let adapter = lora_format::read(&directory, &ReadOptions::default())
            .unwrap_or_else(|error| panic!("{label}: {error}"));
        adapters.push(WeightedAdapter { weight: one.weight, ..adapter.into() });
    }
    let options = MergeOptions { dtype, ..MergeOptions::default() };
    let base_model = Checkpoint::open(&path("base.safetensors")).unwrap();
    let plan = MergePlan::new(base_model, adapters, &options)
        .unwrap_or_else(|error| panic!("{label}: {error}"));
    let run = RunOptions {
        threads: prng.between(1, 3),
        tile_bytes: prng.pick(&[64, 1000, 1 << 19]),
        ..RunOptions::default()
    };
    write(&plan, TokenizerSource::Auto, &path("out.safetensors"), &run)
        .unwrap_or_else(|error| panic!("{label}: {error}"));
    let merged = &read_model(&path("out.safetensors"))[&name];
    let out_dtype = dtype.unwrap_or(base_dtype);
    assert_eq!((merged.dtype, &merged.shape), (out_dtype, &layer.shape), "{label}");

    let (w, ours) = (base.values(), merged.values());
    let gamma = 64.0 * 2f64.powi(-24) * 1.01;
    let u = unit_roundoff(out_dtype);
    for out in 0..layer.out {
        // V of DoRA, its norm, and the norm of what f32 chains may have lost of it.
        let norm = trained[0].magnitude.as_ref().map(|_| {
            let values = (0..layer.columns).map(|column| {
                let (delta, absolute) = trained[0].delta(&layer, out, column);
                (w[layer.at(out, column)] + delta, absolute)
            });
            let (v, lost) = values.fold((0.0, 0.0), |(v, lost), (value, absolute)| {
                (v + value * value, lost + (gamma * absolute) * (gamma * absolute))
            });
            (v.sqrt(), lost.sqrt())
        });
        for column in 0..layer.columns {
            let at = layer.at(out, column);
            let (mut wanted, mut slack) = (w[at], 0.0);
            for one in &trained {
                let (delta, absolute) = one.delta(&layer, out, column);
                match (&one.magnitude, norm) {
                    (Some(magnitude), Some((norm, lost))) => {
                        let gain = magnitude[out] / norm;
                        let v = w[at] + delta;
                        wanted += one.weight * (gain * v - w[at]);
                        let relative = 2.0 * lost / norm;
                        slack += (one.weight * gain).abs()
                            * (gamma * absolute + v.abs() * relative)
                            * 1.1;
                    }
                    _ => {
                        wanted += one.weight * delta;
                        slack += one.weight.abs() * gamma * absolute;
                    }
                }
            }
            let bound = u * wanted.abs() + (1.0 + u) * slack + least(out_dtype);
            // f64 arithmetic of a few hundred terms.
            let bound = bound + 1e-12 * (w[at].abs() + wanted.abs());
            let off = (ours[at] - wanted).abs();
            assert!(off <= bound, "{label} [{out},{column}]: {} for {wanted}, {off:e}", ours[at]);
        }
    }
}
