//! Where every output tensor goes: which file, at which offset, made how.

use std::collections::HashMap;

use lora_format::Dtype;
use lora_format::checkpoint::{Checkpoint, Layout, Location};
use lora_format::container::safetensors::{Declared, encode_header};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::parameters::{Parameters, Role, Source};
use crate::plan::PlannedTarget;

/// 5 GB, as huggingface_hub counts them.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// How the output's bytes come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// The source's bytes.
    Copy,
    /// The source's values in another dtype.
    Convert,
    /// The source's values changed as the target with this index says.
    Merge(usize),
}

/// One tensor of the output.
#[derive(Clone, Debug)]
pub struct OutputTensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its values come from.
    pub source: Source,
    /// How it is made.
    pub job: Job,
    /// The dtype it is written in.
    pub dtype: Dtype,
    /// Its size in the output.
    pub bytes: u64,
    /// Its first byte in the output file.
    pub offset: u64,
}

/// One file of the output.
#[derive(Clone, Debug)]
pub struct OutputFile {
    /// Its name in the output directory; of a single-file output, unused.
    pub name: String,
    /// Everything up to its data.
    pub header: Vec<u8>,
    /// Its tensors, in data order.
    pub tensors: Vec<OutputTensor>,
    /// Its whole size.
    pub bytes: u64,
}

/// All files of the output.
#[derive(Clone, Debug)]
pub struct OutputLayout {
    /// The safetensors files.
    pub files: Vec<OutputFile>,
    /// `model.safetensors.index.json`, if there is more than one file or the base had one.
    pub index: Option<Map<String, Value>>,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Whether the shards are not those of the base.
    pub resharded: bool,
}

/// The output dtype of each tensor, and which target it is.
pub(crate) struct Choices<'a> {
    /// The dtype that floating-point tensors are converted to; `None` keeps each tensor's own.
    pub(crate) dtype: Option<Dtype>,
    /// What changes.
    pub(crate) targets: &'a [PlannedTarget],
    /// The user's `--max-shard-size`.
    pub(crate) shard_bytes: Option<u64>,
}

/// Lays the output out like the base, or in new shards where its own would grow too large.
pub(crate) fn lay_out(
    base: &Checkpoint,
    parameters: &Parameters,
    choices: &Choices<'_>,
) -> Result<OutputLayout> {
    let by_parameter = choices.targets.iter().enumerate();
    let place = Places {
        parameters,
        roles: parameters.roles(),
        targets: by_parameter
            .filter_map(|(index, target)| Some((target.parameter?, index)))
            .collect(),
        choices,
    };
    let mut groups: Vec<Vec<OutputTensor>> =
        (0..base.shards().len()).map(|shard| place.shard_tensors(base, shard)).collect();
    if let Some(last) = groups.last_mut() {
        let added = choices.targets.iter().enumerate().filter(|entry| entry.1.parameter.is_none());
        last.extend(added.map(|(index, target)| place.target(index, target)));
    }
    let single = base.layout() == Layout::File;
    if single && choices.shard_bytes.is_some() {
        return Err(Error::ShardsNeedDirectory);
    }
    let data_bytes = |group: &[OutputTensor]| group.iter().map(|tensor| tensor.bytes).sum::<u64>();
    let limit = choices.shard_bytes.unwrap_or(DEFAULT_SHARD_BYTES);
    // A shard that was over the limit before and has not grown is the publisher's choice.
    let outgrown = groups.iter().zip(base.shards()).any(|(group, shard)| {
        let bytes = data_bytes(group);
        bytes > limit && (choices.shard_bytes.is_some() || bytes > shard.file.file_bytes())
    });
    let resharded = !single && outgrown;
    let names: Vec<String>;
    let groups = if resharded {
        let groups = reshard(groups, limit);
        names = shard_names(groups.len());
        groups
    } else {
        names = base.shards().iter().map(|shard| shard.name.clone()).collect();
        groups
    };
    let metadata = shared_metadata(base);
    let mut files = Vec::with_capacity(groups.len());
    for (number, (name, tensors)) in names.into_iter().zip(groups).enumerate() {
        let metadata =
            if resharded { &metadata } else { &base.shards()[number].file.header().metadata };
        files.push(close(name, metadata, tensors));
    }
    let tensor_bytes = files.iter().map(|file| data_bytes(&file.tensors)).sum();
    let indexed = files.len() > 1 || (base.layout() == Layout::Sharded && !resharded);
    let index = indexed.then(|| index(base, &files, tensor_bytes));
    Ok(OutputLayout { files, index, tensor_bytes, resharded })
}

/// What decides the place of a tensor.
struct Places<'a> {
    parameters: &'a Parameters,
    roles: HashMap<Location, Role>,
    /// Target indices by parameter.
    targets: HashMap<usize, usize>,
    choices: &'a Choices<'a>,
}

