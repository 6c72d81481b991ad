//! Bases quantised by bitsandbytes, GPTQ and AWQ: the weights that the libraries' own
//! dequantisation gives, at any run of elements, and refusals of what does not fit together.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lora_format::Dtype;
use lora_format::checkpoint::{Checkpoint, Location};
use lora_merge::quantised::{self, QuantisedBase, QuantisedProblem, QuantisedWeight};
use serde_json::{Value, json};

use crate::support::{Prng, Tensor, fixtures, read_json, read_tensors, write_json, write_tensors};

/// The cases of these three methods.
fn cases() -> Vec<PathBuf> {
    let entries = fs::read_dir(fixtures().join("quantised")).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        ["bnb-", "gptq-", "awq"].iter().any(|method| name.starts_with(method))
    });
    paths.sort();
    assert!(paths.len() >= 19, "only {} cases", paths.len());
    paths
}

fn find(base: &Checkpoint) -> Result<QuantisedBase, Vec<QuantisedProblem>> {
    quantised::find(base).map(|found| found.expect("a quantised base"))
}

/// The data of every tensor.
struct Data<'a> {
    base: &'a Checkpoint,
    files: Vec<Vec<u8>>,
}

impl<'a> Data<'a> {
    fn of(base: &'a Checkpoint) -> Data<'a> {
        let files = base.shards().iter().map(|shard| fs::read(shard.file.path()).unwrap());
        Data { base, files: files.collect() }
    }

    fn of_part(&self, part: Location) -> &[u8] {
        let header = self.base.shards()[part.shard].file.header();
        let info = &header.tensors[part.tensor];
        let at = |offset| (header.data_start + offset) as usize;
        &self.files[part.shard][at(info.start)..at(info.end)]
    }

    fn read(&self, weight: &QuantisedWeight, first: usize, count: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; count];
        weight.read(&|part| self.of_part(part), first, &mut out);
        out
    }

    fn requantise(&self, weight: &QuantisedWeight, first: usize, values: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; values.len()];
        weight.requantise(&|part| self.of_part(part), first, values, &mut out);
        out
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Runs that begin and end anywhere, short and long ones, and the whole.
fn runs(prng: &mut Prng, elements: usize) -> Vec<(usize, usize)> {
    let mut runs = vec![(0, elements), (elements, 0)];
    for _ in 0..60 {
        let first = prng.below(elements);
        let longest = if prng.below(2) == 0 { 80.min(elements - first) } else { elements - first };
        runs.push((first, prng.between(1, longest)));
    }
    runs
}

#[test]
fn weights_are_those_that_the_library_dequantises_to() {
    let mut prng = Prng::new(1);
    for case in cases() {
        let about = read_json(&case.join("case.json"));
        let expected = read_tensors(&case.join("expected.safetensors"));
        let base = Checkpoint::open(&case.join("base")).unwrap();
        let found = find(&base).unwrap_or_else(|problems| panic!("{case:?}: {problems:?}"));
        let names: Vec<&str> = found.weights.iter().map(|weight| weight.name.as_str()).collect();
        assert_eq!(names, expected.keys().map(String::as_str).collect::<Vec<_>>(), "{case:?}");
        assert_eq!(found.dropped, []);
        assert_eq!(about["tolerance"], 0);
        let data = Data::of(&base);
        for weight in &found.weights {
            let (name, expected) = (&weight.name, &expected[&weight.name]);
            assert_eq!(weight.shape, expected.shape, "{case:?} {name}");
            assert_eq!(weight.dtype.name(), about["dtype"], "{case:?} {name}");
            let expected = expected.bits();
            for (first, count) in runs(&mut prng, expected.len()) {
                let values = data.read(weight, first, count);
                let same = bits(&values) == expected[first..first + count];
                assert!(same, "{case:?} {name}: {count} elements from {first} on");
            }
        }
    }
}

#[test]
fn every_part_belongs_to_its_weight() {
    for case in cases() {
        let base = Checkpoint::open(&case.join("base")).unwrap();
        let found = find(&base).unwrap();
        let parts: Vec<Location> =
            found.weights.iter().flat_map(|weight| weight.parts.iter().copied()).collect();
        for (location, info) in base.tensors() {
            let plain = !parts.contains(&location);
            let float = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16);
            let named = info.name.ends_with("norm.weight")
                || info.name.starts_with("model.embed_tokens")
                || info.name.starts_with("lm_head");
            assert_eq!(plain, float && named, "{case:?}: `{}`", info.name);
        }
    }
}

