//! The native format: the vectors, and what the format promises about size and identity.

use std::path::{Path, PathBuf};
use std::time::Instant;

use lora_format::checkpoint::Checkpoint;
use lora_format::container::safetensors::SafetensorsFile;
use lora_format::fingerprint::{self, Fingerprint, TargetSamples, Verdict};
use lora_format::model::{
    AdapterFormat, Bounded, Butterfly, Candidate, Component, Cores, Decomposed, Experts, Form,
    Gain, GainAxis, GainStored, Grid, Hadamard, Kronecker, KroneckerSide, Layer, LowRank,
    Reflections, Rotation, Scaling, ScalingRule, Shared, SourceConfig, Sparse, Target, Tiled,
    TiledRule, Tucker,
};
use lora_format::native::{self, DigestVerdict};
use lora_format::{Adapter, Dtype, Error, ReadOptions, Tensor};
use lora_tests::fixture;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{Random, entries, name, read};

pub(crate) fn vectors() -> Vec<PathBuf> {
    entries(&fixture("native"), ".safetensors")
}

/// The file as it would be written.
pub(crate) fn encoded(adapter: &Adapter) -> Vec<u8> {
    let (mut bytes, tensors) = native::encode(adapter).unwrap();
    tensors.iter().for_each(|tensor| bytes.extend_from_slice(tensor.bytes()));
    bytes
}

fn write(adapter: &Adapter, path: &Path) {
    use lora_format::io::atomic::{Durability, Overwrite};
    native::write(adapter, path, Overwrite::Never, Durability::Cached).unwrap();
}

fn digest(path: &Path) -> DigestVerdict {
    native::verify_digest(&SafetensorsFile::open(path).unwrap()).unwrap()
}

fn factor(tensor: &Tensor) -> Value {
    let sha256: String =
        Sha256::digest(tensor.bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
    json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "sha256": sha256})
}

/// The components of an adapter, as `scripts/lora_format.py` describes them: every fact, and every
/// tensor.
pub(crate) fn components_of(adapter: &Adapter) -> Vec<Value> {
    let mut sorted: Vec<&Component> = adapter.components.iter().collect();
    sorted.sort_by(|x, y| x.compare(y));
    let mut shared = Vec::new();
    sorted.into_iter().map(|component| describe_component(component, &mut shared)).collect()
}

fn describe_component(component: &Component, shared: &mut Vec<Value>) -> Value {
    let Component { target, form } = component;
    let mut found = json!({"module": target.module});
    if target.parameter != "weight" {
        found["parameter"] = target.parameter.as_str().into();
    }
    let of_form = match form {
        Form::LowRank(factors) => describe_factors(factors),
        Form::Decomposed(Decomposed { change, magnitude, axis }) => {
            let name = if *axis == GainAxis::In { "in_magnitude" } else { "magnitude" };
            match &**change {
                Form::LowRank(factors) => {
                    let mut of_form = describe_factors(factors);
                    of_form[name] = factor(magnitude);
                    of_form
                }
                change => {
                    let mut of_form = describe_form(change, shared);
                    of_form["tensors"][name] = factor(magnitude);
                    of_form
                }
            }
        }
        Form::Replaced(value) => json!({"value": factor(value)}),
        Form::Base(copy) => json!({"base": factor(copy)}),
        Form::Rows { indices, rows } => json!({"indices": indices, "rows": factor(rows)}),
        Form::Added { tensor, scale } => json!({"added": factor(tensor), "scale": scale}),
        other => describe_form(other, shared),
    };
    found.as_object_mut().unwrap().extend(of_form.as_object().unwrap().clone());
    found
}

fn describe_factors(factors: &LowRank) -> Value {
    let mut of_form = json!({
        "rank": factors.rank(), "alpha": factors.scaling.alpha,
        "rule": factors.scaling.rule.name(), "scale": factors.scale(),
        "a": factor(&factors.a), "b": factor(&factors.b),
    });
    match factors.layer {
        Layer::Linear => {}
        Layer::Convolution => of_form["layer"] = "convolution".into(),
        Layer::Embedding => of_form["layer"] = "embedding".into(),
        Layer::Merged => of_form["layer"] = "merged".into(),
    }
    let gains = [("rank_gain", &factors.rank_gain), ("magnitude", &factors.magnitude)];
    for (name, gain) in gains {
        if let Some(gain) = gain {
            of_form[name] = factor(gain);
        }
    }
    of_form
}

