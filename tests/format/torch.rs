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
        for _ in 0..60 {
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
    assert!(accepted > 30 && refused > 3000, "{accepted} {refused}");
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

const HOSTILE: &[(&str, &str)] = &[
    (
        "big-endian.pt",
        "big-endian.pt: its numbers are big-endian, and only little-endian ones are read",
    ),
    (
        "call-eval-bare.pt",
        "call-eval-bare.pt: the pickle calls `builtins.eval`; a file of tensors has no \
         need to, and nothing was called",
    ),
    (
        "call-eval-protocol-4.pt",
        "call-eval-protocol-4.pt: the pickle calls `builtins.eval`; a file of tensors has \
         no need to, and nothing was called",
    ),
    (
        "call-inst.pt",
        "call-inst.pt: the pickle calls `posix.system`; a file of tensors has no need to, \
         and nothing was called",
    ),
    (
        "call-obj.pt",
        "call-obj.pt: the pickle calls `posix.system`; a file of tensors has no need to, \
         and nothing was called",
    ),
    ("call-of-value.pt", "call-of-value.pt: the pickle calls, at byte 9, what is no global"),
    (
        "call-os-system-beside.pt",
        "call-os-system-beside.pt: the pickle calls `posix.system`; a file of tensors has \
         no need to, and nothing was called",
    ),
    (
        "call-os-system.pt",
        "call-os-system.pt: the pickle calls `posix.system`; a file of tensors has no need \
         to, and nothing was called",
    ),
    (
        "call-unknown-class.pt",
        "call-unknown-class.pt: the pickle calls `__main__.Config`; a file of tensors has \
         no need to, and nothing was called",
    ),
    (
        "dict-in-itself.pt",
        "dict-in-itself.pt: the dict `in` is, once more, the outermost dict: its tensors \
         would have two names",
    ),
    (
        "dtype-complex.pt",
        "dtype-complex.pt: tensor `c`: its type `torch.ComplexFloatStorage` is not read",
    ),
    (
        "dtype-float4.pt",
        "dtype-float4.pt: tensor `f`: its type `torch.float4_e2m1fn_x2` is not read",
    ),
    (
        "key-integer.pt",
        "key-integer.pt: the outermost dict holds tensors and has the key 1, which is not \
         a string",
    ),
    (
        "kind-quantised.pt",
        "kind-quantised.pt: tensor `q`: a quantised tensor (made by \
         `torch._utils._rebuild_qtensor`), which is not read",
    ),
    (
        "kind-sparse.pt",
        "kind-sparse.pt: tensor `s`: a sparse tensor (made by \
         `torch._utils._rebuild_sparse_tensor`), which is not read",
    ),
    (
        "legacy-big-endian.pt",
        "legacy-big-endian.pt: its numbers are big-endian, and only little-endian ones are \
         read",
    ),
    (
        "legacy-count-negative.pt",
        "legacy-count-negative.pt: the storage `00000000000000` goes beyond the file \
         (truncated?)",
    ),
    (
        "legacy-count.pt",
        "legacy-count.pt: the storage `00000000000000` goes beyond the file (truncated?)",
    ),
    (
        "legacy-cut.pt",
        "legacy-cut.pt: the storage `00000000000000` goes beyond the file (truncated?)",
    ),
    (
        "legacy-other-pickle.pt",
        "legacy-other-pickle.pt: a pickle, but not one that torch.save wrote",
    ),
    (
        "legacy-trailing.pt",
        "legacy-trailing.pt: 1 bytes after the last storage belong to no tensor",
    ),
    (
        "list-of-tensors.pt",
        "list-of-tensors.pt: `l` is a list or a tuple of tensors, which have no names there",
    ),
    (
        "memo-dicts.pt",
        "memo-dicts.pt: the dict \
         `a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.b` \
         is, once more, the dict \
         `a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a`: \
         its tensors would have two names",
    ),
    ("memo-tuples.pt", "memo-tuples.pt: it holds a tuple, not a dict of tensors"),
    ("name-twice-nested.pt", "name-twice-nested.pt: `a.b` appears twice"),
    ("name-twice.pt", "name-twice.pt: `t` appears twice"),
    (
        "offset-beyond.pt",
        "offset-beyond.pt: tensor `t`: shape [2, 2] with strides [2, 1] from element 1 \
         goes beyond its storage of 4 elements",
    ),
    (
        "offset-huge.pt",
        "offset-huge.pt: tensor `t`: shape [2, 2] with strides [2, 1] from element \
         9223372036854775807 goes beyond its storage of 4 elements",
    ),
    (
        "offset-negative.pt",
        "offset-negative.pt: tensor `t`: the arguments of \
         `torch._utils._rebuild_tensor_v2` are not as torch writes them",
    ),
    (
        "pickle-append-to-dict.pt",
        "pickle-append-to-dict.pt: the pickle needs, at byte 4, another kind of value: a \
         list",
    ),
    ("pickle-cut.pt", "pickle-cut.pt: the pickle is cut off after 143 bytes (truncated?)"),
    ("pickle-deep.pt", "pickle-deep.pt: the pickle has more than 1000 values inside one another"),
    (
        "pickle-empty-stack.pt",
        "pickle-empty-stack.pt: the pickle takes, at byte 2, from an empty stack",
    ),
    ("pickle-left-over.pt", "pickle-left-over.pt: the pickle leaves 1 values behind"),
    (
        "pickle-memo.pt",
        "pickle-memo.pt: the pickle uses, at byte 2, what it has not stored: memo 5",
    ),
    (
        "pickle-protocol-0.pt",
        "pickle-protocol-0.pt: the pickle's byte 0 is 0x49, no instruction that is read \
         (those of protocols 2 to 5, without extensions and buffers outside the pickle)",
    ),
    (
        "pickle-protocol-9.pt",
        "pickle-protocol-9.pt: the pickle has protocol 9; protocols 2 to 5 are read",
    ),
    (
        "pickle-string-length.pt",
        "pickle-string-length.pt: the pickle is cut off after 9 bytes (truncated?)",
    ),
    ("pickle-trailing.pt", "pickle-trailing.pt: 2 bytes after the pickle belong to no tensor"),
    ("root-list.pt", "root-list.pt: it holds a list with tensors, not a dict of tensors"),
    ("root-tensor.pt", "root-tensor.pt: it holds a tensor, not a dict of tensors"),
    (
        "shape-beyond.pt",
        "shape-beyond.pt: tensor `t`: shape [2, 3] with strides [3, 1] from element 0 goes \
         beyond its storage of 4 elements",
    ),
    (
        "shape-expanded.pt",
        "shape-expanded.pt: tensor `t`: its elements do not lie in order, and in order \
         they would take 17179869184 bytes; the limit for a file of this size is 1556",
    ),
    (
        "shape-huge.pt",
        "shape-huge.pt: tensor `t`: shape [1099511627776, 1099511627776] with strides [0, \
         0] from element 0 goes beyond its storage of 4 elements",
    ),
    (
        "shape-negative.pt",
        "shape-negative.pt: tensor `t`: the arguments of `torch._utils._rebuild_tensor_v2` \
         are not as torch writes them",
    ),
    ("storage-missing.pt", "storage-missing.pt: tensor `t`: its storage `1` is not in the file"),
    (
        "storage-short.pt",
        "storage-short.pt: tensor `t`: its storage `0` should have 16 bytes, the file has \
         12",
    ),
    (
        "stride-beyond.pt",
        "stride-beyond.pt: tensor `t`: shape [2, 2] with strides [4611686018427387904, \
         4611686018427387904] from element 0 goes beyond its storage of 4 elements",
    ),
    (
        "stride-count.pt",
        "stride-count.pt: tensor `t`: the arguments of `torch._utils._rebuild_tensor_v2` \
         are not as torch writes them",
    ),
    (
        "tar.pt",
        "tar.pt: a tar archive: the format of torch before 0.1.10, which is not read; save \
         it again",
    ),
    ("torchscript.pt", "torchscript.pt: a TorchScript archive: a program, not a file of tensors"),
    (
        "view-negated.pt",
        "view-negated.pt: tensor `n`: it is stored conjugated or negated, which is not read",
    ),
    (
        "zip-bomb.pt",
        "zip-bomb.pt: the entry `a/data.pkl` is compressed or encrypted; torch stores its \
         entries as they are",
    ),
    (
        "zip-claims-more.pt",
        "zip-claims-more.pt: the entry `a/data/0` takes 16 bytes and claims 1073741824",
    ),
    (
        "zip-compressed.pt",
        "zip-compressed.pt: the entry `a/data.pkl` is compressed or encrypted; torch \
         stores its entries as they are",
    ),
    (
        "zip-count.pt",
        "zip-count.pt: a zip archive that cannot be read: its directory has 2 entries and \
         claims 65000",
    ),
    (
        "zip-cut.pt",
        "zip-cut.pt: a zip archive that cannot be read: Missing end of central directory",
    ),
    (
        "zip-entry-beyond.pt",
        "zip-entry-beyond.pt: the entry `a/data/0` goes beyond the archive's data \
         (truncated?)",
    ),
    (
        "zip-entry-in-directory.pt",
        "zip-entry-in-directory.pt: the entry `a/data/0` goes beyond the archive's data \
         (truncated?)",
    ),
    ("zip-entry-twice.pt", "zip-entry-twice.pt: the entry `data/0` appears twice"),
    (
        "zip-names-differ.pt",
        "zip-names-differ.pt: the entry `a/data/0` is called `a/data/1` where its data \
         begins",
    ),
    (
        "zip-no-pickle.pt",
        "zip-no-pickle.pt: a zip archive with no `data.pkl`: not one that torch.save wrote",
    ),
    (
        "zip-other-directory.pt",
        "zip-other-directory.pt: the entry `b/version` lies outside the archive's \
         directory `a/`",
    ),
    ("zip-overlap.pt", "zip-overlap.pt: the entries `a/data.pkl` and `a/data/0` overlap"),
    ("zip-trailing.pt", "zip-trailing.pt: 8 bytes after the archive belong to no tensor"),
];
