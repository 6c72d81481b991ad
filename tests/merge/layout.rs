//! The safetensors files of the output: shards, index, metadata.

use lora_format::Dtype;
use lora_merge::MergeOptions;
use lora_merge::engine::RunOptions;
use serde_json::{Value, json};

use crate::support::{
    Factors, Prng, Tensor, names, read_json, read_metadata, read_tensors, write_json, write_tensors,
};
use crate::{Case, Merged};

const INDEX: &str = "model.safetensors.index.json";

fn tensors(dtype: Dtype) -> Vec<Tensor> {
    let mut prng = Prng::new(50);
    let random = |name: &str| Tensor::random(&mut prng, name, dtype, &[20, 30], 1.0);
    ["m.0.a.weight", "m.0.b.weight", "m.1.a.weight", "m.1.b.weight"].map(random).into()
}

fn factors() -> [Factors; 1] {
    [Factors::random(&mut Prng::new(51), "m.0.a", (20, 30, 2), Dtype::F32, 0.1)]
}

fn merge(case: &Case, options: &MergeOptions) -> Merged {
    case.merge(options, &RunOptions::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// The index names every tensor of every shard, the right shard, and the right size.
fn check_index(merged: &Merged) -> Value {
    let index = read_json(&merged.output.join(INDEX));
    let map = index["weight_map"].as_object().unwrap();
    let mut total = 0;
    let mut found = 0;
    for name in names(&merged.output).iter().filter(|name| name.ends_with(".safetensors")) {
        for (tensor, stored) in read_tensors(&merged.output.join(name)) {
            assert_eq!(map[&tensor], json!(name), "{tensor}");
            total += stored.data.len();
            found += 1;
        }
    }
    assert_eq!(map.len(), found);
    assert_eq!(index["metadata"]["total_size"], json!(total));
    index
}

#[test]
fn shards_stay_as_they_are() {
    let all = tensors(Dtype::F32);
    let case = Case::sharded(&[&all[..1], &all[1..]], &factors());
    let merged = merge(&case, &MergeOptions::default());
    check_index(&merged);
    assert_eq!(names(&merged.output), names(&case.base));
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        let (ours, theirs) = (read_tensors(&merged.output.join(shard)), case.base.join(shard));
        assert!(ours.keys().eq(read_tensors(&theirs).keys()), "{shard}");
    }
    // Converted to a narrower dtype: still the same shards.
    let options = MergeOptions { dtype: Some(Dtype::Bf16), ..MergeOptions::default() };
    let merged = merge(&case, &options);
    assert_eq!(names(&merged.output), names(&case.base));
    let index = check_index(&merged);
    assert_eq!(index["metadata"]["total_size"], json!(4 * 20 * 30 * 2));
}

#[test]
fn growth_is_sharded_again_at_the_limit() {
    let all = tensors(Dtype::Bf16);
    let case = Case::sharded(&[&all[..2], &all[2..]], &factors());
    let tensor = 20 * 30 * 4;
    let options = |limit| MergeOptions {
        dtype: Some(Dtype::F32),
        shard_bytes: Some(limit),
        ..MergeOptions::default()
    };
    // (limit, files): a file never exceeds the limit unless one tensor alone does.
    for (limit, files) in
        [(4 * tensor, 2), (2 * tensor, 2), (2 * tensor - 1, 4), (tensor, 4), (1, 4)]
    {
        let merged = merge(&case, &options(limit));
        check_index(&merged);
        let shards: Vec<String> =
            names(&merged.output).into_iter().filter(|n| n.ends_with(".safetensors")).collect();
        assert_eq!(shards.len(), files, "limit {limit}");
        for (number, shard) in shards.iter().enumerate() {
            assert_eq!(*shard, format!("model-{:05}-of-{files:05}.safetensors", number + 1));
            let inside = read_tensors(&merged.output.join(shard));
            let bytes: usize = inside.values().map(|tensor| tensor.data.len()).sum();
            assert!(bytes as u64 <= limit || inside.len() == 1, "{shard}: {bytes} of {limit}");
        }
        assert_eq!(merged.tensors.len(), 4);
        for (name, tensor) in &merged.tensors {
            assert_eq!(tensor.dtype, Dtype::F32, "{name}");
        }
    }
}

#[test]
fn a_single_file_directory_can_be_sharded() {
    let case = Case::directory(&json!({}), &tensors(Dtype::F32), &factors());
    let whole = merge(&case, &MergeOptions::default());
    assert_eq!(names(&whole.output), ["config.json", "model.safetensors"]);
    let options = MergeOptions { shard_bytes: Some(5000), ..MergeOptions::default() };
    let merged = merge(&case, &options);
    check_index(&merged);
    assert_eq!(merged.tensors, whole.tensors);
    let options = MergeOptions { shard_bytes: Some(1 << 20), ..MergeOptions::default() };
    assert_eq!(names(&merge(&case, &options).output), ["config.json", "model.safetensors"]);
}

#[test]
fn a_file_cannot_be_sharded() {
    let case = Case::file(&tensors(Dtype::F32), &factors());
    let options = MergeOptions { shard_bytes: Some(5000), ..MergeOptions::default() };
    let expected = "a single file cannot be sharded; give a directory as the base";
    assert_eq!(case.refusal(&options), expected);
}

#[test]
fn metadata_is_kept() {
    let case = Case::file(&tensors(Dtype::F32), &factors());
    let pairs = [("format", "pt"), ("zeta", "last \"quoted\""), ("alpha", "ä\n")];
    write_tensors(&case.base, &tensors(Dtype::F32), &pairs);
    let merged = merge(&case, &MergeOptions::default());
    let expected = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    assert_eq!(read_metadata(&merged.output), expected);

    // New shards get what all old ones had in common.
    let all = tensors(Dtype::F32);
    let case = Case::sharded(&[&all[..2], &all[2..]], &factors());
    let shard = |number| case.base.join(format!("model-0000{number}-of-00002.safetensors"));
    write_tensors(&shard(1), &all[..2], &[("format", "pt"), ("by", "us"), ("part", "1")]);
    write_tensors(&shard(2), &all[2..], &[("part", "2"), ("format", "pt"), ("by", "us")]);
    let mut index = read_json(&case.base.join(INDEX));
    index["metadata"] = json!({"total_parameters": 2400, "total_size": 1, "note": ["kept"]});
    write_json(&case.base.join(INDEX), &index);
    let merged = merge(&case, &MergeOptions::default());
    let first = merged.output.join("model-00001-of-00002.safetensors");
    assert_eq!(read_metadata(&first)["part"], "1");
    let index = check_index(&merged);
    assert_eq!(index["metadata"]["total_parameters"], 2400);
    assert_eq!(index["metadata"]["note"], json!(["kept"]));
    let options = MergeOptions { shard_bytes: Some(2400), ..MergeOptions::default() };
    let merged = merge(&case, &options);
    let first = merged.output.join("model-00001-of-00004.safetensors");
    assert_eq!(read_metadata(&first), [("by", "us"), ("format", "pt")].map(owned).into());
    assert_eq!(check_index(&merged)["metadata"]["note"], json!(["kept"]));
}

fn owned((key, value): (&str, &str)) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

#[test]
fn the_index_decides_over_stale_and_unlisted_tensors() {
    let all = tensors(Dtype::F32);
    let case = Case::sharded(&[&all[..2], &all[2..]], &factors());
    // A stale copy of the target in the second shard, and a tensor the index does not list.
    let stale = Tensor::zeros("m.0.a.weight", Dtype::F32, &[20, 30]);
    let unlisted = Tensor::zeros("m.9.z.weight", Dtype::F32, &[2]);
    let mut second = all[2..].to_vec();
    second.extend([stale, unlisted.clone()]);
    let path = case.base.join("model-00002-of-00002.safetensors");
    write_tensors(&path, &second, &[("format", "pt")]);
    // A whole file that the index does not know is no part of the model.
    write_tensors(&case.base.join("consolidated.safetensors"), &all, &[]);
    for shard_bytes in [None, Some(2400)] {
        let options = MergeOptions { shard_bytes, ..MergeOptions::default() };
        let merged = merge(&case, &options);
        check_index(&merged);
        assert_eq!(merged.tensors.len(), 5);
        assert_eq!(merged.tensors["m.9.z.weight"], unlisted);
        assert_ne!(merged.tensors["m.0.a.weight"].data, vec![0; 2400]);
        assert!(!names(&merged.output).contains(&"consolidated.safetensors".to_owned()));
    }
    let notes: Vec<String> = case
        .plan(&MergeOptions::default())
        .unwrap()
        .notes
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        notes,
        [
            "`m.0.a.weight` in model-00002-of-00002.safetensors is dropped: the index places it in \
             model-00001-of-00002.safetensors",
            "`m.9.z.weight` is in model-00002-of-00002.safetensors but not in the index; it is \
             copied and indexed",
        ]
    );
}

