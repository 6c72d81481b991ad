//! The oracle: the contract of the module documentation, read aloud.
//!
//! Nothing here is arranged for speed and nothing is shared with the vector
//! code. Every other instruction set is tested against this file, bit by bit,
//! and hands back to [`finish_unit`] whatever its fast path cannot vouch for.

use super::factors::{CHUNK, Factors, GROUPS, LANES, PANEL, Path};
use super::float::FloatType;
use super::stats::{ConvertStats, LaneSums, Tally, TileStats, canonical};
use super::{ROW_GROUP, Rounding, Source, Tile, TileRegion, UNIT_ROWS, stochastic};

/// Δ of one element, as its accumulation path left it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Delta {
    /// [`Path::F32`]: Δ itself.
    Single(f32),
    /// [`Path::F64`] and Δ computed elsewhere: Δ is `scale · sum`, to be fused
    /// with the base. Where there is no scale it is 1, and nothing is fused.
    Double { sum: f64, scale: f64 },
}

impl Delta {
    /// Whether the element keeps its base value.
    #[inline(always)]
    fn is_zero(self) -> bool {
        match self {
            Self::Single(delta) => delta == 0.0,
            Self::Double { sum, scale } => scale * sum == 0.0,
        }
    }

    /// Δ itself.
    fn value(self) -> f64 {
        match self {
            Self::Single(delta) => f64::from(delta),
            Self::Double { sum, scale } => scale * sum,
        }
    }

    /// Δ as the statistics see it.
    #[inline(always)]
    fn as_f32(self) -> f32 {
        match self {
            Self::Single(delta) => delta,
            Self::Double { sum, scale } => (scale * sum) as f32,
        }
    }

    /// `base + Δ` in `f64`, rounded to nearest.
    #[inline(always)]
    fn added_to(self, base: f32) -> f64 {
        match self {
            Self::Single(delta) => f64::from(base) + f64::from(delta),
            Self::Double { sum, scale } => scale.mul_add(sum, f64::from(base)),
        }
    }

    /// `base + Δ` in a form that one more rounding turns into the contract's
    /// result: rounded to odd where Δ is added exactly, the fused `f64` as is.
    #[inline(always)]
    pub(crate) fn added_to_once(self, base: f32) -> f64 {
        match self {
            Self::Single(delta) => add_to_odd(f64::from(base), f64::from(delta)),
            Self::Double { .. } => self.added_to(base),
        }
    }
}

/// `a + b` rounded to odd: an inexact sum becomes whichever neighbouring `f64`
/// has an odd last bit. Such a sum never looks like a tie, nor like an exact
/// value, of a format with at least two bits less, so rounding it again gives
/// the correctly rounded exact sum (Boldo and Melquiond, 2008).
#[inline(always)]
fn add_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    // Knuth's TwoSum. Both inputs come from f32, so nothing overflows.
    let b_part = sum - a;
    let rest = (a - (sum - b_part)) + (b - b_part);
    if !sum.is_finite() || rest == 0.0 || sum.to_bits() & 1 == 1 {
        return sum;
    }
    let outwards = (rest > 0.0) == (sum > 0.0);
    f64::from_bits(if outwards { sum.to_bits() + 1 } else { sum.to_bits() - 1 })
}

/// The bits of element `index` read from little-endian `bytes`.
#[inline(always)]
fn read(float: FloatType, bytes: &[u8], index: usize) -> u32 {
    let size = float.size();
    let bytes = &bytes[index * size..][..size];
    match float {
        FloatType::F32 => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        FloatType::F16 | FloatType::Bf16 => u32::from(u16::from_le_bytes([bytes[0], bytes[1]])),
    }
}

#[inline(always)]
fn write(float: FloatType, bytes: &mut [u8], index: usize, bits: u32) {
    let size = float.size();
    bytes[index * size..][..size].copy_from_slice(&bits.to_le_bytes()[..size]);
}

/// A value moved between storage types, rounded once. The identity leaves
/// every bit alone, NaN payloads included.
#[inline(always)]
fn recode(bits: u32, from: FloatType, to: FloatType) -> u32 {
    if from == to { bits } else { to.encode(f64::from(from.decode(bits))) }
}

