//! Quantised bases: every weight of the fixtures bit for bit as its own library dequantises it,
//! and typed problems for whatever does not fit together.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lora_format::Dtype;
use lora_format::checkpoint::{Checkpoint, Location};
use lora_format::io::mmap::Mapping;
use lora_merge::quantised::{self, QuantisedBase, QuantisedProblem, QuantisedWeight};
use serde_json::{Value, json};

use crate::support::{Prng, Tensor, fixtures, read_json, read_tensors, write_json, write_tensors};

/// A base and its mapped shards.
struct Mapped {
    base: Checkpoint,
    shards: Vec<Mapping>,
}

impl Mapped {
    fn open(path: &Path) -> Mapped {
        let base = Checkpoint::open(path).unwrap();
        let shards = base.shards().iter().map(|shard| shard.file.map().unwrap()).collect();
        Mapped { base, shards }
    }

    fn bytes(&self, part: Location) -> &[u8] {
        let (file, info) = (&self.base.shards()[part.shard].file, self.base.info(part));
        let start = (file.header().data_start + info.start) as usize;
        &self.shards[part.shard][start..start + info.bytes() as usize]
    }

    fn read(&self, weight: &QuantisedWeight, first: usize, count: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; count];
        weight.read(&|part| self.bytes(part), first, &mut out);
        out
    }

    fn requantise(&self, weight: &QuantisedWeight, first: usize, values: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; values.len()];
        weight.requantise(&|part| self.bytes(part), first, values, &mut out);
        out
    }

    fn find(&self) -> QuantisedBase {
        quantised::find(&self.base).unwrap().expect("a quantised base")
    }
}

/// The cases of scripts/make_quantised_fixtures.py.
fn cases() -> Vec<PathBuf> {
    let directory = fixtures().join("quantised");
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        ["ct-", "fp8-", "mxfp4-"].iter().any(|prefix| name.starts_with(prefix))
    };
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<PathBuf> = entries.filter(is_ours).collect();
    cases.sort();
    assert_eq!(cases.len(), 20, "a fixture came or went");
    cases
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn every_fixture_is_what_its_library_dequantises() {
    for case in cases() {
        let label = case.file_name().unwrap().to_string_lossy().into_owned();
        let about = read_json(&case.join("case.json"));
        let base = Mapped::open(&case.join("base"));
        let found = base.find();
        let expected = read_tensors(&case.join("expected.safetensors"));
        let names: Vec<&str> = found.weights.iter().map(|weight| weight.name.as_str()).collect();
        assert_eq!(names, expected.keys().collect::<Vec<_>>(), "{label}");
        let dropped: Vec<&str> =
            found.dropped.iter().map(|&part| base.base.info(part).name.as_str()).collect();
        assert_eq!(json!(dropped), about["dropped"], "{label}");
        let mut prng = Prng::new(7);
        for weight in &found.weights {
            let label = format!("{label}: {}", weight.name);
            let expected = &expected[&weight.name];
            assert_eq!(weight.shape, expected.shape, "{label}");
            assert_eq!(weight.dtype.name(), about["dtype"].as_str().unwrap(), "{label}");
            let wanted = expected.bits();
            let elements = weight.elements();
            assert_eq!(bits(&base.read(weight, 0, elements)), wanted, "{label}");
            for _ in 0..200 {
                let first = prng.below(elements + 1);
                let count = prng.below(elements - first + 1);
                let count = if prng.below(2) == 0 { count } else { count.min(prng.below(50)) };
                let read = base.read(weight, first, count);
                assert_eq!(bits(&read), wanted[first..first + count], "{label}: {first}, {count}");
            }
        }
    }
}

#[test]
fn every_tensor_is_part_of_a_weight_dropped_or_plain() {
    for case in cases() {
        let base = Mapped::open(&case.join("base"));
        let found = base.find();
        let parts = found.weights.iter().flat_map(|weight| &weight.parts);
        let used: BTreeSet<Location> = parts.chain(&found.dropped).copied().collect();
        for (location, info) in base.base.tensors() {
            let plain = info.dtype.is_merge_float();
            assert!(plain || used.contains(&location), "{}: {}", case.display(), info.name);
        }
    }
}

