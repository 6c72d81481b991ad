//! Integer codes with a scale and a zero point per group of input channels, stored as (in, out):
//! what GPTQ and AWQ have in common.
//!
//! ```text
//! W[o][i] = (q[i][o] − z[g(i)][o]) · s[g(i)][o]
//! ```
//!
//! in f32, where the difference is exact. Neighbours in memory are neighbouring *output* channels,
//! and readers want rows of the (out, in) weight, so a run of elements is walked in strips:
//!
//! ```text
//!               input channels →
//!             ┌────┬────┬────┬───
//!   ≤ 64 rows │ 32 │ 32 │ 32 │       one square at a time: unpacked channel by channel,
//!             ├────┼────┼────┼───    which is the order in memory, scaled, and transposed
//!   ≤ 64 rows │    │    │    │       into the rows of `out`
//!             └────┴────┴────┴───
//! ```
//!
//! Every cache line of codes that a strip touches is used whole if the strip is full. Nothing is
//! allocated.

use std::ops::Range;

use lora_format::Dtype;

use super::bnb::nearest_integer;
use super::survey::{Part, Result};
use crate::kernels::FloatType;

/// Output channels that are unpacked together.
pub(super) const ROWS: usize = 64;
/// Output channels that arithmetic is done on at once.
pub(super) const LANES: usize = 8;
/// Input channels that are unpacked together: 32 codes of any width fill whole words.
pub(super) const CHANNELS: usize = 32;

/// One number per input channel and output channel of a square.
pub(super) type Square<T> = [[T; ROWS]; CHANNELS];

// Positions among the parts.
const CODES: usize = 0;
const ZEROS: usize = 1;
const SCALES: usize = 2;
const GROUPS: usize = 3;

/// How codes and zero points lie in their words of 32 bits.
pub(super) trait Packing {
    /// The codes of the output channels `rows` (at most [`ROWS`]) and the input channels
    /// `channels` (at most [`CHANNELS`], the first a multiple of it). What lies beyond either may
    /// be anything.
    fn codes(
        &self,
        words: &[u8],
        rows: Range<usize>,
        channels: Range<usize>,
        codes: &mut Square<i32>,
    );

    /// The zero points of a group for the output channels `rows`.
    fn zeros(&self, words: &[u8], group: usize, rows: Range<usize>, zeros: &mut [i32]);

    /// The largest code.
    fn largest(&self) -> i32;

    /// Strips begin at multiples of this many output channels.
    const ALIGNMENT: usize;
}

/// A weight with a scale and a zero point per group.
#[derive(Clone, Debug)]
pub(super) struct Grouped<P> {
    pub(super) packing: P,
    /// Output channels.
    pub(super) rows: usize,
    /// Input channels.
    pub(super) columns: usize,
    pub(super) groups: usize,
    pub(super) group_of: GroupOf,
    pub(super) scales: FloatType,
}

/// The group that an input channel belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) enum GroupOf {
    /// Groups of this many neighbours.
    Size(usize),
    /// What `g_idx`, the fourth part, says.
    Index,
}

/// The numbers of one group for the output channels of a strip.
struct Group {
    index: usize,
    scales: [f32; ROWS],
    zeros: [i32; ROWS],
}

impl<P: Packing> Grouped<P> {
    pub(super) fn read(&self, parts: &[&[u8]], first: usize, out: &mut [f32]) {
        let mut codes: Square<i32> = [[0; ROWS]; CHANNELS];
        let mut weights: Square<f32> = [[0.0; ROWS]; CHANNELS];
        let run = first..first + out.len();
        for strip in self.strips(&run) {
            let mut group = Group::none();
            for channels in squares(strip.channels.clone()) {
                self.packing.codes(parts[CODES], strip.rows.clone(), channels.clone(), &mut codes);
                for (channel, (codes, weights)) in
                    channels.clone().zip(codes.iter().zip(&mut weights))
                {
                    self.enter_group(&mut group, parts, channel, &strip.rows);
                    let lanes = strip.rows.len().next_multiple_of(LANES);
                    let (codes, weights) = (&codes[..lanes], &mut weights[..lanes]);
                    for (lane, (weight, code)) in weights.iter_mut().zip(codes).enumerate() {
                        *weight = (code - group.zeros[lane]) as f32 * group.scales[lane];
                    }
                }
                self.each_row(&strip, &channels, &run, |lane, square, at| {
                    for (out, weights) in out[at].iter_mut().zip(&weights[square]) {
                        *out = weights[lane];
                    }
                });
            }
        }
    }