/// A rectangle inside a tile: at most [`UNIT_ROWS`] rows of one panel. Its
/// statistics are summed in `f32` before they join the tile's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unit {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) base_type: FloatType,
    pub(crate) out_type: FloatType,
    /// Elements from one row of the tile to the next.
    pub(crate) stride: usize,
    pub(crate) rounding: Rounding,
    /// Index of the unit's first element in the whole tensor, and the distance
    /// between rows there.
    pub(crate) first_index: u64,
    pub(crate) index_stride: u64,
}

/// Merges one unit. `base` and `out` begin at its first element; `delta` maps
/// a row and a column of the unit to Δ.
#[inline(always)]
pub(crate) fn finish_unit(
    unit: &Unit,
    delta: impl Fn(usize, usize) -> Delta,
    base: &[u8],
    out: &mut [u8],
    tally: &mut Tally,
) {
    let &Unit { base_type, out_type, .. } = unit;
    let mut sums = LaneSums::ZERO;
    for row in 0..unit.rows {
        for column in 0..unit.columns {
            let place = row * unit.stride + column;
            let index = unit.first_index + row as u64 * unit.index_stride + column as u64;
            let delta = delta(row, column);
            let before = read(base_type, base, place);
            let base = base_type.decode(before);

            let unmerged = recode(before, base_type, out_type);
            let merged = match unit.rounding {
                _ if delta.is_zero() => unmerged,
                Rounding::Nearest => out_type.encode(delta.added_to_once(base)),
                Rounding::Stochastic { key } => {
                    stochastic::round(delta.added_to(base), out_type, key, index)
                }
            };
            write(out_type, out, place, merged);

            let wanted = delta.as_f32();
            let realised = out_type.decode(merged) - out_type.decode(unmerged);
            if realised.is_finite() && wanted.is_finite() {
                let lane = column % LANES;
                sums.dot[lane] = realised.mul_add(wanted, sums.dot[lane]);
                sums.realised_sq[lane] = realised.mul_add(realised, sums.realised_sq[lane]);
                sums.wanted_sq[lane] = wanted.mul_add(wanted, sums.wanted_sq[lane]);
            }
            tally.nonzero_delta += u64::from(!delta.is_zero());
            tally.changed += u64::from(merged != unmerged);
            tally.non_finite += u64::from(!out_type.is_finite(merged));
            tally.overflowed +=
                u64::from(out_type.is_infinite(merged) && base.is_finite() && wanted.is_finite());
        }
    }
    tally.add_unit(&sums);
}

/// The [`merge_tile`](super::merge_tile) of [`Isa::Scalar`](super::Isa).
pub(crate) fn merge_tile(tile: &Tile<'_>, out: &mut [u8]) -> TileStats {
    let &Tile { source, cols, region, base, base_type, out_type, rounding } = tile;
    let mut tally = Tally::ZERO;
    for group in (0..region.rows).step_by(ROW_GROUP) {
        let group_end = region.rows.min(group + ROW_GROUP);
        for column in (0..region.cols).step_by(PANEL) {
            for row in (group..group_end).step_by(UNIT_ROWS) {
                let first = row * region.cols + column;
                let (first_row, first_column) = (region.row + row, region.col + column);
                let unit = Unit {
                    rows: UNIT_ROWS.min(group_end - row),
                    columns: PANEL.min(region.cols - column),
                    base_type,
                    out_type,
                    stride: region.cols,
                    rounding,
                    first_index: first_row as u64 * cols as u64 + first_column as u64,
                    index_stride: cols as u64,
                };
                finish_unit(
                    &unit,
                    |row, column| match source {
                        Source::Factors(factors) => {
                            product(factors, first_row + row, first_column + column)
                        }
                        Source::Given(delta) => Delta::Double {
                            sum: delta[first + row * region.cols + column],
                            scale: 1.0,
                        },
                    },
                    &base[first * base_type.size()..],
                    &mut out[first * out_type.size()..],
                    &mut tally,
                );
            }
        }
    }
    tally.finish((region.rows * region.cols) as u64)
}

/// The [`product_tile`](super::product_tile) of [`Isa::Scalar`](super::Isa).
pub(crate) fn product_tile(factors: &Factors, region: TileRegion, out: &mut [f64]) {
    for row in 0..region.rows {
        for column in 0..region.cols {
            let delta = product(factors, region.row + row, region.col + column);
            out[row * region.cols + column] = canonical(delta.value());
        }
    }
}