#[test]
fn the_bytes_of_the_codes_are_all_that_is_read_of_them() {
    let mut prng = Prng::new(8);
    for case in cases() {
        let base = Mapped::open(&case.join("base"));
        for weight in &base.find().weights {
            for _ in 0..50 {
                let first = prng.below(weight.elements());
                let count = 1 + prng.below(weight.elements() - first);
                let range = weight.codes(first, count);
                let mut codes = base.bytes(weight.parts[0]).to_vec();
                // Whatever is outside the range does not matter.
                for (at, byte) in codes.iter_mut().enumerate() {
                    if !range.contains(&at) {
                        *byte ^= 0x55;
                    }
                }
                let data = |part| {
                    if part == weight.parts[0] { &codes[..] } else { base.bytes(part) }
                };
                let mut out = vec![f32::NAN; count];
                weight.read(&data, first, &mut out);
                assert_eq!(bits(&out), bits(&base.read(weight, first, count)), "{}", weight.name);
            }
        }
    }
}

#[test]
fn requantising_keeps_what_is_representable_and_finds_the_nearest() {
    let mut prng = Prng::new(9);
    for case in cases() {
        let label = case.file_name().unwrap().to_string_lossy().into_owned();
        let base = Mapped::open(&case.join("base"));
        for weight in &base.find().weights {
            let values = base.read(weight, 0, weight.elements());
            let again = base.requantise(weight, 0, &values);
            for (at, (old, new)) in values.iter().zip(&again).enumerate() {
                // One rounding in the division, one in the product.
                let close = (old - new).abs() <= old.abs() * 3e-7;
                assert!(close, "{label}: {} at {at}: {old} became {new}", weight.name);
            }
            // A small step is either lost or lands on another representable value.
            let moved: Vec<f32> =
                values.iter().map(|value| value * (1.0 + 0.2 * prng.unit() as f32)).collect();
            let nearest = base.requantise(weight, 0, &moved);
            let fixed = base.requantise(weight, 0, &nearest);
            for (at, ((old, new), twice)) in moved.iter().zip(&nearest).zip(&fixed).enumerate() {
                assert!((new - twice).abs() <= new.abs() * 3e-7, "{label} at {at}");
                let kept = (old - values[at]).abs().mul_add(1.000_001, 1e-30);
                let distance = (old - new).abs();
                assert!(distance <= kept, "{label} at {at}: {old} became {new}");
            }
        }
    }
}

/// A directory with this configuration and these tensors.
fn problems(config: &Value, tensors: &[Tensor]) -> Vec<QuantisedProblem> {
    let directory = tempfile::tempdir().unwrap();
    write_tensors(&directory.path().join("model.safetensors"), tensors, &[]);
    write_json(&directory.path().join("config.json"), config);
    let base = Checkpoint::open(directory.path()).unwrap();
    match quantised::find(&base) {
        Ok(found) => panic!("accepted: {found:?}"),
        Err(problems) => problems,
    }
}

fn messages(config: &Value, tensors: &[Tensor]) -> String {
    let problems = problems(config, tensors);
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn zeros(name: &str, dtype: Dtype, shape: &[usize]) -> Tensor {
    Tensor::zeros(name, dtype, shape)
}

/// A tensor of integers, little-endian.
fn integers(name: &str, dtype: Dtype, values: &[i64]) -> Tensor {
    let width = (dtype.bits() / 8) as usize;
    let data = values.iter().flat_map(|value| value.to_le_bytes()[..width].to_vec()).collect();
    Tensor { name: name.to_owned(), dtype, shape: vec![values.len()], data }
}

fn fp8(config: &Value) -> Value {
    let mut quantization = json!({"quant_method": "fp8"});
    for (key, value) in config.as_object().unwrap() {
        quantization[key] = value.clone();
    }
    json!({"quantization_config": quantization})
}

fn groups(weights: &Value) -> Value {
    let group = json!({"targets": ["Linear"], "weights": weights});
    json!({"quantization_config":
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}})
}

#[test]
fn plain_bases_are_not_quantised() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let tensors = [
        zeros("a.weight", Dtype::Bf16, &[4, 4]),
        zeros("a.attn.bias", Dtype::U8, &[1, 1, 4, 4]),
        zeros("a.position_ids", Dtype::I64, &[4]),
        zeros("a.k_scale", Dtype::F32, &[4]),
    ];
    write_tensors(&path, &tensors, &[]);
    assert!(quantised::find(&Checkpoint::open(&path).unwrap()).unwrap().is_none());
}

