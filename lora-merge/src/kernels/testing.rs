//! Checks that every instruction set must pass, and the inputs they run on.
//!
//! The checks assert bits, of the output and of the statistics, against
//! [`Isa::Scalar`]. Whether the oracle itself keeps the contract is asked
//! where it lives, in `scalar.rs` and `float.rs`.

use super::native::{FLUSHING, read_control, write_control};
use super::{
    ConvertStats, Factors, FloatType, Isa, PANEL, Path, Rounding, TileRegion, TileStats, convert,
    merge_tile, with_ieee_floats,
};

/// Numbers that look random and are the same every time (PCG-XSH-RR).
#[derive(Clone)]
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u32 {
        let state = self.0;
        self.0 =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (((state >> 18) ^ state) >> 27) as u32;
        mixed.rotate_right((state >> 59) as u32)
    }

    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        ((u64::from(self.bits()) * u64::from(bound)) >> 32) as u32
    }

    /// In [-1, 1), never zero.
    pub(crate) fn float(&mut self) -> f32 {
        ((self.bits() >> 8) as f32 + 0.5) / (1 << 23) as f32 - 1.0
    }
}

/// Which values a test draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taste {
    /// What models are made of: the fast path throughout.
    Plain,
    /// The same with one remarkable value in a few hundred, for the fast path
    /// to notice.
    Sprinkled,
    /// Any bit pattern, and often a remarkable one.
    Wild,
}

const TASTES: [Taste; 3] = [Taste::Plain, Taste::Sprinkled, Taste::Wild];

/// The remarkable bit patterns of a storage type.
pub(crate) fn landmarks(float: FloatType) -> Vec<u32> {
    let infinity = float.infinity();
    let smallest_normal = infinity & infinity.wrapping_neg();
    let positive = [
        0,
        1,
        2,
        smallest_normal - 1,
        smallest_normal,
        smallest_normal + 1,
        infinity - 1,
        infinity,
        infinity + 1,
        float.canonical_nan(),
        float.canonical_nan() + 5,
        infinity | (infinity - smallest_normal) | (smallest_normal - 1),
    ];
    let sign = if float == FloatType::F32 { 1 << 31 } else { 1 << 15 };
    positive.into_iter().flat_map(|bits| [bits, bits | sign]).collect()
}

/// `count` encoded elements.
pub(crate) fn elements(noise: &mut Noise, float: FloatType, count: usize, taste: Taste) -> Vec<u8> {
    let landmarks = landmarks(float);
    let mut bytes = Vec::with_capacity(count * float.size());
    for _ in 0..count {
        let taste = match taste {
            Taste::Sprinkled if noise.below(300) == 0 => Taste::Wild,
            Taste::Sprinkled => Taste::Plain,
            _ => taste,
        };
        let bits = match (taste, noise.below(4)) {
            (Taste::Plain, _) | (Taste::Wild, 0) => float.encode(f64::from(noise.float()) * 0.05),
            (Taste::Wild, 1) => landmarks[noise.below(landmarks.len() as u32) as usize],
            // Short mantissas, so that sums meet ties.
            (Taste::Wild, 2) => float.encode(f64::from(noise.below(512)) / 256.0 - 1.0),
            _ => noise.bits(),
        };
        bytes.extend_from_slice(&bits.to_le_bytes()[..float.size()]);
    }
    bytes
}

/// A factor of `count` values. Wild factors hold zeros, short mantissas and,
/// rarely, values that overflow, underflow or are not numbers.
fn factor(noise: &mut Noise, count: usize, taste: Taste) -> Vec<f32> {
    let rarely = if taste == Taste::Sprinkled { 300 } else { 1 };
    (0..count)
        .map(|_| match (taste, noise.below(64 * rarely)) {
            (Taste::Plain, _) | (_, 64..) | (_, 0..32) => noise.float() * 0.1,
            (_, 32..44) => 0.0,
            (_, 44..60) => noise.below(33) as f32 / 16.0 - 1.0,
            (_, 60) => f32::from_bits(noise.below(1 << 24)),
            (_, 61) => noise.float() * 1e19,
            (_, 62) => noise.float() * 1e-22,
            (_, _) if noise.below(16) == 0 => {
                [f32::INFINITY, f32::NAN, f32::MAX, f32::from_bits(0x7FFF_FFFF)]
                    [noise.below(4) as usize]
            }
            (_, _) => -0.0,
        })
        .collect()
}

/// A whole tensor and what to do with it.
pub(crate) struct Case {
    pub(crate) factors: Factors,
    pub(crate) base: Vec<u8>,
    pub(crate) base_type: FloatType,
    pub(crate) out_type: FloatType,
    pub(crate) rounding: Rounding,
}

