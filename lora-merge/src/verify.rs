//! Is a model what a merge makes? The merge is carried out again, and every byte that it would
//! write is compared with what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use lora_format::checkpoint::{Checkpoint, Location};
use lora_format::io::mmap::Mapping;
use lora_format::{Dtype, Shape};

use crate::engine::{self, Progress, RunOptions, Sink};
use crate::error::Result;
use crate::numbers::{float_type, steps_between};
use crate::plan::MergePlan;

/// What a comparison found.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifyReport {
    /// Tensors compared element by element.
    pub compared: usize,
    /// Those that differ somewhere, sorted by name.
    pub different: Vec<Difference>,
    /// Tensors that the merge makes and the model lacks.
    pub missing: Vec<String>,
    /// Tensors that the model has and the merge does not make.
    pub unexpected: Vec<String>,
    /// Tensors of another shape or dtype than the merge makes.
    pub reshaped: Vec<Reshaped>,
    /// A prefix by which the model's names differ from the merge's.
    pub renamed: Option<Renamed>,
}

/// One prefix for another, as classes of transformers save one architecture with it or without
/// (`bert.`). A prefix that is empty is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renamed {
    /// What the merge's names begin with.
    pub made: String,
    /// What the model's begin with instead.
    pub found: String,
}

impl Renamed {
    /// The prefix without which, or with which, most names that are missing are those that are
    /// unexpected: more than half of either list.
    fn of(missing: &BTreeSet<&str>, unexpected: &BTreeSet<&str>) -> Option<Renamed> {
        let most = |longer: &BTreeSet<&str>, shorter: &BTreeSet<&str>| {
            let mut votes: BTreeMap<String, usize> = BTreeMap::new();
            for name in longer {
                for (dot, _) in name.match_indices('.') {
                    if shorter.contains(&name[dot + 1..]) {
                        *votes.entry(name[..=dot].to_owned()).or_default() += 1;
                    }
                }
            }
            let (prefix, votes) = votes.into_iter().max_by_key(|&(_, votes)| votes)?;
            (2 * votes > missing.len().min(unexpected.len())).then_some((prefix, votes))
        };
        match (most(missing, unexpected), most(unexpected, missing)) {
            (Some((made, votes)), other) if other.as_ref().is_none_or(|one| one.1 <= votes) => {
                Some(Renamed { made, found: String::new() })
            }
            (_, Some((found, _))) => Some(Renamed { made: String::new(), found }),
            _ => None,
        }
    }

    /// What the model calls a tensor of the merge.
    fn name(&self, made: &str) -> Option<String> {
        Some(format!("{}{}", self.found, made.strip_prefix(self.made.as_str())?))
    }
}

/// A tensor that cannot be compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Reshaped {
    /// Its name.
    pub tensor: String,
    /// What the merge makes.
    pub expected: (Dtype, Shape),
    /// What the model has.
    pub found: (Dtype, Shape),
}

/// How a tensor differs from what the merge makes.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Its name.
    pub tensor: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its elements.
    pub elements: u64,
    /// Those whose bits differ.
    pub different: u64,
    /// The most values of the dtype from what is expected to what is there, counting one end;
    /// `None` where one of the two is NaN, or the dtype is no float.
    pub steps: Option<u64>,
    /// ‖difference‖ / ‖what is there‖, both Frobenius norms; `None` where it is no number, or the
    /// dtype is no float.
    pub relative: Option<f64>,
    /// The one whose value is furthest off; the first of equals.
    pub worst: Worst,
}

/// The element whose value is furthest off.
#[derive(Clone, Debug, PartialEq)]
pub struct Worst {
    /// Its place in the tensor.
    pub index: Vec<usize>,
    /// What the merge makes.
    pub expected: Number,
    /// What the model has.
    pub found: Number,
    /// How many values of the dtype they are apart, as [`Difference::steps`] counts.
    pub steps: Option<u64>,
}

impl Worst {
    /// How far the two values are apart; what is not a number is farthest.
    pub fn distance(&self) -> f64 {
        self.expected.distance(self.found)
    }
}