/// In two shards and in no index: which of them is the model's cannot be told.
#[test]
fn an_unlisted_tensor_in_two_shards_is_an_error() {
    let all = tensors(Dtype::F32);
    let case = Case::sharded(&[&all[..2], &all[2..]], &factors());
    for (number, range) in [(1, 0..2), (2, 2..4)] {
        let mut shard = all[range].to_vec();
        shard.push(Tensor::new("twice", Dtype::F32, &[1], &[f64::from(number)]));
        let path = case.base.join(format!("model-0000{number}-of-00002.safetensors"));
        write_tensors(&path, &shard, &[]);
    }
    let options = MergeOptions { shard_bytes: Some(1 << 20), ..MergeOptions::default() };
    for options in [MergeOptions::default(), options] {
        let text = case.refusal(&options);
        let expected = "model.safetensors.index.json: the tensor `twice` is in both \
                        model-00001-of-00002.safetensors and model-00002-of-00002.safetensors";
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn scalars_and_empty_tensors_are_copied() {
    let mut base = tensors(Dtype::F32);
    base.push(Tensor::new("scalar", Dtype::F32, &[], &[0.5]));
    base.push(Tensor::zeros("empty", Dtype::Bf16, &[0, 7]));
    base.push(Tensor::zeros("mask", Dtype::Bool, &[5]));
    base.push(Tensor::of_bits("ids", Dtype::I32, &[2], &[7, u32::MAX]));
    let case = Case::file(&base, &factors());
    let options = MergeOptions { dtype: Some(Dtype::F16), ..MergeOptions::default() };
    let merged = merge(&case, &options);
    assert_eq!(merged.tensors["scalar"], Tensor::new("scalar", Dtype::F16, &[], &[0.5]));
    assert_eq!(merged.tensors["empty"], Tensor::zeros("empty", Dtype::F16, &[0, 7]));
    assert_eq!(merged.tensors["mask"], base[6]);
    assert_eq!(merged.tensors["ids"], base[7]);
}