impl Case {
    /// Merges one region, from and to addresses that are odd.
    pub(crate) fn merge(&self, isa: Isa, region: TileRegion) -> (Vec<u8>, TileStats) {
        let size = self.base_type.size();
        let mut base = vec![0xAA];
        for row in region.row..region.row + region.rows {
            let first = row * self.factors.cols() + region.col;
            base.extend_from_slice(&self.base[first * size..][..region.cols * size]);
        }
        let mut out = vec![0xAA; 1 + region.rows * region.cols * self.out_type.size()];
        let stats = merge_tile(
            isa,
            &self.factors,
            region,
            &base[1..],
            self.base_type,
            &mut out[1..],
            self.out_type,
            self.rounding,
        );
        out.remove(0);
        (out, stats)
    }

    fn whole(&self) -> TileRegion {
        TileRegion::full_width(&self.factors, 0, self.factors.rows())
    }

    /// Asserts that `isa` gives the oracle's bits for `region`.
    fn check(&self, isa: Isa, region: TileRegion, what: &str) {
        let (expected, expected_stats) = self.merge(Isa::Scalar, region);
        let (out, stats) = self.merge(isa, region);
        let what = format!(
            "{isa} {what}: {}×{} rank {} {:?} {}→{} {:?} {region:?}",
            self.factors.rows(),
            self.factors.cols(),
            self.factors.rank(),
            self.factors.path(),
            self.base_type,
            self.out_type,
            self.rounding,
        );
        let size = self.out_type.size();
        if let Some(at) = (0..out.len() / size)
            .find(|at| out[at * size..][..size] != expected[at * size..][..size])
        {
            let (row, column) = (at / region.cols, at % region.cols);
            panic!(
                "{what}: element ({row}, {column}): {:02x?} instead of {:02x?}",
                &out[at * size..][..size],
                &expected[at * size..][..size],
            );
        }
        assert_eq!(bits(&stats), bits(&expected_stats), "{what}: {stats:?} {expected_stats:?}");
    }
}

/// Statistics in a form that tells −0 from 0 and compares NaN by payload.
fn bits(stats: &TileStats) -> [u64; 8] {
    [
        stats.elements,
        stats.nonzero_delta,
        stats.changed,
        stats.dot.to_bits(),
        stats.realised_sq.to_bits(),
        stats.wanted_sq.to_bits(),
        stats.overflowed,
        stats.non_finite,
    ]
}

const ROWS: [usize; 11] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 0];
const COLS: [usize; 14] = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 95, 97, 160];
const RANKS: [usize; 13] = [0, 1, 2, 3, 7, 8, 16, 63, 64, 65, 127, 128, 130];
const SCALES: [f64; 10] = [1.0, -0.5, 4.0, 0.3, -1.7, 0.0, 1e-30, 1e-60, 3e38, 1.0 / 16384.0];

/// All shapes around every boundary, each with its own draw of types, taste
/// and scale.
pub(crate) fn check_shapes(isa: Isa) {
    let mut noise = Noise::new(1);
    for rows in ROWS {
        for cols in COLS {
            for rank in RANKS {
                if rows == 33 && rank > 16 {
                    continue;
                }
                let taste = TASTES[noise.below(3) as usize];
                let scale = match taste {
                    Taste::Plain | Taste::Sprinkled => SCALES[noise.below(5) as usize],
                    Taste::Wild => SCALES[noise.below(SCALES.len() as u32) as usize],
                };
                let base_type = FloatType::ALL[noise.below(3) as usize];
                let out_type = FloatType::ALL[noise.below(3) as usize];
                let case = random_case(
                    &mut noise,
                    [rows, cols, rank],
                    scale,
                    taste,
                    [base_type, out_type],
                );
                case.check(isa, case.whole(), "shape");
            }
        }
    }
}

fn random_case(
    noise: &mut Noise,
    [rows, cols, rank]: [usize; 3],
    scale: f64,
    taste: Taste,
    [base_type, out_type]: [FloatType; 2],
) -> Case {
    let left = factor(noise, rows * rank, taste);
    let right = factor(noise, rank * cols, taste);
    Case {
        factors: Factors::new(rows, cols, rank, &left, &right, scale),
        base: elements(noise, base_type, rows * cols, taste),
        base_type,
        out_type,
        rounding: match noise.below(4) {
            0 => Rounding::Stochastic { key: u64::from(noise.bits()) },
            _ => Rounding::Nearest,
        },
    }
}