/// The value of an element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// Of a float.
    Float(f64),
    /// Of an integer or a truth value; of a dtype whose numbers are not known here, its bits.
    Integer(i128),
}

impl Number {
    /// Of the little-endian bytes of an element.
    fn of(dtype: Dtype, bytes: &[u8]) -> Number {
        let mut word = [0; 8];
        let length = bytes.len().min(8);
        word[..length].copy_from_slice(&bytes[..length]);
        let bits = u64::from_le_bytes(word);
        match (dtype, float_type(dtype)) {
            (_, Some(float)) => Number::Float(f64::from(float.decode(bits as u32))),
            (Dtype::F64, _) => Number::Float(f64::from_bits(bits)),
            (Dtype::I8, _) => Number::Integer(i128::from(bits as i8)),
            (Dtype::I16, _) => Number::Integer(i128::from(bits as i16)),
            (Dtype::I32, _) => Number::Integer(i128::from(bits as i32)),
            (Dtype::I64, _) => Number::Integer(i128::from(bits as i64)),
            _ => Number::Integer(i128::from(bits)),
        }
    }

    /// How far two values of one dtype are apart; what is not a number is farthest.
    fn distance(self, other: Number) -> f64 {
        match (self, other) {
            (Number::Float(one), Number::Float(other)) => {
                let distance = (one - other).abs();
                if distance.is_nan() { f64::INFINITY } else { distance }
            }
            (Number::Integer(one), Number::Integer(other)) => one.abs_diff(other) as f64,
            _ => f64::INFINITY,
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Number::Float(value) => value.fmt(f),
            Number::Integer(value) => value.fmt(f),
        }
    }
}

impl VerifyReport {
    /// Whether the model is what the merge makes, up to `steps` values of the dtype.
    pub fn agrees(&self, steps: u64) -> bool {
        self.missing.is_empty()
            && self.unexpected.is_empty()
            && self.reshaped.is_empty()
            && self.different.iter().all(|one| one.steps.is_some_and(|far| far <= steps))
    }
}

/// The dtype that a merge must have converted to for `merged` to be its output, where the model's
/// floating-point tensors have one dtype.
pub fn common_dtype(merged: &Checkpoint) -> Option<Dtype> {
    let floats = merged.tensors().map(|(_, info)| info.dtype).filter(|d| d.is_merge_float());
    let dtypes: BTreeSet<Dtype> = floats.collect();
    dtypes.first().copied().filter(|_| dtypes.len() == 1)
}

/// Carries the merge out again and compares.
///
/// # Errors
/// What the merge meets, or reading the model.
pub fn verify(
    plan: &MergePlan,
    merged: &Checkpoint,
    options: &RunOptions,
    progress: &Progress,
) -> Result<VerifyReport> {
    let mut report = VerifyReport {
        compared: 0,
        different: Vec::new(),
        missing: Vec::new(),
        unexpected: Vec::new(),
        reshaped: Vec::new(),
        renamed: None,
    };
    let outputs = plan.output.files.iter().flat_map(|file| &file.tensors);
    let made: BTreeSet<&str> = outputs.map(|tensor| tensor.name.as_str()).collect();
    let there: BTreeSet<&str> = merged.tensors().map(|(_, info)| info.name.as_str()).collect();
    let missing: BTreeSet<&str> = made.difference(&there).copied().collect();
    let mut unexpected: BTreeSet<&str> = there.difference(&made).copied().collect();
    let renamed = Renamed::of(&missing, &unexpected);
    let find = |name: &str| {
        let other = renamed.as_ref().and_then(|renamed| renamed.name(name));
        let other = other.filter(|other| missing.contains(name) && !made.contains(other.as_str()));
        merged.find(other.as_deref().unwrap_or(name))
    };
    let mut counterparts = Vec::with_capacity(plan.output.files.len());
    for file in &plan.output.files {
        let mut own = Vec::with_capacity(file.tensors.len());
        for tensor in &file.tensors {
            let location = find(&tensor.name);
            if let Some(location) = location {
                unexpected.remove(merged.info(location).name.as_str());
            }
            let counterpart = location.filter(|&location| {
                let info = merged.info(location);
                info.dtype == tensor.dtype && info.shape == tensor.shape
            });
            match (location, counterpart) {
                (None, _) => report.missing.push(tensor.name.clone()),
                (Some(location), None) => {
                    let info = merged.info(location);
                    report.reshaped.push(Reshaped {
                        tensor: tensor.name.clone(),
                        expected: (tensor.dtype, Shape(tensor.shape.clone())),
                        found: (info.dtype, Shape(info.shape.clone())),
                    });
                }
                (_, Some(_)) => report.compared += 1,
            }
            own.push(Counterpart { location: counterpart, found: Mutex::new(Found::default()) });
        }
        counterparts.push(own);
    }
    report.unexpected = merged
        .tensors()
        .map(|(_, info)| &info.name)
        .filter(|name| unexpected.contains(name.as_str()))
        .cloned()
        .collect();
    report.renamed = renamed;

    let shards = merged.shards().iter();
    let mappings = shards.map(|shard| shard.file.map()).collect::<Result<_, _>>()?;
    let sink = CompareSink { plan, merged, mappings, counterparts };
    engine::fill(plan, &sink, options, progress)?;
    for shard in merged.shards() {
        shard.file.ensure_unchanged()?;
    }
    report.different = sink.differences();
    report.missing.sort();
    Ok(report)
}