#[test]
fn only_the_codes_that_are_announced_are_read() {
    let mut prng = Prng::new(2);
    for case in cases() {
        let base = Checkpoint::open(&case.join("base")).unwrap();
        let data = Data::of(&base);
        for weight in &find(&base).unwrap().weights {
            for (first, count) in runs(&mut prng, weight.elements()) {
                let range = weight.codes(first, count);
                let mut codes = vec![0x5A; data.of_part(weight.parts[0]).len()];
                codes[range.clone()].copy_from_slice(&data.of_part(weight.parts[0])[range]);
                let mut out = vec![f32::NAN; count];
                let only = |part: Location| {
                    if part == weight.parts[0] { codes.as_slice() } else { data.of_part(part) }
                };
                weight.read(&only, first, &mut out);
                assert_eq!(bits(&out), bits(&data.read(weight, first, count)), "{case:?}");
            }
        }
    }
}

#[test]
fn requantising_keeps_what_can_be_represented_and_rounds_the_rest() {
    let mut prng = Prng::new(3);
    for case in cases() {
        let base = Checkpoint::open(&case.join("base")).unwrap();
        let data = Data::of(&base);
        for weight in &find(&base).unwrap().weights {
            for (first, count) in runs(&mut prng, weight.elements()) {
                let values = data.read(weight, first, count);
                assert_eq!(data.requantise(weight, first, &values), values, "{case:?}");
                // Of two representable numbers, neither is further away than the other one.
                let moved: Vec<f32> =
                    values.iter().map(|value| value + prng.unit() as f32 * 0.02).collect();
                let rounded = data.requantise(weight, first, &moved);
                assert_eq!(data.requantise(weight, first, &rounded), rounded, "{case:?}");
                for ((value, moved), rounded) in values.iter().zip(&moved).zip(&rounded) {
                    let (new, old) = ((rounded - moved).abs(), (value - moved).abs());
                    assert!(new <= old * 1.000_01, "{case:?}: {moved} became {rounded}");
                }
            }
        }
    }
}

/// A case with something about it changed, and what is said of it.
fn refusal(case: &str, change: impl FnOnce(&mut Tensors, &mut Value)) -> String {
    let from = fixtures().join("quantised").join(case).join("base");
    let mut tensors = Tensors(read_tensors(&from.join("model.safetensors")));
    let mut config = read_json(&from.join("config.json"));
    change(&mut tensors, &mut config);
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), &tensors, &config);
    let base = Checkpoint::open(directory.path()).unwrap();
    let problems = match quantised::find(&base) {
        Ok(found) => panic!("{case}: accepted: {found:?}"),
        Err(problems) => problems,
    };
    let texts: Vec<String> = problems.iter().map(ToString::to_string).collect();
    texts.join("\n")
}

fn write(directory: &Path, tensors: &Tensors, config: &Value) {
    let list: Vec<Tensor> = tensors.0.values().cloned().collect();
    write_tensors(&directory.join("model.safetensors"), &list, &[("format", "pt")]);
    write_json(&directory.join("config.json"), config);
}

/// The tensors of a base by name.
struct Tensors(BTreeMap<String, Tensor>);

impl Tensors {
    fn get(&mut self, name: &str) -> &mut Tensor {
        self.0.get_mut(name).unwrap_or_else(|| panic!("no {name}"))
    }

    fn remove(&mut self, name: &str) -> Tensor {
        self.0.remove(name).unwrap_or_else(|| panic!("no {name}"))
    }

    fn replace(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        self.0.insert(name.to_owned(), Tensor::zeros(name, dtype, shape));
    }

    /// Rewrites the JSON of a quant state.
    fn state(&mut self, name: &str, change: impl FnOnce(&mut Value)) {
        let tensor = self.get(name);
        let mut state = serde_json::from_slice(&tensor.data).unwrap();
        change(&mut state);
        self.text(name, &state.to_string());
    }