#[test]
fn fp8_that_does_not_fit_is_refused() {
    let codes = || zeros("a.weight", Dtype::F8_E4M3, &[200, 300]);
    let scale = |shape: &[usize]| zeros("a.weight_scale_inv", Dtype::F32, shape);
    let block = fp8(&json!({"weight_block_size": [128, 128]}));
    for (config, tensors, wanted) in [
        (&block, vec![codes()], "`a.weight`: the base has no `a.weight_scale_inv`"),
        (&block, vec![scale(&[2, 3])], "the base has no `a.weight` to go with it"),
        (&block, vec![codes(), scale(&[2, 2])], "expected shape [2, 3] (blocks of 128×128)"),
        (&block, vec![codes(), scale(&[1])], "expected shape [2, 3]"),
        (&block, vec![codes(), scale(&[2, 3, 1])], "expected shape [2, 3]"),
        (
            &block,
            vec![codes(), zeros("a.weight_scale_inv", Dtype::I32, &[2, 3])],
            "expected F32 or F16",
        ),
        (
            &block,
            vec![zeros("a.weight", Dtype::Bf16, &[200, 300]), scale(&[2, 3])],
            "expected F8_E4M3 or F8_E5M2, found BF16",
        ),
        (
            &block,
            vec![zeros("a.weight", Dtype::F8_E4M3, &[0, 300]), scale(&[0, 3])],
            "expected shape without a 0",
        ),
        (
            &block,
            vec![zeros("a.weight", Dtype::F8_E4M3, &[300]), scale(&[3])],
            "expected shape of at least two dimensions",
        ),
        (&json!({}), vec![codes(), scale(&[7, 3])], "one scale per block"),
        (&json!({}), vec![codes(), scale(&[0, 0])], "one scale per block"),
        (
            &json!({"quantization_config": {"quant_method": "gptq"}}),
            vec![codes(), scale(&[2, 3])],
            "config.json says quant_method `gptq`, the tensors say 8-bit floats",
        ),
        (
            &fp8(&json!({"modules_to_not_convert": ["a"]})),
            vec![codes(), scale(&[2, 3])],
            "config.json says it is not quantised",
        ),
    ] {
        let found = messages(config, &tensors);
        assert!(found.contains(wanted), "{wanted}:\n{found}");
        assert_eq!(found.lines().count(), 1, "{found}");
    }
}

#[test]
fn configurations_of_the_wrong_type_are_refused() {
    let tensors = [
        zeros("a.weight", Dtype::F8_E4M3, &[8, 8]),
        zeros("a.weight_scale_inv", Dtype::F32, &[1, 1]),
    ];
    let weights = |key: &str, value: Value| {
        let mut weights = json!({"num_bits": 8, "type": "float", "strategy": "group"});
        weights["group_size"] = json!(4);
        weights[key] = value;
        groups(&weights)
    };
    for (config, field) in [
        (json!({"quantization_config": 3}), "quantization_config"),
        (json!({"quantization_config": {"quant_method": ["fp8"]}}), "quant_method"),
        (fp8(&json!({"weight_block_size": [0, 128]})), "weight_block_size"),
        (fp8(&json!({"weight_block_size": [128]})), "weight_block_size"),
        (fp8(&json!({"weight_block_size": 128})), "weight_block_size"),
        (fp8(&json!({"weight_block_size": [-1, 1.5]})), "weight_block_size"),
        (fp8(&json!({"modules_to_not_convert": "a"})), "modules_to_not_convert"),
        (json!({"quantization_config": {"quant_method": "compressed-tensors"}}), "config_groups"),
        (weights("group_size", json!(0)), "group_size"),
        (weights("group_size", json!(-2)), "group_size"),
        (weights("group_size", json!("16")), "group_size"),
        (weights("group_size", json!(1e300)), "group_size"),
        (weights("num_bits", json!(3)), "num_bits"),
        (weights("num_bits", json!(0)), "num_bits"),
        (weights("type", json!("complex")), "type"),
        (weights("strategy", json!("token")), "strategy"),
        (weights("strategy", json!("block")), "block_structure"),
        (weights("symmetric", json!("yes")), "symmetric"),
    ] {
        let problems = problems(&config, &tensors);
        let [QuantisedProblem::Config { field: found, .. }] = &*problems else {
            panic!("{field}: {problems:?}");
        };
        assert!(found.ends_with(field), "{field}: {found}");
    }
    for (structure, accepted) in [("4x2", true), ("4x0", false), ("4", false), ("x", false)] {
        let weights = json!({"num_bits": 8, "type": "float", "strategy": "block",
            "block_structure": structure});
        let tensors = [
            zeros("a.weight", Dtype::F8_E4M3, &[8, 8]),
            zeros("a.weight_scale", Dtype::F32, &[2, 4]),
        ];
        let directory = tempfile::tempdir().unwrap();
        write_tensors(&directory.path().join("model.safetensors"), &tensors, &[]);
        write_json(&directory.path().join("config.json"), &groups(&weights));
        let found = quantised::find(&Checkpoint::open(directory.path()).unwrap());
        assert_eq!(found.is_ok(), accepted, "{structure}");
    }
    let rotated = json!({"quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "transform_config": {"config_groups": {"R1": {}}},
    }});
    assert!(messages(&rotated, &tensors).contains("transform_config"));
}