/// Compares what it is given with a model.
struct CompareSink<'a> {
    plan: &'a MergePlan,
    merged: &'a Checkpoint,
    mappings: Vec<Mapping>,
    /// By output file and tensor.
    counterparts: Vec<Vec<Counterpart>>,
}

/// The model's tensor of the same name, shape and dtype, and what was found of it.
struct Counterpart {
    location: Option<Location>,
    found: Mutex<Found>,
}

/// What was found of one tensor so far.
#[derive(Default)]
struct Found {
    different: u64,
    /// The most; `u64::MAX` where there is no number.
    steps: u64,
    worst: Option<Element>,
    /// The sum of the squares of the differences in each run, by the run's first byte.
    squares: Vec<(u64, f64)>,
}

/// An element that differs.
struct Element {
    steps: u64,
    index: u64,
    expected: Number,
    found: Number,
}

impl Sink for CompareSink<'_> {
    fn put(&self, file: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let tensors = &self.plan.output.files[file].tensors;
        let end = offset + bytes.len() as u64;
        let first = tensors.partition_point(|tensor| tensor.offset + tensor.bytes <= offset);
        for (position, tensor) in tensors.iter().enumerate().skip(first) {
            if tensor.offset >= end {
                break;
            }
            let counterpart = &self.counterparts[file][position];
            let Some(location) = counterpart.location else { continue };
            let from = offset.max(tensor.offset);
            let until = end.min(tensor.offset + tensor.bytes);
            let made = &bytes[(from - offset) as usize..(until - offset) as usize];
            let shard = &self.merged.shards()[location.shard];
            let info = self.merged.info(location);
            let start = shard.file.header().data_start + info.start + (from - tensor.offset);
            let range = start as usize..start as usize + made.len();
            let mapping = &self.mappings[location.shard];
            mapping.populate(range.clone());
            let there = &mapping[range.clone()];
            if made != there {
                compare(tensor.dtype, from - tensor.offset, made, there, counterpart);
            }
            mapping.release(range);
        }
        Ok(())
    }

    fn copy(
        &self,
        file: usize,
        offset: u64,
        _: &File,
        mapping: &Mapping,
        range: Range<usize>,
    ) -> Result<()> {
        mapping.populate(range.clone());
        self.put(file, offset, &mapping[range.clone()])?;
        mapping.release(range);
        Ok(())
    }
}

