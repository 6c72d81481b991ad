//! Files of `torch.save`: what is read equals what torch reads back, and each malformed or hostile
//! file gives one message, word for word.

use lora_format::container::torch::PlainValue;
use lora_format::container::{Container, TensorFile};
use lora_format::model::{AdapterFormat, Note};
use lora_format::{ReadOptions, Tensor};
use lora_tests::fixture;

use crate::{Random, check_table, entries, name, read};

fn open(name: &str) -> TensorFile {
    TensorFile::open(&fixture("torch").join(name)).unwrap()
}

/// dtype, shape and bytes of every tensor, in the order of their names.
fn contents(mut tensors: Vec<Tensor>) -> Vec<(String, String, Vec<u8>)> {
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let row = |tensor: Tensor| {
        let kind = format!("{} {:?}", tensor.dtype, tensor.shape);
        let bytes = tensor.bytes().to_vec();
        (tensor.name, kind, bytes)
    };
    tensors.into_iter().map(row).collect()
}

#[test]
fn what_is_read_equals_what_torch_reads() {
    let files = entries(&fixture("torch"), ".pt");
    assert_eq!(files.len(), 9);
    for path in files {
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.container, Container::Torch);
        let expected = TensorFile::open(&path.with_extension("expected.safetensors")).unwrap();
        assert!(!expected.tensors.is_empty());
        assert_eq!(contents(file.tensors), contents(expected.tensors), "{}", path.display());
    }
}

/// What lies beside the tensors is kept, or is called by its name.
#[test]
fn values_beside_the_tensors() {
    let opaque = |name: &str| PlainValue::Opaque(name.to_owned());
    let text = |text: &str| PlainValue::Text(text.to_owned());
    let targets = PlainValue::List(vec![text("q_proj"), text("v_proj")]);
    let config = vec![("alpha".to_owned(), PlainValue::Int(16)), ("targets".to_owned(), targets)];
    let betas = vec![PlainValue::Float(0.9), PlainValue::None, PlainValue::Bool(true)];
    let expected = [
        ("epoch", PlainValue::Int(3)),
        ("loss", PlainValue::Float(0.25)),
        ("name", text("run")),
        ("hyper_parameters", opaque("argparse.Namespace")),
        ("betas", PlainValue::List(betas)),
        ("config", PlainValue::Dict(config)),
        ("tags", opaque("builtins.set")),
        ("optimizer_states", opaque("a list with tensors")),
    ];
    let values = open("checkpoint.pt").values;
    assert_eq!(values, expected.map(|(name, value)| (name.to_owned(), value)));
    for name in ["nested.pt", "nested-protocol-4.pt", "nested-legacy-protocol-5.pt"] {
        assert_eq!(open(name).values, [("step".to_owned(), PlainValue::Int(7))]);
    }
}

/// Each hostile file is refused where it is opened as a container and as an adapter.
#[test]
fn hostile_files() {
    let folder = fixture("torch/bad");
    let files = entries(&folder, ".pt");
    check_table(&folder, &files, HOSTILE, TensorFile::open);
    for file in files {
        let opened = TensorFile::open(&file).unwrap_err().to_string();
        assert_eq!(read(&file).unwrap_err().to_string(), opened);
    }
}