/// A packed weight of 16×64, 4 bits, groups of 16.
fn packed() -> Vec<Tensor> {
    vec![
        zeros("a.weight_packed", Dtype::I32, &[16, 8]),
        zeros("a.weight_scale", Dtype::F32, &[16, 4]),
        integers("a.weight_shape", Dtype::I64, &[16, 64]),
    ]
}

#[test]
fn packed_integers_that_do_not_fit_are_refused() {
    let four = groups(&json!({"num_bits": 4, "strategy": "group", "group_size": 16}));
    let replaced = |name: &str, with: Tensor| {
        let mut tensors = packed();
        tensors.retain(|tensor| tensor.name != name);
        tensors.push(with);
        tensors
    };
    let shaped = |numbers: &[i64]| {
        replaced("a.weight_shape", integers("a.weight_shape", Dtype::I64, numbers))
    };
    let with = |tensor: Tensor| {
        let mut tensors = packed();
        tensors.push(tensor);
        tensors
    };
    let order = |values: &[i64]| with(integers("a.weight_g_idx", Dtype::I32, values));
    let sixteen = |group: i64| vec![group; 16];
    let ordered = |groups: [i64; 4]| order(&groups.map(sixteen).concat());
    for (tensors, wanted) in [
        (packed()[..2].to_vec(), "the base has no `a.weight_shape`"),
        (packed()[..1].to_vec(), "the base has no `a.weight_scale`"),
        (shaped(&[16, -64]), "expected two positive numbers, found [16, -64]"),
        (shaped(&[16, i64::MAX]), "[…, 1152921504606846976 (4 bits)], found [16, 8]"),
        (shaped(&[16, 65]), "expected shape […, 9 (4 bits)]"),
        (shaped(&[15, 64]), "expected shape [15, …], as `a.weight_shape` says"),
        (shaped(&[16, 64, 1]), "expected shape [2]"),
        (shaped(&[0, 0]), "expected two positive numbers"),
        (
            replaced("a.weight_scale", zeros("a.weight_scale", Dtype::F32, &[16, 3])),
            "expected shape [16, 4] (blocks of 1×16), found [16, 3]",
        ),
        (
            replaced("a.weight_scale", zeros("a.weight_scale", Dtype::F64, &[16, 4])),
            "expected F32 or F16 or BF16, found F64",
        ),
        (
            replaced("a.weight_packed", zeros("a.weight_packed", Dtype::I64, &[16, 8])),
            "expected I32, found I64",
        ),
        (
            with(zeros("a.weight_zero_point", Dtype::I32, &[2, 4])),
            "config.json says 4-bit integers symmetric, the tensors say 4-bit integers and zero",
        ),
        (
            with(zeros("a.weight_zero_point", Dtype::I32, &[1, 4])),
            "expected shape [2, 4], found [1, 4]",
        ),
        (ordered([0, 1, 2, 4]), "expected groups below 4, found 4"),
        (ordered([0, 1, 2, -2]), "expected groups below 4, found -2"),
        (ordered([0, 1, 2, 2]), "expected 4 groups of equal size"),
        (order(&[0; 63]), "expected shape [64]"),
    ] {
        let found = messages(&four, &tensors);
        assert!(found.contains(wanted), "{wanted}:\n{found}");
        assert_eq!(found.lines().count(), 1, "{found}");
    }
    let eight = groups(&json!({"num_bits": 8, "strategy": "group", "group_size": 16}));
    assert!(messages(&eight, &packed()).contains("16 (8 bits)"));
    let asymmetric = json!({"num_bits": 4, "strategy": "group", "group_size": 16,
        "symmetric": false});
    assert!(messages(&groups(&asymmetric), &packed()).contains("4-bit integers asymmetric"));
    // Without a configuration, two columns may be of any number of bits.
    let tiny = [
        zeros("a.weight_packed", Dtype::I32, &[3, 1]),
        zeros("a.weight_scale", Dtype::F32, &[3, 1]),
        integers("a.weight_shape", Dtype::I64, &[3, 2]),
    ];
    assert!(messages(&json!({}), &tiny).contains("config.json does not tell"));
}