impl Places<'_> {
    /// The parameters of one shard of the base in data order: without stale copies, and without
    /// what only a quantised weight needs.
    fn shard_tensors(&self, base: &Checkpoint, number: usize) -> Vec<OutputTensor> {
        let shard = &base.shards()[number];
        let positions = 0..shard.file.header().tensors.len();
        let locations = positions.map(|tensor| Location { shard: number, tensor });
        locations
            .filter_map(|location| match self.roles.get(&location) {
                Some(&Role::Parameter(index)) => Some(self.parameter(index)),
                _ => None,
            })
            .collect()
    }

    fn parameter(&self, index: usize) -> OutputTensor {
        if let Some(&target) = self.targets.get(&index) {
            return self.target(target, &self.choices.targets[target]);
        }
        let parameter = self.parameters.get(index);
        let dtype = self.dtype(parameter.dtype);
        let source = parameter.source;
        let same = matches!(source, Source::Plain(_)) && dtype == parameter.dtype;
        let job = if same { Job::Copy } else { Job::Convert };
        output_tensor(&parameter.name, &parameter.shape, source, job, dtype)
    }

    fn target(&self, index: usize, target: &PlannedTarget) -> OutputTensor {
        let dtype = self.dtype(target.dtype);
        output_tensor(&target.name, &target.shape, target.source, Job::Merge(index), dtype)
    }

    fn dtype(&self, own: Dtype) -> Dtype {
        self.choices.dtype.filter(|_| own.is_merge_float()).unwrap_or(own)
    }
}

fn output_tensor(
    name: &str,
    shape: &[usize],
    source: Source,
    job: Job,
    dtype: Dtype,
) -> OutputTensor {
    let (name, shape) = (name.to_owned(), shape.to_vec());
    // Inputs were checked to have a size that fits; what is written is at most four times that.
    let bytes = dtype.tensor_bytes(&shape).unwrap_or(u64::MAX);
    OutputTensor { name, shape, source, job, dtype, bytes, offset: 0 }
}

/// Greedy in the base's order, as huggingface_hub shards: a file is closed when the next tensor
/// would take it over the limit; a tensor over the limit has a file to itself.
fn reshard(groups: Vec<Vec<OutputTensor>>, limit: u64) -> Vec<Vec<OutputTensor>> {
    let mut shards = Vec::new();
    let mut current = Vec::new();
    let mut size = 0;
    for tensor in groups.into_iter().flatten() {
        if size + tensor.bytes > limit && !current.is_empty() {
            shards.push(std::mem::take(&mut current));
            size = 0;
        }
        size += tensor.bytes;
        current.push(tensor);
    }
    if !current.is_empty() || shards.is_empty() {
        shards.push(current);
    }
    shards
}

fn shard_names(count: usize) -> Vec<String> {
    if count == 1 {
        return vec![lora_format::checkpoint::MODEL_FILE.to_owned()];
    }
    (1..=count).map(|number| format!("model-{number:05}-of-{count:05}.safetensors")).collect()
}

/// Metadata that all shards of the base have in common, for new shards.
fn shared_metadata(base: &Checkpoint) -> Vec<(String, String)> {
    let mut headers = base.shards().iter().map(|shard| &shard.file.header().metadata);
    let Some(first) = headers.next() else {
        return Vec::new();
    };
    let others: Vec<_> = headers.collect();
    first.iter().filter(|entry| others.iter().all(|other| other.contains(entry))).cloned().collect()
}

/// A file with its header, and its tensors at their offsets.
fn close(
    name: String,
    metadata: &[(String, String)],
    mut tensors: Vec<OutputTensor>,
) -> OutputFile {
    let header = encode_header(
        metadata,
        tensors.iter().map(|tensor| Declared {
            name: &tensor.name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            bytes: tensor.bytes,
        }),
    );
    let mut offset = header.len() as u64;
    for tensor in &mut tensors {
        tensor.offset = offset;
        offset += tensor.bytes;
    }
    OutputFile { name, header, tensors, bytes: offset }
}

/// The index: the base's own metadata with the new size, and every tensor's file.
fn index(base: &Checkpoint, files: &[OutputFile], tensor_bytes: u64) -> Map<String, Value> {
    let mut metadata = base.index_metadata().clone();
    metadata.insert("total_size".to_owned(), json!(tensor_bytes));
    let mut entries: Vec<(&str, &str)> = files
        .iter()
        .flat_map(|file| {
            file.tensors.iter().map(|tensor| (tensor.name.as_str(), file.name.as_str()))
        })
        .collect();
    entries.sort_unstable();
    let weight_map: Map<String, Value> =
        entries.into_iter().map(|(tensor, file)| (tensor.to_owned(), json!(file))).collect();
    let mut index = Map::new();
    index.insert("metadata".to_owned(), Value::Object(metadata));
    index.insert("weight_map".to_owned(), Value::Object(weight_map));
    index
}