/// Δ of one element of the tensor.
fn product(factors: &Factors, row: usize, column: usize) -> Delta {
    let left = factors.left_row(row);
    let (panel, group, lane) = (column / PANEL, column % PANEL / LANES, column % LANES);
    debug_assert!(group < GROUPS, "a panel has three groups");
    let right = factors.right_panel(panel);
    let chain = |chunk: std::ops::Range<usize>| {
        chunk.fold(0.0_f32, |sum, k| left[k].mul_add(right[k].0[group][lane], sum))
    };
    // S of the ranks from `first` up to `end`, which are one segment.
    let segment_sum = |first: usize, end: usize| {
        let mut sum = f64::from(chain(first..end.min(first + CHUNK)));
        for start in (first + CHUNK..end).step_by(CHUNK) {
            sum += f64::from(chain(start..end.min(start + CHUNK)));
        }
        sum
    };
    match (factors.path(), factors.segments()) {
        (Path::F32, _) => Delta::Single(chain(0..factors.rank())),
        (Path::F64, [only]) => Delta::Double { sum: segment_sum(0, only.ranks), scale: only.scale },
        (Path::F64, segments) => {
            let (mut sum, mut first) = (0.0, 0);
            for (number, segment) in segments.iter().enumerate() {
                let scaled = segment.scale * segment_sum(first, first + segment.ranks);
                // Adding to +0 would turn a first −0 into +0.
                sum = if number == 0 { scaled } else { sum + scaled };
                first += segment.ranks;
            }
            Delta::Double { sum, scale: 1.0 }
        }
    }
}

