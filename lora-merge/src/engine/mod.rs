//! The streaming merge: mapped base → tiles → kernels → output files.
//!
//! Workers take tiles in file order from one counter. A tile is read through the mapping (and
//! decoded, if the base is quantised), merged into the worker's buffer and written at its place;
//! its pages are then given back, so that memory does not grow with the model. What changes a
//! matrix is prepared when its first tile is reached and dropped after its last. The bytes do not
//! depend on the number of threads, the tile size or the instruction set (`docs/numerics.md`).

mod copy;
mod ledger;
mod schedule;
mod source;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lora_format::io::mmap::Mapping;
use lora_format::model::Form;
use lora_format::{IoContext, Tensor};

use crate::error::{Error, Result};
use crate::kernels::{self, Factors, FloatType, Isa, Rounding, TileRegion, TileStats};
use crate::layout::{Job, OutputFile};
use crate::low_rank::{self, Term};
use crate::numbers::{decode_bytes, dtype_of, float_type, non_finite};
use crate::operator::{self, Operator};
use crate::parameters::Source;
use crate::plan::{Change, MergePlan, PlannedTarget};
use crate::report::{MergeReport, Realised, Recovered, TargetReport};
use ledger::Ledger;
use schedule::{Work, WorkKind};
use source::{Scratch, Sources, Values};

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
    /// Whether to find out what quantising a merged quantised weight again would lose.
    pub requantise: bool,
    /// Carries no component of this method out, as a faulty engine would: for the test that such
    /// a merge fails.
    #[doc(hidden)]
    pub fault: Option<&'static str>,
}