    fn text(&mut self, name: &str, text: &str) {
        let tensor = self.get(name);
        tensor.data = text.as_bytes().to_vec();
        tensor.shape = vec![text.len()];
    }
}

const Q: &str = "model.layers.0.self_attn.q_proj";
const W: &str = "model.layers.0.self_attn.q_proj.weight";

/// Checks that `problem` is all that is said.
fn refused(case: &str, problem: &str, change: impl FnOnce(&mut Tensors, &mut Value)) {
    assert_eq!(refusal(case, change), problem.replace("{Q}", Q), "{case}");
}

#[test]
fn four_bit_parts_that_do_not_fit_are_refused() {
    let nested = "bnb-nf4-nested-blocks";
    let refused = |problem: &str, change: &dyn Fn(&mut Tensors)| {
        refused(nested, problem, |tensors, _| change(tensors));
    };
    refused("`{Q}.weight`: the base has no `{Q}.weight.absmax` to go with it", &|tensors| {
        tensors.remove(&format!("{W}.absmax"));
    });
    refused("`{Q}.weight`: the base has no `{Q}.weight.nested_quant_map` to go with it", &|all| {
        all.remove(&format!("{W}.nested_quant_map"));
    });
    refused(
        "`{Q}.weight.quant_state.bitsandbytes__nf4`: the base has no `{Q}.weight` to go with it",
        &|tensors| drop(tensors.remove(W)),
    );
    refused("`{Q}.weight`: expected 4224 bytes, two codes each, found 4223 bytes", &|tensors| {
        tensors.replace(W, Dtype::U8, &[4223, 1]);
    });
    refused("`{Q}.weight.absmax`: expected shape of 264 elements, found [263]", &|tensors| {
        tensors.replace(&format!("{W}.absmax"), Dtype::U8, &[263]);
    });
    refused("`{Q}.weight.absmax`: expected U8, found F32", &|tensors| {
        tensors.replace(&format!("{W}.absmax"), Dtype::F32, &[264]);
    });
    // Scales of scales that are gone make the scales plain ones.
    refused("`{Q}.weight.absmax`: expected F32, found U8", &|tensors| {
        tensors.remove(&format!("{W}.nested_absmax"));
    });
    refused("`{Q}.weight.nested_absmax`: expected shape of 2 elements, found [1]", &|tensors| {
        tensors.replace(&format!("{W}.nested_absmax"), Dtype::F32, &[1]);
    });
    refused("`{Q}.weight.nested_quant_map`: expected F32, found F16", &|tensors| {
        tensors.replace(&format!("{W}.nested_quant_map"), Dtype::F16, &[256]);
    });
    refused("`{Q}.weight.quant_map`: expected shape of 16 elements, found [15]", &|tensors| {
        tensors.replace(&format!("{W}.quant_map"), Dtype::F32, &[15]);
    });
}