/// Neither a panic nor more memory than the limits give, whatever bytes are changed or cut off.
#[test]
fn changed_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.pt");
    let mut random = Random(20_261_201);
    let mut files = entries(&fixture("torch"), ".pt");
    files.extend(entries(&fixture("torch/bad"), ".pt"));
    let (mut accepted, mut refused) = (0, 0);
    for file in files {
        let original = std::fs::read(&file).unwrap();
        for _ in 0..200 {
            let mut bytes = original.clone();
            for _ in 0..=random.below(4) {
                let at = random.below(bytes.len());
                bytes[at] = match random.below(3) {
                    0 => random.next() as u8,
                    1 => bytes[at].wrapping_add(1),
                    _ => *random.pick(b"\x00\xff\x80.(R}]thq2"),
                };
            }
            if random.below(8) == 0 {
                bytes.truncate(random.below(bytes.len()));
            }
            std::fs::write(&path, &bytes).unwrap();
            match TensorFile::open(&path) {
                Ok(opened) => {
                    accepted += 1;
                    let held: usize = opened.tensors.iter().map(|t| t.bytes().len()).sum();
                    assert!(held <= 5 * bytes.len() * opened.tensors.len().max(1));
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(accepted > 100 && refused > 1000, "{accepted} {refused}");
}

/// PEFT wrote `adapter_model.bin` before it wrote safetensors; what is read is the same.
#[test]
fn a_directory_of_peft() {
    let (pickled, stored) = (fixture("torch/peft"), fixture("peft/llama-rslora/adapter"));
    let pickle = read(&pickled).unwrap();
    let expected = read(&stored).unwrap();
    assert_eq!(pickle.format, AdapterFormat::Peft);
    assert_eq!(pickle.path, pickled);
    assert!(!pickle.components.is_empty());
    assert_eq!(format!("{:?}", rows(&pickle)), format!("{:?}", rows(&expected)));
    assert_eq!(pickle.notes.len(), expected.notes.len());
    assert!(lora_format::codec::peft::other_files(&pickled).unwrap().is_empty());
    // The file alone, with the configuration beside it.
    let file = read(&pickled.join("adapter_model.bin")).unwrap();
    assert_eq!(format!("{:?}", rows(&file)), format!("{:?}", rows(&expected)));
}

/// Targets, and the bytes of all factors.
fn rows(adapter: &lora_format::Adapter) -> Vec<(String, f64, Vec<u8>)> {
    let row = |component: &lora_format::model::Component| {
        let lora_format::model::Form::LowRank(factors) = &component.form else {
            panic!("{component:?}")
        };
        let bytes = [factors.a.bytes(), factors.b.bytes()].concat();
        (component.target.name(), factors.scale(), bytes)
    };
    adapter.components.iter().map(row).collect()
}

#[test]
fn safetensors_wins_over_a_pickle_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let stored = fixture("peft/llama-rslora/adapter");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(stored.join(name), folder.path().join(name)).unwrap();
    }
    std::fs::write(folder.path().join("adapter_model.bin"), b"not looked at").unwrap();
    let notes = read(folder.path()).unwrap().notes;
    let last = notes.last().map(Note::to_string);
    assert_eq!(
        last.as_deref(),
        Some("adapter_model.bin is not read: adapter_model.safetensors lies beside it")
    );
}

/// loralib's, bare and as it is published for GPT-2, under `model_state_dict`.
#[test]
fn loralib() {
    let mut found = Vec::new();
    for file in ["loralib.pt", "loralib-wrapped.pt"] {
        let path = fixture("torch").join(file);
        assert_eq!(
            read(&path).unwrap_err().to_string(),
            format!(
                "{}: no adapter_config.json beside it and no alpha given: the scale alpha/rank is \
                 unknown",
                path.display()
            )
        );
        let options = ReadOptions { alpha: Some(4.0), ..ReadOptions::default() };
        let adapter = lora_format::read(&path, &options).unwrap();
        assert_eq!(adapter.format, AdapterFormat::Loralib);
        let names: Vec<String> = adapter.components.iter().map(|c| c.target.name()).collect();
        assert_eq!(names, ["layer.bias", "layer.weight"], "{}", name(&path));
        found.push(rows_of_weight(adapter));
    }
    assert_eq!(found[0], found[1]);
    assert_eq!(found[0].1, 2.0);
}

fn rows_of_weight(mut adapter: lora_format::Adapter) -> (String, f64, Vec<u8>) {
    adapter.components.retain(|component| component.target.parameter == "weight");
    rows(&adapter).remove(0)
}

const HOSTILE: &[(&str, &str)] = &[];