impl Default for RunOptions {
    fn default() -> Self {
        RunOptions {
            threads: 0,
            isa: Isa::detect(),
            rounding: RoundingMode::Nearest,
            allow_non_finite: false,
            tile_bytes: DEFAULT_TILE_BYTES,
            requantise: true,
            fault: None,
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

/// Finding the nearest codes takes many times what a merge does, and a share is a share: one tile
/// of so many, the first of every matrix among them, is quantised again for the report.
const REQUANTISED_TILES: usize = 16;

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
    /// The kernels' rounding for one matrix of a parameter.
    fn of(self, target: &PlannedTarget, slab: usize) -> Rounding {
        match self {
            RoundingMode::Nearest => Rounding::Nearest,
            RoundingMode::Stochastic { seed } if target.slabs.len() == 1 => {
                Rounding::Stochastic { key: stochastic_key(seed, &target.key) }
            }
            RoundingMode::Stochastic { seed } => Rounding::Stochastic {
                key: stochastic_key(seed, &format!("{}[{slab}]", target.key)),
            },
        }
    }
}

/// The 64-bit FNV-1a hash of the seed's little-endian bytes followed by the parameter's name.
pub(crate) fn stochastic_key(seed: u64, parameter: &str) -> u64 {
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

    /// Counts work that is done, in whatever unit its total is in.
    pub(crate) fn add(&self, amount: u64) {
        self.done.fetch_add(amount, Ordering::Relaxed);
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

/// Where the output's bytes go.
pub(crate) trait Sink: Sync {
    /// Takes bytes of an output file at an offset.
    fn put(&self, file: usize, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Takes a range of one of the base's files, which `mapping` maps, as it is.
    fn copy(
        &self,
        file: usize,
        offset: u64,
        source: &File,
        mapping: &Mapping,
        range: Range<usize>,
    ) -> Result<()>;
}

/// An open output file, with the name that messages give it.
pub(crate) struct OutputHandle<'a> {
    pub(crate) path: &'a Path,
    pub(crate) file: &'a File,
}

/// The files of an output.
pub(crate) struct FileSink<'a>(pub(crate) &'a [OutputHandle<'a>]);

impl Sink for FileSink<'_> {
    fn put(&self, file: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let output = &self.0[file];
        Ok(copy::write_at(output.file, bytes, offset).at(output.path, "write")?)
    }

    fn copy(
        &self,
        file: usize,
        offset: u64,
        source: &File,
        mapping: &Mapping,
        range: Range<usize>,
    ) -> Result<()> {
        let output = &self.0[file];
        let copied = copy::copy_range(source, mapping, range, output.file, offset);
        Ok(copied.at(output.path, "write")?)
    }
}

/// Makes every byte of the output files of the plan's layout.
pub(crate) fn fill(
    plan: &MergePlan,
    sink: &dyn Sink,
    options: &RunOptions,
    progress: &Progress,
) -> Result<MergeReport> {
    if !options.allow_non_finite {
        refuse_non_finite(plan)?;
    }
    for (file, layout) in plan.output.files.iter().enumerate() {
        sink.put(file, 0, &layout.header)?;
        progress.done.fetch_add(layout.header.len() as u64, Ordering::Relaxed);
    }
    let sources = Sources::open(plan)?;
    let work = schedule::schedule(plan, options.tile_bytes);
    let mut firsts = Vec::with_capacity(plan.targets.len());
    let mut slabs = 0;
    for target in &plan.targets {
        firsts.push(slabs);
        slabs += target.slabs.len();
    }
    let mut tiles = vec![0; slabs];
    for item in &work {
        if let WorkKind::Merge { target, slab, .. } = item.kind {
            tiles[firsts[target] + slab] += 1;
        }
    }
    let engine = Engine {
        plan,
        sink,
        options,
        progress,
        sources,
        ledger: Ledger::new(plan),
        firsts,
        states: tiles.into_iter().map(SlabState::new).collect(),
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
    sink: &'a dyn Sink,
    options: &'a RunOptions,
    progress: &'a Progress,
    sources: Sources<'a>,
    ledger: Ledger,
    /// The index of every target's first state.
    firsts: Vec<usize>,
    /// One per matrix.
    states: Vec<SlabState>,
    work: Vec<Work>,
    next: AtomicUsize,
    failure: Mutex<Option<Error>>,
}

/// What the tiles of one matrix share.
struct SlabState {
    prepared: Mutex<Option<Arc<Prepared>>>,
    remaining: AtomicUsize,
    stats: Mutex<Sums>,
}

impl SlabState {
    fn new(tiles: usize) -> SlabState {
        SlabState {
            prepared: Mutex::new(None),
            remaining: AtomicUsize::new(tiles),
            stats: Mutex::new(Sums::default()),
        }
    }
}

/// The statistics of a matrix, summed in the order of its tiles whichever is done first.
#[derive(Default)]
struct Sums {
    total: TileReport,
    /// Tiles that are in the total.
    summed: usize,
    /// Those that wait for an earlier one: at most one for every other worker.
    waiting: BTreeMap<usize, TileReport>,
}

impl Sums {
    fn add(&mut self, number: usize, report: TileReport) {
        self.waiting.insert(number, report);
        while let Some(next) = self.waiting.remove(&self.summed) {
            self.total.add(&next);
            self.summed += 1;
        }
    }
}

/// What one tile did, or several.
#[derive(Clone, Copy, Default)]
struct TileReport {
    stats: TileStats,
    /// Elements of what replaces the base's that the output's dtype had to round.
    rounded: u64,
    /// What the tile would be if it were quantised again.
    requantised: TileStats,
    /// How well what was taken out can be told from rounding.
    undone: Recovered,
}

impl TileReport {
    fn add(&mut self, other: &TileReport) {
        self.stats.merge(&other.stats);
        self.rounded += other.rounded;
        self.requantised.merge(&other.requantised);
        self.undone.add(&other.undone);
    }
}

/// The changes of one matrix, ready to be applied to any tile of it.
struct Prepared {
    all: Changes,
    /// What is taken out again, by itself.
    undone: Option<Changes>,
}

/// Changes that add up.
struct Changes {
    /// All low-rank terms.
    factors: Option<Arc<Factors>>,
    /// All others, with their weights.
    operators: Vec<(Arc<dyn Operator>, f64)>,
}

/// A worker's buffers, kept from tile to tile.
#[derive(Default)]
struct Buffers {
    output: Vec<u8>,
    scratch: Scratch,
    base: Vec<f32>,
    delta: Vec<f64>,
    values: Vec<f32>,
    requantised: Vec<f32>,
}

/// A lock whose holder panicked guards nothing that outlives the error.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine<'_> {
    /// One worker: takes work until there is none, or somebody failed.
    fn work(&self) {
        let mut buffers = Buffers::default();
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
            if let Err(error) = self.execute(item, &mut buffers) {
                lock(&self.failure).get_or_insert(error);
                return;
            }
            self.progress.done.fetch_add(item.bytes, Ordering::Relaxed);
        }
    }

    fn execute(&self, item: &Work, buffers: &mut Buffers) -> Result<()> {
        let (file, offset) = (item.file, item.offset);
        if let WorkKind::Copy { shard, source } = item.kind {
            let range = source as usize..(source + item.bytes) as usize;
            let opened = self.plan.base.shards()[shard].file.file();
            return self.sink.copy(file, offset, opened, self.sources.mapping(shard), range);
        }
        let tensor = &self.plan.output.files[file].tensors[item.tensor];
        let values = self.sources.values(tensor.source);
        let elements = item.first as usize..(item.first + item.elements) as usize;
        buffers.output.resize(item.bytes as usize, 0);
        let overflowed = match item.kind {
            WorkKind::Merge { target, slab, region, number } => {
                let at = (slab, region, number);
                self.merge(target, at, &values, elements.clone(), item, buffers)?
            }
            _ => {
                let base = values.read(elements.clone(), &mut buffers.scratch);
                let (from, to) = (values.float(), item.output_type);
                kernels::convert(self.options.isa, base, from, &mut buffers.output, to).overflowed
            }
        };
        if overflowed > 0 {
            return Err(Error::Overflow {
                tensor: tensor.name.clone(),
                count: overflowed,
                dtype: tensor.dtype,
            });
        }
        values.release(elements);
        self.sink.put(file, offset, &buffers.output)
    }

    /// Makes one tile of a target, and says how many of its elements overflowed.
    #[allow(clippy::too_many_arguments, reason = "a tile is many things")]
    fn merge(
        &self,
        target: usize,
        (slab, region, number): (usize, TileRegion, usize),
        values: &Values<'_>,
        elements: Range<usize>,
        item: &Work,
        buffers: &mut Buffers,
    ) -> Result<u64> {
        let planned = &self.plan.targets[target];
        let state = &self.states[self.firsts[target] + slab];
        let prepared = {
            let mut slot = lock(&state.prepared);
            match &*slot {
                Some(prepared) => Arc::clone(prepared),
                None => Arc::clone(slot.insert(Arc::new(self.prepare(planned, slab, values)?))),
            }
        };
        let (isa, rounding) = (self.options.isa, self.options.rounding.of(planned, slab));
        let (from, to) = (values.float(), item.output_type);
        let Buffers { output, scratch, base: numbers, delta, .. } = buffers;
        let base = values.read(elements.clone(), scratch);
        let mut report = TileReport::default();
        match &prepared.all {
            Changes { factors: None, operators } if operators.is_empty() => {
                let converted = kernels::convert(isa, base, from, output, to);
                report.stats.elements = converted.elements;
                report.stats.overflowed = converted.overflowed;
                if let Source::Brought { .. } = planned.source {
                    report.rounded = converted.changed;
                }
            }
            Changes { factors: Some(factors), operators } if operators.is_empty() => {
                report.stats =
                    kernels::merge_tile(isa, factors, region, base, from, output, to, rounding);
            }
            changes => {
                numbers.resize(elements.len(), 0.0);
                decode_bytes(from, base, 0, 1, numbers);
                changes.sum(isa, region, numbers, delta);
                let cols = planned.matrix().1;
                report.stats =
                    kernels::add_tile(isa, cols, region, delta, base, from, output, to, rounding);
            }
        }
        if let Some(undone) = &prepared.undone {
            numbers.resize(elements.len(), 0.0);
            decode_bytes(from, base, 0, 1, numbers);
            undone.sum(isa, region, numbers, delta);
            report.undone = Recovered::of(dtype_of(from), numbers, delta);
        }
        if let (Source::Brought { adapter, component }, false) =
            (planned.source, self.is_faulty(planned.source))
        {
            self.ledger.enter(adapter, component, 0, elements.len());
        }
        let stats = &report.stats;
        let mut overflowed = stats.overflowed;
        if stats.non_finite > 0 && !self.options.allow_non_finite {
            // The adapter is finite, so what the base did not bring overflowed, whether in the sum
            // or in the delta itself.
            let brought = non_finite(dtype_of(from), base).map_or(0, |found| found.0 as u64);
            overflowed = stats.non_finite.saturating_sub(brought).max(stats.overflowed);
        }
        for change in &planned.rows {
            overflowed += self.replace_rows(change, region, output, to);
        }
        let sampled = self.options.requantise && number % REQUANTISED_TILES == 0;
        if let (Values::Quantised { .. }, true, true) =
            (values, sampled, !planned.changes.is_empty())
        {
            report.requantised = requantise(values, elements.start, buffers, to);
        }
        lock(&state.stats).add(number, report);
        if state.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            *lock(&state.prepared) = None;
            if slab + 1 == planned.slabs.len() {
                values.release_all();
            }
        }
        Ok(overflowed)
    }

    /// Writes the rows that a component gives into a tile of whole or partial rows.
    fn replace_rows(
        &self,
        change: &Change,
        region: TileRegion,
        output: &mut [u8],
        to: FloatType,
    ) -> u64 {
        let form = &self.plan.component(change.adapter, change.component).form;
        let Form::Rows { indices, rows } = form else { return 0 };
        if self.options.fault == Some(form.method()) {
            return 0;
        }
        let Some(from) = float_type(rows.dtype) else { return 0 };
        let width = rows.shape.get(1).copied().unwrap_or(0);
        let mut overflowed = 0;
        for (position, &index) in indices.iter().enumerate() {
            let inside = (index as usize).checked_sub(region.row);
            let Some(row) = inside.filter(|&row| row < region.rows) else { continue };
            let first = (position * width + region.col) * from.size();
            let values = &rows.bytes()[first..first + region.cols * from.size()];
            let bytes = region.cols * to.size();
            let place = &mut output[row * bytes..(row + 1) * bytes];
            overflowed += kernels::convert(self.options.isa, values, from, place, to).overflowed;
            self.ledger.enter(change.adapter, change.component, 0, region.cols);
        }
        overflowed
    }

    /// The changes of one matrix: its low-rank terms packed, its operators prepared.
    fn prepare(
        &self,
        target: &PlannedTarget,
        slab: usize,
        values: &Values<'_>,
    ) -> Result<Prepared> {
        let (rows, cols) = target.matrix();
        let changes = &target.slabs[slab];
        let isa = self.options.isa;
        let faulty = |form: &Form| self.options.fault == Some(form.method());
        let terms: Vec<Term> =
            changes.terms.iter().filter(|term| !faulty(self.plan.form(term))).cloned().collect();
        let pack = |terms: &[Term]| {
            (!terms.is_empty()).then(|| {
                Arc::new(low_rank::pack((rows, cols), terms, &|term| self.plan.form(term)))
            })
        };
        let factors = pack(&terms);
        for term in &terms {
            let form = self.plan.form(term);
            for (tensor, elements) in term.elements(form) {
                self.ledger.enter(term.adapter, term.component, tensor, elements);
            }
            form.tensors().into_iter().for_each(Tensor::release);
        }
        let first = slab * rows * cols;
        let read = |range: Range<usize>, out: &mut [f32]| {
            let elements = first + range.start * cols..first + range.end * cols;
            values.read_f32(elements, out);
            Ok(())
        };
        let mut operators = Vec::with_capacity(changes.operators.len());
        let mut undone = Vec::new();
        let threads = self.options.workers();
        for planned in &changes.operators {
            let Change { adapter, component, weight, .. } = planned.change;
            let form = &self.plan.component(adapter, component).form;
            if faulty(form) {
                continue;
            }
            let prepared = operator::prepare(form, planned.matrix, isa, threads, &read)?;
            if let Some(operator) = prepared.map(Arc::from) {
                if self.plan.adapters[adapter].undo {
                    undone.push((Arc::clone(&operator), weight));
                }
                operators.push((operator, weight));
                self.ledger.enter_all(self.plan, adapter, component);
            }
        }
        let undoes = |term: &&Term| self.plan.adapters[term.adapter].undo;
        let undone_terms: Vec<Term> = terms.iter().filter(undoes).cloned().collect();
        let undone_factors = match undone_terms.len() == terms.len() {
            true => factors.clone(),
            false => pack(&undone_terms),
        };
        let undone = (undone_factors.is_some() || !undone.is_empty())
            .then_some(Changes { factors: undone_factors, operators: undone });
        Ok(Prepared { all: Changes { factors, operators }, undone })
    }

    fn is_faulty(&self, source: Source) -> bool {
        match (source, self.options.fault) {
            (Source::Brought { adapter, component }, Some(method)) => {
                self.plan.component(adapter, component).form.method() == method
            }
            _ => false,
        }
    }

    fn finish(self, threads: usize) -> Result<MergeReport> {
        if let Some(error) = lock(&self.failure).take() {
            return Err(error);
        }
        self.ledger.balance(self.plan)?;
        for shard in self.plan.base.shards() {
            shard.file.ensure_unchanged()?;
        }
        for one in &self.plan.adapters {
            one.adapter.ensure_unchanged()?;
        }
        let jobs = || self.plan.output.files.iter().flat_map(|file| &file.tensors);
        let mut realised = Realised::default();
        let mut targets = Vec::with_capacity(self.plan.targets.len());
        let mut dtypes = vec![None; self.plan.targets.len()];
        for tensor in jobs() {
            if let Job::Merge(target) = tensor.job {
                dtypes[target] = Some(tensor.dtype);
            }
        }
        for (index, planned) in self.plan.targets.iter().enumerate() {
            let mut total = TileReport::default();
            for state in &self.states[self.firsts[index]..][..planned.slabs.len()] {
                total.add(&lock(&state.stats).total);
            }
            let own = Realised::from(total.stats);
            let elements = planned.shape.iter().map(|&n| n as u64).product();
            if own.elements != elements {
                let (tensor, used) = (planned.name.clone(), own.elements);
                return Err(Error::Unwritten { tensor, written: used, elements });
            }
            realised.add(&own);
            let quantised = matches!(planned.source, Source::Quantised(_));
            targets.push(TargetReport {
                parameter: planned.name.clone(),
                shape: planned.shape.clone(),
                changes: planned
                    .changes
                    .iter()
                    .map(|change| self.plan.describe(planned, change))
                    .collect(),
                dtype: dtypes[index].unwrap_or(planned.dtype),
                realised: own,
                rounded: total.rounded,
                undone: (total.undone.elements > 0).then_some(total.undone),
                requantised: (quantised && self.options.requantise)
                    .then(|| Realised::from(total.requantised)),
            });
        }
        let count = |job| jobs().filter(|tensor| tensor.job == job).count();
        Ok(MergeReport {
            targets,
            realised,
            copied: count(Job::Copy),
            converted: count(Job::Convert),
            bytes: self.plan.output.files.iter().map(|file: &OutputFile| file.bytes).sum(),
            threads,
        })
    }
}

impl Changes {
    /// Their sum in a tile of whole or partial rows.
    fn sum(&self, isa: Isa, region: TileRegion, base: &[f32], delta: &mut Vec<f64>) {
        delta.clear();
        delta.resize(base.len(), 0.0);
        if let Some(factors) = &self.factors {
            kernels::product_tile(isa, factors, region, delta);
        }
        for (operator, weight) in &self.operators {
            operator.add(isa, region.row..region.row + region.rows, base, *weight, delta);
        }
    }
}

/// What a tile would be if it were quantised again with the scales that it had: the codes nearest
/// to the merged values, as a realised delta against the wanted one.
fn requantise(
    values: &Values<'_>,
    first: usize,
    buffers: &mut Buffers,
    to: FloatType,
) -> TileStats {
    let Buffers { output, base, values: merged, requantised, .. } = buffers;
    let elements = output.len() / to.size();
    for buffer in [&mut *base, &mut *merged, &mut *requantised] {
        buffer.resize(elements, 0.0);
    }
    decode_bytes(to, output, 0, 1, merged);
    values.read_f32(first..first + elements, base);
    values.requantise(first, merged, requantised);
    let mut stats = TileStats { elements: elements as u64, ..TileStats::default() };
    for ((&before, &wanted), &after) in base.iter().zip(&*merged).zip(&*requantised) {
        let delta = f64::from(wanted) - f64::from(before);
        let realised = f64::from(after) - f64::from(before);
        stats.nonzero_delta += u64::from(delta != 0.0);
        stats.changed += u64::from(realised != 0.0);
        if delta.is_finite() && realised.is_finite() {
            stats.dot += delta * realised;
            stats.wanted_sq += delta * delta;
            stats.realised_sq += realised * realised;
        }
    }
    stats
}

fn refuse_non_finite(plan: &MergePlan) -> Result<()> {
    for one in &plan.adapters {
        for tensor in one.adapter.tensors() {
            let found = non_finite(tensor.dtype, tensor.bytes());
            tensor.release();
            if let Some((count, first)) = found {
                let (adapter, tensor) = (one.adapter.path.clone(), tensor.name.clone());
                return Err(Error::NonFinite { adapter, tensor, count, first });
            }
        }
    }
    Ok(())
}