#[test]
fn quant_states_that_make_no_sense_are_refused() {
    let name = format!("{W}.quant_state.bitsandbytes__nf4");
    let field = |key: &str, value: Value, problem: &str| {
        refused("bnb-nf4-nested-blocks", &format!("`{name}`: {problem}"), |tensors, _| {
            tensors.state(&name, |state| state[key] = value);
        });
    };
    let block = "expected `blocksize` to be a power of two from 32 to 4096";
    for value in [json!(0), json!(-64), json!(48), json!(u64::MAX), json!("64"), json!([64])] {
        field("blocksize", value.clone(), &format!("{block}, found {value}"));
    }
    let sizes = "expected `shape` to be sizes whose product is a number of elements";
    for value in [json!([]), json!([0, 88]), json!([u64::MAX, 2]), json!([1u64 << 40, 1u64 << 40])]
    {
        field("shape", value.clone(), &format!("{sizes}, found {value}"));
    }
    let long = format!("{sizes}, found [{}...", "1,".repeat(28));
    field("shape", json!(vec![1; 17]), &format!("{sizes}, found {}", json!(vec![1; 17])));
    field("shape", json!(vec![1; 100]), &long);
    for value in [json!("[96, 88]"), json!([96.5, 88]), json!([-96, -88]), Value::Null] {
        let problem = format!("expected `shape` to be a list of sizes, found {value}");
        field("shape", value, &problem);
    }
    let kind = "expected `quant_type` to be that of the tensor's name";
    field("quant_type", json!("fp4"), &format!("{kind}, found \"fp4\""));
    let dtype = "expected `dtype` to be float32, float16 or bfloat16";
    field("dtype", json!("float64"), &format!("{dtype}, found \"float64\""));
    let long = "x".repeat(1000);
    field("dtype", json!(long), &format!("{dtype}, found \"{}...", "x".repeat(56)));
    let nested = "expected `nested_blocksize` to be a positive number";
    field("nested_blocksize", json!(0), &format!("{nested}, found 0"));
    let offset = "expected `nested_offset` to be a number that fits an F32";
    field("nested_offset", json!("1"), &format!("{offset}, found \"1\""));
    field("nested_offset", json!(1e300), &format!("{offset}, found 1e+300"));

    let text =
        |text: &str| refusal("bnb-nf4-nested-blocks", |tensors, _| tensors.text(&name, text));
    let none = format!("`{name}`: expected a JSON object, found ");
    assert_eq!(text("[1, 2]"), format!("{none}[1,2]"));
    for broken in ["", "{", "\u{0}", "{\"shape\": 1, \"shape\": 2}", "{\"nested_offset\": NaN}"] {
        let said = text(broken);
        assert!(said.starts_with(&none), "{said}");
    }
    let deep = "[".repeat(10_000);
    assert!(text(&deep).starts_with(&none));
    let huge = format!("`{name}`: expected at most 16384 bytes of JSON, found 20000 bytes");
    assert_eq!(text(&" ".repeat(20_000)), huge);
    // The elements that a shape promises must be there.
    refused(
        "bnb-nf4-nested-blocks",
        "`{Q}.weight`: expected 2199023255552 bytes, two codes each, found 4224 bytes",
        |tensors, _| tensors.state(&name, |state| state["shape"] = json!([1u64 << 42])),
    );
}

#[test]
fn eight_bit_parts_that_do_not_fit_are_refused() {
    let refused = |problem: &str, change: &dyn Fn(&mut Tensors)| {
        refused("bnb-int8", problem, |tensors, _| change(tensors));
    };
    refused("`{Q}.SCB`: expected shape of 24 elements, found [23]", &|tensors| {
        tensors.replace(&format!("{Q}.SCB"), Dtype::F32, &[23]);
    });
    refused("`{Q}.SCB`: expected F32, found F16", &|tensors| {
        tensors.replace(&format!("{Q}.SCB"), Dtype::F16, &[24]);
    });
    refused("`{Q}.weight`: expected I8, found U8", &|tensors| {
        tensors.replace(W, Dtype::U8, &[24, 24]);
    });
    refused("`{Q}.weight`: expected shape [rows, columns], found [576]", &|tensors| {
        tensors.replace(W, Dtype::I8, &[576]);
    });
    refused("`{Q}.weight_format`: expected 0, which means rows, found 2", &|tensors| {
        tensors.get(&format!("{Q}.weight_format")).data = vec![2];
    });
    refused("`{Q}.SCB`: the base has no `{Q}.weight` to go with it", &|tensors| {
        tensors.remove(W);
    });
    let said = refusal("bnb-int8", |tensors, _| drop(tensors.remove(&format!("{Q}.SCB"))));
    assert!(said.contains("looks quantised"), "{said}");
}

#[test]
fn bitsandbytes_under_another_name_is_refused() {
    refused(
        "bnb-fp4",
        "`{Q}.weight.quant_state.bitsandbytes__fp4`: config.json says quant_method gptq, the \
         tensors say bitsandbytes",
        |tensors, config| {
            let other = "model.layers.0.self_attn.k_proj.weight";
            tensors.0.retain(|name, _| !name.starts_with(other));
            config["quantization_config"] =
                json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
        },
    );
}