/// Enters the elements that differ in a run of a tensor.
fn compare(dtype: Dtype, first_byte: u64, made: &[u8], there: &[u8], counterpart: &Counterpart) {
    let width = (dtype.bits() / 8).max(1) as usize;
    let first = first_byte / width as u64;
    let mut found = counterpart.found.lock().unwrap_or_else(PoisonError::into_inner);
    let mut squares = 0.0;
    let pairs = made.chunks(width).zip(there.chunks(width)).enumerate();
    for (index, (made, there)) in pairs.filter(|(_, (made, there))| made != there) {
        found.different += 1;
        let element = Element::of(dtype, first + index as u64, made, there);
        found.steps = found.steps.max(element.steps);
        squares += element.expected.distance(element.found).powi(2);
        // Runs come in any order: of equals, the first in the tensor.
        let worse = found.worst.as_ref().is_none_or(|worst| {
            let distance = |element: &Element| element.expected.distance(element.found);
            let order = distance(&element).total_cmp(&distance(worst));
            order.then(worst.index.cmp(&element.index)).is_gt()
        });
        if worse {
            found.worst = Some(element);
        }
    }
    found.squares.push((first_byte, squares));
}

impl Element {
    fn of(dtype: Dtype, index: u64, made: &[u8], there: &[u8]) -> Element {
        let steps = float_type(dtype).and_then(|float| {
            let bits = |bytes: &[u8]| match *bytes {
                [a, b] => u32::from(u16::from_le_bytes([a, b])),
                [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
                _ => 0,
            };
            steps_between(float, bits(made), bits(there))
        });
        Element {
            steps: steps.unwrap_or(u64::MAX),
            index,
            expected: Number::of(dtype, made),
            found: Number::of(dtype, there),
        }
    }
}

impl CompareSink<'_> {
    fn differences(mut self) -> Vec<Difference> {
        let mut differences = Vec::new();
        let counterparts = std::mem::take(&mut self.counterparts);
        for (file, counterparts) in self.plan.output.files.iter().zip(counterparts) {
            for (tensor, counterpart) in file.tensors.iter().zip(counterparts) {
                let found = counterpart.found.into_inner().unwrap_or_else(PoisonError::into_inner);
                let (Some(worst), Some(location)) = (found.worst, counterpart.location) else {
                    continue;
                };
                let relative = self.relative(location, found.squares);
                differences.push(Difference {
                    tensor: tensor.name.clone(),
                    dtype: tensor.dtype,
                    elements: tensor.shape.iter().map(|&n| n as u64).product(),
                    different: found.different,
                    steps: number(found.steps),
                    relative,
                    worst: Worst {
                        steps: number(worst.steps),
                        index: place(worst.index, &tensor.shape),
                        expected: worst.expected,
                        found: worst.found,
                    },
                });
            }
        }
        differences.sort_by(|a, b| a.tensor.cmp(&b.tensor));
        differences
    }

    /// [`Difference::relative`], of the squares of all runs. They came in any order, and are added in
    /// that of the tensor.
    fn relative(&self, location: Location, mut squares: Vec<(u64, f64)>) -> Option<f64> {
        /// Bytes whose pages are given back together.
        const RUN: usize = 1 << 22;
        let info = self.merged.info(location);
        float_type(info.dtype)?;
        squares.sort_by_key(|run| run.0);
        let sum: f64 = squares.iter().map(|run| run.1).sum();
        let shard = &self.merged.shards()[location.shard];
        let mapping = &self.mappings[location.shard];
        let start = (shard.file.header().data_start + info.start) as usize;
        let end = start + info.bytes() as usize;
        let width = (info.dtype.bits() / 8).max(1) as usize;
        let mut norm = 0.0;
        for first in (start..end).step_by(RUN) {
            let range = first..end.min(first + RUN);
            for element in mapping[range.clone()].chunks_exact(width) {
                norm += Number::of(info.dtype, element).distance(Number::Float(0.0)).powi(2);
            }
            mapping.release(range);
        }
        Some((sum / norm).sqrt()).filter(|relative| relative.is_finite())
    }
}

/// A number of values of a dtype, if it is one.
fn number(steps: u64) -> Option<u64> {
    (steps != u64::MAX).then_some(steps)
}

