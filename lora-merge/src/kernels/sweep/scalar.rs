//! The oracle of [`sweep`](super): its contract, read aloud.
//!
//! Nothing here is arranged for speed and nothing is shared with the vector
//! code, which is tested against this file, bit by bit.

use super::super::float::FloatType;
use super::super::stats::canonical;
use super::{BlockRow, COLUMN_PANEL, LANES, Left, Pass, Rows, SQUARE_LANES};

/// One pass over some rows.
pub(crate) fn run<const G: usize>(pass: Pass<'_, G>) {
    let Pass { rows, cols, left, z } = pass;
    let w: &[BlockRow<G>] = match left {
        Left::Product(v, w) => {
            for (i, w) in w.iter_mut().enumerate() {
                *w = product(|k| element(rows, i * cols + k), v);
            }
            canonical_rows(w);
            w
        }
        Left::Given(w) => w,
    };
    let Some(z) = z else { return };
    if w.is_empty() {
        return;
    }
    for (k, z) in z.iter_mut().enumerate() {
        for (i, w) in w.iter().enumerate() {
            let a = element(rows, i * cols + k);
            each_lane(z, |group, lane, z| a.mul_add(w.0[group][lane], z));
        }
    }
    canonical_rows(z);
}

/// Makes every NaN the canonical one.
pub(crate) fn canonical_rows<const G: usize>(rows: &mut [BlockRow<G>]) {
    for row in rows {
        canonicalise(row.0.as_flattened_mut());
    }
}

/// A row of `W`: that of `A` times `v`.
fn product<const G: usize>(a: impl Fn(usize) -> f32, v: &[BlockRow<G>]) -> BlockRow<G> {
    let mut sum = BlockRow::ZERO;
    for (panel, v) in v.chunks(COLUMN_PANEL).enumerate() {
        let mut chain = BlockRow::<G>::ZERO;
        for (k, v) in v.iter().enumerate() {
            let a = a(panel * COLUMN_PANEL + k);
            each_lane(&mut chain, |group, lane, p| a.mul_add(v.0[group][lane], p));
        }
        each_lane(&mut sum, |group, lane, sum| sum + chain.0[group][lane]);
    }
    sum
}

fn each_lane<const G: usize>(
    row: &mut BlockRow<G>,
    mut value: impl FnMut(usize, usize, f32) -> f32,
) {
    for group in 0..G {
        for lane in 0..LANES {
            row.0[group][lane] = value(group, lane, row.0[group][lane]);
        }
    }
}

/// Element `index` of the run of rows.
fn element(rows: Rows<'_>, index: usize) -> f32 {
    match rows {
        Rows::Plain(elements) => elements[index],
        Rows::Stored { tuned, tuned_type, base } => {
            let tuned = decode(tuned_type, tuned, index);
            match base {
                Some((base, base_type)) => tuned - decode(base_type, base, index),
                None => tuned,
            }
        }
    }
}

/// Element `index` of stored ones.
pub(crate) fn decode(float: FloatType, bytes: &[u8], index: usize) -> f32 {
    let size = float.size();
    let mut bits = [0; 4];
    bits[..size].copy_from_slice(&bytes[index * size..][..size]);
    float.decode(u32::from_le_bytes(bits))
}

/// [`difference`](super::difference).
pub(crate) fn difference(rows: Rows<'_>, out: &mut [f32]) {
    for (index, out) in out.iter_mut().enumerate() {
        *out = element(rows, index);
    }
    canonicalise(out);
}

/// [`energy`](super::energy).
pub(crate) fn energy(a: &[f32]) -> f64 {
    sum_of_squares(a.iter().map(|a| f64::from(*a)))
}

/// [`residual_energy`](super::residual_energy).
pub(crate) fn residual_energy(a: &[f32], product: &[f64]) -> f64 {
    sum_of_squares(a.iter().zip(product).map(|(a, p)| f64::from(*a) - p))
}

fn sum_of_squares(values: impl Iterator<Item = f64>) -> f64 {
    let mut lanes = [0.0; SQUARE_LANES];
    for (n, x) in values.enumerate() {
        let lane: &mut f64 = &mut lanes[n % SQUARE_LANES];
        *lane = x.mul_add(x, *lane);
    }
    canonical(lanes.iter().fold(0.0, |sum, lane| sum + lane))
}

/// Makes every NaN the canonical one.
pub(crate) fn canonicalise(values: &mut [f32]) {
    for value in values.iter_mut().filter(|value| value.is_nan()) {
        *value = f32::from_bits(FloatType::F32.canonical_nan());
    }
}
