//! Two checkpoints paired up: names, ties, vocabularies, dtypes, and ΔW against arithmetic of its
//! own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::slice::from_ref;

use lora_format::Dtype;
use lora_format::checkpoint::Checkpoint;
use lora_merge::kernels::{FloatType, Rows};
use lora_merge::pair::{Change, Kind, Pair, PairNote, PairProblem, Pairing, Side, Tie, measure};
use lora_merge::{Error, Result};
use serde_json::{Value, json};

use crate::support::{
    Prng, Tensor, fixtures, least, read_json, read_model, read_tensors, ulp, unit_roundoff,
    write_json, write_tensors,
};

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// Two models in a scratch directory.
struct Models {
    directory: tempfile::TempDir,
}

impl Models {
    fn new(base: &[Tensor], tuned: &[Tensor]) -> Models {
        let models = Models { directory: tempfile::tempdir().unwrap() };
        models.write("base", base);
        models.write("tuned", tuned);
        models
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, tensors: &[Tensor]) {
        let path = self.path(name);
        std::fs::create_dir_all(&path).unwrap();
        write_tensors(&path.join("model.safetensors"), tensors, &[("format", "pt")]);
    }

    fn configured(self, name: &str, config: &Value) -> Models {
        write_json(&self.path(name).join("config.json"), config);
        self
    }

    fn pairing(&self) -> Result<Pairing> {
        pairing(&self.path("base"), &self.path("tuned"))
    }

    fn paired(&self) -> Pairing {
        self.pairing().unwrap()
    }

    fn problem(&self) -> PairProblem {
        match self.pairing() {
            Err(Error::Pair { base, tuned, problem }) => {
                assert_eq!((base, tuned), (self.path("base"), self.path("tuned")));
                *problem
            }
            Err(other) => panic!("another error: {other}"),
            Ok(pairing) => panic!("paired: {:?}", pairing.pairs),
        }
    }
}

fn pairing(base: &Path, tuned: &Path) -> Result<Pairing> {
    Pairing::new(Checkpoint::open(base)?, Checkpoint::open(tuned)?)
}

fn names(pairing: &Pairing) -> Vec<(&str, &str)> {
    pairing.pairs.iter().map(|pair| (pair.name.as_str(), pair.tuned_name.as_str())).collect()
}

fn find<'a>(pairing: &'a Pairing, name: &str) -> (usize, &'a Pair) {
    let found = pairing.pairs.iter().enumerate().find(|(_, pair)| pair.name == name);
    found.unwrap_or_else(|| panic!("{name} is not paired: {:?}", names(pairing)))
}

fn random(prng: &mut Prng, name: &str, shape: &[usize]) -> Tensor {
    Tensor::random(prng, name, Dtype::F32, shape, 1.0)
}

/// What `measure` gives, by the definitions.
fn change_of(base: &Tensor, tuned: &Tensor) -> Change {
    let mut change = Change::default();
    let finer = unit_roundoff(tuned.dtype) < unit_roundoff(base.dtype);
    for (old, new) in base.values().into_iter().zip(tuned.values()) {
        let difference = f64::from(new as f32 - old as f32);
        change.elements += 1;
        change.base_energy += old * old;
        change.energy += difference * difference;
        change.largest = change.largest.max(difference.abs());
        if new != old {
            change.changed += 1;
            change.storage_variance += ulp(new, tuned.dtype).powi(2) / 12.0;
            if finer {
                change.storage_variance += ulp(old, base.dtype).powi(2) / 12.0;
            }
        }
    }
    change.storage_variance /= change.elements.max(1) as f64;
    change
}

/// Equal but for the order of f64 sums of a few million terms.
fn close(found: f64, wanted: f64) -> bool {
    (found - wanted).abs() <= 1e-10 * wanted.abs()
}

fn assert_change(found: &Change, wanted: &Change, label: &str) {
    assert_eq!(
        (found.elements, found.changed, found.largest),
        (wanted.elements, wanted.changed, wanted.largest),
        "{label}"
    );
    assert_eq!((found.non_finite, found.first_non_finite), (0, None), "{label}");
    for (found, wanted) in [
        (found.energy, wanted.energy),
        (found.base_energy, wanted.base_energy),
        (found.storage_variance, wanted.storage_variance),
    ] {
        assert!(close(found, wanted), "{label}: {found} for {wanted}");
    }
}

/// Every pair is what its two tensors differ by.
fn assert_deltas(pairing: &Pairing, base: &[Tensor], tuned: &[Tensor], label: &str) {
    let mapped = pairing.open().unwrap();
    for (index, pair) in pairing.pairs.iter().enumerate() {
        let find = |tensors: &[Tensor], name: &str| {
            tensors.iter().find(|tensor| tensor.name == name).unwrap().clone()
        };
        let (old, new) = (find(base, &pair.base_name), find(tuned, &pair.tuned_name));
        let label = format!("{label}: {}", pair.name);
        assert_change(&measure(&mapped.delta(index)), &change_of(&old, &new), &label);
    }
}

/// A matrix of one dtype, and the same with two thirds of its elements changed, in another.
fn changed(prng: &mut Prng, [from, to]: [Dtype; 2], rows: usize, cols: usize) -> [Tensor; 2] {
    let base = Tensor::random(prng, "a.weight", from, &[rows, cols], 1.0);
    let moved = |(index, value): (usize, f64)| {
        if index % 3 == 0 { value } else { value + 0.02 * prng.unit() }
    };
    let values: Vec<f64> = base.values().into_iter().enumerate().map(moved).collect();
    let tuned = Tensor::new("a.weight", to, &[rows, cols], &values);
    [base, tuned]
}