/// A form that has roles of its own: its name, its facts, its tensors.
fn describe_form(form: &Form, shared: &mut Vec<Value>) -> Value {
    let scaling = |scaling: &Scaling| json!({"alpha": scaling.alpha, "rule": scaling.rule.name()});
    let cores = |cores: &Cores, [core, b, a]: [&str; 3]| {
        let mut tensors = json!({b: factor(&cores.b), a: factor(&cores.a)});
        if let Some(tensor) = &cores.core {
            tensors[core] = factor(tensor);
        }
        tensors
    };
    let side = |side: &KroneckerSide, full: &str, product: [&str; 3]| match side {
        KroneckerSide::Full(tensor) => json!({full: factor(tensor)}),
        KroneckerSide::Product(factors) => cores(factors, product),
    };
    let both = |mut first: Value, second: Value| {
        first.as_object_mut().unwrap().extend(second.as_object().unwrap().clone());
        first
    };
    let pair = |a: &Tensor, b: &Tensor| json!({"A": factor(a), "B": factor(b)});
    let (name, facts, tensors) = match form {
        Form::Experts(it) => {
            let candidate =
                |it: &Candidate| json!({"scaling": scaling(&it.scaling), "rank": it.rank});
            let candidates: Vec<Value> = it.candidates.iter().map(candidate).collect();
            let name = format!("experts.{}", it.depth);
            (name, json!({"candidates": candidates}), pair(&it.a, &it.b))
        }
        Form::Shared(it) => {
            let factors = pair(&it.a, &it.b);
            let number = shared.iter().position(|known| *known == factors).unwrap_or_else(|| {
                shared.push(factors.clone());
                shared.len() - 1
            });
            let gains = json!({"in_gain": factor(&it.in_gain), "out_gain": factor(&it.out_gain)});
            ("shared".into(), json!({"factors": number}), both(factors, gains))
        }
        Form::Tucker(it) => {
            let core = json!({"mid": factor(&it.core)});
            (
                "tucker".into(),
                json!({"scaling": scaling(&it.scaling)}),
                both(pair(&it.a, &it.b), core),
            )
        }
        Form::Hadamard(it) => {
            let tensors = both(
                cores(&it.first, ["t1", "w1a", "w1b"]),
                cores(&it.second, ["t2", "w2a", "w2b"]),
            );
            let facts = json!({"scaling": scaling(&it.scaling), "rank": it.rank});
            ("hadamard".into(), facts, tensors)
        }
        Form::Kronecker(it) => {
            let left = side(&it.left, "w1", ["t1", "w1a", "w1b"]);
            let right = side(&it.right, "w2", ["t2", "w2a", "w2b"]);
            let facts = json!({"scaling": scaling(&it.scaling), "rank": it.rank});
            ("kronecker".into(), facts, both(left, right))
        }
        Form::Gain(it) => {
            let axis = if it.axis == GainAxis::In { "in" } else { "out" };
            let stored = if it.stored == GainStored::Whole { "whole" } else { "less-one" };
            let facts = json!({"axis": axis, "stored": stored});
            ("gain".into(), facts, json!({"gain": factor(&it.gain)}))
        }
        Form::Rotation(it) => {
            let layer = match it.layer {
                Layer::Linear => "linear",
                Layer::Convolution => "convolution",
                Layer::Embedding => "embedding",
                Layer::Merged => "merged",
            };
            let mut facts = json!({"layer": layer});
            if let Some(terms) = it.neumann_terms {
                facts["neumann_terms"] = terms.into();
            }
            if let Some(radius) = it.radius {
                facts["radius"] =
                    if radius.fract() == 0.0 { (radius as i64).into() } else { radius.into() };
            }
            assert_eq!(it.block * (it.block - 1) / 2, it.generators.shape[1]);
            ("rotation".into(), facts, json!({"generators": factor(&it.generators)}))
        }
        Form::Reflections(it) => {
            let facts = json!({"orthogonal": it.orthogonal});
            ("reflections".into(), facts, json!({"vectors": factor(&it.vectors)}))
        }
        Form::Butterfly(it) => {
            let tensors = json!({"generators": factor(&it.generators), "gain": factor(&it.gain)});
            ("butterfly".into(), json!({}), tensors)
        }
        Form::Tiled(it) => {
            let role = if it.rule == TiledRule::Add { "block" } else { "bat" };
            ("tiled".into(), json!({}), json!({role: factor(&it.block)}))
        }
        Form::Proportional(it) => {
            let tensors = match it.layer {
                Layer::Embedding => {
                    json!({"embedding_A": factor(&it.a), "embedding_B": factor(&it.b)})
                }
                _ => pair(&it.a, &it.b),
            };
            assert_eq!(it.layer == Layer::Convolution, it.a.shape.len() > 2);
            ("proportional".into(), json!({"scaling": scaling(&it.scaling)}), tensors)
        }
        Form::Sparse(it) => {
            let tensors = json!({"values": factor(&it.values), "indices": factor(&it.indices)});
            ("sparse".into(), json!({}), tensors)
        }
        Form::Circulant(kernels) => {
            ("circulant".to_owned(), json!({}), json!({"kernels": factor(kernels)}))
        }
        Form::Bounded(it) => {
            let rest = json!({"bound": factor(&it.bound), "norms": factor(&it.norms)});
            ("bounded".into(), json!({}), both(pair(&it.a, &it.b), rest))
        }
        Form::Grid(it) => {
            let facts = json!({"scaling": scaling(&it.scaling), "rank": it.rank});
            ("grid".into(), facts, pair(&it.a, &it.b))
        }
        other => panic!("{other:?}"),
    };
    // As JSON has it, an integral alpha is an integer.
    let facts = serde_json::from_str::<Value>(&integral(&facts)).unwrap();
    json!({"form": name, "facts": facts, "tensors": tensors})
}

/// JSON whose integral numbers below 2⁵³ are integers (F14).
fn integral(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let members = members.iter().map(|(key, value)| format!("{key:?}:{}", integral(value)));
            format!("{{{}}}", members.collect::<Vec<_>>().join(","))
        }
        Value::Array(values) => {
            format!("[{}]", values.iter().map(integral).collect::<Vec<_>>().join(","))
        }
        Value::Number(number) => match number.as_f64() {
            Some(value) if value.fract() == 0.0 && value.abs() < 2f64.powi(53) => {
                if value == 0.0 && value.is_sign_negative() {
                    "-0.0".to_owned()
                } else {
                    format!("{value:.0}")
                }
            }
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

/// The description that `scripts/lora_format.py read` prints.
pub(crate) fn describe(path: &Path) -> Value {
    let adapter = read(path).unwrap();
    let (recorded, matches) = match digest(path) {
        DigestVerdict::Intact { digest } => (digest, true),
        DigestVerdict::Damaged { recorded, .. } => (recorded, false),
    };
    json!({
        "modules": components_of(&adapter),
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "names": adapter.names.map(AdapterFormat::name),
        "base": {
            "name": adapter.base.name, "revision": adapter.base.revision,
            "fingerprint": adapter.base.fingerprint.as_ref().map(describe_fingerprint),
        },
        "source": adapter.source.map(|source| {
            json!({"format": source.format.name(), "config": source.config})
        }),
        "extensions": adapter.extensions,
        "metadata": adapter.metadata.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        "digest": recorded,
        "digest_matches": matches,
    })
}

fn describe_fingerprint(fingerprint: &Fingerprint) -> Value {
    let target = |samples: &TargetSamples| {
        json!({
            "target": samples.target, "dtype": samples.dtype.name(),
            "shape": samples.shape, "values": base64(&samples.values),
        })
    };
    let targets: Vec<Value> = fingerprint.targets.iter().map(target).collect();
    json!({"algorithm": fingerprint::ALGORITHM, "targets": targets})
}

fn base64(values: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |word, &byte| word << 8 | u32::from(byte));
        let word = word << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let sextet = ALPHABET[(word >> (18 - 6 * digit)) as usize & 63];
            text.push(if digit <= chunk.len() { sextet.into() } else { '=' });
        }
    }
    text
}

