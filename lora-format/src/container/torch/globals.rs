//! Which globals a pickle of tensors may call, and what torch's names mean.
//!
//! Nothing is ever called. What torch calls to build tensors is understood; what trainers call to
//! build the things that they save beside them (scalars of NumPy, configurations, the state of
//! callbacks) is kept as the name alone and is an error only where a tensor should be; a call of
//! anything else makes the whole file refused, by name. The second group is closed: single
//! globals of Python, NumPy and torch, and *classes* (names that begin with a capital) of the
//! packages of trainers. Functions of those packages are not in it.

use crate::container::pickle::Global;
use crate::dtype::Dtype;

/// The functions that make tensors.
const REBUILD: &str = "torch._utils";

/// Globals that build no tensor and are kept by name.
const HARMLESS: [(&str, &[&str]); 18] = [
    ("_codecs", &["encode"]),
    ("argparse", &["Namespace"]),
    ("builtins", &["bytearray", "complex", "frozenset", "range", "set", "slice"]),
    ("collections", &["Counter", "deque"]),
    ("datetime", &["date", "datetime", "time", "timedelta", "timezone"]),
    ("decimal", &["Decimal"]),
    ("numpy", &["dtype", "ndarray"]),
    ("numpy._core.multiarray", &["_reconstruct", "scalar"]),
    ("numpy._core.numeric", &["_frombuffer"]),
    ("numpy.core.multiarray", &["_reconstruct", "scalar"]),
    ("numpy.core.numeric", &["_frombuffer"]),
    ("pathlib", &PATHS),
    ("pathlib._local", &PATHS),
    ("torch", &["Generator", "Size", "device"]),
    ("torch.nn.modules.container", &["ParameterDict", "ParameterList"]),
    ("torch.serialization", &["_get_layout"]),
    ("types", &["SimpleNamespace"]),
    ("uuid", &["UUID"]),
];

const PATHS: [&str; 6] =
    ["Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"];

/// Packages whose classes are kept by name.
const TRAINERS: [&str; 11] = [
    "accelerate",
    "deepspeed",
    "fairseq",
    "lightning",
    "lightning_fabric",
    "omegaconf",
    "peft",
    "pytorch_lightning",
    "torchtune",
    "transformers",
    "trl",
];

/// Whether a pickle may call a global: the rule of this module.
pub(super) fn may_call(global: Global<'_>) -> bool {
    let path = global.path();
    let Some((module, name)) = path.rsplit_once('.') else {
        return false;
    };
    if Rebuild::of(global).is_some() {
        return true;
    }
    let package = module.split('.').next().unwrap_or(module);
    let class = name.starts_with(|first: char| first.is_ascii_uppercase());
    (class && TRAINERS.contains(&package))
        || HARMLESS.iter().any(|row| row.0 == module && row.1.contains(&name))
}

/// A function that makes a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rebuild {
    /// `_rebuild_tensor` and `_rebuild_tensor_v2`: a view of a typed storage.
    Typed,
    /// `_rebuild_tensor_v3`: a view of an untyped storage, and its dtype.
    Untyped,
    /// `_rebuild_parameter`: another tensor, that training changes.
    Parameter,
    /// `_rebuild_parameter_with_state`: the same with Python attributes.
    ParameterWithState,
    /// One that makes tensors of a kind that is not read.
    Other(&'static str),
}

impl Rebuild {
    /// The kind of tensor that a function makes, if it makes one.
    pub(super) fn of(function: Global<'_>) -> Option<Rebuild> {
        Some(match (function.module, function.name) {
            (REBUILD, "_rebuild_tensor" | "_rebuild_tensor_v2") => Rebuild::Typed,
            (REBUILD, "_rebuild_tensor_v3") => Rebuild::Untyped,
            (REBUILD, "_rebuild_parameter") => Rebuild::Parameter,
            (REBUILD, "_rebuild_parameter_with_state") => Rebuild::ParameterWithState,
            (REBUILD, "_rebuild_qtensor") => Rebuild::Other("a quantised tensor"),
            (REBUILD, "_rebuild_sparse_tensor" | "_rebuild_sparse_csr_tensor") => {
                Rebuild::Other("a sparse tensor")
            }
            (REBUILD, "_rebuild_nested_tensor") => Rebuild::Other("a nested tensor"),
            (REBUILD, "_rebuild_meta_tensor_no_storage") => Rebuild::Other("a tensor without data"),
            (
                REBUILD,
                "_rebuild_device_tensor_from_numpy" | "_rebuild_device_tensor_from_cpu_tensor",
            ) => Rebuild::Other("a tensor of another device"),
            (REBUILD, "_rebuild_wrapper_subclass") | ("torch._tensor", "_rebuild_from_type_v2") => {
                Rebuild::Other("a tensor of a class of its own, or with attributes")
            }
            _ => return None,
        })
    }
}

