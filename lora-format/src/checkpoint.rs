//! Base models on disk: one safetensors file, or a Hugging Face directory of one or many.
//!
//! In a sharded directory the index decides, as it does for transformers' own loader: files it
//! does not name (consolidated or stale copies) do not belong to the model.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use crate::codec::existing;
use crate::container::Container;
use crate::container::safetensors::{Bounded, SafetensorsFile, TensorInfo};
use crate::error::{DetectProblem, Error, IndexProblem, IoContext, Result};
use crate::io;
use crate::io::opened::OpenedFile;
use crate::json;
use crate::limits;
use crate::model::Note;

/// The index of a sharded directory.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The only file of an unsharded one.
pub const MODEL_FILE: &str = "model.safetensors";

/// An open base model: headers read and validated, data untouched.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    layout: Layout,
    shards: Vec<Shard>,
    /// Every tensor of the model as (shard, position in it), sorted by name.
    by_name: Vec<(u32, u32)>,
    index_metadata: Map<String, Value>,
    config: Option<Map<String, Value>>,
    notes: Vec<Note>,
}

/// How the model lies on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A safetensors file that the user named.
    File,
    /// A directory with one safetensors file.
    Directory,
    /// A directory with shards and their index.
    Sharded,
}

/// Opens a safetensors file, and says of a file that is plainly something else what it is.
fn open_plain(path: &Path) -> Result<SafetensorsFile> {
    let opened = OpenedFile::open(path)?;
    if Container::of(&opened)? != Container::Safetensors {
        let suffix = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let problem = DetectProblem::OtherContainer { suffix: format!(".{suffix}") };
        return Err(Error::Unrecognised { path: path.to_owned(), problem });
    }
    SafetensorsFile::of(opened)
}

/// One safetensors file of a model.
#[derive(Debug)]
pub struct Shard {
    /// Its name in the directory.
    pub name: String,
    /// The file.
    pub file: SafetensorsFile,
    /// Positions in its header of stale copies that belong to no model, ascending.
    pub stale: Vec<usize>,
}

/// Where a tensor of the model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// Index of its shard.
    pub shard: usize,
    /// Position in that shard's header.
    pub tensor: usize,
}