    /// Codes are not needed: what can be represented is decided by scales and zero points.
    pub(super) fn requantise(
        &self,
        parts: &[&[u8]],
        first: usize,
        values: &[f32],
        out: &mut [f32],
    ) {
        let mut weights: Square<f32> = [[0.0; ROWS]; CHANNELS];
        let run = first..first + out.len();
        let largest = self.packing.largest();
        for strip in self.strips(&run) {
            let mut group = Group::none();
            for channels in squares(strip.channels.clone()) {
                self.each_row(&strip, &channels, &run, |lane, square, at| {
                    for (weights, value) in weights[square].iter_mut().zip(&values[at]) {
                        weights[lane] = *value;
                    }
                });
                for (channel, weights) in channels.clone().zip(&mut weights) {
                    self.enter_group(&mut group, parts, channel, &strip.rows);
                    for (lane, weight) in weights[..strip.rows.len()].iter_mut().enumerate() {
                        let (scale, zero) = (group.scales[lane], group.zeros[lane]);
                        // A scale of 0 represents nothing but 0.
                        let steps = if scale == 0.0 { 0.0 } else { *weight / scale };
                        let steps = steps.clamp(-zero as f32, (largest - zero) as f32);
                        *weight = nearest_integer(steps) * scale;
                    }
                }
                self.each_row(&strip, &channels, &run, |lane, square, at| {
                    for (out, weights) in out[at].iter_mut().zip(&weights[square]) {
                        *out = weights[lane];
                    }
                });
            }
        }
    }

    /// The strips that the elements `run` lie in.
    fn strips(&self, run: &Range<usize>) -> impl Iterator<Item = Strip> + use<P> {
        let (columns, rows, run) = (self.columns, self.rows, run.clone());
        let end_row = run.end.div_ceil(columns);
        let first_row = run.start / columns / P::ALIGNMENT * P::ALIGNMENT;
        (first_row..end_row).step_by(ROWS).map(move |row| {
            let strip = row..(row + ROWS).min(end_row).next_multiple_of(P::ALIGNMENT).min(rows);
            // Of a strip that the run covers in part of one row, only that part is walked.
            let asked = row.max(run.start / columns)..strip.end.min(end_row);
            let channels = match asked.len() {
                1 => {
                    let before = asked.start * columns;
                    run.start.saturating_sub(before)..(run.end - before).min(columns)
                }
                _ => 0..columns,
            };
            Strip { rows: strip, channels }
        })
    }

    /// Calls `visit(lane, square, at)` for every row of a strip that `run` touches within
    /// `channels`: the row's number in the strip, the channels counted within the square, and the
    /// same elements counted from the start of the run.
    fn each_row(
        &self,
        strip: &Strip,
        channels: &Range<usize>,
        run: &Range<usize>,
        mut visit: impl FnMut(usize, Range<usize>, Range<usize>),
    ) {
        for (lane, row) in strip.rows.clone().enumerate() {
            let before = row * self.columns;
            let start = (before + channels.start).max(run.start);
            let end = (before + channels.end).min(run.end);
            if start < end {
                let square = before + channels.start;
                visit(lane, start - square..end - square, start - run.start..end - run.start);
            }
        }
    }

    /// Makes `group` the one that `channel` belongs to.
    fn enter_group(&self, group: &mut Group, parts: &[&[u8]], channel: usize, rows: &Range<usize>) {
        let index = match self.group_of {
            GroupOf::Size(size) => channel / size,
            GroupOf::Index => word(parts[GROUPS], channel) as usize,
        };
        // In range when the base was opened; the file may have changed since.
        let index = index.min(self.groups - 1);
        if index == group.index {
            return;
        }
        group.index = index;
        let scales = &parts[SCALES][(index * self.rows + rows.start) * self.scales.size()..];
        match self.scales {
            FloatType::F32 => {
                for (scale, bits) in group.scales[..rows.len()].iter_mut().zip(scales.as_chunks().0)
                {
                    *scale = f32::from_le_bytes(*bits);
                }
            }
            // One loop each, so that the conversion is chosen outside of it.
            FloatType::F16 => group.decode(scales, rows.len(), |bits| FloatType::F16.decode(bits)),
            FloatType::Bf16 => {
                group.decode(scales, rows.len(), |bits| FloatType::Bf16.decode(bits))
            }
        }
        self.packing.zeros(parts[ZEROS], index, rows.clone(), &mut group.zeros);
    }
}