#[test]
fn every_mix_of_dtypes_is_the_difference_in_f32() {
    let mut prng = Prng::new(1);
    for from in FLOATS {
        for to in FLOATS {
            let (rows, cols) = (37, 53);
            let [base, tuned] = changed(&mut prng, [from, to], rows, cols);
            let label = format!("{from} → {to}");
            let models = Models::new(from_ref(&base), from_ref(&tuned));
            let pairing = models.paired();
            let (index, pair) = find(&pairing, "a.weight");
            assert_eq!((pair.base_dtype, pair.tuned_dtype), (from, to));
            assert_eq!((pair.kind, pair.matrix()), (Kind::Linear, (rows, cols)));
            let mapped = pairing.open().unwrap();
            let delta = mapped.delta(index);
            assert_eq!(delta.shape(), (rows, cols));

            let (old, new) = (base.values(), tuned.values());
            for (first, count) in [(0, rows), (5, 1), (rows - 3, 3), (rows, 0)] {
                let range = first * cols..(first + count) * cols;
                let (old, new) = (&old[range.clone()], &new[range.clone()]);
                let mut out = vec![f32::NAN; range.len()];
                delta.read(first, &mut out);
                for (out, (old, new)) in out.iter().zip(old.iter().zip(new)) {
                    assert_eq!(out.to_bits(), (*new as f32 - *old as f32).to_bits(), "{label}");
                }
                delta.read_base(first, &mut out);
                assert!(out.iter().zip(old).all(|(out, old)| f64::from(*out) == *old), "{label}");
                delta.read_tuned(first, &mut out);
                assert!(out.iter().zip(new).all(|(out, new)| f64::from(*out) == *new), "{label}");

                let ((bytes, of_tuned), (base_bytes, of_base)) =
                    delta.bytes(first..first + count).unwrap();
                let size = |float: FloatType| range.start * float.size()..range.end * float.size();
                assert_eq!(bytes, &tuned.data[size(of_tuned)], "{label}");
                assert_eq!(base_bytes, &base.data[size(of_base)], "{label}");
                match delta.stored(first..first + count) {
                    Some(Rows::Stored { tuned, tuned_type, base: Some(base) }) => {
                        assert_eq!(
                            (tuned, tuned_type, base),
                            (bytes, of_tuned, (base_bytes, of_base))
                        );
                    }
                    other => panic!("{label}: {other:?}"),
                }
                delta.release(first..first + count);
            }
            assert_change(&measure(&delta), &change_of(&base, &tuned), &label);
        }
    }
}

#[test]
fn a_large_matrix_is_measured_in_spans() {
    let mut prng = Prng::new(2);
    let [base, tuned] = changed(&mut prng, [Dtype::Bf16, Dtype::Bf16], 1201, 2003);
    let models = Models::new(from_ref(&base), from_ref(&tuned));
    let pairing = models.paired();
    let mapped = pairing.open().unwrap();
    assert_change(&measure(&mapped.delta(0)), &change_of(&base, &tuned), "large");
}

#[test]
fn what_did_not_change_is_known() {
    let mut prng = Prng::new(3);
    let base = random(&mut prng, "a.weight", &[9, 7]);
    let mut bits = base.bits();
    bits[0] = 0;
    let base = Tensor::of_bits("a.weight", Dtype::F32, &[9, 7], &bits);
    bits[0] = 1 << 31;
    // Only the sign of a zero, which is no value.
    let tuned = Tensor::of_bits("a.weight", Dtype::F32, &[9, 7], &bits);
    let models = Models::new(&[base], &[tuned]);
    let pairing = models.paired();
    let change = measure(&pairing.open().unwrap().delta(0));
    assert!(change.is_unchanged());
    assert_eq!((change.energy, change.storage_variance, change.largest), (0.0, 0.0, 0.0));
    assert_eq!(change.relative(), 0.0);
}

#[test]
fn what_is_not_finite_is_found_and_left_out() {
    let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let with = |at: usize, value: f64| {
        let mut values = values;
        values[at] = value;
        Tensor::new("a.weight", Dtype::F32, &[2, 3], &values)
    };
    let plain = with(0, 1.5);
    for (base, tuned, side) in [
        (plain.clone(), with(4, f64::NAN), Some(Side::Tuned)),
        (with(4, f64::INFINITY), plain.clone(), Some(Side::Base)),
        (with(4, f64::NEG_INFINITY), with(4, f64::NEG_INFINITY), Some(Side::Tuned)),
        (with(4, f64::from(f32::MAX)), with(4, f64::from(f32::MIN)), None),
    ] {
        let models = Models::new(from_ref(&base), from_ref(&tuned));
        let pairing = models.paired();
        let change = measure(&pairing.open().unwrap().delta(0));
        let first = change.first_non_finite.unwrap();
        assert_eq!((change.non_finite, first.element, first.side), (1, 4, side));
        let rest = |tensor: &Tensor| {
            let mut values = tensor.values();
            values[4] = 0.0;
            Tensor::new("a.weight", Dtype::F32, &[2, 3], &values)
        };
        let wanted = change_of(&rest(&base), &rest(&tuned));
        assert_eq!(
            (change.changed, change.energy, change.base_energy, change.largest),
            (wanted.changed, wanted.energy, wanted.base_energy, wanted.largest)
        );
        assert!(!change.is_unchanged());
    }
}

#[test]
fn tensors_without_elements_and_without_dimensions_are_pairs() {
    let tensors = |value: f64| {
        vec![
            Tensor::zeros("empty.weight", Dtype::F32, &[0, 5]),
            Tensor::zeros("hollow.weight", Dtype::F32, &[0, 1 << 40, 1 << 40]),
            Tensor::zeros("thin.weight", Dtype::F32, &[5, 0]),
            Tensor::new("logit_scale", Dtype::F32, &[], &[value]),
        ]
    };
    let models = Models::new(&tensors(1.0), &tensors(1.5));
    let pairing = models.paired();
    let mapped = pairing.open().unwrap();
    assert_eq!(pairing.pairs.len(), 4);
    for (index, pair) in pairing.pairs.iter().enumerate() {
        let delta = mapped.delta(index);
        let change = measure(&delta);
        let (elements, energy) = if pair.name == "logit_scale" { (1, 0.25) } else { (0, 0.0) };
        assert_eq!((change.elements, change.energy), (elements, energy), "{}", pair.name);
        delta.read(0, &mut vec![0.0; elements as usize]);
    }
}