/// Every pair of types on one middling shape, every scale, both tastes.
pub(crate) fn check_types(isa: Isa) {
    let mut noise = Noise::new(2);
    for base_type in FloatType::ALL {
        for out_type in FloatType::ALL {
            for scale in SCALES {
                for taste in TASTES {
                    for rank in [1, 5, 66] {
                        let shape = [6, 117, rank];
                        let types = [base_type, out_type];
                        let case = random_case(&mut noise, shape, scale, taste, types);
                        case.check(isa, case.whole(), "types");
                    }
                }
            }
        }
    }
}

/// Sums that lie on a tie of the output type, or the least bit beside one.
///
/// The left factor is an identity, so that every element has a Δ of its own;
/// a second identity 64 ranks later adds a residual far below it, on
/// [`Path::F64`].
pub(crate) fn check_ties(isa: Isa) {
    const ROWS: usize = 5;
    const COLS: usize = 3 * PANEL + 7;
    let mut noise = Noise::new(3);
    for base_type in FloatType::ALL {
        for out_type in FloatType::ALL {
            for range in Range::ALL {
                for (rank, path) in [(ROWS, Path::F32), (65, Path::F64), (64 + ROWS, Path::F64)] {
                    let mut left = vec![0.0; ROWS * rank];
                    let mut right = vec![0.0; rank * COLS];
                    let mut base = Vec::new();
                    for row in 0..ROWS {
                        left[row * rank + row] = 1.0;
                        if rank > 65 {
                            left[row * rank + 64 + row] = 1.0;
                        }
                        for column in 0..COLS {
                            let (bits, delta, residual) =
                                tie(&mut noise, base_type, out_type, range);
                            base.extend_from_slice(&bits.to_le_bytes()[..base_type.size()]);
                            right[row * COLS + column] = delta;
                            if rank > 65 {
                                right[(64 + row) * COLS + column] = residual;
                            }
                        }
                    }
                    let factors = Factors::new(ROWS, COLS, rank, &left, &right, 1.0);
                    assert_eq!(factors.path(), path);
                    let rounding = Rounding::Nearest;
                    let case = Case { factors, base, base_type, out_type, rounding };
                    case.check(isa, case.whole(), "ties");
                }
            }
        }
    }
}

/// Where on the number line a test draws.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Range {
    /// Subnormals and the smallest normal values.
    Bottom,
    /// Around one, where no square overflows and the fast path does it all.
    Middle,
    /// Up to the largest finite value.
    Top,
}

impl Range {
    pub(crate) const ALL: [Self; 3] = [Self::Bottom, Self::Middle, Self::Top];

    /// A positive bit pattern whose successor is finite.
    fn draw(self, noise: &mut Noise, float: FloatType) -> u32 {
        let infinity = float.infinity();
        let smallest_normal = infinity & infinity.wrapping_neg();
        let (from, to) = match self {
            Self::Bottom => (0, 2 * smallest_normal),
            Self::Middle => (float.encode(0.125), float.encode(8.0)),
            Self::Top => (infinity / 2, infinity - 1),
        };
        from + noise.below(to - from)
    }
}

/// A base element and a Δ ≠ 0 whose sum is a tie of `out_type`, exactly or
/// almost, and a residual to move it by a little more.
pub(crate) fn tie(
    noise: &mut Noise,
    base_type: FloatType,
    out_type: FloatType,
    range: Range,
) -> (u32, f32, f32) {
    loop {
        let lower = range.draw(noise, out_type);
        let values = [lower, lower + 1].map(|bits| f64::from(out_type.decode(bits)));
        let middle = f64::midpoint(values[0], values[1]);
        let middle = if noise.below(2) == 0 { middle } else { -middle };
        // A base within a few binades of the sum, or next to it, or the tie
        // itself.
        let factor = match noise.below(5) {
            0 => 1.0,
            1 => 1.0 + 1e-4,
            2 => 1.0 + f64::from(noise.float()) * 0.01,
            _ => f64::from(noise.float()) * 2.0,
        };
        let bits = base_type.encode(middle * factor);
        let base = f64::from(base_type.decode(bits));
        let delta = (middle - base) as f32;
        if !base.is_finite() || !delta.is_finite() {
            continue;
        }
        let delta = match noise.below(4) {
            // Half-way already: the last bit there is decides.
            _ if delta == 0.0 => f32::from_bits(1 | noise.bits() & 1 << 31),
            0 => delta.next_up(),
            1 => delta.next_down(),
            _ => delta,
        };
        let residual = (middle * f64::from(noise.float()) * 1e-15) as f32;
        if delta != 0.0 && delta.is_finite() {
            return (bits, delta, [0.0, residual][noise.below(2) as usize]);
        }
    }
}