/// Output channels that are walked together, and the input channels that are wanted of them.
struct Strip {
    rows: Range<usize>,
    channels: Range<usize>,
}

impl Group {
    fn none() -> Group {
        Group { index: usize::MAX, scales: [0.0; ROWS], zeros: [0; ROWS] }
    }

    /// Scales of two bytes.
    fn decode(&mut self, bytes: &[u8], count: usize, decode: impl Fn(u32) -> f32) {
        for (scale, bits) in self.scales[..count].iter_mut().zip(bytes.as_chunks().0) {
            *scale = decode(u32::from(u16::from_le_bytes(*bits)));
        }
    }
}

/// The squares that some input channels lie in.
fn squares(channels: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let first = channels.start / CHANNELS * CHANNELS;
    (first..channels.end)
        .step_by(CHANNELS)
        .map(move |start| start..(start + CHANNELS).min(channels.end))
}

/// The storage type of scales.
pub(super) fn float_type(scales: &Part<'_>) -> Result<FloatType> {
    scales.expect_dtype(&[Dtype::F16, Dtype::Bf16, Dtype::F32])?;
    Ok(match scales.dtype() {
        Dtype::F16 => FloatType::F16,
        Dtype::Bf16 => FloatType::Bf16,
        _ => FloatType::F32,
    })
}