/// What a small BERT stores, without a prefix.
fn encoder(prng: &mut Prng, prefix: &str) -> Vec<Tensor> {
    let mut tensors =
        vec![random(prng, &format!("{prefix}embeddings.word_embeddings.weight"), &[9, 4])];
    for layer in 0..3 {
        for (name, shape) in [
            ("attention.self.query.weight", &[4, 4][..]),
            ("attention.self.query.bias", &[4]),
            ("attention.output.LayerNorm.weight", &[4]),
            ("attention.output.LayerNorm.bias", &[4]),
            ("output.dense.weight", &[4, 6]),
        ] {
            tensors.push(random(prng, &format!("{prefix}encoder.layer.{layer}.{name}"), shape));
        }
    }
    tensors
}

#[test]
fn prefixes_are_found_in_the_names() {
    for (base, tuned, rename) in [
        ("", "", None),
        ("", "model.", Some(("", "model"))),
        ("bert.", "", Some(("bert", ""))),
        ("", "bert.", Some(("", "bert"))),
        ("transformer.", "module.transformer.", Some(("", "module"))),
        ("model.", "base_model.model.model.", Some(("", "base_model.model"))),
        ("module.bert.", "bert.", Some(("module", ""))),
        ("distilbert.", "encoder_of_mine.", Some(("distilbert", "encoder_of_mine"))),
        (
            "language_model.model.",
            "model.language_model.",
            Some(("language_model.model", "model.language_model")),
        ),
        // Inserted by a wrapper, and no prefix at all.
        ("", "_orig_mod.", None),
        ("", "_fsdp_wrapped_module._orig_mod.", None),
        ("_orig_mod.bert.", "module.bert.", Some(("", "module"))),
    ] {
        let mut prng = Prng::new(4);
        let ours = encoder(&mut prng, base);
        let mut theirs = encoder(&mut prng, tuned);
        theirs.push(random(&mut prng, "classifier.weight", &[2, 4]));
        theirs.push(random(&mut prng, "classifier.bias", &[2]));
        let models = Models::new(&ours, &theirs);
        let pairing = models.paired();
        let label = format!("{base:?} → {tuned:?}");
        assert_eq!(pairing.pairs.len(), ours.len(), "{label}");
        for (name, tuned_name) in names(&pairing) {
            let rest = name.strip_prefix(base).unwrap();
            assert_eq!(tuned_name.strip_prefix(tuned), Some(rest), "{label}");
        }
        assert_eq!(pairing.only_base, [""; 0], "{label}");
        assert_eq!(pairing.only_tuned, ["classifier.bias", "classifier.weight"], "{label}");
        let found: Vec<(&str, &str)> = pairing
            .renames
            .iter()
            .map(|rename| {
                assert_eq!(rename.parameters, ours.len(), "{label}");
                (rename.base.as_str(), rename.tuned.as_str())
            })
            .collect();
        assert_eq!(found, rename.into_iter().collect::<Vec<_>>(), "{label}");
        let noted =
            pairing.notes.iter().filter(|note| matches!(note, PairNote::Renamed(_))).count();
        assert_eq!(noted, found.len(), "{label}");
        let respelled = pairing.notes.iter().any(|note| matches!(note, PairNote::Respelled { .. }));
        assert_eq!(respelled, base != tuned && rename.is_none(), "{label}");
    }
}

#[test]
fn several_prefixes_may_change_at_once() {
    let path = fixtures().join("peft/llava/base");
    let ours: Vec<Tensor> = read_model(&path).into_values().collect();
    // As transformers 5 names them.
    let renamed = |name: &str| {
        for (old, new) in [
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ] {
            if let Some(rest) = name.strip_prefix(old) {
                return format!("{new}{rest}");
            }
        }
        panic!("{name}");
    };
    let theirs: Vec<Tensor> = ours.iter().map(|one| one.renamed(&renamed(&one.name))).collect();
    let config = read_json(&path.join("config.json"));
    for backwards in [false, true] {
        let models = match backwards {
            false => Models::new(&ours, &theirs),
            true => Models::new(&theirs, &ours),
        };
        let pairing = models.configured("base", &config).configured("tuned", &config).paired();
        assert_eq!(pairing.pairs.len(), ours.len(), "{:?}", pairing.only_base);
        for (name, tuned) in names(&pairing) {
            let (old, new) = if backwards { (tuned, name) } else { (name, tuned) };
            assert_eq!(renamed(old), new);
        }
        let mapped = pairing.open().unwrap();
        assert!((0..ours.len()).all(|index| measure(&mapped.delta(index)).is_unchanged()));
        assert_eq!(pairing.renames.len(), 3, "{:?}", pairing.renames);
    }
}

