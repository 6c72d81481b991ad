//! The inputs: a random Llama-shaped base model and a PEFT adapter for it, made once and kept.
//!
//! Weights are drawn from N(0, 0.02) and rounded to bf16, so that no file system or kernel finds
//! anything to compress, share or skip. Factors are scaled so that the change of a weight has a
//! hundredth of its standard deviation, which is what fine-tuning does.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use lora_format::Dtype;
use lora_format::container::safetensors::{Declared, encode_header};
use serde_json::json;

use crate::Result;

/// The standard deviation of the weights.
const WEIGHT_DEVIATION: f64 = 0.02;
/// That of A's elements; B's follows from it, the rank and the wanted change.
const A_DEVIATION: f64 = 0.01;
/// The standard deviation of the change, relative to that of the weights.
const RELATIVE_CHANGE: f64 = 0.01;
/// alpha/rank of every adapter.
const SCALE: f64 = 2.0;

/// A named model shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preset {
    /// A few megabytes, for smoke tests.
    Tiny,
    /// TinyLlama 1.1B: 2.2 GB.
    #[value(name = "1b")]
    OneBillion,
    /// Llama 3 8B: 16 GB in four shards.
    #[value(name = "8b")]
    EightBillion,
}

/// What determines a Llama-shaped model.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) key_value_heads: usize,
    pub(crate) vocabulary: usize,
    pub(crate) shards: usize,
}

/// A tensor of the base.
struct Parameter {
    name: String,
    shape: Vec<usize>,
    mean: f64,
}

impl Parameter {
    fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * 2
    }
}

impl Shape {
    pub(crate) fn preset(preset: Preset) -> Shape {
        match preset {
            Preset::Tiny => Shape {
                hidden: 256,
                intermediate: 704,
                layers: 4,
                heads: 8,
                key_value_heads: 2,
                vocabulary: 2000,
                shards: 1,
            },
            Preset::OneBillion => Shape {
                hidden: 2048,
                intermediate: 5632,
                layers: 22,
                heads: 32,
                key_value_heads: 4,
                vocabulary: 32000,
                shards: 1,
            },
            Preset::EightBillion => Shape {
                hidden: 4096,
                intermediate: 14336,
                layers: 32,
                heads: 32,
                key_value_heads: 8,
                vocabulary: 128_256,
                shards: 4,
            },
        }
    }

    /// TinyLlama's layers, as many as come nearest to `bytes`.
    pub(crate) fn of_bytes(bytes: u64) -> Shape {
        let mut shape = Shape { layers: 0, ..Shape::preset(Preset::OneBillion) };
        let fixed = shape.bytes();
        shape.layers = 1;
        let layer = shape.bytes() - fixed;
        shape.layers = ((bytes.saturating_sub(fixed) + layer / 2) / layer).max(1) as usize;
        shape
    }

    /// Bytes of all tensors.
    pub(crate) fn bytes(&self) -> u64 {
        self.parameters().iter().map(Parameter::bytes).sum()
    }

    /// The linear layers of one block: name under the block, out features, in features.
    fn linears(&self) -> [(&'static str, usize, usize); 7] {
        let key_value = self.hidden / self.heads * self.key_value_heads;
        [
            ("self_attn.q_proj", self.hidden, self.hidden),
            ("self_attn.k_proj", key_value, self.hidden),
            ("self_attn.v_proj", key_value, self.hidden),
            ("self_attn.o_proj", self.hidden, self.hidden),
            ("mlp.gate_proj", self.intermediate, self.hidden),
            ("mlp.up_proj", self.intermediate, self.hidden),
            ("mlp.down_proj", self.hidden, self.intermediate),
        ]
    }

    /// All tensors in the order of the model's state dict.
    fn parameters(&self) -> Vec<Parameter> {
        let matrix =
            |name: String, rows, cols| Parameter { name, shape: vec![rows, cols], mean: 0.0 };
        let norm = |name: String| Parameter { name, shape: vec![self.hidden], mean: 1.0 };
        let mut all =
            vec![matrix("model.embed_tokens.weight".into(), self.vocabulary, self.hidden)];
        for layer in 0..self.layers {
            let block = format!("model.layers.{layer}");
            for (name, rows, cols) in self.linears() {
                all.push(matrix(format!("{block}.{name}.weight"), rows, cols));
            }
            all.push(norm(format!("{block}.input_layernorm.weight")));
            all.push(norm(format!("{block}.post_attention_layernorm.weight")));
        }
        all.push(norm("model.norm.weight".into()));
        all.push(matrix("lm_head.weight".into(), self.vocabulary, self.hidden));
        all
    }

    /// Multiplications and additions of all B·A: 2·out·in·rank per target.
    pub(crate) fn operations(&self, rank: usize) -> f64 {
        let block: usize = self.linears().iter().map(|(_, rows, cols)| rows * cols).sum();
        2.0 * block as f64 * rank as f64 * self.layers as f64
    }

    fn config(&self) -> serde_json::Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        })
    }
}

