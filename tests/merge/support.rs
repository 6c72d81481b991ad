//! Models, adapters and arithmetic made here, independently of the code under test.
#![allow(dead_code, reason = "two test programs share this file, neither uses all of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lora_format::Dtype;
use serde_json::{Value, json};

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").canonicalize().unwrap()
}

/// SplitMix64.
pub(crate) struct Prng(u64);

impl Prng {
    pub(crate) fn new(seed: u64) -> Prng {
        Prng(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = self.0;
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// From `least` to `most`, both included.
    pub(crate) fn between(&mut self, least: usize, most: usize) -> usize {
        least + self.below(most - least + 1)
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// In (−1, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    pub(crate) fn values(&mut self, count: usize, size: f64) -> Vec<f64> {
        (0..count).map(|_| self.unit() * size).collect()
    }
}

/// Bits of precision and the smallest normal exponent.
fn format_of(dtype: Dtype) -> (i32, i32) {
    match dtype {
        Dtype::F32 => (24, -126),
        Dtype::F16 => (11, -14),
        Dtype::Bf16 => (8, -126),
        other => panic!("no float format here for {other}"),
    }
}

/// The relative error of rounding to nearest: half a unit in the last place.
pub(crate) fn unit_roundoff(dtype: Dtype) -> f64 {
    2f64.powi(-format_of(dtype).0)
}

/// The distance between subnormal numbers.
pub(crate) fn least(dtype: Dtype) -> f64 {
    let (precision, exponent) = format_of(dtype);
    2f64.powi(exponent - precision + 1)
}

/// The distance between neighbours at `value`.
pub(crate) fn ulp(value: f64, dtype: Dtype) -> f64 {
    let (precision, least) = format_of(dtype);
    let exponent = if value == 0.0 { least } else { exponent_of(value).max(least) };
    2f64.powi(exponent - precision + 1)
}

/// ⌊log₂|value|⌋ of a normal f64.
fn exponent_of(value: f64) -> i32 {
    ((value.to_bits() >> 52) & 0x7FF) as i32 - 1023
}

/// Rounds once, from f64, to nearest with ties to even.
pub(crate) fn encode(value: f64, dtype: Dtype) -> u32 {
    let (precision, least) = format_of(dtype);
    if dtype == Dtype::F32 && !value.is_finite() {
        return (value as f32).to_bits();
    }
    if value.is_nan() {
        return if dtype == Dtype::F16 { 0x7E00 } else { 0x7FC0 };
    }
    let sign = u32::from(value.is_sign_negative());
    let magnitude = value.abs();
    let (exponent_bits, infinity) = match dtype {
        Dtype::F32 => (8, 0x7F80_0000_u32),
        Dtype::F16 => (5, 0x7C00),
        _ => (8, 0x7F80),
    };
    let sign = sign << (precision - 1 + exponent_bits);
    if magnitude.is_infinite() {
        return sign | infinity;
    }
    let exponent = if magnitude == 0.0 { least } else { exponent_of(magnitude).max(least) };
    let units = (magnitude / 2f64.powi(exponent - precision + 1)).round_ties_even() as u64;
    // A carry out of the significand moves into the exponent by itself.
    let bits = (((exponent - least) as u64) << (precision - 1)) + units;
    sign | u32::try_from(bits).unwrap_or(infinity).min(infinity)
}

pub(crate) fn decode(bits: u32, dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(f32::from_bits(bits)),
        Dtype::Bf16 => f64::from(f32::from_bits(bits << 16)),
        Dtype::F16 => {
            let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
            let (exponent, fraction) = ((bits >> 10) & 31, f64::from(bits & 1023));
            sign * match exponent {
                0 => fraction * 2f64.powi(-24),
                31 if fraction == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1.0 + fraction / 1024.0) * 2f64.powi(exponent as i32 - 15),
            }
        }
        other => panic!("no float format here for {other}"),
    }
}

/// The value that is stored for `value`.
pub(crate) fn rounded(value: f64, dtype: Dtype) -> f64 {
    decode(encode(value, dtype), dtype)
}

/// A tensor in memory.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Tensor {
    pub(crate) fn new(name: &str, dtype: Dtype, shape: &[usize], values: &[f64]) -> Tensor {
        let bits: Vec<u32> = values.iter().map(|&value| encode(value, dtype)).collect();
        Tensor::of_bits(name, dtype, shape, &bits)
    }

    pub(crate) fn of_bits(name: &str, dtype: Dtype, shape: &[usize], bits: &[u32]) -> Tensor {
        assert_eq!(shape.iter().product::<usize>(), bits.len(), "{name}");
        let width = (dtype.bits() / 8) as usize;
        let data = bits.iter().flat_map(|bits| bits.to_le_bytes()[..width].to_vec()).collect();
        Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), data }
    }

    pub(crate) fn random(
        prng: &mut Prng,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        size: f64,
    ) -> Tensor {
        let count = shape.iter().product();
        Tensor::new(name, dtype, shape, &prng.values(count, size))
    }

    pub(crate) fn zeros(name: &str, dtype: Dtype, shape: &[usize]) -> Tensor {
        let bytes = shape.iter().product::<usize>() as u64 * dtype.bits() / 8;
        let data = vec![0; bytes as usize];
        Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), data }
    }

    pub(crate) fn bits(&self) -> Vec<u32> {
        let width = (self.dtype.bits() / 8) as usize;
        let read = |bytes: &[u8]| bytes.iter().rev().fold(0, |bits, &b| (bits << 8) | u32::from(b));
        self.data.chunks_exact(width).map(read).collect()
    }

    pub(crate) fn values(&self) -> Vec<f64> {
        if self.dtype == Dtype::F64 {
            let word = |bytes: &[u8]| f64::from_le_bytes(bytes.try_into().unwrap());
            return self.data.chunks_exact(8).map(word).collect();
        }
        self.bits().into_iter().map(|bits| decode(bits, self.dtype)).collect()
    }

    pub(crate) fn renamed(&self, name: &str) -> Tensor {
        Tensor { name: name.to_owned(), ..self.clone() }
    }
}