#[test]
fn weights_that_are_not_those_of_the_full_precision_model_are_refused() {
    let transposed = "a quantised gpt2, whose weights are transposed, is not supported";
    for (case, tensor) in
        [("bnb-nf4-nested-blocks", "weight.quant_state.bitsandbytes__nf4"), ("gptq-2", "qweight")]
    {
        let problem = format!("`{{Q}}.{tensor}`: {transposed}");
        refused(case, &problem, |_, config| config["model_type"] = json!("gpt2"));
    }
    let problem = "`model.embed_tokens.qweight`: an embedding quantised with GPTQ is not supported";
    refused("gptq-2", problem, |tensors, _| {
        tensors.0 = std::mem::take(&mut tensors.0)
            .into_values()
            .map(|tensor| tensor.renamed(&tensor.name.replace(Q, "model.embed_tokens")))
            .map(|tensor| (tensor.name.clone(), tensor))
            .collect();
    });
}

#[test]
fn gptq_parts_that_do_not_fit_are_refused() {
    let (codes, zeros) = (format!("{Q}.qweight"), format!("{Q}.qzeros"));
    let (scales, groups) = (format!("{Q}.scales"), format!("{Q}.g_idx"));
    // (32, 64), groups of 16.
    let refused = |problem: &str, change: &dyn Fn(&mut Tensors)| {
        refused("gptq-4-order", problem, |tensors, _| change(tensors));
    };
    refused("`{Q}.qweight`: the base has no `{Q}.qzeros` to go with it", &|tensors| {
        tensors.remove(&zeros);
    });
    refused("`{Q}.qweight`: the base has no `{Q}.scales` to go with it", &|tensors| {
        tensors.remove(&scales);
    });
    refused("`{Q}.qweight`: expected I32, found I16", &|tensors| {
        tensors.replace(&codes, Dtype::I16, &[8, 32]);
    });
    refused("`{Q}.qweight`: expected shape [8, out], found [7, 32]", &|tensors| {
        tensors.replace(&codes, Dtype::I32, &[7, 32]);
    });
    refused("`{Q}.qweight`: config.json says 4 bits, the tensors say 8 bits", &|tensors| {
        tensors.replace(&codes, Dtype::I32, &[16, 32]);
    });
    refused("`{Q}.scales`: expected shape [4, 32], found [4, 31]", &|tensors| {
        tensors.replace(&scales, Dtype::F16, &[4, 31]);
    });
    refused("`{Q}.scales`: expected F16 or BF16 or F32, found F64", &|tensors| {
        tensors.replace(&scales, Dtype::F64, &[4, 32]);
    });
    refused("`{Q}.qzeros`: expected shape [4, 4], found [4, 32]", &|tensors| {
        tensors.replace(&zeros, Dtype::I32, &[4, 32]);
    });
    refused("`{Q}.qweight`: expected shape no empty dimension, found [8, 0]", &|tensors| {
        tensors.replace(&codes, Dtype::I32, &[8, 0]);
    });
    refused(
        "`{Q}.qweight`: expected shape no empty dimension, found [1152921504606846976, 0]",
        &|all| {
            all.replace(&codes, Dtype::I32, &[1 << 60, 0]);
        },
    );
    refused("`{Q}.scales`: expected shape no empty dimension, found [0, 32]", &|tensors| {
        tensors.replace(&scales, Dtype::F16, &[0, 32]);
    });
    refused("`{Q}.g_idx`: expected I32, found I64", &|tensors| {
        tensors.replace(&groups, Dtype::I64, &[64]);
    });
    let group = |channel: usize, group: i32| {
        move |tensors: &mut Tensors| {
            let data = &mut tensors.get(&format!("{Q}.g_idx")).data;
            data[4 * channel..][..4].copy_from_slice(&group.to_le_bytes());
        }
    };
    refused(
        "`{Q}.g_idx`: expected groups from 0 to 3, found 4 for input channel 63",
        &group(63, 4),
    );
    refused(
        "`{Q}.g_idx`: expected groups from 0 to 3, found -1 for input channel 0",
        &group(0, -1),
    );
    refused("`{Q}.g_idx`: expected 4 groups, found group 0 for every input channel", &|tensors| {
        tensors.replace(&groups, Dtype::I32, &[64])
    });
}