/// Word `index` of little-endian 32-bit data.
pub(super) fn word(bytes: &[u8], index: usize) -> u32 {
    let at = index * 4;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::super::{awq, gptq};
    use super::*;

    /// Numbers that look random and are the same every time.
    struct Noise(u64);

    impl Noise {
        fn below(&mut self, bound: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 33) as usize % bound
        }
    }

    /// Codes, zero points, scales and groups of a weight, one number each.
    struct Plain {
        rows: usize,
        columns: usize,
        codes: Vec<u32>,
        zeros: Vec<u32>,
        scales: Vec<f32>,
        groups: Vec<usize>,
    }

    impl Plain {
        fn random(noise: &mut Noise, rows: usize, columns: usize, bits: usize) -> Plain {
            let count = 1 + noise.below(columns.min(5));
            let mut code = |_| noise.below(1 << bits) as u32;
            let codes = (0..rows * columns).map(&mut code).collect();
            let zeros = (0..count * rows).map(&mut code).collect();
            // Exact in every storage type.
            let scales = (0..count * rows).map(|_| (1 + noise.below(64)) as f32 / 64.0).collect();
            let groups = (0..columns).map(|_| noise.below(count)).collect();
            Plain { rows, columns, codes, zeros, scales, groups }
        }

        fn weights(&self) -> Vec<f32> {
            let of = |row: usize, column: usize| {
                let at = self.groups[column] * self.rows + row;
                let code = self.codes[column * self.rows + row];
                (code as f32 - self.zeros[at] as f32) * self.scales[at]
            };
            let rows = 0..self.rows;
            rows.flat_map(|row| (0..self.columns).map(move |column| of(row, column))).collect()
        }

        fn group_bytes(&self) -> Vec<u8> {
            self.groups.iter().flat_map(|&group| (group as u32).to_le_bytes()).collect()
        }

        fn scale_bytes(&self, float: FloatType) -> Vec<u8> {
            let encoded = self.scales.iter().map(|&scale| float.encode(f64::from(scale)));
            encoded.flat_map(|bits| bits.to_le_bytes()[..float.size()].to_vec()).collect()
        }

        fn count(&self) -> usize {
            self.scales.len() / self.rows
        }
    }

    /// Fields of `bits` bits, the first in the lowest bits.
    fn stream(fields: impl Iterator<Item = u32>, bits: usize) -> Vec<u32> {
        let mut words = Vec::new();
        for (index, field) in fields.enumerate() {
            for bit in 0..bits {
                let at = index * bits + bit;
                if at / 32 == words.len() {
                    words.push(0);
                }
                words[at / 32] |= (field >> bit & 1) << (at % 32);
            }
        }
        words
    }

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Reads random runs, the whole, and requantises what was read.
    fn check<P: Packing>(noise: &mut Noise, weight: &Grouped<P>, parts: &[&[u8]], plain: &Plain) {
        let expected = plain.weights();
        for turn in 0..20 {
            let first = if turn == 0 { 0 } else { noise.below(expected.len()) };
            let rest = expected.len() - first;
            let count = if turn == 0 { rest } else { 1 + noise.below(rest) };
            let mut out = vec![f32::NAN; count];
            weight.read(parts, first, &mut out);
            assert_eq!(out, expected[first..first + count], "{count} from {first} on");
            let mut again = vec![f32::NAN; count];
            weight.requantise(parts, first, &out, &mut again);
            assert_eq!(again, out);
        }
    }

    #[test]
    fn gptq_of_any_shape() {
        let mut noise = Noise(1);
        for turn in 0..120 {
            let bits = [2, 3, 4, 8][turn % 4];
            let (rows, columns) = (1 + noise.below(150), 1 + noise.below(100));
            let plain = Plain::random(&mut noise, rows, columns, bits);
            let column = |row: usize| plain.codes[row..].iter().step_by(rows).copied();
            let streams: Vec<Vec<u32>> = (0..rows).map(|row| stream(column(row), bits)).collect();
            let words = streams[0].len();
            let codes: Vec<u32> =
                (0..words).flat_map(|at| streams.iter().map(move |words| words[at])).collect();
            let zeros = plain.zeros.chunks(rows);
            let zeros: Vec<Vec<u32>> =
                zeros.map(|zeros| stream(zeros.iter().copied(), bits)).collect();
            let float = FloatType::ALL[turn % 3];
            let weight = Grouped {
                packing: gptq::Words::for_test(bits, rows, words, zeros[0].len()),
                rows,
                columns,
                groups: plain.count(),
                group_of: GroupOf::Index,
                scales: float,
            };
            let (codes, zeros) = (bytes(&codes), bytes(&zeros.concat()));
            let (scales, groups) = (plain.scale_bytes(float), plain.group_bytes());
            check(&mut noise, &weight, &[&codes, &zeros, &scales, &groups], &plain);
        }
    }

    #[test]
    fn awq_of_any_shape() {
        let mut noise = Noise(2);
        let pack = |codes: &[u32]| {
            let order = [0, 2, 4, 6, 1, 3, 5, 7];
            let words = codes.chunks(8).map(|codes| order.map(|channel| codes[channel]));
            let words: Vec<u32> = words.map(|nibbles| stream(nibbles.into_iter(), 4)[0]).collect();
            bytes(&words)
        };
        for turn in 0..60 {
            let (rows, columns) = (8 + 8 * noise.below(20), 1 + noise.below(100));
            let plain = Plain::random(&mut noise, rows, columns, 4);
            let float = FloatType::ALL[turn % 3];
            let weight = Grouped {
                packing: awq::Words::for_test(rows / 8),
                rows,
                columns,
                groups: plain.count(),
                group_of: GroupOf::Index,
                scales: float,
            };
            let (codes, zeros) = (pack(&plain.codes), pack(&plain.zeros));
            let (scales, groups) = (plain.scale_bytes(float), plain.group_bytes());
            check(&mut noise, &weight, &[&codes, &zeros, &scales, &groups], &plain);
        }
    }

    #[test]
    fn groups_that_change_while_the_file_is_open_are_not_followed_out_of_it() {
        let weight = Grouped {
            packing: awq::Words::for_test(1),
            rows: 8,
            columns: 1,
            groups: 1,
            group_of: GroupOf::Index,
            scales: FloatType::F32,
        };
        let (word, scales) = ([0x21; 4], [0x3F; 32]);
        let mut out = [f32::NAN; 8];
        weight.read(&[&word, &word, &scales, &[0xFF; 4]], 0, &mut out);
        assert_eq!(out, [0.0; 8]);
    }
}