/// The element type of a storage class; `None` if it is not one that is read.
pub(super) fn storage_dtype(class: Global<'_>) -> Option<Dtype> {
    let ("torch", name) = (class.module, class.name) else {
        return None;
    };
    Some(match name {
        "BoolStorage" => Dtype::Bool,
        "ByteStorage" => Dtype::U8,
        "CharStorage" => Dtype::I8,
        "ShortStorage" => Dtype::I16,
        "IntStorage" => Dtype::I32,
        "LongStorage" => Dtype::I64,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::Bf16,
        "FloatStorage" => Dtype::F32,
        "DoubleStorage" => Dtype::F64,
        _ => return None,
    })
}

/// Whether a storage class counts bytes.
pub(super) fn is_untyped(class: Global<'_>) -> bool {
    class.module == "torch.storage" && class.name == "UntypedStorage"
}

/// What torch calls a dtype; `None` if it is not one that is read. Of two 4-bit floats in a byte
/// torch counts bytes, not elements.
pub(super) fn dtype(name: Global<'_>) -> Option<Dtype> {
    let ("torch", name) = (name.module, name.name) else {
        return None;
    };
    Some(match name {
        "bool" => Dtype::Bool,
        "uint8" => Dtype::U8,
        "uint16" => Dtype::U16,
        "uint32" => Dtype::U32,
        "uint64" => Dtype::U64,
        "int8" => Dtype::I8,
        "int16" => Dtype::I16,
        "int32" => Dtype::I32,
        "int64" => Dtype::I64,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::Bf16,
        "float32" => Dtype::F32,
        "float64" => Dtype::F64,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e4m3fnuz" => Dtype::F8_E4M3Fnuz,
        "float8_e5m2" => Dtype::F8_E5M2,
        "float8_e5m2fnuz" => Dtype::F8_E5M2Fnuz,
        "float8_e8m0fnu" => Dtype::F8_E8M0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_code_is_refused() {
        let refused = [
            ("posix", "system"),
            ("nt", "system"),
            ("os", "system"),
            ("subprocess", "Popen"),
            ("builtins", "eval"),
            ("__builtin__", "exec"),
            ("builtins", "getattr"),
            ("operator", "attrgetter"),
            ("importlib", "import_module"),
            ("torch", "load"),
            ("torch.hub", "load"),
            ("torch._utils", "_import_dotted_name"),
            ("numpy.testing._private.utils", "runstring"),
            ("transformers.pipelines", "pipeline"),
            ("lightningx", "Trainer"),
            ("__main__", "Config"),
            // A name with dots is an attribute of what the module holds.
            ("argparse", "Namespace.os"),
            ("collections", "OrderedDict.__init__"),
            ("", ""),
        ];
        for (module, name) in refused {
            assert!(!may_call(Global { module, name }), "{module}.{name}");
        }
    }

    #[test]
    fn what_trainers_save_is_kept_by_name() {
        let kept = [
            ("numpy.core.multiarray", "scalar"),
            ("__builtin__", "set"),
            ("argparse", "Namespace"),
            ("torch._utils", "_rebuild_qtensor"),
            ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
            ("omegaconf.dictconfig", "DictConfig"),
            ("transformers.training_args", "TrainingArguments"),
        ];
        for (module, name) in kept {
            assert!(may_call(Global { module, name }), "{module}.{name}");
        }
    }
}