#[test]
fn gptq_configurations_that_do_not_fit_are_refused() {
    let refused = |case: &str, key: &str, value: Value, problem: &str| {
        refused(case, problem, |_, config| config["quantization_config"][key] = value);
    };
    let with_index = "gptq-4-order";
    let without = "gptq-4-no-index";
    refused(
        with_index,
        "bits",
        json!(8),
        "`{Q}.qweight`: config.json says 8 bits, the tensors say 4 bits",
    );
    refused(with_index, "bits", json!(5), "`{Q}.qweight`: GPTQ with 5 bits is not supported");
    refused(
        with_index,
        "bits",
        json!("4"),
        "config.json: `quantization_config.bits`: expected a positive integer, found \"4\"",
    );
    refused(
        with_index,
        "bits",
        Value::Null,
        "config.json: `quantization_config.bits`: expected 2, 3, 4 or 8, found null",
    );
    for size in [0, -2] {
        let problem = format!(
            "config.json: `quantization_config.group_size`: expected -1 or a positive integer, \
             found {size}"
        );
        refused(without, "group_size", json!(size), &problem);
    }
    refused(
        without,
        "group_size",
        json!(32),
        "`{Q}.scales`: expected shape [2, 32], found [4, 32]",
    );
    refused(
        without,
        "group_size",
        json!(-1),
        "`{Q}.scales`: expected shape [1, 32], found [4, 32]",
    );
    refused(
        with_index,
        "checkpoint_format",
        json!("marlin"),
        "`{Q}.qweight`: checkpoint_format marlin is not supported",
    );
    refused(
        without,
        "bits",
        json!(3),
        "`{Q}.qweight`: expected shape [a multiple of 3, out], found [8, 32]",
    );
}

#[test]
fn modules_with_a_width_of_their_own_are_read_where_the_configuration_allows_it() {
    let from = fixtures().join("quantised/gptq-8/base");
    let tensors = Tensors(read_tensors(&from.join("model.safetensors")));
    let mut config = read_json(&from.join("config.json"));
    config["quantization_config"]["bits"] = json!(4);
    config["quantization_config"]["dynamic"] = json!({"+:.*q_proj.*": {"bits": 8}});
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), &tensors, &config);
    let base = Checkpoint::open(directory.path()).unwrap();
    let found = find(&base).unwrap();
    let expected = read_tensors(&from.join("../expected.safetensors"));
    let data = Data::of(&base);
    assert_eq!(bits(&data.read(&found.weights[0], 0, 2048)), expected[W].bits());
}

#[test]
fn awq_that_does_not_fit_is_refused() {
    let change = |problem: &str, change: &dyn Fn(&mut Tensors)| {
        refused("awq-whole", problem, |tensors, _| change(tensors));
    };
    // (32, 40), one group.
    change("`{Q}.qweight`: the base has no `{Q}.scales` to go with it", &|tensors| {
        tensors.remove(&format!("{Q}.scales"));
    });
    change("`{Q}.qweight`: expected I32, found I16", &|tensors| {
        tensors.replace(&format!("{Q}.qweight"), Dtype::I16, &[40, 4]);
    });
    change("`{Q}.scales`: expected shape [1, 32], found [1, 24]", &|tensors| {
        tensors.replace(&format!("{Q}.scales"), Dtype::F16, &[1, 24]);
    });
    change("`{Q}.scales`: expected shape [a divisor of 40, 32], found [3, 32]", &|tensors| {
        tensors.replace(&format!("{Q}.scales"), Dtype::F16, &[3, 32]);
        tensors.replace(&format!("{Q}.qzeros"), Dtype::I32, &[3, 4]);
    });
    change("`{Q}.scales`: expected shape [a divisor of 40, 32], found [0, 32]", &|tensors| {
        tensors.replace(&format!("{Q}.scales"), Dtype::F16, &[0, 32]);
        tensors.replace(&format!("{Q}.qzeros"), Dtype::I32, &[0, 4]);
    });
    change("`{Q}.qzeros`: expected shape [1, 4], found [1, 5]", &|tensors| {
        tensors.replace(&format!("{Q}.qzeros"), Dtype::I32, &[1, 5]);
    });
    change("`{Q}.qweight`: expected shape no empty dimension, found [0, 4]", &|tensors| {
        tensors.replace(&format!("{Q}.qweight"), Dtype::I32, &[0, 4]);
    });
    let configured = |key: &str, value: Value, problem: &str| {
        refused("awq-whole", problem, |_, config| config["quantization_config"][key] = value);
    };
    configured(
        "version",
        json!("gemv"),
        "config.json: `quantization_config.version`: expected gemm, the layout that AWQ is read \
         in, found \"gemv\"",
    );
    configured(
        "bits",
        json!(8),
        "config.json: `quantization_config.bits`: expected 4, the width that AWQ is read with, \
         found 8",
    );
    configured(
        "group_size",
        json!(16),
        "`{Q}.scales`: config.json says group_size 16, the tensors say groups of 40",
    );
    configured(
        "group_size",
        json!(0),
        "`{Q}.scales`: config.json says group_size 0, the tensors say groups of 40",
    );
}