#[test]
fn old_names_of_norms_are_known() {
    let mut prng = Prng::new(5);
    let ours = encoder(&mut prng, "bert.");
    let old = |name: &str| {
        let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
        name.replace("LayerNorm.bias", "LayerNorm.beta")
    };
    let theirs: Vec<Tensor> = ours.iter().map(|one| one.renamed(&old(&one.name))).collect();
    for models in [Models::new(&ours, &theirs), Models::new(&theirs, &ours)] {
        let pairing = models.paired();
        assert_eq!(pairing.pairs.len(), ours.len());
        let kind = |kind: Kind| pairing.pairs.iter().filter(|pair| pair.kind == kind).count();
        assert_eq!((kind(Kind::Norm), kind(Kind::Bias), kind(Kind::Linear)), (3, 6, 6));
        match pairing.notes.as_slice() {
            [note @ PairNote::Respelled { parameters: 6, .. }] => {
                assert!(
                    note.to_string().starts_with("6 parameters are spelled differently: `bert.")
                );
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn two_towers_that_fit_equally_well_are_refused() {
    let mut prng = Prng::new(6);
    let ours = encoder(&mut prng, "");
    let mut theirs = encoder(&mut prng, "question.");
    theirs.extend(encoder(&mut prng, "passage."));
    let models = Models::new(&ours, &theirs);
    match models.problem() {
        PairProblem::TwoPrefixes { ways, examples } => {
            let [first, second] = *ways;
            assert_eq!((first.tuned.as_str(), second.tuned.as_str()), ("passage", "question"));
            assert_eq!(first.parameters, ours.len());
            assert_eq!(examples.len(), 3);
            for [one, other] in examples {
                assert_eq!(one.0, other.0);
                assert_eq!(one.1, format!("passage.{}", one.0));
                assert_eq!(other.1, format!("question.{}", one.0));
            }
        }
        other => panic!("{other}"),
    }
    let text = models.pairing().unwrap_err().to_string();
    let shown = "two ways of matching the names are equally good, no prefix → `passage.` (16 \
                 parameters) and no prefix → `question.` (16 parameters): \
                 `embeddings.word_embeddings.weight` = `passage.embeddings.word_embeddings.weight` or";
    assert!(text.contains(shown), "{text}");
    // Towards the two, from the one: the same.
    let backwards = Models::new(&theirs, &ours);
    assert!(matches!(backwards.problem(), PairProblem::TwoPrefixes { .. }));
    // One that fits better is taken.
    theirs.pop();
    let pairing = Models::new(&ours, &theirs).paired();
    assert_eq!(pairing.renames[0].tuned, "question");
    assert_eq!((pairing.pairs.len(), pairing.only_tuned.len()), (16, 15));
}

#[test]
fn heads_are_not_each_other_because_their_shapes_are_equal() {
    let mut prng = Prng::new(7);
    let mut ours = encoder(&mut prng, "bert.");
    ours.push(random(&mut prng, "cls.seq_relationship.weight", &[2, 4]));
    ours.push(random(&mut prng, "cls.seq_relationship.bias", &[2]));
    ours.push(random(&mut prng, "cls.predictions.transform.dense.weight", &[4, 4]));
    let mut theirs = encoder(&mut prng, "bert.");
    theirs.push(random(&mut prng, "classifier.weight", &[2, 4]));
    theirs.push(random(&mut prng, "classifier.bias", &[2]));
    theirs.push(random(&mut prng, "bert.pooler.dense.weight", &[4, 4]));
    let pairing = Models::new(&ours, &theirs).paired();
    assert_eq!(pairing.pairs.len(), 16);
    assert_eq!(pairing.renames, []);
    assert_eq!(
        pairing.only_base,
        [
            "cls.predictions.transform.dense.weight",
            "cls.seq_relationship.bias",
            "cls.seq_relationship.weight"
        ]
    );
    assert_eq!(
        pairing.only_tuned,
        ["bert.pooler.dense.weight", "classifier.bias", "classifier.weight"]
    );
}

#[test]
fn models_with_nothing_in_common_are_refused() {
    let mut prng = Prng::new(8);
    let ours = encoder(&mut prng, "");
    let theirs = [random(&mut prng, "decoder.blocks.0.w1", &[4, 4]), random(&mut prng, "x", &[3])];
    let models = Models::new(&ours, &theirs);
    match models.problem() {
        PairProblem::NothingInCommon { base, base_parameters, tuned, tuned_parameters } => {
            assert_eq!((base.len(), base_parameters, tuned_parameters), (3, 16, 2));
            assert_eq!(tuned, ["decoder.blocks.0.w1", "x"]);
        }
        other => panic!("{other}"),
    }
    let empty = Models::new(&ours, &[]);
    assert!(matches!(empty.problem(), PairProblem::NothingInCommon { tuned_parameters: 0, .. }));
}

#[test]
fn shards_are_one_model() {
    let mut prng = Prng::new(9);
    let ours = encoder(&mut prng, "");
    let theirs: Vec<Tensor> = encoder(&mut prng, "");
    let models = Models::new(&ours, &[]);
    let tuned = models.path("sharded");
    std::fs::create_dir(&tuned).unwrap();
    let mut map = serde_json::Map::new();
    for (number, tensors) in theirs.chunks(6).enumerate() {
        let name = format!("model-{:05}-of-00003.safetensors", number + 1);
        write_tensors(&tuned.join(&name), tensors, &[("format", "pt")]);
        tensors.iter().for_each(|one| {
            map.insert(one.name.clone(), json!(name));
        });
    }
    write_json(&tuned.join("model.safetensors.index.json"), &json!({"weight_map": map}));
    let pairing = pairing(&models.path("base"), &tuned).unwrap();
    let mapped = pairing.open().unwrap();
    assert_eq!(pairing.pairs.len(), ours.len());
    for (base, tuned) in ours.iter().zip(&theirs) {
        let (index, _) = find(&pairing, &base.name);
        assert_change(&measure(&mapped.delta(index)), &change_of(base, tuned), &base.name);
        let (info, bytes) = mapped.tuned_tensor(&tuned.name).unwrap();
        assert_eq!((&info.shape, bytes), (&tuned.shape, tuned.data.as_slice()));
        mapped.release_tuned(&tuned.name);
    }
    assert!(mapped.tuned_tensor("nothing").is_none());
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn table(prng: &mut Prng, name: &str) -> Tensor {
    random(prng, name, &[40, 8])
}

/// The same with small changes.
fn nudged(prng: &mut Prng, tensor: &Tensor, name: &str) -> Tensor {
    let values: Vec<f64> =
        tensor.values().into_iter().map(|value| value + 0.01 * prng.unit()).collect();
    Tensor::new(name, Dtype::F32, &tensor.shape, &values)
}

/// What a side stores of its two ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ends {
    Embedding,
    Head,
    Equal,
    Different,
}

fn ends(prng: &mut Prng, ends: Ends, embedding: &Tensor, prefix: &str) -> Vec<Tensor> {
    let named = |tensor: &Tensor, name: &str| tensor.renamed(&format!("{prefix}{name}"));
    let mut tensors =
        vec![random(prng, &format!("{prefix}model.layers.0.mlp.up_proj.weight"), &[6, 8])];
    if ends != Ends::Head {
        tensors.push(named(embedding, EMBEDDING));
    }
    match ends {
        Ends::Embedding => {}
        Ends::Head | Ends::Equal => tensors.push(named(embedding, HEAD)),
        Ends::Different => {
            let head = nudged(prng, embedding, HEAD);
            tensors.push(named(&head, HEAD));
        }
    }
    tensors
}

#[test]
fn ties_of_every_kind() {
    use Ends::{Different, Embedding, Equal, Head};
    let (yes, no) = (Some(true), Some(false));
    // What each side stores and says; the pairs as (name, base's, tuned's, tie); what is left.
    type Wanted<'a> = (&'a [(&'a str, &'a str, &'a str, Tie)], &'a [&'a str], &'a [&'a str]);
    let e = (EMBEDDING, EMBEDDING, EMBEDDING);
    let both: &[_] = &[(e.0, e.1, e.2, Tie::Both)];
    type OneSide = (Ends, Option<bool>);
    let cases: [(OneSide, OneSide, Wanted<'_>); 14] = [
        ((Embedding, yes), (Embedding, yes), (both, &[], &[])),
        ((Equal, yes), (Equal, yes), (both, &[], &[])),
        // The values say it.
        ((Equal, None), (Equal, None), (both, &[], &[])),
        ((Embedding, yes), (Equal, yes), (both, &[], &[])),
        ((Equal, yes), (Embedding, yes), (both, &[], &[])),
        // What is left of two equal tensors after one was dropped.
        ((Embedding, yes), (Head, yes), (&[(EMBEDDING, EMBEDDING, HEAD, Tie::Both)], &[], &[])),
        ((Head, yes), (Embedding, yes), (&[(HEAD, HEAD, EMBEDDING, Tie::Both)], &[], &[])),
        // Fine-tuning untied them.
        (
            (Embedding, yes),
            (Different, no),
            (&[(HEAD, EMBEDDING, HEAD, Tie::Base), (e.0, e.1, e.2, Tie::Base)], &[], &[]),
        ),
        (
            (Equal, yes),
            (Different, no),
            (&[(HEAD, HEAD, HEAD, Tie::Base), (e.0, e.1, e.2, Tie::Base)], &[], &[]),
        ),
        // Or tied them.
        (
            (Different, no),
            (Embedding, yes),
            (&[(HEAD, HEAD, EMBEDDING, Tie::Tuned), (e.0, e.1, e.2, Tie::Tuned)], &[], &[]),
        ),
        (
            (Different, no),
            (Different, no),
            (&[(HEAD, HEAD, HEAD, Tie::None), (e.0, e.1, e.2, Tie::None)], &[], &[]),
        ),
        // A head that one side does not have at all.
        ((Embedding, no), (Different, no), (&[(e.0, e.1, e.2, Tie::None)], &[], &[HEAD])),
        ((Different, no), (Embedding, no), (&[(e.0, e.1, e.2, Tie::None)], &[HEAD], &[])),
        // Nothing is said, and the head's rows are nearly the embedding's.
        (
            (Embedding, None),
            (Different, no),
            (&[(HEAD, EMBEDDING, HEAD, Tie::Base), (e.0, e.1, e.2, Tie::Base)], &[], &[]),
        ),
    ];
    for (number, ((ours, base_says), (theirs, tuned_says), (pairs, only_base, only_tuned))) in
        cases.into_iter().enumerate()
    {
        for prefix in ["", "_orig_mod.", "module."] {
            let mut prng = Prng::new(10);
            let embedding = table(&mut prng, EMBEDDING);
            let base = ends(&mut prng, ours, &embedding, "");
            let embedding = nudged(&mut prng, &embedding, EMBEDDING);
            let tuned = ends(&mut prng, theirs, &embedding, prefix);
            let mut models = Models::new(&base, &tuned);
            for (name, says) in [("base", base_says), ("tuned", tuned_says)] {
                if let Some(says) = says {
                    models = models.configured(name, &json!({"tie_word_embeddings": says}));
                }
            }
            let pairing = models.paired();
            let label = format!("case {number} {prefix:?}: {:?}", pairing.notes);
            let found: Vec<(&str, &str, &str, Tie)> = pairing
                .pairs
                .iter()
                .filter(|pair| pair.kind != Kind::Linear)
                .map(|pair| {
                    let tuned = pair.tuned_name.strip_prefix(prefix).unwrap();
                    (pair.name.as_str(), pair.base_name.as_str(), tuned, pair.tie)
                })
                .collect();
            assert_eq!(found, pairs, "{label}");
            let only_tuned: Vec<String> =
                only_tuned.iter().map(|name| format!("{prefix}{name}")).collect();
            assert_eq!(pairing.only_base, only_base, "{label}");
            assert_eq!(pairing.only_tuned, only_tuned, "{label}");
            assert_deltas(&pairing, &base, &tuned, &label);
            let by_values = base_says.is_none() && ours == Embedding;
            let noted = |note: &PairNote| {
                matches!(note, PairNote::TieFromValues { side: Side::Base, tied: true, .. })
            };
            assert_eq!(pairing.notes.iter().any(noted), by_values, "{label}");
        }
    }
}

/// Where no configuration says anything, the values do; where only a class is named, it does.
#[test]
fn a_head_that_one_side_lacks_is_tied_or_missing() {
    let mut prng = Prng::new(11);
    let embedding = table(&mut prng, EMBEDDING);
    let base = ends(&mut prng, Ends::Embedding, &embedding, "");
    let mut tuned = ends(&mut prng, Ends::Embedding, &embedding, "");
    tuned.push(table(&mut prng, HEAD));
    let class = |name: &str| json!({"architectures": [name]});
    let silent = Models::new(&base, &tuned).paired();
    assert_eq!(silent.only_tuned, [HEAD]);
    let text = "`lm_head.weight` is not stored in the base: taken as missing, since the values are \
                not alike";
    assert!(silent.notes.iter().any(|note| note.to_string() == text), "{:?}", silent.notes);
    let headless = Models::new(&base, &tuned).configured("base", &class("LlamaModel")).paired();
    assert_eq!((headless.only_tuned, headless.notes), (vec![HEAD.to_owned()], Vec::new()));
    let generates =
        Models::new(&base, &tuned).configured("base", &class("LlamaForCausalLM")).paired();
    let (_, head) = find(&generates, HEAD);
    assert_eq!((head.base_name.as_str(), head.tie, head.kind), (EMBEDDING, Tie::Base, Kind::Head));
    assert_eq!((generates.only_tuned, generates.notes), (Vec::new(), Vec::new()));
}

#[test]
fn a_configuration_that_the_values_contradict_is_noted() {
    let mut prng = Prng::new(12);
    let embedding = table(&mut prng, EMBEDDING);
    let base = ends(&mut prng, Ends::Equal, &embedding, "");
    let tuned = ends(&mut prng, Ends::Different, &embedding, "");
    let says = json!({"text_config": {"tie_word_embeddings": true}});
    let models = Models::new(&base, &tuned).configured("base", &says).configured("tuned", &says);
    let pairing = models.paired();
    assert_eq!(pairing.pairs.len(), 3);
    let contradicted = PairNote::TieContradicted { side: Side::Tuned, head: HEAD.to_owned() };
    assert_eq!(pairing.notes, [contradicted]);
    assert_deltas(&pairing, &base, &tuned, "contradicted");
}

#[test]
fn copies_of_an_embedding_that_one_side_stores_are_no_parameters_of_their_own() {
    let mut prng = Prng::new(13);
    let shared = table(&mut prng, "shared.weight");
    let base = [shared.clone(), random(&mut prng, "decoder.block.0.layer.0.o.weight", &[8, 8])];
    let new = nudged(&mut prng, &shared, "shared.weight");
    let mut tuned = vec![
        new.clone(),
        base[1].clone(),
        new.renamed("encoder.embed_tokens.weight"),
        new.renamed("lm_head.weight"),
    ];
    let config = json!({"tie_word_embeddings": true});
    let models =
        || Models::new(&base, &tuned).configured("base", &config).configured("tuned", &config);
    let pairing = models().paired();
    assert_eq!(pairing.only_tuned, [""; 0]);
    let (_, pair) = find(&pairing, "shared.weight");
    assert_eq!(pair.tie, Tie::Both);
    let repeats = PairNote::Repeats {
        side: Side::Tuned,
        name: "encoder.embed_tokens.weight".to_owned(),
        of: "shared.weight".to_owned(),
    };
    assert_eq!(pairing.notes, [repeats]);
    // One with other values is one.
    tuned[2] = table(&mut prng, "encoder.embed_tokens.weight");
    let pairing = Models::new(&base, &tuned)
        .configured("base", &config)
        .configured("tuned", &config)
        .paired();
    assert_eq!(pairing.only_tuned, ["encoder.embed_tokens.weight"]);
}

#[test]
fn of_vocabularies_that_differ_the_common_rows_are_compared() {
    for (rows, tuned_rows) in [(40, 43), (40, 32)] {
        let mut prng = Prng::new(14);
        let models = |names: &[&str], rows: usize, prng: &mut Prng| -> Vec<Tensor> {
            names.iter().map(|name| random(prng, name, &[rows, 8])).collect()
        };
        let all = [EMBEDDING, HEAD];
        let base = models(&all, rows, &mut prng);
        let tuned = models(&all, tuned_rows, &mut prng);
        let pairing = Models::new(&base, &tuned)
            .configured("base", &json!({"tie_word_embeddings": false}))
            .configured("tuned", &json!({"tie_word_embeddings": false}))
            .paired();
        assert_eq!(pairing.reshaped, []);
        let common = rows.min(tuned_rows);
        let cut = |tensor: &Tensor| Tensor {
            shape: vec![common, 8],
            data: tensor.data[..common * 8 * 4].to_vec(),
            ..tensor.clone()
        };
        for pair in &pairing.pairs {
            assert_eq!(pair.matrix(), (common, 8));
            assert_eq!(pair.rows_added(), tuned_rows.saturating_sub(rows));
            assert_eq!(pair.rows_removed(), rows.saturating_sub(tuned_rows));
            assert_eq!((&pair.shape, &pair.tuned_shape), (&vec![rows, 8], &vec![tuned_rows, 8]));
        }
        let cut_all = |tensors: &[Tensor]| tensors.iter().map(cut).collect::<Vec<_>>();
        assert_deltas(&pairing, &cut_all(&base), &cut_all(&tuned), "vocabulary");
    }
}

#[test]
fn other_shapes_are_listed() {
    let mut prng = Prng::new(15);
    let shapes: [(&str, &[usize], &[usize]); 6] = [
        ("classifier.weight", &[2, 8], &[5, 8]),
        ("classifier.bias", &[2], &[5]),
        (EMBEDDING, &[40, 8], &[40, 16]),
        ("lm_head.bias", &[40], &[43]),
        ("a.weight", &[8, 4], &[4, 8]),
        ("conv.weight", &[8, 4, 3], &[8, 4, 3, 1]),
    ];
    let mut base: Vec<Tensor> =
        shapes.iter().map(|(name, shape, _)| random(&mut prng, name, shape)).collect();
    let mut tuned: Vec<Tensor> =
        shapes.iter().map(|(name, _, shape)| random(&mut prng, name, shape)).collect();
    base.push(random(&mut prng, "same.weight", &[3, 3]));
    tuned.push(base[6].clone());
    let pairing = Models::new(&base, &tuned).paired();
    assert_eq!(names(&pairing), [("same.weight", "same.weight")]);
    let mut listed: Vec<(&str, &[usize], &[usize])> = pairing
        .reshaped
        .iter()
        .map(|one| (one.name.as_str(), one.shape.0.as_slice(), one.tuned_shape.0.as_slice()))
        .collect();
    listed.sort_by_key(|one| shapes.iter().position(|other| other.0 == one.0));
    assert_eq!(listed, shapes);
    assert_eq!((pairing.only_base.len(), pairing.only_tuned.len()), (0, 0));
}

#[test]
fn what_is_stored_in_other_types_is_equal_or_not() {
    let raw = |name: &str, dtype: Dtype, byte: u8| {
        let mut tensor = Tensor::zeros(name, dtype, &[4]);
        tensor.data[3] = byte;
        tensor
    };
    let base = [
        raw("embeddings.position_ids", Dtype::I64, 1),
        raw("double.weight", Dtype::F64, 1),
        raw("mask", Dtype::Bool, 0),
        raw("wide.weight", Dtype::F64, 0),
        raw("x.weight", Dtype::F32, 0),
    ];
    let tuned = [
        raw("embeddings.position_ids", Dtype::I64, 1),
        raw("double.weight", Dtype::F64, 2),
        raw("mask", Dtype::Bool, 1),
        raw("wide.weight", Dtype::F32, 0),
        raw("x.weight", Dtype::F32, 0),
    ];
    let pairing = Models::new(&base, &tuned).paired();
    assert_eq!(names(&pairing), [("x.weight", "x.weight")]);
    assert_eq!(pairing.identical, ["embeddings.position_ids"]);
    let listed: Vec<(&str, Dtype, Dtype)> = pairing
        .incomparable
        .iter()
        .map(|one| (one.name.as_str(), one.base_dtype, one.tuned_dtype))
        .collect();
    assert_eq!(
        listed,
        [
            ("double.weight", Dtype::F64, Dtype::F64),
            ("mask", Dtype::Bool, Dtype::Bool),
            ("wide.weight", Dtype::F64, Dtype::F32)
        ]
    );
}

/// The values of a quantised base are what its library dequantises: the difference is that
/// library's rounding to its dtype.
#[test]
fn quantised_bases_are_compared_as_they_are_dequantised() {
    let mut cases: Vec<PathBuf> = std::fs::read_dir(fixtures().join("quantised"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    cases.sort();
    assert!(cases.len() >= 39, "fixtures are missing");
    for case in cases {
        let label = case.file_name().unwrap().to_string_lossy().into_owned();
        let expected = read_tensors(&case.join("expected.safetensors"));
        let base = case.join("base");
        let pairing = pairing(&base, &case.join("expected.safetensors")).unwrap();
        assert_eq!(pairing.only_tuned, [""; 0], "{label}");
        assert_eq!((pairing.reshaped.len(), pairing.incomparable.len()), (0, 0), "{label}");
        assert_eq!(pairing.notes, [], "{label}");
        let mapped = pairing.open().unwrap();
        let mut quantised = 0;
        for (index, pair) in pairing.pairs.iter().enumerate() {
            let tensor = &expected[&pair.tuned_name];
            let label = format!("{label}: {}", pair.name);
            let delta = mapped.delta(index);
            let (rows, cols) = delta.shape();
            let (mut difference, mut old) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
            delta.read(0, &mut difference);
            delta.read_base(0, &mut old);
            let change = measure(&delta);
            let (mut energy, mut base_energy) = (0.0, 0.0);
            for ((new, difference), old) in tensor.values().into_iter().zip(&difference).zip(&old) {
                assert_eq!(*difference, new as f32 - old, "{label}");
                let bound = unit_roundoff(tensor.dtype) * new.abs() + least(tensor.dtype);
                assert!(f64::from(difference.abs()) <= bound, "{label}: {difference} at {new}");
                energy += f64::from(*difference).powi(2);
                base_energy += f64::from(*old).powi(2);
            }
            assert!(close(change.energy, energy) && close(change.base_energy, base_energy));
            // A second time, in pieces, after all pages were given back.
            let middle = rows / 2;
            let mut part = vec![0.0; (rows - middle) * cols];
            delta.read(middle, &mut part);
            assert_eq!(part, difference[middle * cols..], "{label}");
            delta.release(0..rows);
            if pair.is_quantised() {
                quantised += 1;
                assert!(delta.bytes(0..rows).is_none() && delta.stored(0..rows).is_none());
            }
        }
        assert!(quantised > 0, "{label}");
    }
}

#[test]
fn stored_as_in_out_or_out_in() {
    let itself = |path: &str| {
        let path = fixtures().join(path);
        pairing(&path, &path).unwrap()
    };
    let transposed = |pairing: &Pairing| -> Vec<String> {
        assert!(pairing.pairs.iter().all(|pair| pair.orientation_doubt.is_none()));
        let pairs = pairing.pairs.iter().filter(|pair| pair.transposed);
        pairs.map(|pair| pair.name.trim_start_matches("transformer.h.0.").to_owned()).collect()
    };
    let gpt2 = itself("features/bases/gpt2");
    assert_eq!(
        transposed(&gpt2),
        ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
    );
    assert_eq!(gpt2.pairs.iter().filter(|pair| pair.kind == Kind::Linear).count(), 4);
    for linear in ["llama", "llama-square", "llama-bias", "qwen3-moe", "layers"] {
        let pairing = itself(&format!("features/bases/{linear}"));
        assert_eq!(transposed(&pairing), [""; 0], "{linear}");
    }

    // Heads of a GPT-2 are Linear.
    let mut prng = Prng::new(16);
    let mut tensors: Vec<Tensor> =
        read_model(&fixtures().join("features/bases/gpt2")).into_values().collect();
    let config = read_json(&fixtures().join("features/bases/gpt2/config.json"));
    tensors.push(random(&mut prng, "score.weight", &[3, 12]));
    tensors.push(random(&mut prng, "summary.weight", &[2, 12]));
    tensors.push(random(&mut prng, "summary.bias", &[2]));
    let models = Models::new(&tensors, &tensors).configured("base", &config);
    assert_eq!(transposed(&models.paired()).len(), 4);
    // A square one beside contradictory siblings is nobody's guess.
    tensors.push(random(&mut prng, "transformer.h.0.odd.weight", &[5, 12]));
    tensors.push(random(&mut prng, "transformer.h.0.odd.bias", &[5]));
    let models = Models::new(&tensors, &tensors).configured("base", &config);
    let pairing = models.paired();
    let (_, square) = find(&pairing, "transformer.h.0.attn.c_proj.weight");
    let doubt = square.orientation_doubt.as_deref().unwrap();
    assert!(doubt.contains("contradictory"), "{doubt}");
    let doubted = pairing.pairs.iter().filter(|pair| pair.orientation_doubt.is_some()).count();
    assert_eq!(doubted, 1);
}

#[test]
fn kinds_of_parameters() {
    let kinds = |path: &str| -> BTreeMap<String, Kind> {
        let path = fixtures().join(path);
        let pairing = pairing(&path, &path).unwrap();
        pairing.pairs.iter().map(|pair| (pair.name.clone(), pair.kind)).collect()
    };
    let llava = kinds("peft/llava/base");
    for (name, kind) in [
        ("language_model.lm_head.weight", Kind::Head),
        ("language_model.model.embed_tokens.weight", Kind::Embedding),
        ("language_model.model.layers.0.input_layernorm.weight", Kind::Norm),
        ("language_model.model.layers.0.mlp.down_proj.weight", Kind::Linear),
        ("language_model.model.norm.weight", Kind::Norm),
        ("multi_modal_projector.linear_1.bias", Kind::Bias),
        ("vision_tower.embeddings.class_embedding", Kind::Other),
        ("vision_tower.embeddings.patch_embedding.weight", Kind::Convolution),
        ("vision_tower.embeddings.position_embedding.weight", Kind::Embedding),
        ("vision_tower.pre_layrnorm.bias", Kind::Bias),
    ] {
        assert_eq!(llava[name], kind, "{name}");
    }
    let bert = kinds("peft/bert-prefix/base");
    assert_eq!(bert["bert.embeddings.token_type_embeddings.weight"], Kind::Embedding);
    assert_eq!(bert["bert.embeddings.LayerNorm.weight"], Kind::Norm);
    assert_eq!(bert["cls.predictions.bias"], Kind::Bias);
    let gpt2 = kinds("features/bases/gpt2");
    assert_eq!(gpt2["transformer.wpe.weight"], Kind::Embedding);
    assert_eq!(gpt2["transformer.h.0.ln_1.weight"], Kind::Norm);
    let layers = kinds("features/bases/layers");
    for name in ["conv1.weight", "conv2.weight", "conv3.weight", "pointwise.weight"] {
        assert_eq!(layers[name], Kind::Convolution, "{name}");
    }
    for (model, stack) in [
        ("features/bases/mixtral-fused", "model.layers.0.mlp.experts.gate_up_proj"),
        ("quantised/mxfp4-gpt-oss/base", "model.layers.0.mlp.experts.down_proj"),
    ] {
        assert_eq!(kinds(model)[stack], Kind::Stack, "{model}");
    }
    let oss = kinds("quantised/mxfp4-gpt-oss/base");
    assert_eq!(oss["model.layers.0.mlp.experts.down_proj_bias"], Kind::Bias);

    // Linear layers that are called embedders have biases.
    let mut prng = Prng::new(17);
    let tensors = [
        random(&mut prng, "x_embedder.weight", &[6, 4]),
        random(&mut prng, "x_embedder.bias", &[6]),
        random(&mut prng, "y_embedder.embedding_table.weight", &[6, 4]),
        random(&mut prng, "embed_vision.embedding_projection.weight", &[6, 4]),
        random(&mut prng, "a.relative_attention_bias.weight", &[6, 4]),
        random(&mut prng, "attn.in_proj_weight", &[6, 4]),
        random(&mut prng, "attn.in_proj_bias", &[6]),
        random(&mut prng, "text_projection", &[6, 4]),
        random(&mut prng, "ls1.gamma", &[6]),
        random(&mut prng, "norm1.gamma", &[6]),
        random(&mut prng, "norm1.beta", &[6]),
        random(&mut prng, "mixer.A_log", &[6]),
        random(&mut prng, "bn.running_mean", &[6]),
    ];
    let pairing = Models::new(&tensors, &tensors).paired();
    let wanted = [
        Kind::Linear,
        Kind::Bias,
        Kind::Embedding,
        Kind::Linear,
        Kind::Embedding,
        Kind::Linear,
        Kind::Bias,
        Kind::Other,
        Kind::Other,
        Kind::Norm,
        Kind::Bias,
        Kind::Other,
        Kind::Other,
    ];
    for (tensor, kind) in tensors.iter().zip(wanted) {
        assert_eq!(find(&pairing, &tensor.name).1.kind, kind, "{}", tensor.name);
    }
}

/// Convolutions and stacks as matrices: their rows lie one after the other.
#[test]
fn tensors_of_more_dimensions_are_matrices() {
    let mut prng = Prng::new(18);
    for (name, shape, matrix) in [
        ("conv.weight", &[6, 4, 3][..], (6, 12)),
        ("conv.weight", &[6, 4, 3, 3], (6, 36)),
        ("conv.weight", &[4, 2, 3, 3, 3], (4, 54)),
        ("mlp.experts.down_proj", &[3, 5, 7], (15, 7)),
        ("norm.weight", &[9], (1, 9)),
    ] {
        let (base, tuned) = (random(&mut prng, name, shape), random(&mut prng, name, shape));
        let pairing = Models::new(from_ref(&base), from_ref(&tuned)).paired();
        assert_eq!(pairing.pairs[0].matrix(), matrix, "{name}");
        assert_eq!(pairing.pairs[0].elements(), (matrix.0 * matrix.1) as u64);
        assert_deltas(&pairing, &[base], &[tuned], name);
    }
}

#[test]
fn codes_without_their_scales_are_said_to_be_unreadable() {
    let path = fixtures().join("quantised/bnb-nf4/base");
    let mut tensors: Vec<Tensor> = read_model(&path).into_values().collect();
    let models =
        Models::new(&tensors, &tensors).configured("base", &read_json(&path.join("config.json")));
    assert!(models.paired().pairs.iter().any(Pair::is_quantised));
    let weight = models.paired().pairs.iter().find(|pair| pair.is_quantised()).unwrap().clone();
    let stem = weight.name.trim_end_matches(".weight");
    tensors.retain(|tensor| !tensor.name.starts_with(stem) || tensor.name == weight.name);
    models.write("tuned", &tensors);
    let pairing = models.paired();
    assert!(
        pairing
            .notes
            .iter()
            .any(|note| { matches!(note, PairNote::Unreadable { side: Side::Tuned, .. }) }),
        "{:?}",
        pairing.notes
    );
    assert!(pairing.reshaped.iter().any(|one| one.name == weight.name));
}