#[test]
fn fp4_that_does_not_fit_is_refused() {
    let codes = || zeros("a.weight_packed", Dtype::U8, &[4, 16]);
    let scale = |columns| zeros("a.weight_scale", Dtype::F8_E4M3, &[4, columns]);
    let global = |count| zeros("a.weight_global_scale", Dtype::F32, &[count]);
    for (tensors, wanted) in [
        (vec![codes()], "the base has no `a.weight_scale`"),
        (vec![codes(), scale(2)], "the base has no `a.weight_global_scale`"),
        (vec![codes(), scale(2), global(2)], "expected shape of 1 elements, found [2]"),
        (vec![codes(), scale(1), global(1)], "expected shape [4, 2] (blocks of 1×16)"),
    ] {
        let found = messages(&json!({}), &tensors);
        assert!(found.contains(wanted), "{wanted}:\n{found}");
        assert_eq!(found.lines().count(), 1, "{found}");
    }
    let blocks = |last| zeros("x.up_blocks", Dtype::U8, &[2, 8, 3, last]);
    let scales = |count| zeros("x.up_scales", Dtype::U8, &[2, 8, count]);
    for (config, tensors, wanted) in [
        (json!({}), vec![blocks(16)], "the base has no `x.up_scales`"),
        (json!({}), vec![blocks(16), scales(2)], "expected shape [2, 8, 3], found [2, 8, 2]"),
        (json!({}), vec![blocks(8), scales(3)], "expected shape [experts, out, in/32, 16]"),
        (fp8(&json!({})), vec![blocks(16), scales(3)], "quant_method `fp8`, the tensors say MXFP4"),
    ] {
        let found = messages(&config, &tensors);
        assert!(found.contains(wanted), "{wanted}:\n{found}");
        assert_eq!(found.lines().count(), 1, "{found}");
    }
}

#[test]
fn leftovers_and_doubles_are_refused() {
    let scale = zeros("b.weight_scale", Dtype::F32, &[1]);
    for (tensors, wanted) in [
        (vec![zeros("a.weight", Dtype::F8_E4M3, &[4, 4])], "`a.weight` (F8_E4M3): looks quant"),
        (vec![zeros("a.weight", Dtype::I8, &[4, 4])], "`a.weight` (I8)"),
        (vec![zeros("a.weight", Dtype::I32, &[4, 4])], "`a.weight` (I32)"),
        (vec![scale], "`b.weight_scale` (F32)"),
    ] {
        let found = messages(&json!({}), &tensors);
        assert!(found.contains(wanted), "{wanted}:\n{found}");
    }
    let mut twice = packed();
    twice.push(zeros("a.weight", Dtype::Bf16, &[16, 64]));
    let found = messages(&json!({}), &twice);
    assert!(found.contains("stored twice: as `a.weight_packed` and as `a.weight`"), "{found}");
    let plain = [zeros("a.weight", Dtype::Bf16, &[4, 4])];
    assert!(messages(&fp8(&json!({})), &plain).contains("no quantised weight is in it"));
}