/// F3, F7 to F9, F12, F15 to F17, F22 to F53: what is found is what the description says.
#[test]
fn every_vector_is_read_as_described() {
    for path in vectors() {
        let text = std::fs::read(path.with_extension("json")).unwrap();
        let expected: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(describe(&path), expected, "{}", name(&path));
        assert_eq!(read(&path).unwrap().format, AdapterFormat::Native);
    }
}

/// F3 to F5, F13, F14, F22, F32, F33, F51: rewritten, every vector gives the same bytes.
#[test]
fn every_vector_is_rewritten_to_the_same_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    for path in vectors() {
        let copy = scratch.path().join(name(&path));
        write(&read(&path).unwrap(), &copy);
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(&path).unwrap(), "{}", name(&path));
        assert!(matches!(digest(&copy), DigestVerdict::Intact { .. }));
    }
}

/// F4, F13, F18, F20, F21, F32, F33, F51: files that we would have written otherwise become what we would have written.
#[test]
fn foreign_files_are_rewritten_as_ours() {
    let table = std::fs::read_to_string(fixture("native/README.md")).unwrap();
    for path in entries(&fixture("native/foreign"), "") {
        let key = format!("| `foreign/{}` | `", name(&path).trim_end_matches(".safetensors"));
        let row = table.lines().find_map(|line| line.strip_prefix(&key)).unwrap();
        let same_as = fixture(&format!("native/{}.safetensors", row.split('`').next().unwrap()));
        let found = encoded(&read(&path).unwrap());
        assert!(found == std::fs::read(same_as).unwrap(), "{}", name(&path));
    }
}

/// F5: neither the order of components nor that of the metadata shows in the bytes.
#[test]
fn the_order_in_memory_does_not_matter() {
    for path in vectors() {
        let mut adapter = read(&path).unwrap();
        adapter.components.reverse();
        adapter.metadata.reverse();
        assert!(encoded(&adapter) == std::fs::read(&path).unwrap(), "{}", name(&path));
    }
}

/// F3: metadata that pretends to be the format's own does not get into a file.
#[test]
fn the_users_metadata_cannot_replace_the_formats() {
    let path = fixture("native/plain.safetensors");
    let mut adapter = read(&path).unwrap();
    adapter.metadata.push(("format".into(), "mlx".into()));
    adapter.metadata.push(("lora_format".into(), String::new()));
    assert!(encoded(&adapter) == std::fs::read(&path).unwrap());
}

/// F23: one flipped bit is found by a check, and by nothing else.
#[test]
fn damage_is_found_when_asked() {
    let damaged = fixture("native/bad/damaged.safetensors");
    read(&damaged).unwrap();
    let DigestVerdict::Damaged { recorded, actual } = digest(&damaged) else { panic!() };
    assert_ne!(recorded, actual);
    let intact = DigestVerdict::Intact { digest: recorded };
    assert_eq!(digest(&fixture("native/plain.safetensors")), intact);
}

/// The fingerprint of the base in `folder` for this adapter.
fn sampled(adapter: &Adapter, folder: &Path) -> Fingerprint {
    let base = Checkpoint::open(folder).unwrap();
    let file = base.shards()[0].file.map().unwrap();
    let data = &file[base.shards()[0].file.header().data_start as usize..];
    let names: Vec<String> = adapter.components.iter().map(|c| c.target.name()).collect();
    let sampled = fingerprint::sampled_targets(names.len()).map(|index| {
        let info = base.info(base.find(&names[index]).unwrap());
        let bytes = &data[info.start as usize..info.end as usize];
        TargetSamples {
            target: names[index].clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            values: fingerprint::sample(info.dtype, bytes).unwrap(),
        }
    });
    Fingerprint { targets: sampled.collect() }
}

/// F17, F18: the recorded samples are those of the base, and tell it from others.
#[test]
fn a_fingerprint_knows_its_base() {
    let adapter = read(&fixture("native/fingerprint.safetensors")).unwrap();
    let recorded = adapter.base.fingerprint.clone().unwrap();
    let actual = sampled(&adapter, &fixture("native/base"));
    assert_eq!(actual, recorded);
    // Of every kind of parameter, and one sampled for each of two components.
    let forms = read(&fixture("native/forms.safetensors")).unwrap();
    let base = fixture("native/base-forms");
    assert_eq!(forms.base.fingerprint, Some(sampled(&forms, &base)));
    assert_eq!(forms.base.fingerprint.unwrap().targets.len(), forms.components.len());

    let verdict = |changed: &Fingerprint| {
        let find = |target: &TargetSamples| {
            changed.targets.iter().find(|found| found.target == target.target).cloned()
        };
        fingerprint::compare(&recorded, find)
    };
    assert_eq!(verdict(&actual), Verdict::Same);
    assert_eq!(verdict(&Fingerprint { targets: Vec::new() }), Verdict::Unknown);

    let mut widened = actual.clone();
    widened.targets.iter_mut().for_each(|target| target.dtype = Dtype::F32);
    assert_eq!(verdict(&widened), Verdict::Reencoded);

    let mut reshaped = actual.clone();
    reshaped.targets[1].shape.reverse();
    let first = recorded.targets[1].target.clone();
    let different = Verdict::Different { equal: 32, compared: 48, first: first.clone() };
    assert_eq!(verdict(&reshaped), different);

    let mut trained = actual;
    trained.targets[1].values[7] *= 1.0 + 1.0 / 128.0;
    assert_eq!(verdict(&trained), Verdict::Different { equal: 47, compared: 48, first });
}

/// F17: no more targets than are ever sampled.
#[test]
fn a_fingerprint_of_too_many_targets_is_refused() {
    let mut adapter = read(&fixture("native/fingerprint.safetensors")).unwrap();
    let targets = &mut adapter.base.fingerprint.as_mut().unwrap().targets;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.safetensors");
    targets.resize(64, targets[0].clone());
    write(&adapter, &path);
    read(&path).unwrap();
    let targets = &mut adapter.base.fingerprint.as_mut().unwrap().targets;
    targets.push(targets[0].clone());
    let path = scratch.path().join("b.safetensors");
    write(&adapter, &path);
    let message = read(&path).unwrap_err().to_string();
    let expected = "`base.fingerprint.targets` must be at most 64 targets, found 65";
    assert!(message.ends_with(expected), "{message}");
}

