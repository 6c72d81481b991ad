//! Whether this is the base that the adapter was trained on.

use std::path::{Path, PathBuf};

use lora_format::ReadOptions;
use lora_format::checkpoint::Checkpoint;
use lora_format::fingerprint::Verdict;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_format::{Dtype, native};
use lora_merge::{Error, MergeOptions, identity};

use crate::support::{Factors, Prng, Tensor, write_tensors};
use crate::{Case, plan};

const MODULES: [&str; 3] = ["model.layers.0.q", "model.layers.0.v", "model.layers.1.q"];

fn base(dtype: Dtype) -> Vec<Tensor> {
    let mut prng = Prng::new(40);
    MODULES
        .iter()
        .map(|module| Tensor::random(&mut prng, &format!("{module}.weight"), dtype, &[20, 30], 1.0))
        .collect()
}

fn case() -> Case {
    let mut prng = Prng::new(41);
    let factors =
        MODULES.map(|module| Factors::random(&mut prng, module, (20, 30, 2), Dtype::F32, 0.1));
    Case::file(&base(Dtype::F32), &factors)
}

/// A stamped copy of the case's adapter.
fn stamp(case: &Case) -> PathBuf {
    let base = Checkpoint::open(&case.base).unwrap();
    let mut adapter = lora_format::read(&case.adapter, &ReadOptions::default()).unwrap();
    adapter.base.fingerprint = Some(identity::stamp(&adapter, &base).unwrap());
    let output = case.path("stamped.safetensors");
    native::write(&adapter, &output, Overwrite::Never, Durability::Cached).unwrap();
    output
}

fn verdict(base: &Path, adapter: &Path) -> Verdict {
    plan(base, adapter, &MergeOptions::default()).unwrap().identity.remove(0)
}

fn variant(case: &Case, tensors: &[Tensor]) -> PathBuf {
    let path = case.path("variant.safetensors");
    write_tensors(&path, tensors, &[]);
    path
}

#[test]
fn an_unstamped_adapter_is_unknown() {
    let case = case();
    assert_eq!(verdict(&case.base, &case.adapter), Verdict::Unknown);
}

#[test]
fn the_same_base_is_the_same_under_any_names_and_in_any_shards() {
    let case = case();
    let stamped = stamp(&case);
    assert_eq!(verdict(&case.base, &stamped), Verdict::Same);

    let renamed: Vec<Tensor> =
        base(Dtype::F32).iter().map(|t| t.renamed(&format!("llm.{}", t.name))).collect();
    assert_eq!(verdict(&variant(&case, &renamed), &stamped), Verdict::Same);
    let stripped: Vec<Tensor> =
        base(Dtype::F32).iter().map(|t| t.renamed(t.name.trim_start_matches("model."))).collect();
    assert_eq!(verdict(&variant(&case, &stripped), &stamped), Verdict::Same);

    let tensors = base(Dtype::F32);
    let sharded = Case::sharded(&[&tensors[2..], &tensors[..2]], &[]);
    assert_eq!(verdict(&sharded.base, &stamped), Verdict::Same);
}

#[test]
fn another_dtype_is_the_same_re_encoded() {
    let case = case();
    let stamped = stamp(&case);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        assert_eq!(verdict(&variant(&case, &base(dtype)), &stamped), Verdict::Reencoded);
    }
    // And back: stamped on bf16, merged into the f32 original.
    let narrow = case.path("narrow.safetensors");
    write_tensors(&narrow, &base(Dtype::Bf16), &[]);
    let other = Case { base: narrow, ..case };
    std::fs::remove_file(&stamped).unwrap();
    let stamped = stamp(&other);
    assert_eq!(verdict(&other.path("base.safetensors"), &stamped), Verdict::Reencoded);
}

#[test]
fn a_different_base_is_refused_unless_allowed() {
    let case = case();
    let stamped = stamp(&case);
    let mut prng = Prng::new(42);
    let mut tensors = base(Dtype::F32);
    tensors[1] = Tensor::random(&mut prng, &tensors[1].name, Dtype::F32, &[20, 30], 1.0);
    let other = variant(&case, &tensors);
    let error = plan(&other, &stamped, &MergeOptions::default()).unwrap_err();
    let Error::DifferentBase { equal, compared, first, .. } = &error else { panic!("{error}") };
    assert_eq!((*equal, *compared), (32, 48));
    assert_eq!(first, "model.layers.0.v.weight");
    let allowed = MergeOptions { allow_different_base: true, ..MergeOptions::default() };
    let plan = plan(&other, &stamped, &allowed).unwrap();
    assert!(matches!(plan.identity[0], Verdict::Different { .. }));
}

/// One changed value in 600 may escape the samples; the same model after more training may not.
#[test]
fn further_training_is_a_different_base() {
    let case = case();
    let stamped = stamp(&case);
    let mut prng = Prng::new(43);
    let trained: Vec<Tensor> = base(Dtype::F32)
        .iter()
        .map(|tensor| {
            let values: Vec<f64> = tensor.values().iter().map(|v| v + 1e-4 * prng.unit()).collect();
            Tensor::new(&tensor.name, Dtype::F32, &tensor.shape, &values)
        })
        .collect();
    let other = variant(&case, &trained);
    let error = plan(&other, &stamped, &MergeOptions::default()).unwrap_err();
    assert!(matches!(error, Error::DifferentBase { equal: 0, .. }), "{error}");
}

#[test]
fn stamping_needs_every_module() {
    let case = case();
    let missing = variant(&case, &base(Dtype::F32)[..2]);
    let adapter = lora_format::read(&case.adapter, &ReadOptions::default()).unwrap();
    let error = identity::stamp(&adapter, &Checkpoint::open(&missing).unwrap()).unwrap_err();
    assert!(error.to_string().contains("`model.layers.1.q`: the base has no such"), "{error}");
}