/// Any partition into tiles gives the bytes, and the counts, of the whole.
pub(crate) fn check_partitions(isa: Isa) {
    const ROWS: usize = 37;
    const COLS: usize = 4 * PANEL + 16;
    let mut noise = Noise::new(4);
    for rounding in [Rounding::Nearest, Rounding::Stochastic { key: 99 }] {
        for (scale, taste) in [(0.5, Taste::Plain), (0.3, Taste::Wild)] {
            let types = [FloatType::Bf16, FloatType::F16];
            let mut case = random_case(&mut noise, [ROWS, COLS, 9], scale, taste, types);
            case.rounding = rounding;
            let (whole, whole_stats) = case.merge(isa, case.whole());
            for row_cuts in [&[0, ROWS][..], &[0, 1, 2, 5, 36, ROWS], &[0, 32, ROWS]] {
                for col_cuts in [&[0, COLS][..], &[0, 48, 192, COLS], &[0, 144, COLS]] {
                    let mut sum = TileStats::default();
                    for rows in row_cuts.windows(2) {
                        for cols in col_cuts.windows(2) {
                            let region = TileRegion {
                                row: rows[0],
                                rows: rows[1] - rows[0],
                                col: cols[0],
                                cols: cols[1] - cols[0],
                            };
                            case.check(isa, region, "partition");
                            let (tile, stats) = case.merge(isa, region);
                            sum.merge(&stats);
                            let size = case.out_type.size();
                            for (row, tile) in tile.chunks(region.cols * size).enumerate() {
                                let first = (region.row + row) * COLS + region.col;
                                assert_eq!(tile, &whole[first * size..][..tile.len()]);
                            }
                        }
                    }
                    let counts = |stats: &TileStats| {
                        let all = bits(stats);
                        [all[0], all[1], all[2], all[6], all[7]]
                    };
                    assert_eq!(counts(&sum), counts(&whole_stats));
                }
            }
        }
    }
}

/// A Δ of zero leaves every bit pattern of the same type alone.
pub(crate) fn check_zero_delta(isa: Isa) {
    for float in [FloatType::F16, FloatType::Bf16] {
        let base: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let factors = Factors::new(256, 256, 1, &[0.0; 256], &[1.0; 256], 1.0);
        let rounding = Rounding::Nearest;
        let case = Case { factors, base, base_type: float, out_type: float, rounding };
        case.check(isa, case.whole(), "zero");
        let (out, stats) = case.merge(isa, case.whole());
        assert_eq!(out, case.base);
        assert_eq!((stats.nonzero_delta, stats.changed), (0, 0));
    }
}

/// Conversions agree, whatever the length and the alignment.
pub(crate) fn check_conversions(isa: Isa) {
    let mut noise = Noise::new(5);
    for base_type in FloatType::ALL {
        for out_type in FloatType::ALL {
            for taste in TASTES {
                for count in (0..100).chain([9999]) {
                    let mut base = vec![0];
                    base.extend(elements(&mut noise, base_type, count, taste));
                    let run = |isa| {
                        let mut out = vec![0; 1 + count * out_type.size()];
                        let stats = convert(isa, &base[1..], base_type, &mut out[1..], out_type);
                        (out, stats)
                    };
                    assert_eq!(run(isa), run(Isa::Scalar), "{isa} {base_type}→{out_type} {count}");
                }
            }
        }
    }
}

/// Every 16-bit pattern, and every neighbourhood of a tie, through the vector
/// conversions.
pub(crate) fn check_conversions_exhaustively(isa: Isa) {
    let patterns: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for from in [FloatType::F16, FloatType::Bf16] {
        let values: Vec<f32> = (0..=0xFFFF).map(|bits| from.decode(bits)).collect();
        let mut wide = vec![0; 4 << 16];
        convert(isa, &patterns, from, &mut wide, FloatType::F32);
        for (bytes, value) in wide.as_chunks::<4>().0.iter().zip(&values) {
            let wanted = FloatType::F32.encode(f64::from(*value));
            assert_eq!(u32::from_le_bytes(*bytes), wanted, "{isa} {from}");
        }
        let mut back = vec![0; 2 << 16];
        convert(isa, &wide, FloatType::F32, &mut back, from);
        for (bits, bytes) in (0..).zip(back.as_chunks::<2>().0) {
            let wanted = if from.decode(bits).is_nan() { from.canonical_nan() } else { bits };
            assert_eq!(u32::from(u16::from_le_bytes(*bytes)), wanted, "{isa} {from}");
        }
        let near_ties: Vec<u8> = values
            .iter()
            .zip(&values[1..])
            .filter(|(low, high)| low.is_finite() && high.is_finite())
            .flat_map(|(low, high)| {
                let middle = f64::midpoint(f64::from(*low), f64::from(*high)) as f32;
                [middle.next_down(), middle, middle.next_up()]
            })
            .flat_map(f32::to_le_bytes)
            .collect();
        let run = |isa| {
            let mut out = vec![0; near_ties.len() / 2];
            let stats: ConvertStats = convert(isa, &near_ties, FloatType::F32, &mut out, from);
            (out, stats)
        };
        assert!(run(isa) == run(Isa::Scalar), "{isa} {from}");
    }
}