fn component(
    module: String,
    factors: [(Dtype, Vec<usize>, Vec<u8>); 2],
    scaling: Scaling,
) -> Component {
    let [a, b] = factors
        .map(|(dtype, shape, bytes)| Tensor::new(String::new(), dtype, shape, bytes).unwrap());
    Component {
        target: Target::weight(module),
        form: Form::LowRank(LowRank::linear(a, b, scaling)),
    }
}

fn adapter(components: Vec<Component>) -> Adapter {
    Adapter::new("made", components, fingerprint::BaseIdentity::default())
}

fn tensor(random: &mut Random, dtype: Dtype, shape: &[usize]) -> Tensor {
    let bytes = random.bytes(dtype.tensor_bytes(shape).unwrap() as usize);
    Tensor::new(String::new(), dtype, shape.to_vec(), bytes).unwrap()
}

/// A change of any kind but that of a linear layer.
fn random_form(random: &mut Random, scaling: Scaling) -> Form {
    let [rank, inputs, outputs] = [(); 3].map(|()| 1 + random.below(5));
    let float = *random.pick(&[Dtype::F32, Dtype::F16, Dtype::Bf16]);
    match random.below(10) {
        kind @ (0 | 1) => {
            let dtypes: Vec<Dtype> = Dtype::all().filter(|dtype| dtype.bits() >= 8).collect();
            let shape: Vec<usize> = (0..random.below(5)).map(|_| random.below(4)).collect();
            let dtype = *random.pick(&dtypes);
            let whole = tensor(random, dtype, &shape);
            if kind == 0 { Form::Replaced(whole) } else { Form::Base(whole) }
        }
        2 => {
            let mut indices: Vec<u64> = (0..outputs).map(|_| random.next() >> 1).collect();
            indices.sort_unstable();
            indices.dedup();
            let shape = [indices.len(), inputs];
            Form::Rows { indices, rows: tensor(random, float, &shape) }
        }
        3 => Form::Added {
            tensor: tensor(random, float, &[outputs, inputs]),
            scale: random.next() as i64 as f64 / 3.0,
        },
        kind @ 4..8 => {
            let (mut a, mut b) = (vec![rank, inputs], vec![outputs, rank]);
            let layer =
                [Layer::Convolution, Layer::Embedding, Layer::Linear, Layer::Merged][kind - 4];
            match layer {
                Layer::Convolution => {
                    a.extend(kernel(random, 1));
                    b.resize(a.len(), 1);
                }
                Layer::Merged => {
                    let groups = 1 + random.below(3);
                    (a[0], b[0]) = (a[0] * groups, b[0] * groups);
                }
                _ => {}
            }
            let [a, b] = [a, b].map(|shape| tensor(random, float, &shape));
            if layer == Layer::Merged {
                return Form::LowRank(LowRank { layer, ..LowRank::linear(a, b, scaling) });
            }
            let dora = random.below(2) == 0;
            let out = b.shape[0];
            let magnitude = dora.then(|| tensor(random, float, &[out]));
            let rank_gain = (random.below(3) == 0).then(|| tensor(random, float, &[rank]));
            let low_rank =
                LowRank { layer, rank_gain, magnitude, ..LowRank::linear(a, b, scaling) };
            if low_rank.magnitude.is_none() && random.below(2) == 0 {
                let inputs = low_rank.a.shape[1];
                let magnitude = tensor(random, float, &[inputs]);
                let change = Box::new(Form::LowRank(low_rank));
                return Form::Decomposed(Decomposed { change, magnitude, axis: GainAxis::In });
            }
            Form::LowRank(low_rank)
        }
        _ => {
            let kind = random.below(FORMS);
            let change = form_of_roles(random, kind, scaling, float);
            if random.below(4) > 0 {
                return change;
            }
            let axis = *random.pick(&[GainAxis::In, GainAxis::Out]);
            let magnitude = tensor(random, float, &[outputs]);
            Form::Decomposed(Decomposed { change: Box::new(change), magnitude, axis })
        }
    }
}

/// At least so many lengths of a kernel, at most three.
fn kernel(random: &mut Random, least: usize) -> Vec<usize> {
    (0..least + random.below(4 - least)).map(|_| 1 + random.below(3)).collect()
}

/// How many forms have roles of their own, but for experts.
const FORMS: usize = 14;

