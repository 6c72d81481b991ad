//! The native format: the vectors, and what the format promises about size and identity.

use std::path::{Path, PathBuf};
use std::time::Instant;

use lora_format::checkpoint::Checkpoint;
use lora_format::container::safetensors::SafetensorsFile;
use lora_format::fingerprint::{self, Fingerprint, TargetSamples, Verdict};
use lora_format::model::{
    AdapterFormat, Component, Form, Layer, LowRank, Scaling, ScalingRule, Target,
};
use lora_format::native::{self, DigestVerdict};
use lora_format::{Adapter, Dtype, Error, Tensor};
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

/// The description that `scripts/lora_format.py read` prints.
pub(crate) fn describe(path: &Path) -> Value {
    let adapter = read(path).unwrap();
    let factor = |tensor: &Tensor| {
        let sha256: String =
            Sha256::digest(tensor.bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "sha256": sha256})
    };
    let component = |component: &Component| {
        let Component { target, form } = component;
        let mut found = json!({"module": target.module});
        if target.parameter != "weight" {
            found["parameter"] = target.parameter.as_str().into();
        }
        let of_form = match form {
            Form::LowRank(factors) => {
                let mut of_form = json!({
                    "rank": factors.rank(), "alpha": factors.scaling.alpha,
                    "rule": factors.scaling.rule.name(), "scale": factors.scale(),
                    "a": factor(&factors.a), "b": factor(&factors.b),
                });
                match factors.layer {
                    Layer::Convolution => of_form["layer"] = "convolution".into(),
                    Layer::Embedding => of_form["layer"] = "embedding".into(),
                    _ => {}
                }
                if let Some(magnitude) = &factors.magnitude {
                    of_form["magnitude"] = factor(magnitude);
                }
                of_form
            }
            Form::Replaced(value) => json!({"value": factor(value)}),
            Form::Rows { indices, rows } => json!({"indices": indices, "rows": factor(rows)}),
            Form::Added { tensor, scale } => json!({"added": factor(tensor), "scale": scale}),
            other => panic!("{other:?}"),
        };
        found.as_object_mut().unwrap().extend(of_form.as_object().unwrap().clone());
        found
    };
    let (recorded, matches) = match digest(path) {
        DigestVerdict::Intact { digest } => (digest, true),
        DigestVerdict::Damaged { recorded, .. } => (recorded, false),
    };
    json!({
        "modules": adapter.components.iter().map(component).collect::<Vec<_>>(),
        "fan_in_fan_out": adapter.fan_in_fan_out,
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

/// F3, F7 to F9, F12, F16, F17, F22 to F30: what is found is what the description says.
#[test]
fn every_vector_is_read_as_described() {
    for path in vectors() {
        let text = std::fs::read(path.with_extension("json")).unwrap();
        let expected: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(describe(&path), expected, "{}", name(&path));
        assert_eq!(read(&path).unwrap().format, AdapterFormat::Native);
    }
}

/// F3 to F5, F13, F14, F22: rewritten, every vector gives the same bytes.
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

/// F4, F13, F18, F21: files that we would have written otherwise become what we would have written.
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
    match random.below(6) {
        0 => Form::Replaced({
            let dtypes: Vec<Dtype> = Dtype::all().filter(|dtype| dtype.bits() >= 8).collect();
            let shape: Vec<usize> = (0..random.below(5)).map(|_| random.below(4)).collect();
            let dtype = *random.pick(&dtypes);
            tensor(random, dtype, &shape)
        }),
        1 => {
            let mut indices: Vec<u64> = (0..outputs).map(|_| random.next() >> 1).collect();
            indices.sort_unstable();
            indices.dedup();
            let shape = [indices.len(), inputs];
            Form::Rows { indices, rows: tensor(random, float, &shape) }
        }
        2 => Form::Added {
            tensor: tensor(random, float, &[outputs, inputs]),
            scale: random.next() as i64 as f64 / 3.0,
        },
        kind => {
            let (mut a, mut b) = (vec![rank, inputs], vec![outputs, rank]);
            if kind == 3 {
                let dimensions = 1 + random.below(3);
                a.extend((0..dimensions).map(|_| 1 + random.below(3)));
                b.resize(a.len(), 1);
            }
            let [a, b] = [a, b].map(|shape| tensor(random, float, &shape));
            let layer = [Layer::Convolution, Layer::Embedding, Layer::Linear][kind - 3];
            let dora = kind == 5 || random.below(2) == 0;
            let magnitude = dora.then(|| tensor(random, float, &[outputs]));
            Form::LowRank(LowRank { layer, magnitude, ..LowRank::linear(a, b, scaling) })
        }
    }
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
    let components = (0..1 + random.below(9)).map(|index| {
        let [rank, inputs, outputs] = [(); 3].map(|()| 1 + random.below(5));
        let scaling = Scaling { alpha: *random.pick(&alphas), rule: *random.pick(&RULES) };
        if random.below(2) == 0 {
            let target = Target {
                module: format!("{}{index}", random.text(6)),
                parameter: (*random.pick(&["weight", "bias", "in_proj_weight"])).to_owned(),
            };
            return Component { target, form: random_form(random, scaling) };
        }
        let factors = [[rank, inputs], [outputs, rank]].map(|shape| {
            let dtype = *random.pick(&[Dtype::F32, Dtype::F16, Dtype::Bf16]);
            let bytes = random.bytes(dtype.tensor_bytes(&shape).unwrap() as usize);
            (dtype, shape.to_vec(), bytes)
        });
        component(format!("{}{index}", random.text(6)), factors, scaling)
    });
    let mut made = adapter(components.collect());
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

/// F5: written, read and written again, any adapter is the same.
#[test]
fn random_adapters_survive() {
    let scratch = tempfile::tempdir().unwrap();
    let mut random = Random(1);
    for round in 0..200 {
        let adapter = random_adapter(&mut random);
        let path = scratch.path().join(format!("{round}.safetensors"));
        write(&adapter, &path);
        assert!(encoded(&read(&path).unwrap()) == encoded(&adapter), "round {round}");
    }
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
    let gain = |component: &mut Component| {
        let mut factors = factors(component);
        factors.rank_gain = Some(factors.b.clone());
        component.form = Form::LowRank(factors);
    };
    let merged = |component: &mut Component| {
        let factors = LowRank { layer: Layer::Merged, ..factors(component) };
        component.form = Form::LowRank(factors);
    };
    let copy = |component: &mut Component| component.form = Form::Base(factors(component).a);
    let nameless = |component: &mut Component| component.target.module = String::new();
    let torn = |component: &mut Component| {
        component.target.parameter = "a.b".into();
        component.form = Form::Replaced(factors(component).a);
    };
    for change in [&gain as &dyn Fn(&mut Component), &merged, &copy, &nameless, &torn] {
        let (inexpressible, message) = refused(change);
        assert!(inexpressible, "{message}");
    }
}

/// F7, F24 to F30: what could not be read again is not written.
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