/// A base model on disk.
#[derive(Debug)]
pub(crate) struct Base {
    /// The directory that transformers loads.
    pub(crate) directory: PathBuf,
    /// Its safetensors files.
    pub(crate) files: Vec<PathBuf>,
    /// Bytes of these files.
    pub(crate) bytes: u64,
    pub(crate) shape: Shape,
}

impl Base {
    /// What a merge is given: the file of a model that has one, else the directory.
    pub(crate) fn argument(&self) -> &Path {
        match self.files.as_slice() {
            [file] => file,
            _ => &self.directory,
        }
    }
}

/// Makes the base in `parent`, unless it is there.
pub(crate) fn base(parent: &Path, shape: &Shape) -> Result<Base> {
    let label = format!(
        "llama-{}x{}x{}-v{}-s{}",
        shape.hidden, shape.intermediate, shape.layers, shape.vocabulary, shape.shards
    );
    let directory = parent.join(label);
    let shards = split(shape.parameters(), shape.shards);
    let names: Vec<String> = (1..=shards.len())
        .map(|number| match shards.len() {
            1 => "model.safetensors".into(),
            count => format!("model-{number:05}-of-{count:05}.safetensors"),
        })
        .collect();
    once(&directory, || {
        let bell = Bell::new();
        let mut weight_map = serde_json::Map::new();
        let mut seed = 0;
        for (shard, name) in shards.iter().zip(&names) {
            let declared = shard.iter().map(|parameter| Declared {
                name: &parameter.name,
                dtype: Dtype::Bf16,
                shape: &parameter.shape,
                bytes: parameter.bytes(),
            });
            let mut file = File::create(directory.join(name))?;
            file.write_all(&encode_header(&[("format".into(), "pt".into())], declared))?;
            for parameter in shard {
                seed += 1;
                bell.write_bf16(&mut file, seed, parameter.bytes(), parameter.mean)?;
                weight_map.insert(parameter.name.clone(), name.as_str().into());
            }
        }
        if names.len() > 1 {
            let index =
                json!({"metadata": {"total_size": shape.bytes()}, "weight_map": weight_map});
            fs::write(directory.join("model.safetensors.index.json"), index.to_string())?;
        }
        fs::write(directory.join("config.json"), shape.config().to_string())?;
        Ok(())
    })?;
    let files: Vec<PathBuf> = names.iter().map(|name| directory.join(name)).collect();
    let mut bytes = 0;
    for file in &files {
        bytes += file.metadata()?.len();
    }
    Ok(Base { directory, files, bytes, shape: shape.clone() })
}

/// Cuts the state dict into runs of about equal bytes, as transformers does, each sorted by name,
/// as safetensors does.
fn split(parameters: Vec<Parameter>, count: usize) -> Vec<Vec<Parameter>> {
    let total: u64 = parameters.iter().map(Parameter::bytes).sum();
    let mut shards: Vec<Vec<Parameter>> = (0..count.max(1)).map(|_| Vec::new()).collect();
    let mut before = 0;
    for parameter in parameters {
        let bytes = parameter.bytes();
        // The shard in which the middle of the tensor falls.
        let shard = (before + bytes / 2) * shards.len() as u64 / total;
        before += bytes;
        shards[shard as usize].push(parameter);
    }
    shards.retain(|shard| !shard.is_empty());
    for shard in &mut shards {
        shard.sort_by(|a, b| a.name.cmp(&b.name));
    }
    shards
}

/// How an adapter stores its factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FactorType {
    F32,
    Bf16,
}

/// An adapter on disk.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) directory: PathBuf,
    pub(crate) file: PathBuf,
    /// Bytes of its factors, were all stored as f32.
    pub(crate) bytes_as_f32: u64,
}