/// A change of one of them.
fn form_of_roles(random: &mut Random, kind: usize, scaling: Scaling, float: Dtype) -> Form {
    let [rank, inputs, outputs, b, k] = [(); 5].map(|()| 1 + random.below(4));
    let divisor = 1 + random.below(30);
    let mut make = |shape: &[usize]| tensor(random, float, shape);
    match kind {
        0 => Form::Bounded(Bounded {
            a: make(&[rank, inputs]),
            b: make(&[outputs, rank]),
            bound: make(&[1]),
            norms: make(&[inputs]),
        }),
        1 => Form::Butterfly(Butterfly {
            generators: make(&[k, rank, b, b]),
            gain: make(if rank == 1 { &[1, 5] } else { &[5, 1] }),
        }),
        2 => Form::Circulant(make(&[outputs, inputs, b])),
        3 => Form::Gain(Gain {
            gain: make(if rank == 1 { &[1, 5, 1] } else { &[5, 1] }),
            axis: *random.pick(&[GainAxis::In, GainAxis::Out]),
            stored: *random.pick(&[GainStored::Whole, GainStored::LessOne]),
        }),
        4 => Form::Grid(Grid {
            a: make(&[k, inputs, k * rank]),
            b: make(&[k, k * rank, outputs]),
            scaling,
            rank: divisor,
        }),
        5 => {
            let kernel = (k > 2).then(|| kernel(random, 1));
            let first = cores(random, float, [outputs, inputs, rank], kernel.as_deref());
            let second = cores(random, float, [outputs, inputs, b], kernel.as_deref());
            Form::Hadamard(Hadamard { first, second, scaling, rank: divisor })
        }
        6 => {
            let left = random_side(random, float, false);
            let right = random_side(random, float, true);
            Form::Kronecker(Kronecker { left, right, scaling, rank: divisor })
        }
        7 => {
            let layer = *random.pick(&[Layer::Linear, Layer::Convolution, Layer::Embedding]);
            let (mut a, mut b) = (vec![rank, inputs], vec![outputs, rank]);
            if layer == Layer::Convolution {
                a.extend(kernel(random, 1));
                b.resize(a.len(), 1);
            }
            let [a, b] = [a, b].map(|shape| tensor(random, float, &shape));
            Form::Proportional(LowRank { layer, ..LowRank::linear(a, b, scaling) })
        }
        8 => Form::Reflections(Reflections {
            vectors: make(&[inputs, rank]),
            orthogonal: random.below(2) == 0,
        }),
        9 => Form::Rotation(Rotation {
            generators: make(&[k, b * (b - 1) / 2]),
            block: b,
            layer: *random.pick(&[Layer::Linear, Layer::Convolution, Layer::Embedding]),
            neumann_terms: *random.pick(&[None, Some(0), Some(5)]),
            radius: *random.pick(&[None, Some(6e-5), Some(3.0), Some(0.0)]),
        }),
        10 => {
            // Some of them shared with others.
            let mut seeded = Random(b as u64);
            let [a, b] = [[2, 9], [9, 2]].map(|shape| tensor(&mut seeded, Dtype::F16, &shape));
            let (in_gain, out_gain) = (make(&[2]), make(&[outputs]));
            Form::Shared(Shared { a, b, in_gain, out_gain })
        }
        11 => {
            let count = rank - 1;
            let values = make(&[count]);
            let dtype = *random.pick(&[Dtype::I32, Dtype::I64]);
            Form::Sparse(Sparse { indices: tensor(random, dtype, &[2, count]), values })
        }
        12 => {
            let rule = *random.pick(&[TiledRule::Add, TiledRule::Bat]);
            let shape =
                if rule == TiledRule::Add { vec![rank, outputs] } else { vec![k, rank, rank] };
            Form::Tiled(Tiled { block: tensor(random, float, &shape), rule })
        }
        _ => {
            let ones = [1, 1].iter().take(k % 3);
            let core: Vec<usize> = [b, rank].into_iter().chain(kernel(random, 1)).collect();
            let shape = |lengths: [usize; 2]| lengths.iter().chain(ones.clone()).copied().collect();
            let [a, b]: [Vec<usize>; 2] = [shape([rank, inputs]), shape([outputs, b])];
            let [a, b, core] = [a, b, core].map(|shape| tensor(random, float, &shape));
            Form::Tucker(Tucker { a, b, core, scaling })
        }
    }
}

fn cores(
    random: &mut Random,
    float: Dtype,
    [outputs, inputs, rank]: [usize; 3],
    kernel: Option<&[usize]>,
) -> Cores {
    let a = tensor(random, float, &[rank, inputs]);
    let Some(kernel) = kernel else {
        return Cores { b: tensor(random, float, &[outputs, rank]), a, core: None };
    };
    let other = 1 + random.below(3);
    let core = [&[other, rank], kernel].concat();
    Cores {
        b: tensor(random, float, &[other, outputs]),
        a,
        core: Some(tensor(random, float, &core)),
    }
}

/// A side of a Kronecker product; C has no kernel.
fn random_side(random: &mut Random, float: Dtype, with_kernel: bool) -> KroneckerSide {
    let [rows, columns, rank] = [(); 3].map(|()| 1 + random.below(3));
    if random.below(2) == 0 {
        let kernel = if with_kernel { kernel(random, 0) } else { Vec::new() };
        let shape = [&[rows, columns], &*kernel].concat();
        return KroneckerSide::Full(tensor(random, float, &shape));
    }
    let kernel = (with_kernel && random.below(2) == 0).then(|| kernel(random, 1));
    KroneckerSide::Product(cores(random, float, [rows, columns, rank], kernel.as_deref()))
}

/// Nested factors of bare parameters.
fn random_experts(random: &mut Random, module: &str, scaling: Scaling) -> Vec<Component> {
    let names: Vec<&str> = ["gate_up", "down", "x"].into_iter().take(1 + random.below(3)).collect();
    let target = Target { module: module.to_owned(), parameter: names.join("|") };
    let depths = 0..1 + random.below(2);
    let experts = |depth| {
        let candidate = |name: &&str| {
            let rank = 1 + random.below(3);
            Candidate { parameter: (*name).to_owned(), scaling, rank }
        };
        let candidates = names.iter().map(candidate).collect();
        let [a, b] = [[6, 2], [3, 6]].map(|shape| tensor(random, Dtype::F16, &shape));
        Component {
            target: target.clone(),
            form: Form::Experts(Experts { a, b, depth, candidates }),
        }
    };
    depths.map(experts).collect()
}

/// An adapter of anything that the format can say.
pub(crate) fn random_adapter(random: &mut Random) -> Adapter {
    const RULES: [ScalingRule; 3] =
        [ScalingRule::AlphaOverRank, ScalingRule::AlphaOverSqrtRank, ScalingRule::Direct];
    let alphas: Vec<f64> = (0..3)
        .map(|_| match random.below(3) {
            0 => random.below(64) as f64,
            1 => random.next() as u32 as f64 / 1e6,
            // Any f64 that an F32 can hold times any rank.
            _ => f64::from_bits(random.next()).clamp(-1e30, 1e30),
        })
        .map(|alpha| if alpha.is_nan() { 0.1 } else { alpha })
        .collect();
    let mut components = Vec::new();
    for index in 0..1 + random.below(9) {
        let [rank, inputs, outputs] = [(); 3].map(|()| 1 + random.below(5));
        let scaling = Scaling { alpha: *random.pick(&alphas), rule: *random.pick(&RULES) };
        let module = format!("{}{index}", random.text(6));
        if random.below(2) == 0 {
            let parameter = (*random.pick(&["weight", "bias", "in_proj_weight"])).to_owned();
            let target = Target { module, parameter };
            let form = random_form(random, scaling);
            if matches!(form, Form::Grid(_)) {
                // Its hybrid part.
                let [a, b] =
                    [[rank, inputs], [outputs, rank]].map(|it| tensor(random, Dtype::F32, &it));
                let form = Form::LowRank(LowRank::linear(a, b, Scaling::of_rank(3)));
                components.push(Component { target: target.clone(), form });
            }
            components.push(Component { target, form });
        } else if random.below(8) == 0 {
            components.extend(random_experts(random, &module, scaling));
        } else {
            let factors = [[rank, inputs], [outputs, rank]].map(|shape| {
                let dtype = *random.pick(&[Dtype::F32, Dtype::F16, Dtype::Bf16]);
                let bytes = random.bytes(dtype.tensor_bytes(&shape).unwrap() as usize);
                (dtype, shape.to_vec(), bytes)
            });
            components.push(component(module, factors, scaling));
        }
    }
    let mut made = adapter(components);
    made.names = *random.pick(&[None, Some(AdapterFormat::Kohya), Some(AdapterFormat::Comfy)]);
    let metadata: std::collections::BTreeMap<String, String> =
        (0..random.below(4)).map(|_| (random.text(5), random.text(8))).collect();
    made.metadata = metadata.into_iter().collect();
    made.fan_in_fan_out = *random.pick(&[None, Some(false), Some(true)]);
    made.base.name = Some(random.text(9)).filter(|name| !name.is_empty());
    let floats = (0..8).map(|_| f64::from_bits(random.next())).map(Value::from);
    let mut values: Vec<Value> = floats.filter(|value| !value.is_null()).collect();
    values.extend(
        (0..8).map(|_| json!(random.below(1000) as f64 * 10f64.powi(random.below(40) as i32 - 20))),
    );
    values.push(random.next().into());
    values.push(random.text(9).into());
    made.extensions.insert("test.values".into(), json!({"copy": "safe", "value": values}));
    made
}