/// Tensors of random shapes under the names that schemes look for: whatever `find` accepts can be
/// read.
#[test]
fn what_is_found_can_be_read() {
    const FP8: &[Dtype] = &[Dtype::F8_E4M3, Dtype::F8_E5M2, Dtype::I8];
    const SCALES: &[Dtype] = &[Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::U8, Dtype::F8_E8M0];
    const FLOATS: &[Dtype] = &[Dtype::F32, Dtype::Bf16, Dtype::F16];
    const FP4_SCALES: &[Dtype] = &[Dtype::F8_E4M3, Dtype::U8, Dtype::F8_E8M0];
    const U8: &[Dtype] = &[Dtype::U8];
    const I32: &[Dtype] = &[Dtype::I32];
    const SHAPES: &[Dtype] = &[Dtype::I64, Dtype::I32];
    const RECIPES: [&[(&str, &[Dtype])]; 6] = [
        &[("weight", FP8), ("weight_scale_inv", SCALES)],
        &[("weight", FP8), ("weight_scale", SCALES)],
        &[("weight", &[Dtype::I8]), ("weight_scale", FLOATS), ("weight_zero_point", &[Dtype::I8])],
        &[
            ("weight_packed", I32),
            ("weight_scale", FLOATS),
            ("weight_shape", SHAPES),
            ("weight_zero_point", &[Dtype::I32, Dtype::I8]),
            ("weight_g_idx", I32),
        ],
        &[
            ("weight_packed", U8),
            ("weight_scale", FP4_SCALES),
            ("weight_global_scale", &[Dtype::F32]),
        ],
        &[("up_blocks", U8), ("up_scales", U8)],
    ];
    let mut prng = Prng::new(11);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let (mut accepted, mut refused) = ([0; RECIPES.len()], [0; RECIPES.len()]);
    for round in 0..1800 {
        let recipe = round % RECIPES.len();
        let (rows, columns) = (prng.between(1, 5), 16 * prng.between(1, 4));
        let groups = prng.pick(&[1, columns / 16]);
        let bits = prng.pick(&[2, 4, 8]);
        let mut tensors = Vec::new();
        for &(suffix, dtypes) in RECIPES[recipe] {
            // A zero point and a table are as often there as not.
            let optional = matches!(suffix, "weight_zero_point" | "weight_g_idx");
            if prng.below(if optional { 2 } else { 20 }) == 0 {
                continue;
            }
            let dtype = prng.pick(dtypes);
            let mut shape = match suffix {
                "weight" => vec![rows, columns],
                "weight_shape" => vec![2],
                "weight_g_idx" => vec![columns],
                "weight_global_scale" => vec![1],
                "weight_packed" if dtype == Dtype::U8 => vec![rows, columns / 2],
                "weight_packed" => vec![rows, columns * bits / 32],
                "weight_zero_point" if dtype == Dtype::I32 => {
                    vec![rows.div_ceil(32 / bits), groups]
                }
                "up_blocks" => vec![2, rows, groups, 16],
                "up_scales" => vec![2, rows, groups],
                _ => vec![rows, groups],
            };
            if prng.below(10) == 0 {
                let at = prng.below(shape.len());
                shape[at] = prng.below(4);
            }
            let name = format!("m.{suffix}");
            let mut tensor = Tensor::zeros(&name, dtype, &shape);
            tensor.data.iter_mut().for_each(|byte| *byte = prng.next() as u8);
            if suffix == "weight_shape" && prng.below(10) > 0 {
                tensor = integers(&name, dtype, &[rows as i64, columns as i64]);
            }
            if suffix == "weight_g_idx" && prng.below(10) > 0 {
                let order: Vec<i64> = (0..columns).map(|at| (at % groups) as i64).collect();
                tensor = integers(&name, dtype, &order);
            }
            tensors.push(tensor);
        }
        write_tensors(&path, &tensors, &[]);
        let base = Mapped::open(&path);
        let Ok(Some(found)) = quantised::find(&base.base) else {
            refused[recipe] += 1;
            continue;
        };
        accepted[recipe] += 1;
        for weight in &found.weights {
            let elements = weight.elements();
            let values = base.read(weight, 0, elements);
            base.requantise(weight, 0, &values);
            for _ in 0..10 {
                let first = prng.below(elements);
                let count = prng.below(elements - first + 1);
                let range = weight.codes(first, count);
                assert!(range.end <= base.bytes(weight.parts[0]).len());
                assert_same(&base.read(weight, first, count), &values[first..first + count]);
            }
        }
    }
    let enough = |counts: [usize; RECIPES.len()]| counts.iter().all(|&count| count > 20);
    assert!(enough(accepted) && enough(refused), "{accepted:?} accepted, {refused:?} refused");
}