/// Flush-to-zero in the caller's thread changes nothing, and survives.
pub(crate) fn check_environment(isa: Isa) {
    let base: Vec<u8> = (1..=160_u32).flat_map(u32::to_le_bytes).collect();
    let left = [1e-30; 1];
    let right: Vec<f32> = (0..160).map(|n| n as f32 * 1e-15).collect();
    for scale in [0.5, 0.3] {
        let factors = Factors::new(1, 160, 1, &left, &right, scale);
        let (base_type, out_type) = (FloatType::F32, FloatType::F32);
        let rounding = Rounding::Nearest;
        let case = Case { factors, base: base.clone(), base_type, out_type, rounding };
        let (expected, stats) = case.merge(Isa::Scalar, case.whole());
        let before = read_control();
        write_control(before | FLUSHING);
        let inside = with_ieee_floats(read_control);
        let (out, flushed_stats) = case.merge(isa, case.whole());
        let after = read_control();
        write_control(before);
        assert_eq!(after & FLUSHING, FLUSHING, "the caller's setting is restored");
        assert_eq!(inside & FLUSHING, 0);
        assert_eq!(out, expected);
        assert_eq!(bits(&stats), bits(&flushed_stats));
        assert!(stats.changed > 100, "subnormals take part");
    }
}

/// The tests proper: each check on every instruction set of this CPU.
macro_rules! on_every_isa {
    ($($test:ident => $check:ident;)*) => {$(
        #[test]
        fn $test() {
            for isa in Isa::available() {
                $check(isa);
            }
        }
    )*};
}

on_every_isa! {
    shapes => check_shapes;
    types => check_types;
    ties => check_ties;
    partitions => check_partitions;
    zero_delta => check_zero_delta;
    conversions => check_conversions;
    conversions_exhaustively => check_conversions_exhaustively;
    environment => check_environment;
}

#[test]
fn names_parse_back() {
    for isa in Isa::ALL {
        assert_eq!(isa.name().parse(), Ok(isa));
    }
    let unknown = "sse2".parse::<Isa>().unwrap_err();
    assert!(unknown.to_string().contains("avx512"));
    assert!(Isa::available().contains(&Isa::detect()));
}

#[test]
fn paths_follow_the_data() {
    let path = |rank: usize, left: f32, scale| {
        Factors::new(1, 1, rank, &vec![left; rank], &vec![1.0; rank], scale).path()
    };
    assert_eq!(path(64, 1.5, 0.25), Path::F32);
    assert_eq!(path(64, 1.5, -2.0), Path::F32);
    assert_eq!(path(65, 1.5, 0.25), Path::F64);
    assert_eq!(path(4, 1.5, 0.3), Path::F64);
    assert_eq!(path(4, 1.5, 0.0), Path::F64);
    assert_eq!(path(4, f32::MAX, 2.0), Path::F64);
    assert_eq!(path(4, f32::MIN_POSITIVE, 0.5), Path::F32);
    assert_eq!(path(4, f32::MIN_POSITIVE.next_up(), 0.5), Path::F64);
    assert_eq!(path(4, 1.0, 2.0_f64.powi(-1060)), Path::F64);
    assert_eq!(path(4, 1.0, f64::NAN), Path::F64);
    assert_eq!(path(4, 1.0, f64::INFINITY), Path::F64);
}

#[test]
#[should_panic(expected = "is not a tile")]
fn regions_that_split_a_panel_are_refused() {
    let factors = Factors::new(1, 96, 0, &[], &[], 1.0);
    let region = TileRegion { row: 0, rows: 1, col: 16, cols: 80 };
    let float = FloatType::F32;
    merge_tile(Isa::Scalar, &factors, region, &[], float, &mut [], float, Rounding::Nearest);
}