/// The [`convert`](super::convert) of [`Isa::Scalar`](super::Isa), for two
/// different types.
#[inline(always)]
pub(crate) fn convert(
    base: &[u8],
    base_type: FloatType,
    out: &mut [u8],
    out_type: FloatType,
) -> ConvertStats {
    let elements = base.len() / base_type.size();
    let mut stats = ConvertStats { elements: elements as u64, ..ConvertStats::default() };
    for index in 0..elements {
        let before = read(base_type, base, index);
        let after = recode(before, base_type, out_type);
        write(out_type, out, index, after);
        let (before, after) = (base_type.decode(before), out_type.decode(after));
        let kept = before == after || (before.is_nan() && after.is_nan());
        stats.changed += u64::from(!kept);
        stats.overflowed += u64::from(before.is_finite() && after.is_infinite());
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Case, Noise, Range, Taste, elements, tie};
    use super::super::{Factors, FloatType, Isa, Path, Rounding, Segment, TileRegion};
    use super::Delta;

    /// `value / 2^exponent`, which must be an integer.
    fn integer(value: f64, exponent: i32) -> i128 {
        let bits = value.to_bits();
        let biased = (bits >> 52) as i32 & 0x7FF;
        assert!(biased > 0 || value == 0.0, "no f64 subnormals here");
        if value == 0.0 {
            return 0;
        }
        let significand = i128::from(bits & ((1 << 52) - 1) | 1 << 52);
        let shift = biased - 1075 - exponent;
        let magnitude = if shift < 0 {
            assert_eq!(significand >> -shift << -shift, significand, "not an integer");
            significand >> -shift
        } else {
            assert!(shift < 74, "out of range");
            significand << shift
        };
        if value < 0.0 { -magnitude } else { magnitude }
    }

    /// Whether `bits` is the nearest element to `base + delta`, ties to even,
    /// by exact integer arithmetic.
    fn is_nearest(float: FloatType, bits: u32, base: f32, delta: f32) -> bool {
        let (base, delta) = (f64::from(base), f64::from(delta));
        let value = |bits| f64::from(float.decode(bits));
        let (below, above) = (bits.wrapping_sub(1), bits + 1);
        let finest = |x: f64| ((x.to_bits() >> 52) as i32 & 0x7FF) - 1075;
        let all = [base, delta, value(bits), value(below), value(above)];
        let exponent = all.into_iter().filter(|x| *x != 0.0).map(finest).min().unwrap_or(0);
        let exponent = exponent.max(-149 - 30);
        let exact = integer(base, exponent) + integer(delta, exponent);
        let distance = |bits| (integer(value(bits), exponent) - exact).abs();
        let here = distance(bits);
        let even = bits & 1 == 0;
        [below, above]
            .into_iter()
            .all(|other| here < distance(other) || (here == distance(other) && even))
    }

    #[test]
    fn sums_round_once() {
        let mut noise = Noise::new(10);
        let mut checked = 0;
        for base_type in FloatType::ALL {
            for out_type in FloatType::ALL {
                for _ in 0..20_000 {
                    let range = Range::ALL[noise.below(3) as usize];
                    let (base, delta, _) = tie(&mut noise, base_type, out_type, range);
                    let base = base_type.decode(base);
                    let bits = out_type.encode(Delta::Single(delta).added_to_once(base));
                    let magnitude = out_type.decode(bits).abs();
                    // Integers of 128 bits hold exponents this far apart.
                    let near = |x: f32| x == 0.0 || (1e-7..1e7).contains(&x.abs());
                    if near(base) && near(delta) && magnitude > 1e-7 && magnitude < 1e4 {
                        assert!(is_nearest(out_type, bits, base, delta), "{base:e} {delta:e}");
                        checked += 1;
                    }
                }
            }
        }
        assert!(checked > 10_000, "{checked}");
    }

    /// A merge and its reference in `f64`.
    struct Trial {
        case: Case,
        /// The sum of s·B·A.
        delta: Vec<f64>,
        /// W0 + s·B·A.
        wanted: Vec<f64>,
        /// |s|·|B|·|A|, which bounds the rounding errors of the product.
        bound: Vec<f64>,
    }

    fn trial(
        noise: &mut Noise,
        segments: &[Segment],
        base_type: FloatType,
        out_type: FloatType,
    ) -> Trial {
        const ROWS: usize = 40;
        const COLS: usize = 250;
        let scales: Vec<f64> =
            segments.iter().flat_map(|one| std::iter::repeat_n(one.scale, one.ranks)).collect();
        let rank = scales.len();
        // |Δ| stays below a tenth of |W|.
        let left: Vec<f32> = (0..ROWS * rank).map(|_| noise.float()).collect();
        let size = 0.001 / scales.iter().map(|scale| scale.abs()).sum::<f64>();
        let right: Vec<f32> =
            (0..rank * COLS).map(|_| (f64::from(noise.float()) * size) as f32).collect();
        let mut base = elements(noise, base_type, ROWS * COLS, Taste::Plain);
        for element in base.chunks_mut(base_type.size()) {
            let magnitude = 0.01 + 0.04 * f64::from(noise.float()).abs();
            let value = if noise.below(2) == 0 { magnitude } else { -magnitude };
            element.copy_from_slice(&base_type.encode(value).to_le_bytes()[..base_type.size()]);
        }
        let value = |at: usize| {
            let mut bytes = [0; 4];
            bytes[..base_type.size()]
                .copy_from_slice(&base[at * base_type.size()..][..base_type.size()]);
            f64::from(base_type.decode(u32::from_le_bytes(bytes)))
        };
        let (mut delta, mut wanted, mut bound) = (Vec::new(), Vec::new(), Vec::new());
        for row in 0..ROWS {
            for column in 0..COLS {
                let terms = (0..rank).map(|k| {
                    let product =
                        f64::from(left[row * rank + k]) * f64::from(right[k * COLS + column]);
                    scales[k] * product
                });
                let sum = terms.clone().sum::<f64>();
                delta.push(sum);
                wanted.push(value(row * COLS + column) + sum);
                bound.push(terms.map(f64::abs).sum::<f64>());
            }
        }
        let factors = Factors::pack_segments(ROWS, COLS, segments, left, |k, columns, row| {
            row.copy_from_slice(&right[k * COLS..][columns]);
        });
        let case = Case { factors, base, base_type, out_type, rounding: Rounding::Nearest };
        Trial { case, delta, wanted, bound }
    }

    #[test]
    fn errors_stay_within_the_bound() {
        let mut noise = Noise::new(11);
        for base_type in FloatType::ALL {
            for out_type in FloatType::ALL {
                for segments in [
                    &[(1, 1.0)][..],
                    &[(16, 0.5)],
                    &[(64, 2.0)],
                    &[(16, 0.3)],
                    &[(200, 0.25)],
                    &[(16, 0.5), (16, -2.0)],
                    &[(16, 0.7), (8, -3.0), (1, 0.0)],
                    &[(64, 1.0), (65, 0.5), (200, 0.7)],
                ] {
                    let segments: Vec<_> =
                        segments.iter().map(|&(ranks, scale)| Segment { ranks, scale }).collect();
                    let trial = trial(&mut noise, &segments, base_type, out_type);
                    let factors = &trial.case.factors;
                    let region = TileRegion::full_width(factors, 0, 40);
                    let (out, _) = trial.case.merge(Isa::Scalar, region);
                    let unit = match out_type {
                        FloatType::F32 => 2f64.powi(-24),
                        FloatType::F16 => 2f64.powi(-11),
                        FloatType::Bf16 => 2f64.powi(-8),
                    };
                    // γ_n = n·u/(1 − n·u), n the longest chain.
                    let longest = match factors.path() {
                        Path::F32 => factors.rank(),
                        Path::F64 => segments.iter().map(|one| one.ranks.min(64)).max().unwrap(),
                    };
                    let n = longest as f64 * 2f64.powi(-24);
                    let gamma = n / (1.0 - n);
                    let delta = trial.case.product(Isa::Scalar, region);
                    for ((got, wanted), bound) in delta.iter().zip(&trial.delta).zip(&trial.bound) {
                        assert!(
                            (got - wanted).abs() <= (gamma + 1e-13) * bound,
                            "{got:e} {wanted:e}"
                        );
                    }
                    let mut correct = 0;
                    for (at, element) in out.chunks(out_type.size()).enumerate() {
                        let mut bytes = [0; 4];
                        bytes[..element.len()].copy_from_slice(element);
                        let bits = u32::from_le_bytes(bytes);
                        let got = f64::from(out_type.decode(bits));
                        let wanted = trial.wanted[at];
                        // The reference and the last f64 operations round too.
                        let slack = 1e-13 * (wanted.abs() + trial.bound[at]);
                        let allowed =
                            unit * wanted.abs() + gamma * trial.bound[at] * (1.0 + unit) + slack;
                        assert!((got - wanted).abs() <= allowed, "{got:e} {wanted:e} {allowed:e}");
                        correct += usize::from(bits == out_type.encode(wanted));
                    }
                    if out_type == FloatType::Bf16 {
                        let share = correct as f64 / trial.wanted.len() as f64;
                        assert!(share >= 0.9999, "{segments:?}: {share}");
                    }
                }
            }
        }
    }

    #[test]
    fn statistics_say_what_happened() {
        // 1 + 2⁻⁹ rounds back to 1 in bf16, 1 + 2⁻⁷ is the next value.
        let one = FloatType::Bf16.encode(1.0).to_le_bytes();
        let max = (FloatType::Bf16.infinity() - 1).to_le_bytes();
        let nan = FloatType::Bf16.canonical_nan().to_le_bytes();
        let base: Vec<u8> = [one, one, one, max, nan].iter().flat_map(|b| [b[0], b[1]]).collect();
        let right = [2f32.powi(-9), 2f32.powi(-7), 0.0, 1e37, 1.0];
        let factors = Factors::new(1, 5, 1, &[1.0], &right, 1.0);
        let (base_type, out_type) = (FloatType::Bf16, FloatType::Bf16);
        let case = Case { factors, base, base_type, out_type, rounding: Rounding::Nearest };
        let region = TileRegion::full_width(&case.factors, 0, 1);
        for isa in Isa::available() {
            let (_, stats) = case.merge(isa, region);
            assert_eq!(stats.elements, 5);
            assert_eq!(stats.nonzero_delta, 4);
            assert_eq!(stats.changed, 2);
            assert_eq!(stats.overflowed, 1);
            assert_eq!(stats.non_finite, 2);
            assert_eq!(stats.realised_sq, 2f64.powi(-14));
            assert_eq!(stats.dot, 2f64.powi(-14));
            assert_eq!(stats.wanted_sq, 2f64.powi(-18) + 2f64.powi(-14));
        }
    }
}