/// A flat index as one per dimension.
fn place(mut index: u64, shape: &[usize]) -> Vec<usize> {
    let mut place = vec![0; shape.len()];
    for (slot, &length) in place.iter_mut().zip(shape).rev() {
        let length = length.max(1) as u64;
        *slot = (index % length) as usize;
        index /= length;
    }
    place
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The worst of the elements that differ, and how many do.
    fn worst(dtype: Dtype, made: &[u8], there: &[u8]) -> (u64, u64, String, String) {
        let counterpart = Counterpart { location: None, found: Mutex::default() };
        compare(dtype, 0, made, there, &counterpart);
        let found = counterpart.found.into_inner().unwrap();
        let worst = found.worst.unwrap();
        assert!(worst.expected.distance(worst.found) > 0.0, "{dtype}");
        (found.different, worst.index, worst.expected.to_string(), worst.found.to_string())
    }

    fn bytes<const N: usize>(elements: &[[u8; N]]) -> Vec<u8> {
        elements.concat()
    }

    #[test]
    fn elements_are_read_as_their_dtype() {
        let text = |expected: &str, found: &str| (expected.to_owned(), found.to_owned());
        let check = |dtype, made: &[u8], there: &[u8], values: (String, String)| {
            assert_eq!(worst(dtype, made, there), (1, 0, values.0, values.1), "{dtype}");
        };
        // What differs is in the upper half.
        let (one, two) = (1_i64 << 40, -(1_i64 << 40));
        let values = text("1099511627776", "-1099511627776");
        check(Dtype::I64, &one.to_le_bytes(), &two.to_le_bytes(), values);
        // Neighbours that are one f64.
        let (one, two) = (u64::MAX, u64::MAX - 1);
        let values = text("18446744073709551615", "18446744073709551614");
        check(Dtype::U64, &one.to_le_bytes(), &two.to_le_bytes(), values);
        let (one, two) = (1.5_f64, -0.25_f64);
        check(Dtype::F64, &one.to_le_bytes(), &two.to_le_bytes(), text("1.5", "-0.25"));
        check(Dtype::I32, &(-7_i32).to_le_bytes(), &9_i32.to_le_bytes(), text("-7", "9"));
        check(Dtype::U32, &u32::MAX.to_le_bytes(), &[0; 4], text("4294967295", "0"));
        check(Dtype::I16, &(-2_i16).to_le_bytes(), &[1, 0], text("-2", "1"));
        check(Dtype::U16, &[0xFF, 0xFF], &[1, 0], text("65535", "1"));
        check(Dtype::I8, &[0xFF], &[1], text("-1", "1"));
        check(Dtype::U8, &[0xFF], &[1], text("255", "1"));
        check(Dtype::Bool, &[1], &[0], text("1", "0"));
        check(Dtype::Bf16, &[0x80, 0x3F], &[0x80, 0xBF], text("1", "-1"));
        check(Dtype::F32, &2.5_f32.to_le_bytes(), &[0; 4], text("2.5", "0"));
        // Bits, where nothing better is known; and never less than all of them.
        check(Dtype::C64, &[0; 8], &[0, 0, 0, 0, 1, 0, 0, 0], text("0", "4294967296"));
    }

    #[test]
    fn the_worst_is_by_value() {
        let made = bytes(&[1, 0, 5].map(|value: i64| value.to_le_bytes()));
        let there = bytes(&[0, 1 << 33, 5].map(|value: i64| value.to_le_bytes()));
        let of = |made: &[u8], there: &[u8]| worst(Dtype::I64, made, there);
        let far = "8589934592".to_owned();
        assert_eq!(of(&made, &there), (2, 1, "0".to_owned(), far.clone()));
        assert_eq!(of(&there, &made), (2, 1, far, "0".to_owned()));
        let made = bytes(&[1.0, f64::NAN, 3.0].map(f64::to_le_bytes));
        let there = bytes(&[1e300, 2.0, 3.0].map(f64::to_le_bytes));
        let found = worst(Dtype::F64, &made, &there);
        assert_eq!(found, (2, 1, "NaN".to_owned(), "2".to_owned()));
    }
}
