//! The plan cut into pieces of work: tiles of merged and converted tensors, runs of copied bytes.

use lora_format::checkpoint::Location;

use super::{float_bytes, float_type};
use crate::kernels::{FloatType, PANEL, TileRegion};
use crate::layout::{Job, OutputTensor};
use crate::plan::MergePlan;

/// The most bytes that one piece copies: large enough to amortise a system call, small enough to
/// share among threads and to notice an interrupt.
const COPY_BYTES: u64 = 8 * 1024 * 1024;

/// One piece of work: contiguous in the base's shard and in the output file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Work {
    /// Index of the output file.
    pub(super) file: usize,
    /// Index of the base's shard.
    pub(super) shard: usize,
    /// The base's tensor (of a copied run, the first).
    pub(super) tensor: Location,
    /// First byte in the shard's file.
    pub(super) source: u64,
    /// First byte in the output file.
    pub(super) offset: u64,
    /// Bytes written.
    pub(super) bytes: u64,
    /// Elements written; of a copy, unused.
    pub(super) elements: u64,
    pub(super) source_type: FloatType,
    pub(super) output_type: FloatType,
    pub(super) kind: WorkKind,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum WorkKind {
    Copy,
    Convert,
    Merge { target: usize, region: TileRegion },
}

/// All work, in file order.
pub(super) fn schedule(plan: &MergePlan, tile_bytes: usize) -> Vec<Work> {
    let mut work = Vec::new();
    for (file, layout) in plan.output.files.iter().enumerate() {
        let mut run: Option<Work> = None;
        for tensor in &layout.tensors {
            let piece = whole(plan, file, tensor);
            match (&mut run, tensor.job) {
                (Some(run), Job::Copy) if follows(run, &piece) => run.bytes += piece.bytes,
                (_, Job::Copy) => {
                    split_copy(run.replace(piece), &mut work);
                }
                (_, Job::Convert) => {
                    split_copy(run.take(), &mut work);
                    split_elements(&piece, tile_bytes, &mut work);
                }
                (_, Job::Merge(target)) => {
                    split_copy(run.take(), &mut work);
                    let shape = &plan.base.info(tensor.source).shape;
                    if let [rows, cols] = *shape.as_slice() {
                        split_tiles(&piece, target, rows, cols, tile_bytes, &mut work);
                    }
                }
            }
        }
        split_copy(run, &mut work);
    }
    work
}

/// A whole output tensor as one piece.
fn whole(plan: &MergePlan, file: usize, tensor: &OutputTensor) -> Work {
    let info = plan.base.info(tensor.source);
    let header = plan.base.shards()[tensor.source.shard].file.header();
    Work {
        file,
        shard: tensor.source.shard,
        tensor: tensor.source,
        source: header.data_start + info.start,
        offset: tensor.offset,
        bytes: tensor.bytes,
        elements: info.elements(),
        // Of a copy, not used.
        source_type: float_type(info.dtype).unwrap_or(FloatType::F32),
        output_type: float_type(tensor.dtype).unwrap_or(FloatType::F32),
        kind: if tensor.job == Job::Copy { WorkKind::Copy } else { WorkKind::Convert },
    }
}

/// Whether two copies are one: neighbours in both files.
fn follows(run: &Work, piece: &Work) -> bool {
    run.shard == piece.shard
        && run.source + run.bytes == piece.source
        && run.offset + run.bytes == piece.offset
}

fn split_copy(run: Option<Work>, work: &mut Vec<Work>) {
    let Some(run) = run else { return };
    let mut at = 0;
    while at < run.bytes {
        let bytes = COPY_BYTES.min(run.bytes - at);
        work.push(Work { source: run.source + at, offset: run.offset + at, bytes, ..run.clone() });
        at += bytes;
    }
}

fn split_elements(piece: &Work, tile_bytes: usize, work: &mut Vec<Work>) {
    let per_tile = elements_per_tile(piece, tile_bytes);
    let mut at = 0;
    while at < piece.elements {
        let elements = per_tile.min(piece.elements - at);
        work.push(part(piece, at, elements, WorkKind::Convert));
        at += elements;
    }
}

/// Whole rows as many as fit a tile; a row that does not fit is cut at panels.
fn split_tiles(
    piece: &Work,
    target: usize,
    rows: usize,
    cols: usize,
    tile_bytes: usize,
    work: &mut Vec<Work>,
) {
    let per_tile = elements_per_tile(piece, tile_bytes) as usize;
    if rows == 0 || cols == 0 {
        return;
    }
    let tile_rows = (per_tile / cols).max(1);
    let tile_cols = if per_tile >= cols { cols } else { (per_tile / PANEL).max(1) * PANEL };
    let mut row = 0;
    while row < rows {
        let height = tile_rows.min(rows - row);
        let mut col = 0;
        while col < cols {
            let width = tile_cols.min(cols - col);
            let region = TileRegion { row, rows: height, col, cols: width };
            let first = (row * cols + col) as u64;
            let elements = (height * width) as u64;
            work.push(part(piece, first, elements, WorkKind::Merge { target, region }));
            col += width;
        }
        row += height;
    }
}

fn elements_per_tile(piece: &Work, tile_bytes: usize) -> u64 {
    let widest = float_bytes(piece.source_type).max(float_bytes(piece.output_type));
    (tile_bytes as u64 / widest).max(1)
}

fn part(piece: &Work, first: u64, elements: u64, kind: WorkKind) -> Work {
    Work {
        source: piece.source + first * float_bytes(piece.source_type),
        offset: piece.offset + first * float_bytes(piece.output_type),
        bytes: elements * float_bytes(piece.output_type),
        elements,
        kind,
        ..piece.clone()
    }
}