/// Bases with tensors taken away, stretched, retyped or filled with noise, and configurations with
/// other numbers: whatever is accepted can be read and requantised.
#[test]
fn what_is_accepted_can_be_read() {
    let mut prng = Prng::new(5);
    let directory = tempfile::tempdir().unwrap();
    let (mut accepted, mut refused) = (0, 0);
    for case in cases() {
        let tensors = read_tensors(&case.join("base/model.safetensors"));
        let config = read_json(&case.join("base/config.json"));
        let names: Vec<&String> = tensors.keys().collect();
        for _ in 0..60 {
            let (mut tensors, mut config) = (Tensors(tensors.clone()), config.clone());
            for _ in 0..prng.between(1, 2) {
                let name = names[prng.below(names.len())];
                let Some(old) = tensors.0.get(name).cloned() else { continue };
                let mut shape = old.shape.clone();
                let dimension = shape.len().checked_sub(1).map(|last| prng.between(0, last));
                let settings = &mut config["quantization_config"];
                match (prng.below(7), dimension) {
                    (0, _) => drop(tensors.remove(name)),
                    (1, Some(dimension)) => {
                        shape[dimension] = prng.below(2 * shape[dimension] + 1);
                        tensors.replace(name, old.dtype, &shape);
                    }
                    (2, _) => {
                        let dtypes = [Dtype::U8, Dtype::I8, Dtype::I32, Dtype::F16, Dtype::F32];
                        tensors.replace(name, prng.pick(&dtypes), &shape);
                    }
                    (3, _) => settings["bits"] = json!(prng.between(0, 9)),
                    (4, _) => settings["group_size"] = json!(prng.pick(&[-1, 0, 8, 16, 32, 64])),
                    (5, _) => {
                        let at = prng.below(old.data.len().max(1));
                        if let Some(byte) = tensors.get(name).data.get_mut(at) {
                            *byte = prng.next() as u8;
                        }
                    }
                    _ => {
                        let data = &mut tensors.get(name).data;
                        data.iter_mut().for_each(|byte| *byte = prng.next() as u8);
                    }
                }
            }
            write(directory.path(), &tensors, &config);
            let base = Checkpoint::open(directory.path()).unwrap();
            let Ok(Some(found)) = quantised::find(&base) else {
                refused += 1;
                continue;
            };
            accepted += 1;
            let data = Data::of(&base);
            for weight in &found.weights {
                let values = data.read(weight, 0, weight.elements());
                data.requantise(weight, 0, &values);
            }
        }
    }
    assert!(accepted > 200 && refused > 200, "{accepted} accepted, {refused} refused");
}

