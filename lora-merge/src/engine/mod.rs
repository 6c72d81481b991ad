//! The streaming merge: mapped base → tiles → kernels → output files.
//!
//! Workers take tiles in file order from one counter. A tile is read through the mapping, merged
//! into the worker's buffer and written at its place; its pages are then given back, so that
//! memory does not grow with the model. Factors are unpacked when the first tile of their target
//! is reached and dropped after its last. The bytes do not depend on the number of threads, the
//! tile size or the instruction set (`docs/numerics.md`).

mod copy;
mod schedule;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lora_format::Dtype;
use lora_format::checkpoint::Location;
use lora_format::io::mmap::Mapping;
use lora_format::model::LowRank;
use lora_format::{IoContext, Tensor};

use crate::error::{Error, Result};
use crate::kernels::{self, Factors, FloatType, Isa, Rounding, TileRegion, TileStats};
use crate::layout::OutputFile;
use crate::orientation::Orientation;
use crate::plan::{MergePlan, PlannedTarget};
use crate::report::{MergeReport, Realised, TargetReport};
use schedule::{Work, WorkKind};

/// How a merge is carried out. Nothing here changes what is written, except `rounding`.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Worker threads; 0 means one per available core.
    pub threads: usize,
    /// The instruction set of the kernels.
    pub isa: Isa,
    /// How merged elements are rounded.
    pub rounding: RoundingMode,
    /// Merge an adapter that holds NaN or infinities.
    pub allow_non_finite: bool,
    /// The size that a tile aims at, in bytes of base or output, whichever is larger.
    pub tile_bytes: usize,
}

impl Default for RunOptions {
    fn default() -> Self {
        RunOptions {
            threads: 0,
            isa: Isa::detect(),
            rounding: RoundingMode::Nearest,
            allow_non_finite: false,
            tile_bytes: DEFAULT_TILE_BYTES,
        }
    }
}

impl RunOptions {
    /// The number of worker threads, counted where it was left open.
    pub fn workers(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            threads => threads,
        }
    }
}

/// Base and output tile together stay within a core's second-level cache.
pub const DEFAULT_TILE_BYTES: usize = 512 * 1024;

/// How elements with a delta are rounded to the output's dtype.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoundingMode {
    /// To nearest, ties to even.
    Nearest,
    /// Up or down at random so that the expected value is exact; keyed by this seed, the
    /// tensor's name and the element's index.
    Stochastic {
        /// The seed.
        seed: u64,
    },
}

impl RoundingMode {
    /// The kernels' rounding for one tensor.
    fn of(self, parameter: &str) -> Rounding {
        match self {
            RoundingMode::Nearest => Rounding::Nearest,
            RoundingMode::Stochastic { seed } => {
                Rounding::Stochastic { key: stochastic_key(seed, parameter) }
            }
        }
    }
}

/// The 64-bit FNV-1a hash of the seed's little-endian bytes followed by the parameter's name.
fn stochastic_key(seed: u64, parameter: &str) -> u64 {
    let bytes = seed.to_le_bytes().into_iter().chain(parameter.bytes());
    bytes.fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

/// What another thread may watch and stop.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Output bytes written so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Asks the merge to stop; it returns [`Error::Interrupted`] after the tiles in flight.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

/// An open output file, with the name that messages give it.
pub(crate) struct OutputHandle<'a> {
    pub(crate) path: &'a Path,
    pub(crate) file: &'a File,
}

/// Fills the output files, which are open and empty, one per file of the plan's layout.
pub(crate) fn fill(
    plan: &MergePlan,
    outputs: &[OutputHandle<'_>],
    options: &RunOptions,
    progress: &Progress,
) -> Result<MergeReport> {
    if !options.allow_non_finite {
        refuse_non_finite(plan)?;
    }
    for (output, layout) in outputs.iter().zip(&plan.output.files) {
        copy::write_at(output.file, &layout.header, 0).at(output.path, "write")?;
        progress.done.fetch_add(layout.header.len() as u64, Ordering::Relaxed);
    }
    let mappings = plan
        .base
        .shards()
        .iter()
        .map(|shard| shard.file.map())
        .collect::<Result<Vec<Mapping>, _>>()?;
    let work = schedule::schedule(plan, options.tile_bytes);
    let mut tiles = vec![0; plan.targets.len()];
    for item in &work {
        if let WorkKind::Merge { target, .. } = item.kind {
            tiles[target] += 1;
        }
    }
    let engine = Engine {
        plan,
        outputs,
        options,
        progress,
        mappings,
        states: tiles.into_iter().map(TargetState::new).collect(),
        next: AtomicUsize::new(0),
        failure: Mutex::new(None),
        work,
    };
    let threads = options.workers().clamp(1, engine.work.len().max(1));
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|| engine.work());
        }
        engine.work();
    });
    engine.finish(threads)
}

struct Engine<'a> {
    plan: &'a MergePlan,
    outputs: &'a [OutputHandle<'a>],
    options: &'a RunOptions,
    progress: &'a Progress,
    mappings: Vec<Mapping>,
    states: Vec<TargetState>,
    work: Vec<Work>,
    next: AtomicUsize,
    failure: Mutex<Option<Error>>,
}