/// Makes an adapter of all linear layers of `base` beside it, unless it is there.
pub(crate) fn adapter(base: &Base, rank: usize, factor_type: FactorType) -> Result<Adapter> {
    let (dtype, element, suffix) = match factor_type {
        FactorType::F32 => (Dtype::F32, 4, "f32"),
        FactorType::Bf16 => (Dtype::Bf16, 2, "bf16"),
    };
    let directory = base.directory.with_file_name(format!(
        "{}-adapter-r{rank}-{suffix}",
        base.directory.file_name().unwrap_or_default().to_string_lossy()
    ));
    let b_deviation =
        RELATIVE_CHANGE * WEIGHT_DEVIATION / (SCALE * (rank as f64).sqrt() * A_DEVIATION);
    let mut factors = Vec::new();
    for layer in 0..base.shape.layers {
        for (name, rows, cols) in base.shape.linears() {
            let module = format!("base_model.model.model.layers.{layer}.{name}");
            factors.push((format!("{module}.lora_A.weight"), [rank, cols], A_DEVIATION));
            factors.push((format!("{module}.lora_B.weight"), [rows, rank], b_deviation));
        }
    }
    factors.sort_by(|a, b| a.0.cmp(&b.0));
    let elements = |shape: &[usize; 2]| (shape[0] * shape[1]) as u64;
    let file_path = directory.join("adapter_model.safetensors");
    once(&directory, || {
        let bell = Bell::new();
        let declared = factors.iter().map(|(name, shape, _)| Declared {
            name,
            dtype,
            shape,
            bytes: elements(shape) * element,
        });
        let mut file = File::create(&file_path)?;
        file.write_all(&encode_header(&[("format".into(), "pt".into())], declared))?;
        let mut random = Random(0xADA9);
        for (_, shape, deviation) in &factors {
            let mut bytes = Vec::with_capacity((elements(shape) * element) as usize);
            for _ in 0..elements(shape) {
                let value = (bell.normal(&mut random) * deviation) as f32;
                match factor_type {
                    FactorType::F32 => bytes.extend_from_slice(&value.to_le_bytes()),
                    FactorType::Bf16 => bytes.extend_from_slice(&to_bf16(value).to_le_bytes()),
                }
            }
            file.write_all(&bytes)?;
        }
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "",
            "r": rank,
            "lora_alpha": SCALE * rank as f64,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "target_modules":
                ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        });
        fs::write(directory.join("adapter_config.json"), config.to_string())?;
        Ok(())
    })?;
    let bytes_as_f32 = factors.iter().map(|(_, shape, _)| elements(shape) * 4).sum();
    Ok(Adapter { directory, file: file_path, bytes_as_f32 })
}

/// Runs `fill` on an empty `directory`, unless an earlier run came to its end.
fn once(directory: &Path, fill: impl FnOnce() -> Result<()>) -> Result<()> {
    let marker = directory.with_extension("complete");
    if marker.exists() && directory.exists() {
        return Ok(());
    }
    if directory.exists() {
        fs::remove_dir_all(directory)?;
    }
    fs::create_dir_all(directory)?;
    eprintln!("making {}", directory.display());
    fill()?;
    fs::write(marker, "")?;
    Ok(())
}

/// SplitMix64: fast, and good enough that its output does not compress.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }

    /// Uniform in (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

/// 65,536 samples of the normal distribution; sixteen random bits draw one of them.
struct Bell(Vec<f64>);

impl Bell {
    fn new() -> Bell {
        let mut random = Random(0xBE11);
        let sample = |_| {
            let (radius, angle) = (random.unit(), random.unit());
            (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
        };
        Bell((0..1 << 16).map(sample).collect())
    }

    fn normal(&self, random: &mut Random) -> f64 {
        self.0[(random.next() >> 48) as usize]
    }

    /// Writes `bytes` bytes of bf16 with the given mean and [`WEIGHT_DEVIATION`].
    fn write_bf16(&self, file: &mut File, seed: u64, bytes: u64, mean: f64) -> Result<()> {
        let rounded: Vec<u64> = self
            .0
            .iter()
            .map(|sample| u64::from(to_bf16((mean + sample * WEIGHT_DEVIATION) as f32)))
            .collect();
        let draw = |bits: u64| rounded[(bits & 0xFFFF) as usize];
        let mut random = Random(seed << 32);
        let mut buffer = vec![0; 4 << 20];
        let mut left = bytes as usize;
        while left > 0 {
            let length = left.min(buffer.len());
            for four in buffer[..length.next_multiple_of(8)].chunks_exact_mut(8) {
                let word = random.next();
                let packed = draw(word)
                    | draw(word >> 16) << 16
                    | draw(word >> 32) << 32
                    | draw(word >> 48) << 48;
                four.copy_from_slice(&packed.to_le_bytes());
            }
            file.write_all(&buffer[..length])?;
            left -= length;
        }
        Ok(())
    }
}

/// Rounds a finite number to bf16, to nearest, ties to even.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}