/// Bytes of f32 per second, for every kind of weight, by tiles of 512 kB. Run with
/// `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn speed_of_reading() {
    const ROWS: usize = 4096;
    const COLUMNS: usize = 4096;
    const GROUPS: usize = COLUMNS / 128;
    let mut prng = Prng::new(4);
    let mut noise = |name: &str, dtype: Dtype, shape: &[usize]| {
        let mut tensor = Tensor::zeros(name, dtype, shape);
        if matches!(dtype, Dtype::F32 | Dtype::F16) {
            let values = vec![0.0078125; shape.iter().product()];
            return Tensor::new(name, dtype, shape, &values);
        }
        tensor.data.iter_mut().for_each(|byte| *byte = prng.next() as u8);
        tensor
    };
    let text = |name: String, text: &str| Tensor {
        name,
        dtype: Dtype::U8,
        shape: vec![text.len()],
        data: text.as_bytes().to_vec(),
    };
    let blocks = ROWS * COLUMNS / 64;
    let mut bnb = vec![
        noise("int8.weight", Dtype::I8, &[ROWS, COLUMNS]),
        noise("int8.SCB", Dtype::F32, &[ROWS]),
    ];
    for name in ["nf4.weight", "nf4-nested.weight"] {
        let nested = name == "nf4-nested.weight";
        let dtype = if nested { Dtype::U8 } else { Dtype::F32 };
        bnb.push(noise(name, Dtype::U8, &[ROWS * COLUMNS / 2, 1]));
        bnb.push(noise(&format!("{name}.absmax"), dtype, &[blocks]));
        bnb.push(noise(&format!("{name}.quant_map"), Dtype::F32, &[16]));
        if nested {
            bnb.push(noise(&format!("{name}.nested_absmax"), Dtype::F32, &[blocks / 256]));
            bnb.push(noise(&format!("{name}.nested_quant_map"), Dtype::F32, &[256]));
        }
        let state = json!({
            "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, COLUMNS],
            "nested_blocksize": 256, "nested_offset": 0.5,
        });
        let state_name = format!("{name}.quant_state.bitsandbytes__nf4");
        bnb.push(text(state_name, &state.to_string()));
    }
    let mut gptq = Vec::new();
    for (name, bits) in [("2", 2), ("3", 3), ("4", 4), ("8", 8), ("4-order", 4)] {
        gptq.push(noise(&format!("{name}.qweight"), Dtype::I32, &[COLUMNS * bits / 32, ROWS]));
        gptq.push(noise(&format!("{name}.qzeros"), Dtype::I32, &[GROUPS, ROWS * bits / 32]));
        gptq.push(noise(&format!("{name}.scales"), Dtype::F16, &[GROUPS, ROWS]));
        let group = |channel| if name == "4-order" { channel % GROUPS } else { channel / 128 };
        let groups: Vec<u32> = (0..COLUMNS).map(|channel| group(channel) as u32).collect();
        gptq.push(Tensor::of_bits(&format!("{name}.g_idx"), Dtype::I32, &[COLUMNS], &groups));
    }
    let awq = vec![
        noise("4.qweight", Dtype::I32, &[COLUMNS, ROWS / 8]),
        noise("4.qzeros", Dtype::I32, &[GROUPS, ROWS / 8]),
        noise("4.scales", Dtype::F16, &[GROUPS, ROWS]),
    ];
    let bits = json!({"bits": 4, "group_size": 128, "dynamic": {"own": {}}});
    for (method, tensors) in [("bitsandbytes", bnb), ("gptq", gptq), ("awq", awq)] {
        let directory = tempfile::tempdir().unwrap();
        let list = tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor));
        let mut config = json!({"quantization_config": bits});
        config["quantization_config"]["quant_method"] = json!(method);
        write(directory.path(), &Tensors(list.collect()), &config);
        let base = Checkpoint::open(directory.path()).unwrap();
        let data = Data::of(&base);
        let mut out = vec![0.0_f32; 128 * 1024];
        for weight in &find(&base).unwrap().weights {
            let (mut read, mut requantise) = (f64::INFINITY, f64::INFINITY);
            for _ in 0..5 {
                let start = std::time::Instant::now();
                for first in (0..weight.elements()).step_by(out.len()) {
                    weight.read(&|part| data.of_part(part), first, &mut out);
                    std::hint::black_box(&out);
                }
                read = read.min(start.elapsed().as_secs_f64());
            }
            let values = out.clone();
            for _ in 0..5 {
                let start = std::time::Instant::now();
                for first in (0..weight.elements() / 8).step_by(out.len()) {
                    weight.requantise(&|part| data.of_part(part), first, &values, &mut out);
                    std::hint::black_box(&out);
                }
                requantise = requantise.min(start.elapsed().as_secs_f64() * 8.0);
            }
            let speed = |seconds: f64| weight.elements() as f64 * 4.0 / seconds / 1e9;
            println!(
                "{method:12} {:20} read {:5.2} GB/s, requantise {:5.2} GB/s",
                weight.name,
                speed(read),
                speed(requantise)
            );
        }
    }
}