/// What the tiles of one target share.
struct TargetState {
    factors: Mutex<Option<Arc<Factors>>>,
    remaining: AtomicUsize,
    /// Each tile's statistics by its first element, so that they are summed in one order.
    stats: Mutex<BTreeMap<u64, TileStats>>,
}

impl TargetState {
    fn new(tiles: usize) -> TargetState {
        TargetState {
            factors: Mutex::new(None),
            remaining: AtomicUsize::new(tiles),
            stats: Mutex::new(BTreeMap::new()),
        }
    }
}

/// A lock whose holder panicked guards nothing that outlives the error.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine<'_> {
    /// One worker: takes work until there is none, or somebody failed.
    fn work(&self) {
        let mut buffer = Vec::new();
        loop {
            if self.progress.is_cancelled() {
                lock(&self.failure).get_or_insert(Error::Interrupted);
            }
            if lock(&self.failure).is_some() {
                return;
            }
            let Some(item) = self.work.get(self.next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            if let Err(error) = self.execute(item, &mut buffer) {
                lock(&self.failure).get_or_insert(error);
                return;
            }
            self.progress.done.fetch_add(item.bytes, Ordering::Relaxed);
        }
    }

    fn execute(&self, item: &Work, buffer: &mut Vec<u8>) -> Result<()> {
        let output = &self.outputs[item.file];
        let shard = &self.plan.base.shards()[item.shard];
        let mapping = &self.mappings[item.shard];
        let source = item.source as usize;
        if let WorkKind::Copy = item.kind {
            let range = source..source + item.bytes as usize;
            copy::copy_range(shard.file.file(), mapping, range, output.file, item.offset)
                .at(output.path, "write")?;
            return Ok(());
        }
        buffer.resize(item.bytes as usize, 0);
        let source_bytes = item.elements * float_bytes(item.source_type);
        let range = source..source + source_bytes as usize;
        mapping.populate(range.clone());
        let base = &mapping[range.clone()];
        let (from, to) = (item.source_type, item.output_type);
        let overflowed = match item.kind {
            WorkKind::Merge { target, region } => {
                self.merge(target, region, base, from, buffer, to)?
            }
            _ => kernels::convert(self.options.isa, base, from, buffer, to).overflowed,
        };
        if overflowed > 0 {
            return Err(Error::Overflow {
                tensor: self.plan.base.info(item.tensor).name.clone(),
                count: overflowed,
                dtype: dtype_of(to),
            });
        }
        mapping.release(range);
        copy::write_at(output.file, buffer, item.offset).at(output.path, "write")?;
        Ok(())
    }

    fn merge(
        &self,
        target: usize,
        region: TileRegion,
        base: &[u8],
        from: FloatType,
        buffer: &mut [u8],
        to: FloatType,
    ) -> Result<u64> {
        let planned = &self.plan.targets[target];
        let state = &self.states[target];
        let factors = {
            let mut slot = lock(&state.factors);
            match &*slot {
                Some(factors) => Arc::clone(factors),
                None => Arc::clone(slot.insert(Arc::new(self.unpack(planned)?))),
            }
        };
        let rounding = self.options.rounding.of(self.plan.parameter(planned));
        let isa = self.options.isa;
        let stats = kernels::merge_tile(isa, &factors, region, base, from, buffer, to, rounding);
        let first = region.row as u64 * factors.cols() as u64 + region.col as u64;
        lock(&state.stats).insert(first, stats);
        if state.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            *lock(&state.factors) = None;
        }
        if stats.non_finite == 0 || self.options.allow_non_finite {
            return Ok(stats.overflowed);
        }
        // The factors are finite here, so what the base did not bring overflowed, whether in the
        // sum or in the delta itself.
        let brought = non_finite(dtype_of(from), base).map_or(0, |found| found.0 as u64);
        Ok(stats.non_finite.saturating_sub(brought).max(stats.overflowed))
    }

    /// The factors of a target as the kernels want them: left·right in the stored orientation,
    /// decoded straight into their place, so that no factor is held twice.
    fn unpack(&self, target: &PlannedTarget) -> Result<Factors> {
        let factors = required(self.plan.factors(target))?;
        let (a, b) = (&factors.a, &factors.b);
        let (rank, input, out) = (factors.rank(), factors.in_features(), factors.out_features());
        let packed = match target.orientation {
            Orientation::OutIn => {
                let left = decode(b, 0..out * rank, 1);
                Factors::pack(out, input, rank, left, target.scale, |k, columns, row| {
                    let first = k * input;
                    decode_into(a, first + columns.start, 1, row);
                })
            }
            Orientation::InOut => {
                let columns = (0..input).flat_map(|column| {
                    let end = column + (rank - 1) * input + 1;
                    decode(a, column..end, input)
                });
                let left = columns.collect();
                Factors::pack(input, out, rank, left, target.scale, |k, columns, row| {
                    decode_into(b, columns.start * rank + k, rank, row);
                })
            }
        };
        a.release();
        b.release();
        Ok(packed)
    }

    fn finish(self, threads: usize) -> Result<MergeReport> {
        if let Some(error) = lock(&self.failure).take() {
            return Err(error);
        }
        for shard in self.plan.base.shards() {
            shard.file.ensure_unchanged()?;
        }
        self.plan.adapter.ensure_unchanged()?;
        let jobs = || self.plan.output.files.iter().flat_map(|file| &file.tensors);
        let mut realised = Realised::default();
        let mut targets = Vec::with_capacity(self.states.len());
        let dtypes: BTreeMap<Location, Dtype> =
            jobs().map(|tensor| (tensor.source, tensor.dtype)).collect();
        for (planned, state) in self.plan.targets.iter().zip(&self.states) {
            let mut stats = TileStats::default();
            for tile in lock(&state.stats).values() {
                stats.merge(tile);
            }
            let own = Realised::from(stats);
            realised.add(&own);
            let info = self.plan.base.info(planned.location);
            targets.push(TargetReport {
                parameter: info.name.clone(),
                shape: info.shape.clone(),
                rank: self.plan.factors(planned).map_or(0, LowRank::rank),
                scale: planned.scale,
                orientation: planned.orientation,
                dtype: dtypes.get(&planned.location).copied().unwrap_or(info.dtype),
                realised: own,
            });
        }
        let count = |job| jobs().filter(|tensor| tensor.job == job).count();
        Ok(MergeReport {
            targets,
            realised,
            copied: count(crate::layout::Job::Copy),
            converted: count(crate::layout::Job::Convert),
            bytes: self.plan.output.files.iter().map(|file: &OutputFile| file.bytes).sum(),
            threads,
        })
    }
}

