//! torchtune is the reference: `expected.safetensors` is its own export to PEFT.

use std::path::Path;

use lora_format::codec::torchtune::{SAFETENSORS_FILE, write_directory};
use lora_format::container::TensorFile;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_format::model::AdapterFormat;
use lora_format::{Adapter, WriteOptions, Written};
use lora_tests::fixture;

use super::{assert_same, assert_same_tensor, low_rank, with_base, writing};
use crate::read;

fn base() -> std::path::PathBuf {
    fixture("torchtune/base/config.json")
}

fn write(adapter: &Adapter, path: &Path, options: &WriteOptions) -> lora_format::Result<Written> {
    write_directory(adapter, path, options, Overwrite::Never, Durability::Cached)
}

#[test]
fn factors_are_those_of_its_own_export() {
    for (case, count) in [("lora", 8), ("dora", 5)] {
        let folder = fixture("torchtune").join(case);
        let adapter = lora_format::read(&folder, &with_base(&base())).unwrap();
        assert_eq!((adapter.format, adapter.components.len()), (AdapterFormat::Torchtune, count));
        assert_eq!(adapter.base.name.as_deref(), Some("lora-fixtures/tiny"));
        let expected = TensorFile::open(&folder.join("expected.safetensors")).unwrap().tensors;
        assert_eq!(expected.len(), 2 * count);
        for component in &adapter.components {
            let change = low_rank(component);
            assert_eq!(change.scale(), 3.0);
            assert_eq!(change.magnitude.is_some(), case == "dora");
            for (suffix, factor) in [("lora_A", &change.a), ("lora_B", &change.b)] {
                let name = format!("base_model.model.{}.{suffix}.weight", component.target.module);
                let expected = expected.iter().find(|tensor| tensor.name == name).unwrap();
                assert_same_tensor(factor, expected, &name);
            }
        }
    }
}

#[test]
fn there_and_back_to_the_bit() {
    let scratch = tempfile::tempdir().unwrap();
    for case in ["lora", "dora"] {
        let source = fixture("torchtune").join(case);
        let adapter = lora_format::read(&source, &with_base(&base())).unwrap();
        let path = scratch.path().join(case);
        assert_eq!(write(&adapter, &path, &writing(&base())).unwrap(), Written::default());
        assert_same(&adapter, &lora_format::read(&path, &with_base(&base())).unwrap());
        let tensors = |directory: &Path| {
            let mut all = TensorFile::open(&directory.join(SAFETENSORS_FILE)).unwrap().tensors;
            all.sort_by(|x, y| x.name.cmp(&y.name));
            all
        };
        let (ours, theirs) = (tensors(&path), tensors(&source));
        assert_eq!(ours.len(), theirs.len());
        for (one, other) in ours.iter().zip(&theirs) {
            assert_eq!(one.name, other.name);
            assert_same_tensor(one, other, &one.name);
        }
    }
}

/// Of Qwen, torchtune has the rows as transformers has them; its export reorders them all the same.
#[test]
fn the_base_decides_the_order_of_rows() {
    let source = fixture("torchtune/lora");
    let llama = lora_format::read(&source, &with_base(&base())).unwrap();
    let qwen = fixture("torchtune/qwen/config.json");
    let kept = lora_format::read(&source, &with_base(&qwen)).unwrap();
    let stored = TensorFile::open(&source.join(SAFETENSORS_FILE)).unwrap().tensors;
    for (one, other) in llama.components.iter().zip(&kept.components) {
        let module = &one.target.module;
        let differs = module.ends_with("q_proj") || module.ends_with("k_proj");
        assert_eq!(low_rank(one).b.bytes() != low_rank(other).b.bytes(), differs, "{module}");
        if module.ends_with("q_proj") {
            let name = "layers.1.attn.q_proj.lora_b.weight";
            let stored = stored.iter().find(|tensor| tensor.name == name).unwrap();
            assert_same_tensor(&low_rank(other).b, stored, name);
        }
    }
    let message = read(&source).unwrap_err().to_string();
    assert!(message.contains("the base's config.json is needed"), "{message}");
    let dora = lora_format::read(&fixture("torchtune/dora"), &with_base(&qwen)).unwrap_err();
    assert!(
        dora.to_string().contains("v_proj` by DoRA: torchtune scales the layer's bias"),
        "{dora}"
    );
}

/// DoRA's magnitudes of q and k are in the order of the rows.
#[test]
fn magnitudes_follow_the_rows() {
    let scratch = tempfile::tempdir().unwrap();
    let mut adapter = lora_format::read(&fixture("torchtune/lora"), &with_base(&base())).unwrap();
    adapter.components.retain(|it| it.target.module.ends_with("q_proj"));
    let lora_format::model::Form::LowRank(change) = &mut adapter.components[0].form else {
        panic!("no factors")
    };
    let values = (0..16u8).flat_map(|it| f32::from(it).to_le_bytes()).collect();
    let magnitude =
        lora_format::Tensor::new("m".to_owned(), lora_format::Dtype::F32, vec![16], values);
    change.magnitude = magnitude;
    let path = scratch.path().join("adapter");
    write(&adapter, &path, &writing(&base())).unwrap();
    let stored = TensorFile::open(&path.join(SAFETENSORS_FILE)).unwrap().tensors;
    let stored = stored.iter().find(|it| it.name == "layers.1.attn.q_proj.magnitude").unwrap();
    // numpy: arange(16).reshape(4, 2, 2).swapaxes(1, 2).reshape(16)
    assert_eq!(
        stored.to_f32().unwrap(),
        [0., 2., 1., 3., 4., 6., 5., 7., 8., 10., 9., 11., 12., 14., 13., 15.]
    );
    assert_same(&adapter, &lora_format::read(&path, &with_base(&base())).unwrap());
}