/// The same bits, all NaNs being one.
fn assert_same(found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len());
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    assert!(found.iter().zip(wanted).all(same));
}

/// Bytes of f32 per second, for every kind of weight. Run with `--release -- --ignored`.
#[test]
#[ignore = "a measurement"]
fn speed_of_reading() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let (rows, columns) = (2048, 4096);
    let mut prng = Prng::new(1);
    // Codes are anything; scales are about 0.01, so that no product is subnormal.
    let mut noise = |name: &str, dtype: Dtype, shape: &[usize]| {
        let mut tensor = Tensor::zeros(name, dtype, shape);
        let scales = name.contains("_scale");
        let values = match dtype {
            Dtype::F8_E4M3 if scales => 0x30..0x40,
            Dtype::U8 if scales => 118..125,
            Dtype::F32 | Dtype::Bf16 => {
                let values = vec![0.0078125; tensor.shape.iter().product()];
                return Tensor::new(name, dtype, shape, &values);
            }
            _ => 0..256,
        };
        let byte = |prng: &mut Prng| (values.start + prng.below(values.len())) as u8;
        tensor.data.iter_mut().for_each(|slot| *slot = byte(&mut prng));
        tensor
    };
    let shape = |name: &str| integers(name, Dtype::I64, &[rows as i64, columns as i64]);
    let groups = columns / 128;
    let mut order: Vec<i64> = (0..columns as i64).map(|column| column % groups as i64).collect();
    order.rotate_left(3);
    let tensors = [
        noise("fp8-block.weight", Dtype::F8_E4M3, &[rows, columns]),
        noise("fp8-block.weight_scale_inv", Dtype::F32, &[rows / 128, columns / 128]),
        noise("fp8-channel.weight", Dtype::F8_E4M3, &[rows, columns]),
        noise("fp8-channel.weight_scale", Dtype::Bf16, &[rows, 1]),
        noise("int8-channel.weight", Dtype::I8, &[rows, columns]),
        noise("int8-channel.weight_scale", Dtype::Bf16, &[rows, 1]),
        noise("pack4-g128-zero.weight_packed", Dtype::I32, &[rows, columns / 8]),
        noise("pack4-g128-zero.weight_scale", Dtype::Bf16, &[rows, groups]),
        noise("pack4-g128-zero.weight_zero_point", Dtype::I32, &[rows / 8, groups]),
        shape("pack4-g128-zero.weight_shape"),
        noise("pack4-ordered.weight_packed", Dtype::I32, &[rows, columns / 8]),
        noise("pack4-ordered.weight_scale", Dtype::Bf16, &[rows, groups]),
        integers("pack4-ordered.weight_g_idx", Dtype::I32, &order),
        shape("pack4-ordered.weight_shape"),
        noise("nvfp4.weight_packed", Dtype::U8, &[rows, columns / 2]),
        noise("nvfp4.weight_scale", Dtype::F8_E4M3, &[rows, columns / 16]),
        noise("nvfp4.weight_global_scale", Dtype::F32, &[1]),
        noise("mxfp4.weight_packed", Dtype::U8, &[rows, columns / 2]),
        noise("mxfp4.weight_scale", Dtype::U8, &[rows, columns / 32]),
        noise("gpt-oss_blocks", Dtype::U8, &[2, 2048, 2048 / 32, 16]),
        noise("gpt-oss_scales", Dtype::U8, &[2, 2048, 2048 / 32]),
    ];
    write_tensors(&path, &tensors, &[]);
    let base = Mapped::open(&path);
    let mut out = vec![0.0_f32; 128 * 1024];
    for weight in &base.find().weights {
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let start = std::time::Instant::now();
            let mut first = 0;
            while first + out.len() <= weight.elements() {
                weight.read(&|part| base.bytes(part), first, &mut out);
                std::hint::black_box(&out);
                first += out.len();
            }
            best = best.min(start.elapsed().as_secs_f64());
        }
        let speed = weight.elements() as f64 * 4.0 / best / 1e9;
        println!("{:24} {speed:6.2} GB/s", weight.name);
    }
}