impl Checkpoint {
    /// Opens a file or a directory.
    ///
    /// # Errors
    /// [`Error::Unrecognised`], [`Error::Index`], [`Error::Header`], [`Error::Io`].
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let unrecognised = |problem| Error::Unrecognised { path: path.to_owned(), problem };
        let Ok(metadata) = std::fs::metadata(path) else {
            return Err(unrecognised(DetectProblem::NotFound));
        };
        if metadata.is_file() {
            let file = open_plain(path)?;
            return Checkpoint::of_single(path, Layout::File, file);
        }
        // transformers looks for the single file first.
        if let Some(file) = existing(path, MODEL_FILE) {
            return Checkpoint::of_single(path, Layout::Directory, SafetensorsFile::open(&file)?);
        }
        if let Some(index) = existing(path, INDEX_FILE) {
            return Checkpoint::of_index(path, &index);
        }
        let mut files = Vec::new();
        let mut pickles = Vec::new();
        for entry in std::fs::read_dir(path).at(path, "list")? {
            let name = entry.at(path, "list")?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".safetensors") && !name.starts_with('.') {
                files.push(name);
            } else if name.ends_with(".bin") || name.ends_with(".pt") {
                pickles.push(name);
            }
        }
        files.sort();
        pickles.sort();
        match (files.as_slice(), pickles.first()) {
            ([only], _) if is_one_of_several(only) => {
                Err(unrecognised(DetectProblem::OneOfSeveral { file: only.clone() }))
            }
            ([only], _) => {
                let file = SafetensorsFile::open(&path.join(only))?;
                Checkpoint::of_single(path, Layout::Directory, file)
            }
            ([], Some(file)) => Err(unrecognised(DetectProblem::PickleOnly { file: file.clone() })),
            ([], None) => Err(unrecognised(DetectProblem::NoModel)),
            _ => Err(unrecognised(DetectProblem::SeveralModels { files })),
        }
    }

    fn of_single(path: &Path, layout: Layout, file: SafetensorsFile) -> Result<Checkpoint> {
        let name = file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let shards = vec![Shard { name, file, stale: Vec::new() }];
        Checkpoint::assemble(path, layout, shards, Map::new(), Vec::new())
    }

    fn of_index(path: &Path, index_path: &Path) -> Result<Checkpoint> {
        let index = Index::read(index_path)?;
        let invalid = |problem| Error::Index { path: index_path.to_owned(), problem };
        let mut shards = Vec::with_capacity(index.shards.len());
        for name in &index.shards {
            let file = path.join(name);
            if !file.exists() {
                return Err(invalid(IndexProblem::MissingShard { shard: name.clone() }));
            }
            let file = SafetensorsFile::open(&file)?;
            shards.push(Shard { name: name.clone(), file, stale: Vec::new() });
        }
        for (tensor, shard) in &index.weight_map {
            let shard = &shards[*shard as usize];
            if shard.file.header().position(tensor).is_none() {
                let (tensor, shard) = (tensor.clone(), shard.name.clone());
                return Err(invalid(IndexProblem::MissingTensor { tensor, shard }));
            }
        }
        let mut notes = Vec::new();
        // Tensors that the index does not name, and the shard that each is in.
        let mut unlisted: HashMap<String, String> = HashMap::new();
        for (number, shard) in shards.iter_mut().enumerate() {
            for (position, info) in shard.file.header().tensors.iter().enumerate() {
                let (tensor, shard_name) = (info.name.clone(), shard.name.clone());
                match index.shard_of(&info.name) {
                    Some(indexed) if indexed == number => {}
                    Some(indexed) => {
                        shard.stale.push(position);
                        let indexed = index.shards[indexed].clone();
                        notes.push(Note::StaleCopy { tensor, shard: shard_name, indexed });
                    }
                    None => {
                        if let Some(first) = unlisted.insert(tensor.clone(), shard_name.clone()) {
                            let second = shard_name;
                            return Err(invalid(IndexProblem::Twice { tensor, first, second }));
                        }
                        notes.push(Note::NotInIndex { tensor, shard: shard_name });
                    }
                }
            }
        }
        Checkpoint::assemble(path, Layout::Sharded, shards, index.metadata, notes)
    }

    fn assemble(
        path: &Path,
        layout: Layout,
        shards: Vec<Shard>,
        index_metadata: Map<String, Value>,
        notes: Vec<Note>,
    ) -> Result<Checkpoint> {
        let mut by_name = Vec::new();
        for (number, shard) in shards.iter().enumerate() {
            for position in 0..shard.file.header().tensors.len() {
                if shard.stale.binary_search(&position).is_err() {
                    by_name.push((number as u32, position as u32));
                }
            }
        }
        let name_of = |&(shard, tensor): &(u32, u32)| {
            shards[shard as usize].file.header().tensors[tensor as usize].name.as_str()
        };
        by_name.sort_unstable_by(|a, b| name_of(a).cmp(name_of(b)));
        let directory = if layout == Layout::File { io::atomic::parent_of(path) } else { path };
        let config = match existing(directory, "config.json") {
            // Beside a file that the user named, a config.json may belong to something else.
            Some(config) => match json::read_object(&config, limits::CONFIG_BYTES) {
                Ok(config) => Some(config),
                Err(_) if layout == Layout::File => None,
                Err(error) => return Err(error),
            },
            None => None,
        };
        let path = path.to_owned();
        Ok(Checkpoint { path, layout, shards, by_name, index_metadata, config, notes })
    }

    /// The file or directory that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How it lies on disk.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Its files, in name order.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The index's `metadata` object; empty without an index.
    pub fn index_metadata(&self) -> &Map<String, Value> {
        &self.index_metadata
    }

    /// The `config.json` of its directory.
    pub fn config(&self) -> Option<&Map<String, Value>> {
        self.config.as_ref()
    }

    /// What was noticed while opening it.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// The number of tensors.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether it holds no tensors.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The header entry at a location.
    pub fn info(&self, location: Location) -> &TensorInfo {
        &self.shards[location.shard].file.header().tensors[location.tensor]
    }

    /// Every tensor of the model, sorted by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (Location, &TensorInfo)> {
        self.by_name.iter().map(|&(shard, tensor)| {
            let location = Location { shard: shard as usize, tensor: tensor as usize };
            (location, self.info(location))
        })
    }

    /// The tensors whose names begin with `prefix`, sorted by name.
    pub fn tensors_under<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (Location, &'a TensorInfo)> {
        let first = self.by_name.partition_point(|&(shard, tensor)| {
            let location = Location { shard: shard as usize, tensor: tensor as usize };
            self.info(location).name.as_str() < prefix
        });
        let rest = self.by_name[first..].iter().map(|&(shard, tensor)| {
            let location = Location { shard: shard as usize, tensor: tensor as usize };
            (location, self.info(location))
        });
        rest.take_while(move |(_, info)| info.name.starts_with(prefix))
    }

    /// Where the tensor called `name` is.
    pub fn find(&self, name: &str) -> Option<Location> {
        let at = |&(shard, tensor): &(u32, u32)| Location {
            shard: shard as usize,
            tensor: tensor as usize,
        };
        self.by_name
            .binary_search_by(|entry| self.info(at(entry)).name.as_str().cmp(name))
            .ok()
            .map(|found| at(&self.by_name[found]))
    }
}