/// F5: written, read and written again, any adapter is the same, in every fact and every byte.
#[test]
fn random_adapters_survive() {
    let scratch = tempfile::tempdir().unwrap();
    let mut random = Random(1);
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..400 {
        let adapter = random_adapter(&mut random);
        let path = scratch.path().join(format!("{round}.safetensors"));
        write(&adapter, &path);
        let found = read(&path).unwrap();
        assert_eq!(components_of(&found), components_of(&adapter), "round {round}");
        assert_eq!(found.names, adapter.names);
        assert!(encoded(&found) == encoded(&adapter), "round {round}");
        let config = SafetensorsFile::open(&path).unwrap();
        let config = config.header().metadata_value(native::CONFIG_KEY).unwrap().to_owned();
        let config: Value = serde_json::from_str(&config).unwrap();
        let required = config["requires"].as_array().unwrap().iter();
        seen.extend(required.map(|feature| feature.as_str().unwrap().to_owned()));
    }
    assert!(seen.iter().eq(native::FEATURES), "{seen:?}");
}

/// Every adapter of every method of PEFT and of loralib that is read is held without loss.
#[test]
fn adapters_of_every_method_survive() {
    let scratch = tempfile::tempdir().unwrap();
    let mut seen = std::collections::BTreeSet::new();
    let mut count = 0;
    for case in entries(&fixture("features"), "").iter().filter(|it| it.join("case.json").exists())
    {
        let described = std::fs::read(case.join("case.json")).unwrap();
        let described: Value = serde_json::from_slice(&described).unwrap();
        let given = &described["options"];
        let groups = given["enable_lora"].as_array();
        let options = ReadOptions {
            alpha: given["alpha"].as_f64(),
            enable_lora: groups.map(|groups| groups.iter().map(|it| it == true).collect()),
            ..ReadOptions::default()
        };
        let without_groups = ReadOptions { enable_lora: None, ..options.clone() };
        for adapter in described["adapters"].as_array().unwrap() {
            let path = case.join(adapter["path"].as_str().unwrap());
            let given_later = options.clone();
            for options in [&options, &without_groups] {
                let Ok(adapter) = lora_format::read(&path, options) else { continue };
                let copy = scratch.path().join(format!("{count}"));
                write(&adapter, &copy);
                let found = read(&copy).unwrap();
                assert_eq!(components_of(&found), components_of(&adapter), "{}", name(case));
                assert_eq!(found.source, adapter.source);
                assert_eq!(found.metadata.len(), adapter.metadata.len());
                assert!(encoded(&found) == encoded(&adapter), "{}", name(case));
                if options.enable_lora.is_none() && groups.is_some() {
                    // What the user says of fused projections can be said later.
                    let whole = lora_format::read(&path, &given_later).unwrap();
                    let later = ReadOptions { alpha: None, ..given_later.clone() };
                    let found = lora_format::read(&copy, &later).unwrap();
                    assert_eq!(components_of(&found), components_of(&whole), "{}", name(case));
                }
                seen.extend(adapter.components.iter().map(|it| it.form.method()));
                count += 1;
            }
        }
    }
    assert!(count > 250, "{count}");
    let methods = [
        "AdaLoRA",
        "BOFT",
        "C3A",
        "DeLoRA",
        "DoRA",
        "GraLoRA",
        "HRA",
        "HiRA",
        "IA³",
        "LoHa",
        "LoKr",
        "LoRA",
        "MiSS",
        "OFT",
        "SHiRA",
        "VeRA",
        "added",
        "base copy",
        "replaced",
        "token rows",
    ];
    assert!(seen.iter().eq(&methods), "{seen:?}");
}