/// A safetensors file, tensors in the order given.
pub(crate) fn write_tensors(path: &Path, tensors: &[Tensor], metadata: &[(&str, &str)]) {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        let pairs = metadata.iter().map(|(key, value)| ((*key).to_owned(), json!(value)));
        header.insert("__metadata__".to_owned(), Value::Object(pairs.collect()));
    }
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.data.len();
        let (dtype, shape) = (tensor.dtype.name(), &tensor.shape);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    tensors.iter().for_each(|tensor| bytes.extend_from_slice(&tensor.data));
    fs::write(path, bytes).unwrap();
}

/// Reads a safetensors file with the reference crate, which so also judges it.
pub(crate) fn read_tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let dtype = view.dtype().to_string().parse().unwrap();
            let (shape, data) = (view.shape().to_vec(), view.data().to_vec());
            (name.clone(), Tensor { name, dtype, shape, data })
        })
        .collect()
}

/// The `__metadata__` of a safetensors file.
pub(crate) fn read_metadata(path: &Path) -> BTreeMap<String, String> {
    let bytes = fs::read(path).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    metadata.metadata().clone().unwrap_or_default().into_iter().collect()
}

/// A model as transformers reads it: the single file, or what the index lists, checked against
/// what the shards hold.
pub(crate) fn read_model(path: &Path) -> BTreeMap<String, Tensor> {
    if path.is_file() {
        return read_tensors(path);
    }
    let single = path.join("model.safetensors");
    if single.exists() {
        return read_tensors(&single);
    }
    let index = read_json(&path.join("model.safetensors.index.json"));
    let map = index["weight_map"].as_object().unwrap();
    let mut shards: BTreeMap<&str, BTreeMap<String, Tensor>> = BTreeMap::new();
    let mut model = BTreeMap::new();
    for (name, shard) in map {
        let shard = shard.as_str().unwrap();
        let tensors = shards.entry(shard).or_insert_with(|| read_tensors(&path.join(shard)));
        let tensor = tensors.get(name).unwrap_or_else(|| panic!("{name} is not in {shard}"));
        model.insert(name.clone(), tensor.clone());
    }
    model
}

pub(crate) fn read_json(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub(crate) fn write_json(path: &Path, value: &Value) {
    fs::write(path, serde_json::to_string_pretty(value).unwrap()).unwrap();
}

/// One module's factors.
pub(crate) struct Factors {
    pub(crate) module: String,
    /// rank × in
    pub(crate) a: Tensor,
    /// out × rank
    pub(crate) b: Tensor,
}

impl Factors {
    pub(crate) fn random(
        prng: &mut Prng,
        module: &str,
        (out, input, rank): (usize, usize, usize),
        dtype: Dtype,
        size: f64,
    ) -> Factors {
        Factors {
            module: module.to_owned(),
            a: Tensor::random(prng, "", dtype, &[rank, input], size),
            b: Tensor::random(prng, "", dtype, &[out, rank], size),
        }
    }

    pub(crate) fn rank(&self) -> usize {
        self.a.shape[0]
    }
}

/// A PEFT directory with alpha equal to the rank of its first module (scale 1 if all ranks are
/// equal); `extra` overrides or adds configuration fields.
pub(crate) fn write_adapter(directory: &Path, factors: &[Factors], extra: &Value) {
    fs::create_dir_all(directory).unwrap();
    let mut tensors = Vec::new();
    for each in factors {
        let name = |suffix| format!("base_model.model.{}.{suffix}.weight", each.module);
        tensors.push(each.a.renamed(&name("lora_A")));
        tensors.push(each.b.renamed(&name("lora_B")));
    }
    write_tensors(&directory.join("adapter_model.safetensors"), &tensors, &[("format", "pt")]);
    let rank = factors.first().map_or(1, Factors::rank);
    let mut config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"});
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    write_json(&directory.join("adapter_config.json"), &config);
}

/// B·A and |B|·|A| as the weight is stored, in f64.
pub(crate) fn products(a: &Tensor, b: &Tensor, in_out: bool) -> (Vec<f64>, Vec<f64>) {
    let (rank, input, out) = (a.shape[0], a.shape[1], b.shape[0]);
    let (left, right) = (b.values(), a.values());
    let mut product = vec![0.0; out * input];
    let mut absolute = vec![0.0; out * input];
    for row in 0..out {
        for k in 0..rank {
            let scale = left[row * rank + k];
            for column in 0..input {
                let term = scale * right[k * input + column];
                let at = if in_out { column * out + row } else { row * input + column };
                product[at] += term;
                absolute[at] += term.abs();
            }
        }
    }
    (product, absolute)
}

/// The names in a directory, sorted, with their sizes.
pub(crate) fn listing(directory: &Path) -> Vec<(String, u64)> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() {
            let inside = listing(&entry.path()).into_iter();
            names.extend(inside.map(|(inner, size)| (format!("{name}/{inner}"), size)));
            names.push((format!("{name}/"), 0));
        } else {
            names.push((name, entry.metadata().unwrap().len()));
        }
    }
    names.sort();
    names
}

/// The names in a directory, sorted.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    listing(directory).into_iter().map(|entry| entry.0).collect()
}

/// Copies a directory without its subdirectories.
pub(crate) fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}