/// The planner let only floating-point low-rank components through.
fn required<T>(value: Option<T>) -> Result<T> {
    value.ok_or_else(|| {
        let source = std::io::Error::other("a component that the planner should have refused");
        lora_format::Error::Io { path: "the plan".into(), action: "carry out", source }.into()
    })
}

fn refuse_non_finite(plan: &MergePlan) -> Result<()> {
    for factors in plan.targets.iter().filter_map(|target| plan.factors(target)) {
        for tensor in [&factors.a, &factors.b] {
            let found = non_finite(tensor.dtype, tensor.bytes());
            tensor.release();
            if let Some((count, first)) = found {
                let (adapter, tensor) = (plan.adapter.path.clone(), tensor.name.clone());
                return Err(Error::NonFinite { adapter, tensor, count, first });
            }
        }
    }
    Ok(())
}

/// How many elements have all exponent bits set, and the first of them.
fn non_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, usize)> {
    let pair = |at: &[u8]| u32::from(u16::from_le_bytes([at[0], at[1]]));
    let word = |at: &[u8]| u32::from_le_bytes([at[0], at[1], at[2], at[3]]);
    let scan = |width: usize, mask: u32, read: &dyn Fn(&[u8]) -> u32| {
        let bad = |element: &[u8]| read(element) & mask == mask;
        let count = bytes.chunks_exact(width).filter(|&element| bad(element)).count();
        let first = bytes.chunks_exact(width).position(bad)?;
        Some((count, first))
    };
    match dtype {
        Dtype::F16 => scan(2, 0x7C00, &pair),
        Dtype::Bf16 => scan(2, 0x7F80, &pair),
        _ => scan(4, 0x7F80_0000, &word),
    }
}

/// Every `step`-th element of `range`, exactly. A factor's dtype was checked when it was read.
fn decode(tensor: &Tensor, range: Range<usize>, step: usize) -> Vec<f32> {
    let mut values = vec![0.0; range.len().div_ceil(step)];
    decode_into(tensor, range.start, step, &mut values);
    values
}

/// As [`decode`], from `first` on until `values` is full.
fn decode_into(tensor: &Tensor, first: usize, step: usize, values: &mut [f32]) {
    let bytes = tensor.bytes();
    let float = float_type(tensor.dtype).unwrap_or(FloatType::F32);
    let width = float.size();
    let number = |element: &[u8]| match *element {
        [a, b] => float.decode(u32::from(u16::from_le_bytes([a, b]))),
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
        _ => f32::NAN,
    };
    if step == 1 {
        let elements = bytes[first * width..][..values.len() * width].chunks_exact(width);
        for (value, element) in values.iter_mut().zip(elements) {
            *value = number(element);
        }
        return;
    }
    for (index, value) in values.iter_mut().enumerate() {
        let at = (first + index * step) * width;
        *value = number(&bytes[at..at + width]);
    }
}

/// The kernels' name of a dtype they know.
pub(crate) fn float_type(dtype: Dtype) -> Option<FloatType> {
    match dtype {
        Dtype::F32 => Some(FloatType::F32),
        Dtype::F16 => Some(FloatType::F16),
        Dtype::Bf16 => Some(FloatType::Bf16),
        _ => None,
    }
}

fn dtype_of(float: FloatType) -> Dtype {
    match float {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::Bf16 => Dtype::Bf16,
    }
}

fn float_bytes(float: FloatType) -> u64 {
    float.size() as u64
}