/// A `model.safetensors.index.json`.
struct Index {
    metadata: Map<String, Value>,
    /// Shard names, sorted.
    shards: Vec<String>,
    /// (tensor, index into `shards`), sorted by tensor.
    weight_map: Vec<(String, u32)>,
}

impl Index {
    fn read(path: &Path) -> Result<Index> {
        let invalid = |problem| Error::Index { path: path.to_owned(), problem };
        let text = io::read_limited(path, limits::INDEX_BYTES)?;
        let raw: RawIndex = serde_json::from_slice(&text)
            .map_err(|source| Error::Json { path: path.to_owned(), source })?;
        let pairs = raw.weight_map.0.all().map_err(|found| {
            invalid(IndexProblem::TooManyTensors { found, limit: limits::TENSORS })
        })?;
        let mut numbers: BTreeMap<String, u32> = BTreeMap::new();
        for (_, shard) in &pairs {
            if !numbers.contains_key(shard) {
                if !is_plain_name(shard) {
                    return Err(invalid(IndexProblem::OutsideDirectory { shard: shard.clone() }));
                }
                numbers.insert(shard.clone(), 0);
            }
        }
        if numbers.is_empty() {
            return Err(invalid(IndexProblem::Empty));
        }
        if numbers.len() > limits::SHARDS {
            let (found, limit) = (numbers.len(), limits::SHARDS);
            return Err(invalid(IndexProblem::TooManyShards { found, limit }));
        }
        for (number, slot) in numbers.values_mut().enumerate() {
            *slot = number as u32;
        }
        let mut weight_map: Vec<(String, u32)> = pairs
            .into_iter()
            .map(|(tensor, shard)| (tensor, numbers.get(&shard).copied().unwrap_or(0)))
            .collect();
        weight_map.sort_unstable();
        if let Some(pair) = weight_map.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let source = serde::de::Error::custom(format_args!(
                "the tensor `{}` appears twice in weight_map",
                pair[0].0
            ));
            return Err(Error::Json { path: path.to_owned(), source });
        }
        let metadata = match raw.metadata {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(Error::config(path, "metadata", "an object", &other)),
        };
        Ok(Index { metadata, shards: numbers.into_keys().collect(), weight_map })
    }

    fn shard_of(&self, tensor: &str) -> Option<usize> {
        let found = self.weight_map.binary_search_by(|entry| entry.0.as_str().cmp(tensor)).ok()?;
        Some(self.weight_map[found].1 as usize)
    }
}

/// Whether `name` is one ordinary component: not empty, not absolute, no `..`, no separator.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let single = matches!(components.next(), Some(Component::Normal(only)) if only == name);
    single && components.next().is_none() && !name.contains(['/', '\\', '\0'])
}

/// Whether `name` ends as that of one shard of many does: `…-00001-of-00002.safetensors`.
fn is_one_of_several(name: &str) -> bool {
    let number = |text: &str| -> Option<u64> {
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
    };
    let stem = name.strip_suffix(".safetensors").unwrap_or(name);
    stem.rsplit_once("-of-").is_some_and(|(before, total)| {
        let turn = before.rsplit_once('-').map_or(before, |(_, turn)| turn);
        number(turn).is_some() && number(total).is_some_and(|total| total > 1)
    })
}

#[derive(serde::Deserialize)]
struct RawIndex {
    metadata: Option<Value>,
    weight_map: WeightMap,
}

/// The map as a list: equal keys are seen, and a large one is not held as JSON values.
struct WeightMap(Bounded<(String, String)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object that maps tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<WeightMap, A::Error> {
                Bounded::entries(access, limits::TENSORS).map(WeightMap)
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}
