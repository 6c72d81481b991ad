//! The plan cut into pieces of work: tiles of merged and converted tensors, runs of copied bytes.

use crate::kernels::{FloatType, PANEL, TileRegion};
use crate::layout::{Job, OutputTensor};
use crate::numbers::float_type;
use crate::parameters::Source;
use crate::plan::MergePlan;

/// The most bytes that one piece copies: large enough to amortise a system call, small enough to
/// share among threads and to notice an interrupt.
const COPY_BYTES: u64 = 8 * 1024 * 1024;

/// One piece of work: contiguous in its source and in the output file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Work {
    /// Index of the output file.
    pub(super) file: usize,
    /// Index of the output tensor in that file; of a copied run, of its first.
    pub(super) tensor: usize,
    /// First element of the tensor; of a copy, unused.
    pub(super) first: u64,
    /// Elements written; of a copy, unused.
    pub(super) elements: u64,
    /// First byte in the output file.
    pub(super) offset: u64,
    /// Bytes written.
    pub(super) bytes: u64,
    pub(super) output_type: FloatType,
    pub(super) kind: WorkKind,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum WorkKind {
    /// Bytes of one of the base's shards, from `source` on.
    Copy { shard: usize, source: u64 },
    /// Values in another dtype.
    Convert,
    /// A tile of one of a target's matrices.
    /// `number` counts the tiles of a matrix in order.
    Merge { target: usize, slab: usize, region: TileRegion, number: usize },
}

/// All work, in file order.
pub(super) fn schedule(plan: &MergePlan, tile_bytes: usize) -> Vec<Work> {
    let mut work = Vec::new();
    for (file, layout) in plan.output.files.iter().enumerate() {
        let mut run: Option<Work> = None;
        for (index, tensor) in layout.tensors.iter().enumerate() {
            let piece = whole(plan, file, index, tensor);
            if let WorkKind::Copy { .. } = piece.kind {
                match &mut run {
                    Some(run) if follows(run, &piece) => run.bytes += piece.bytes,
                    _ => split_copy(run.replace(piece), &mut work),
                }
                continue;
            }
            split_copy(run.take(), &mut work);
            match tensor.job {
                Job::Merge(target) => split_target(plan, &piece, target, tile_bytes, &mut work),
                _ => split_elements(&piece, tile_bytes, &mut work),
            }
        }
        split_copy(run, &mut work);
    }
    work
}

/// A whole output tensor as one piece.
fn whole(plan: &MergePlan, file: usize, index: usize, tensor: &OutputTensor) -> Work {
    let kind = match (tensor.job, tensor.source) {
        (Job::Copy, Source::Plain(location)) => {
            let header = plan.base.shards()[location.shard].file.header();
            let source = header.data_start + plan.base.info(location).start;
            WorkKind::Copy { shard: location.shard, source }
        }
        _ => WorkKind::Convert,
    };
    Work {
        file,
        tensor: index,
        first: 0,
        elements: tensor.shape.iter().map(|&n| n as u64).product(),
        offset: tensor.offset,
        bytes: tensor.bytes,
        // Of a copy, not used.
        output_type: float_type(tensor.dtype).unwrap_or(FloatType::F32),
        kind,
    }
}

/// Whether two copies are one: neighbours in both files.
fn follows(run: &Work, piece: &Work) -> bool {
    match (&run.kind, &piece.kind) {
        (WorkKind::Copy { shard, source }, WorkKind::Copy { shard: next_shard, source: next }) => {
            shard == next_shard
                && source + run.bytes == *next
                && run.offset + run.bytes == piece.offset
        }
        _ => false,
    }
}

fn split_copy(run: Option<Work>, work: &mut Vec<Work>) {
    let Some(run) = run else { return };
    let WorkKind::Copy { shard, source } = run.kind else { return };
    let mut at = 0;
    while at < run.bytes {
        let bytes = COPY_BYTES.min(run.bytes - at);
        let kind = WorkKind::Copy { shard, source: source + at };
        work.push(Work { offset: run.offset + at, bytes, kind, ..run.clone() });
        at += bytes;
    }
}

fn split_elements(piece: &Work, tile_bytes: usize, work: &mut Vec<Work>) {
    let per_tile = elements_per_tile(tile_bytes, WIDEST) as u64;
    let mut at = 0;
    while at < piece.elements {
        let elements = per_tile.min(piece.elements - at);
        work.push(part(piece, at, elements, WorkKind::Convert));
        at += elements;
    }
}

/// The tiles of every matrix of a target. Operators need whole rows, and room for f64.
fn split_target(
    plan: &MergePlan,
    piece: &Work,
    target: usize,
    tile_bytes: usize,
    work: &mut Vec<Work>,
) {
    let planned = &plan.targets[target];
    let (rows, cols) = planned.matrix();
    if rows == 0 || cols == 0 {
        return;
    }
    for (slab, changes) in planned.slabs.iter().enumerate() {
        let whole_rows = !changes.operators.is_empty();
        let source = match planned.source {
            Source::Plain(location) => plan.base.info(location).dtype.bits() / 8,
            _ => 4,
        };
        let widest = (source as usize).max(piece.output_type.size());
        let per_tile = match whole_rows {
            true => elements_per_tile(tile_bytes, size_of::<f64>()),
            false => elements_per_tile(tile_bytes, widest),
        };
        let tile_rows = (per_tile / cols).max(1);
        let tile_cols = match per_tile >= cols || whole_rows {
            true => cols,
            false => (per_tile / PANEL).max(1) * PANEL,
        };
        let (mut row, mut number) = (0, 0);
        while row < rows {
            let height = tile_rows.min(rows - row);
            let mut col = 0;
            while col < cols {
                let width = tile_cols.min(cols - col);
                let region = TileRegion { row, rows: height, col, cols: width };
                let first = ((slab * rows + row) * cols + col) as u64;
                let elements = (height * width) as u64;
                let kind = WorkKind::Merge { target, slab, region, number };
                number += 1;
                work.push(part(piece, first, elements, kind));
                col += width;
            }
            row += height;
        }
    }
}

/// Bytes of the widest element that is converted.
const WIDEST: usize = 4;

fn elements_per_tile(tile_bytes: usize, widest: usize) -> usize {
    (tile_bytes / widest).max(1)
}

fn part(piece: &Work, first: u64, elements: u64, kind: WorkKind) -> Work {
    let size = piece.output_type.size() as u64;
    Work {
        first,
        elements,
        offset: piece.offset + first * size,
        bytes: elements * size,
        kind,
        ..piece.clone()
    }
}