/// F53: a file of an image model keeps the spelling of its modules, and says so.
#[test]
fn the_naming_of_a_file_of_an_image_model_survives() {
    let scratch = tempfile::tempdir().unwrap();
    let shapes: [(&str, &[usize]); 13] = [
        ("lora_unet_a.hada_w1_a", &[4, 2]),
        ("lora_unet_a.hada_w1_b", &[2, 3]),
        ("lora_unet_a.hada_w2_a", &[4, 2]),
        ("lora_unet_a.hada_w2_b", &[2, 3]),
        ("lora_unet_a.dora_scale", &[1, 3]),
        ("lora_unet_b.lora_down.weight", &[2, 3, 1, 1]),
        ("lora_unet_b.lora_mid.weight", &[2, 2, 3, 3]),
        ("lora_unet_b.lora_up.weight", &[4, 2, 1, 1]),
        ("lora_unet_c.weight", &[1, 3]),
        ("lora_unet_c.on_input", &[]),
        ("lora_unet_d.lora_down.weight", &[2, 3]),
        ("lora_unet_d.lora_up.weight", &[4, 2]),
        ("lora_unet_d.dora_scale", &[1, 3]),
    ];
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    let mut random = Random(3);
    for (name, shape) in shapes {
        let made = tensor(&mut random, Dtype::F32, shape);
        let offsets = [data.len(), data.len() + made.bytes().len()];
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
        header.insert(name.to_owned(), entry);
        data.extend_from_slice(made.bytes());
    }
    let header = Value::from(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    let path = scratch.path().join("image.safetensors");
    std::fs::write(&path, [&length, header.as_bytes(), &data].concat()).unwrap();

    let adapter = read(&path).unwrap();
    let copy = scratch.path().join("copy.safetensors");
    write(&adapter, &copy);
    let found = read(&copy).unwrap();
    assert_eq!((adapter.names, found.names), (Some(adapter.format), Some(AdapterFormat::Kohya)));
    assert_eq!(components_of(&found), components_of(&adapter));
    assert_eq!(found.components.len(), 4);
}

/// F9: an alpha that no F32 can hold is refused when it is written, not when it is read.
#[test]
fn a_scale_beyond_f32_is_not_written() {
    let factors = [(Dtype::F32, vec![1, 1], vec![0; 4]), (Dtype::F32, vec![1, 1], vec![0; 4])];
    let scaling = Scaling { alpha: 1e39, rule: ScalingRule::Direct };
    let error =
        native::encode(&adapter(vec![component("m".into(), factors, scaling)])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "made: the adapter is malformed: `m`: scale times rank is 1e39, more than an F32 `.alpha` \
         tensor can hold"
    );
}

/// F13: what fits no version is refused rather than written as something else.
#[test]
fn what_the_format_cannot_hold_is_refused() {
    let error = native::encode(&adapter(Vec::new())).unwrap_err();
    assert!(matches!(error, Error::Inexpressible { .. }), "{error}");
    let plain = read(&fixture("native/plain.safetensors")).unwrap();
    let refused = |change: &dyn Fn(&mut Component)| {
        let mut changed = plain.clone();
        change(&mut changed.components[0]);
        let error = native::encode(&changed).unwrap_err();
        assert_eq!(native::check(&changed).unwrap_err().to_string(), error.to_string());
        (matches!(error, Error::Inexpressible { .. }), error.to_string())
    };
    let factors = |component: &Component| {
        let Form::LowRank(factors) = component.form.clone() else { panic!() };
        factors
    };
    let decomposed = |change: Form| {
        let magnitude = plain.tensors().next().unwrap().clone();
        Form::Decomposed(Decomposed { change: Box::new(change), magnitude, axis: GainAxis::In })
    };
    let twice = |component: &mut Component| {
        component.form = decomposed(decomposed(component.form.clone()));
    };
    let whole = |component: &mut Component| {
        component.form = decomposed(Form::Replaced(factors(component).a));
    };
    let proportional = |component: &mut Component| {
        let a = factors(component).a;
        component.form = Form::Proportional(LowRank { magnitude: Some(a), ..factors(component) });
    };
    let turned = |component: &mut Component| {
        let (generators, layer) = (factors(component).a, Layer::Merged);
        let (block, neumann_terms, radius) = (3, None, None);
        component.form =
            Form::Rotation(Rotation { generators, block, layer, neumann_terms, radius });
    };
    let nameless = |component: &mut Component| component.target.module = String::new();
    let torn = |component: &mut Component| {
        component.target.parameter = "a.b".into();
        component.form = Form::Replaced(factors(component).a);
    };
    let fused = |component: &mut Component| {
        let (layer, rank_gain) = (Layer::Merged, Some(factors(component).a));
        component.form = Form::LowRank(LowRank { layer, rank_gain, ..factors(component) });
    };
    let changes: [&dyn Fn(&mut Component); 7] =
        [&twice, &whole, &proportional, &turned, &fused, &nameless, &torn];
    for change in changes {
        let (inexpressible, message) = refused(change);
        assert!(inexpressible, "{message}");
    }
    // What a reader would refuse (F15, F53).
    let mut named = plain.clone();
    named.names = Some(AdapterFormat::Peft);
    let error = native::encode(&named).unwrap_err();
    assert!(matches!(error, Error::Inexpressible { .. }), "{error}");
    let mut recorded = plain.clone();
    let config = serde_json::Map::new();
    recorded.source = Some(SourceConfig { format: AdapterFormat::Loralib, config });
    let error = native::encode(&recorded).unwrap_err();
    assert!(matches!(error, Error::Inexpressible { .. }), "{error}");
}

/// F7, F24 to F52: what could not be read again is not written.
#[test]
fn components_that_are_none_are_not_written() {
    let plain = read(&fixture("native/plain.safetensors")).unwrap();
    let Form::LowRank(factors) = plain.components[0].form.clone() else { panic!() };
    let (a, b) = (factors.a.clone(), factors.b.clone());
    let added = |scale| Form::Added { tensor: b.clone(), scale };
    let rows = |indices: &[u64]| Form::Rows { indices: indices.to_vec(), rows: a.clone() };
    let with = |change: &dyn Fn(&mut LowRank)| {
        let mut changed = factors.clone();
        change(&mut changed);
        Form::LowRank(changed)
    };
    let cases: Vec<(Vec<Form>, &str)> = vec![
        (
            vec![with(&|it| it.layer = Layer::Convolution)],
            "`m.lora_A.weight`: shape [2, 3]; A of a linear layer has two dimensions, that of a \
             convolution three to five",
        ),
        (vec![with(&|it| it.b = a.clone())], "`m`: A [2, 3] and B [2, 3] do not agree on the rank"),
        (
            vec![with(&|it| it.magnitude = Some(a.clone()))],
            "`m.weight.lora:magnitude`: shape [2, 3]; a magnitude is one value per output feature",
        ),
        (
            vec![with(&|it| it.scaling.alpha = f64::NAN)],
            "`m`: the scale NaN is not a finite number",
        ),
        (vec![added(f64::INFINITY)], "`m.weight`: the scale inf is not a finite number"),
        (
            vec![rows(&[3, 3])],
            "`m.weight.lora:indices`: the indices of rows must be I64, ascending, none twice or \
             negative, and as many as there are rows",
        ),
        (
            vec![rows(&[1 << 63, u64::MAX])],
            "`m.weight.lora:indices`: the indices of rows must be I64, ascending, none twice or \
             negative, and as many as there are rows",
        ),
        (
            vec![Form::Rows { indices: Vec::new(), rows: b.clone() }],
            "`m.weight.lora:indices`: the indices of rows must be I64, ascending, none twice or \
             negative, and as many as there are rows",
        ),
        (
            vec![rows(&[3, 4]), with(&|_| {})],
            "`m.weight`: token rows and LoRA cannot both act on it",
        ),
        (
            vec![Form::Rotation(Rotation {
                generators: a.clone(),
                block: 4,
                layer: Layer::Linear,
                neumann_terms: None,
                radius: None,
            })],
            "`m.weight.lora:rotation.generators`: shape [2, 3]; its rows are the elements above a \
             block's diagonal",
        ),
        (
            vec![Form::Tucker(Tucker {
                a: a.clone(),
                b: b.clone(),
                core: a.clone(),
                scaling: factors.scaling,
            })],
            "`m.weight.lora:tucker.mid`: shape [2, 3]; beside the form's other tensors it must be \
             q × r × kernel",
        ),
        (
            vec![Form::Grid(Grid {
                a: Tensor::new(String::new(), Dtype::F32, vec![1, 1, 1], vec![0; 4]).unwrap(),
                b: Tensor::new(String::new(), Dtype::F32, vec![1, 1, 1], vec![0; 4]).unwrap(),
                scaling: Scaling { alpha: f64::NAN, ..factors.scaling },
                rank: 1,
            })],
            "`m.weight`: the scale NaN is not a finite number",
        ),
        (
            vec![Form::Experts(Experts {
                a: a.clone(),
                b: b.clone(),
                depth: 0,
                candidates: Vec::new(),
            })],
            "`m.weight`: 0 candidates for the parameters that its name lists",
        ),
        (
            vec![Form::Replaced(a.clone()), Form::Replaced(b.clone())],
            "`m.weight`: replaced and replaced cannot both act on it",
        ),
    ];
    for (forms, expected) in cases {
        let component = |form| Component { target: Target::weight("m"), form };
        let made = adapter(forms.into_iter().map(component).collect());
        let message = native::encode(&made).unwrap_err().to_string();
        assert_eq!(message, format!("made: the adapter is malformed: {expected}"));
    }
}

/// F13: 36,096 targets (a model of 94 layers with 128 experts of three weights each) make a header
/// of some 16 MB, and no entry per target in the configuration.
#[test]
fn an_adapter_of_36_096_experts_stays_small() {
    let started = Instant::now();
    let mut components = Vec::with_capacity(36_096);
    for layer in 0..94 {
        for expert in 0..128 {
            for projection in ["gate_proj", "up_proj", "down_proj"] {
                let module = format!("model.layers.{layer}.mlp.experts.{expert}.{projection}");
                let number = components.len() as u16;
                let factor = |shape: [usize; 2], seed: u16| {
                    (Dtype::Bf16, shape.to_vec(), [number ^ seed; 2].map(u16::to_le_bytes).concat())
                };
                let scaling = Scaling { alpha: 32.0, rule: ScalingRule::AlphaOverSqrtRank };
                components.push(component(module, [factor([1, 2], 0), factor([2, 1], 1)], scaling));
            }
        }
    }
    let written = adapter(components);
    assert_eq!(written.components.len(), 36_096);
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("experts.safetensors");
    write(&written, &path);

    let file = SafetensorsFile::open(&path).unwrap();
    let header = file.header().data_start;
    assert!((10_000_000..25_000_000).contains(&header), "{header} bytes");
    let config = file.header().metadata_value(native::CONFIG_KEY).unwrap();
    assert!(config.len() < 300, "{config}");

    let found = native::read(&file).unwrap();
    let mut expected: Vec<&Component> = written.components.iter().collect();
    expected.sort_by(|x, y| x.target.cmp(&y.target));
    assert_eq!(found.components.len(), expected.len());
    for (found, expected) in found.components.iter().zip(expected) {
        let (Form::LowRank(x), Form::LowRank(y)) = (&found.form, &expected.form) else { panic!() };
        assert_eq!((&found.target, x.scaling), (&expected.target, y.scaling));
        assert_eq!((x.a.bytes(), x.b.bytes()), (y.a.bytes(), y.b.bytes()));
        assert_eq!((&x.a.shape, &x.b.shape), (&y.a.shape, &y.b.shape));
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("header of {header} bytes; written, read and compared in {seconds:.2} s");
}

/// F32: facts that many components have in common take one entry.
#[test]
fn facts_of_many_components_stay_small() {
    let mut random = Random(9);
    let component = |index: usize| {
        let module = format!("model.layers.{}.mlp.experts.{}.up_proj", index / 128, index % 128);
        let gain = tensor(&mut random, Dtype::Bf16, &[1, 2]);
        let form = Form::Gain(Gain { gain, axis: GainAxis::In, stored: GainStored::Whole });
        Component { target: Target::weight(module), form }
    };
    let made = adapter((0..36_096).map(component).collect());
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("gains.safetensors");
    write(&made, &path);
    let file = SafetensorsFile::open(&path).unwrap();
    let config = file.header().metadata_value(native::CONFIG_KEY).unwrap();
    assert!(config.len() < 300, "{config}");
    assert_eq!(native::read(&file).unwrap().components.len(), 36_096);
}

/// An adapter whose file changes while it is copied gives no output: neither of ours nor of PEFT's.
#[test]
fn a_changed_input_leaves_no_output() {
    use lora_format::codec::peft;
    use lora_format::io::atomic::{Durability, Overwrite};
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("source.safetensors");
    std::fs::copy(fixture("native/plain.safetensors"), &source).unwrap();
    let adapter = read(&source).unwrap();
    let mut bytes = std::fs::read(&source).unwrap();
    bytes.push(0);
    std::fs::write(&source, bytes).unwrap();
    let output = scratch.path().join("output");
    for error in [
        native::write(&adapter, &output, Overwrite::Never, Durability::Cached).unwrap_err(),
        peft::write_directory(&adapter, &output, Overwrite::Never, Durability::Cached).unwrap_err(),
    ] {
        assert!(error.to_string().contains("changed while it was being read"), "{error}");
    }
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 1);
}
