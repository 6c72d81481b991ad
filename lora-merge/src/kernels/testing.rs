//! Checks that every instruction set must pass, and the inputs they run on.
//!
//! The checks assert bits, of the output and of the statistics, against
//! [`Isa::Scalar`]. Whether the oracle itself keeps the contract is asked
//! where it lives, in `scalar.rs` and `float.rs`.

use super::native::{FLUSHING, read_control, write_control};
use super::{
    ConvertStats, Factors, FloatType, Isa, PANEL, Path, Rounding, Segment, TileRegion, TileStats,
    add_tile, convert, merge_tile, product_tile, with_ieee_floats,
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

/// `count` doubles for [`add_tile`]. Wild ones are any bit pattern, or a
/// remarkable one, or far from every base.
fn doubles(noise: &mut Noise, count: usize, taste: Taste) -> Vec<f64> {
    const LANDMARKS: [f64; 10] = [
        0.0,
        5e-324,
        f64::MIN_POSITIVE,
        1e-60,
        2.0,
        3.4e38,
        6.9e38,
        f64::MAX,
        f64::INFINITY,
        // Signalling, where it is a NaN at all.
        f64::from_bits(0x7FF0_0000_0000_0005),
    ];
    (0..count)
        .map(|_| {
            let wild = match taste {
                Taste::Plain => false,
                Taste::Sprinkled => noise.below(300) == 0,
                Taste::Wild => true,
            };
            let plain = f64::from(noise.float()) * (0.01 + f64::from(noise.float()) * 1e-10);
            match noise.below(if wild { 5 } else { 1 }) {
                0 => plain,
                1 => LANDMARKS[noise.below(10) as usize].copysign(plain),
                2 => f64::from_bits(u64::from(noise.bits()) << 32 | u64::from(noise.bits())),
                // A tie of some type, or the least bit beside it.
                3 => (f64::from(noise.below(512)) / 256.0 - 1.0) * (1.0 + plain * 1e-13),
                _ => plain * 2f64.powi(noise.below(300) as i32 - 150),
            }
        })
        .collect()
}

/// The first place where two tiles of Δ differ.
fn difference(a: &[f64], b: &[f64]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits())
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
        let (base_type, out_type) = (self.base_type, self.out_type);
        self.apply(region, |base, out| {
            merge_tile(isa, &self.factors, region, base, base_type, out, out_type, self.rounding)
        })
    }

    /// The same with a Δ that is given.
    fn add(&self, isa: Isa, region: TileRegion, delta: &[f64]) -> (Vec<u8>, TileStats) {
        let (base_type, out_type, cols) = (self.base_type, self.out_type, self.factors.cols());
        self.apply(region, |base, out| {
            add_tile(isa, cols, region, delta, base, base_type, out, out_type, self.rounding)
        })
    }

    fn apply(
        &self,
        region: TileRegion,
        kernel: impl FnOnce(&[u8], &mut [u8]) -> TileStats,
    ) -> (Vec<u8>, TileStats) {
        let size = self.base_type.size();
        let mut base = vec![0xAA];
        for row in region.row..region.row + region.rows {
            let first = row * self.factors.cols() + region.col;
            base.extend_from_slice(&self.base[first * size..][..region.cols * size]);
        }
        let mut out = vec![0xAA; 1 + region.rows * region.cols * self.out_type.size()];
        let stats = kernel(&base[1..], &mut out[1..]);
        out.remove(0);
        (out, stats)
    }

    /// Δ of one region, over memory that holds something else.
    pub(crate) fn product(&self, isa: Isa, region: TileRegion) -> Vec<f64> {
        let mut delta = vec![1e300; region.rows * region.cols];
        product_tile(isa, &self.factors, region, &mut delta);
        delta
    }

    /// Whether the contract says that [`product_tile`] and [`add_tile`] make a
    /// [`merge_tile`] of this region.
    fn divides(&self, delta: &[f64], region: TileRegion) -> bool {
        match (self.factors.path(), self.rounding, self.factors.segments()) {
            (Path::F32, Rounding::Nearest, _) if self.out_type != FloatType::F32 => {
                let base = |at: usize| {
                    let (row, column) = (at / region.cols, at % region.cols);
                    let index = (region.row + row) * self.factors.cols() + region.col + column;
                    let size = self.base_type.size();
                    let mut bytes = [0; 4];
                    bytes[..size].copy_from_slice(&self.base[index * size..][..size]);
                    f64::from(self.base_type.decode(u32::from_le_bytes(bytes))).abs()
                };
                let near = |(a, b): (f64, f64)| !(a * 2f64.powi(28) < b || b * 2f64.powi(28) < a);
                let pairs = delta.iter().enumerate().map(|(at, delta)| (base(at), delta.abs()));
                // Zeros add exactly.
                pairs.filter(|(a, b)| *a != 0.0 && *b != 0.0).all(near)
            }
            (Path::F32, ..) => true,
            // A power of two scales exactly.
            (Path::F64, _, [only]) => only.scale.abs().log2().fract() == 0.0,
            (Path::F64, ..) => true,
        }
    }

    fn whole(&self) -> TileRegion {
        TileRegion::full_width(&self.factors, 0, self.factors.rows())
    }

    /// Asserts that `isa` gives the oracle's bits for `region`: of the merge,
    /// of Δ, and of the merge with that Δ, which are equal where they have to be.
    fn check(&self, isa: Isa, region: TileRegion, what: &str) {
        let what = format!(
            "{isa} {what}: {}×{} {:?} {:?} {}→{} {:?} {region:?}",
            self.factors.rows(),
            self.factors.cols(),
            self.factors.segments(),
            self.factors.path(),
            self.base_type,
            self.out_type,
            self.rounding,
        );
        let merged = self.merge(Isa::Scalar, region);
        self.compare(region, self.merge(isa, region), &merged, &what);
        let delta = self.product(Isa::Scalar, region);
        let at = difference(&self.product(isa, region), &delta);
        assert_eq!(at, None, "{what}: Δ");
        let added = self.add(Isa::Scalar, region, &delta);
        self.compare(region, self.add(isa, region, &delta), &added, &format!("{what}, added"));
        if self.divides(&delta, region) {
            self.compare(region, added, &merged, &format!("{what}, divided"));
        }
    }

    fn compare(
        &self,
        region: TileRegion,
        (out, stats): (Vec<u8>, TileStats),
        (expected, expected_stats): &(Vec<u8>, TileStats),
        what: &str,
    ) {
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
        assert_eq!(bits(&stats), bits(expected_stats), "{what}: {stats:?} {expected_stats:?}");
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

/// Several terms, as the oracle has them and as the contract composes them of
/// terms on their own.
pub(crate) fn check_segments(isa: Isa) {
    const TERMS: [usize; 8] = [0, 1, 1, 7, 16, 64, 65, 200];
    const SCALES: [f64; 7] = [1.0, 0.5, 0.7, -3.0, 0.0, -4.0, 1e-44];
    let mut noise = Noise::new(12);
    for round in 0..240 {
        let taste = TASTES[noise.below(3) as usize];
        // Few enough ranks, and scales that fold, in every other round.
        let (terms, scales) = if round % 2 == 0 { (5, 2) } else { (8, 7) };
        let segments: Vec<Segment> = (0..noise.below(5))
            .map(|_| Segment {
                ranks: TERMS[noise.below(terms) as usize],
                scale: SCALES[noise.below(scales) as usize],
            })
            .collect();
        let (rows, cols) = (ROWS[noise.below(10) as usize], COLS[noise.below(14) as usize]);
        let types = [0, 1].map(|_| FloatType::ALL[noise.below(3) as usize]);
        let case = segmented_case(&mut noise, [rows, cols], &segments, taste, types);
        case.check(isa, case.whole(), "segments");
        let row = noise.below(rows as u32) as usize;
        let col = noise.below(cols.div_ceil(PANEL) as u32) as usize * PANEL;
        let region = TileRegion { row, rows: rows - row, col, cols: cols - col };
        case.check(isa, region, "part of segments");
    }
}

/// A case of several segments, whose Δ is asserted to be the sum of theirs.
fn segmented_case(
    noise: &mut Noise,
    [rows, cols]: [usize; 2],
    segments: &[Segment],
    taste: Taste,
    types: [FloatType; 2],
) -> Case {
    let rank = segments.iter().map(|segment| segment.ranks).sum();
    let mut case = random_case(noise, [rows, cols, rank], 1.0, taste, types);
    let left = factor(noise, rows * rank, taste);
    let right = factor(noise, rank * cols, taste);
    case.factors = Factors::pack_segments(rows, cols, segments, left.clone(), |k, columns, row| {
        row.copy_from_slice(&right[k * cols..][columns]);
    });
    let delta = case.product(Isa::Scalar, case.whole());

    // The ranks of each segment, their left columns scaled by `by`.
    let columns = |ranks: std::ops::Range<usize>, by: f64| -> Vec<f32> {
        (0..rows)
            .flat_map(|row| left[row * rank..][ranks.clone()].to_vec())
            .map(|element| (f64::from(element) * by) as f32)
            .collect()
    };
    let mut first = 0;
    let terms: Vec<_> = segments
        .iter()
        .map(|segment| {
            let ranks = first..first + segment.ranks;
            first = ranks.end;
            (ranks, segment.scale)
        })
        .filter(|(ranks, _)| !ranks.is_empty())
        .collect();
    let expected = match case.factors.path() {
        Path::F32 => {
            let scaled: Vec<_> =
                terms.iter().map(|(ranks, scale)| columns(ranks.clone(), *scale)).collect();
            let folded: Vec<f32> = (0..rows)
                .flat_map(|row| {
                    scaled.iter().zip(&terms).map(move |(part, term)| (row, part, term))
                })
                .flat_map(|(row, part, (ranks, _))| &part[row * ranks.len()..][..ranks.len()])
                .copied()
                .collect();
            let factors = Factors::new(rows, cols, rank, &folded, &right, 1.0);
            assert_eq!(factors.path(), Path::F32);
            let mut sum = vec![0.0; delta.len()];
            product_tile(Isa::Scalar, &factors, case.whole(), &mut sum);
            sum
        }
        Path::F64 => {
            let mut sum = vec![0.0_f64; delta.len()];
            for (number, (ranks, scale)) in terms.iter().enumerate() {
                let right = &right[ranks.start * cols..ranks.end * cols];
                let left = columns(ranks.clone(), 1.0);
                // At scale 1, Δ is the sum of the chunks.
                let alone = Factors::new(rows, cols, ranks.len(), &left, right, 1.0);
                let mut part = vec![0.0; delta.len()];
                product_tile(Isa::Scalar, &alone, case.whole(), &mut part);
                for (sum, part) in sum.iter_mut().zip(part) {
                    *sum = if number == 0 { scale * part } else { *sum + scale * part };
                }
            }
            sum.iter().map(|sum| if sum.is_nan() { f64::NAN } else { *sum }).collect()
        }
    };
    assert_eq!(difference(&delta, &expected), None, "{segments:?} {taste:?}");
    case
}

/// A Δ that is given, of every value there is.
pub(crate) fn check_given(isa: Isa) {
    let mut noise = Noise::new(13);
    for base_type in FloatType::ALL {
        for out_type in FloatType::ALL {
            for taste in TASTES {
                for (rows, cols) in ROWS.into_iter().flat_map(|rows| COLS.map(|cols| (rows, cols)))
                {
                    let types = [base_type, out_type];
                    let case = random_case(&mut noise, [rows, cols, 0], 1.0, taste, types);
                    let mut delta = doubles(&mut noise, rows * cols, taste);
                    if noise.below(8) == 0 {
                        delta.fill([0.0, -0.0][noise.below(2) as usize]);
                    }
                    let whole = case.whole();
                    let expected = case.add(Isa::Scalar, whole, &delta);
                    let what = format!("{isa} given: {rows}×{cols} {base_type}→{out_type}");
                    case.compare(whole, case.add(isa, whole, &delta), &expected, &what);
                }
            }
        }
    }
}

/// Any partition gives the bytes and the counts of the whole, and the Δ.
pub(crate) fn check_given_partitions(isa: Isa) {
    const ROWS: usize = 37;
    const COLS: usize = 2 * PANEL + 17;
    let mut noise = Noise::new(14);
    let segments =
        [(3, 0.7), (70, -3.0), (0, 9.0), (5, 0.5)].map(|(ranks, scale)| Segment { ranks, scale });
    for taste in TASTES {
        for rounding in [Rounding::Nearest, Rounding::Stochastic { key: 7 }] {
            let types = [FloatType::F16, FloatType::Bf16];
            let mut case = segmented_case(&mut noise, [ROWS, COLS], &segments, taste, types);
            case.rounding = rounding;
            let whole_delta = case.product(isa, case.whole());
            let given = doubles(&mut noise, ROWS * COLS, taste);
            let (whole, whole_stats) = case.add(isa, case.whole(), &given);
            let mut sum = TileStats::default();
            for rows in [0, 1, 4, 33, ROWS].windows(2) {
                for cols in [0, PANEL, COLS].windows(2) {
                    let (row, col) = (rows[0], cols[0]);
                    let region = TileRegion { row, rows: rows[1] - row, col, cols: cols[1] - col };
                    case.check(isa, region, "part");
                    let delta = case.product(isa, region);
                    let part: Vec<f64> = (row..rows[1])
                        .flat_map(|row| &given[row * COLS..][col..cols[1]])
                        .copied()
                        .collect();
                    let (out, stats) = case.add(isa, region, &part);
                    sum.merge(&stats);
                    for row in 0..region.rows {
                        let first = (region.row + row) * COLS + col;
                        let line = row * region.cols..(row + 1) * region.cols;
                        let expected = &whole_delta[first..][..region.cols];
                        assert_eq!(difference(&delta[line.clone()], expected), None);
                        let expected = &whole[2 * first..][..2 * region.cols];
                        assert_eq!(&out[2 * line.start..2 * line.end], expected);
                    }
                }
            }
            assert_eq!(counts(&sum), counts(&whole_stats));
        }
    }
}

/// The counters, which do not depend on the partition.
fn counts(stats: &TileStats) -> [u64; 5] {
    let all = bits(stats);
    [all[0], all[1], all[2], all[6], all[7]]
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
    segments => check_segments;
    given => check_given;
    partitions => check_partitions;
    given_partitions => check_given_partitions;
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
fn paths_follow_every_segment() {
    let path = |left: &[f32], segments: &[(usize, f64)]| {
        let segments: Vec<_> =
            segments.iter().map(|&(ranks, scale)| Segment { ranks, scale }).collect();
        let factors =
            Factors::pack_segments(1, 1, &segments, left.to_vec(), |_, _, row| row.fill(1.0));
        (factors.path(), factors.segments().len(), factors.scale())
    };
    assert_eq!(path(&[], &[]), (Path::F32, 0, 1.0));
    assert_eq!(path(&[], &[(0, 0.3)]), (Path::F64, 1, 0.3));
    assert_eq!(path(&[], &[(0, 0.3), (0, 0.3)]), (Path::F32, 0, 1.0));
    assert_eq!(path(&[1.0], &[(0, 0.3), (1, -2.0)]), (Path::F32, 1, -2.0));
    assert_eq!(path(&[1.0; 2], &[(1, 0.5), (1, -2.0)]), (Path::F32, 2, 1.0));
    assert_eq!(path(&[1.0; 2], &[(1, 0.5), (1, 0.3)]), (Path::F64, 2, 1.0));
    assert_eq!(path(&[1.0; 64], &[(32, 0.5), (32, 2.0)]), (Path::F32, 2, 1.0));
    assert_eq!(path(&[1.0; 65], &[(32, 0.5), (33, 0.5)]), (Path::F64, 2, 1.0));
    // Only the segment an element belongs to must not round it.
    assert_eq!(path(&[f32::MAX, 1.0], &[(1, 0.5), (1, 2.0)]), (Path::F32, 2, 1.0));
    assert_eq!(path(&[1.0, f32::MAX], &[(1, 0.5), (1, 2.0)]), (Path::F64, 2, 1.0));
}

/// What the contract says about NaN and infinity, spelled out.
#[test]
fn a_given_delta_may_be_anything() {
    let float = FloatType::Bf16;
    let one = float.encode(1.0) as u16;
    let infinity = float.infinity() as u16;
    let nan = float.canonical_nan() as u16;
    let payload = nan | 0x8003;
    let given = [
        (one, f64::from_bits(0xFFF0_0000_0000_0001), nan),
        (one, f64::INFINITY, infinity),
        (infinity, f64::NEG_INFINITY, nan),
        (payload, 0.0, payload),
        (payload, -0.0, payload),
        (payload, 1.0, nan),
        (0x8000, 0.0, 0x8000),
        (one, 1e300, infinity),
        (one, 3e38, float.encode(3e38) as u16),
        (one, 3.4e38, infinity),
        (one, 5e-324, one),
    ];
    let base: Vec<u8> = given.iter().flat_map(|(base, _, _)| base.to_le_bytes()).collect();
    let delta: Vec<f64> = given.iter().map(|(_, delta, _)| *delta).collect();
    let expected: Vec<u8> = given.iter().flat_map(|(_, _, out)| out.to_le_bytes()).collect();
    let cols = given.len();
    let region = TileRegion { row: 3, rows: 1, col: 0, cols };
    for isa in Isa::available() {
        let mut out = vec![0; base.len()];
        let rounding = Rounding::Nearest;
        let stats = add_tile(isa, cols, region, &delta, &base, float, &mut out, float, rounding);
        assert_eq!(out, expected, "{isa}");
        assert_eq!((stats.nonzero_delta, stats.changed), (8, 7), "{isa}");
        // 1e300 is no finite f32, so the statistics see an infinite Δ there.
        assert_eq!((stats.overflowed, stats.non_finite), (1, 8), "{isa}");
    }
}

/// Where Δ on its own says less than the factors do.
#[test]
fn a_rounded_delta_is_not_a_fused_one() {
    let merged = |factors: &Factors, base: f32, float: FloatType| {
        let region = TileRegion::full_width(factors, 0, 1);
        let base = base.to_le_bytes();
        let (from, rounding) = (FloatType::F32, Rounding::Nearest);
        let mut out = [[0; 4]; 2];
        let size = float.size();
        let [fused, divided] = &mut out;
        let fused = &mut fused[..size];
        merge_tile(Isa::Scalar, factors, region, &base, from, fused, float, rounding);
        let mut delta = [0.0];
        product_tile(Isa::Scalar, factors, region, &mut delta);
        let divided = &mut divided[..size];
        add_tile(Isa::Scalar, 1, region, &delta, &base, from, divided, float, rounding);
        out.map(|bytes| f64::from(float.decode(u32::from_le_bytes(bytes))))
    };
    // A tie of bf16 and a trifle, which an f64 cannot hold together.
    let trifle = Factors::new(1, 1, 1, &[1.0], &[1e-20], 1.0);
    let tie = 1.0 + 2f32.powi(-8);
    assert_eq!(merged(&trifle, tie, FloatType::Bf16), [1.0 + 2f64.powi(-7), 1.0]);
    // 3·(1/3) is 1 rounded, and 1 − 2⁻⁵⁴ fused.
    let third = Factors::new(1, 1, 1, &[1.0], &[3.0], 1.0 / 3.0);
    assert_eq!(third.path(), Path::F64);
    assert_eq!(merged(&third, -1.0, FloatType::F32), [-(2f64.powi(-54)), 0.0]);
}

#[test]
#[should_panic(expected = "is not a tile")]
fn given_regions_that_split_a_panel_are_refused() {
    let region = TileRegion { row: 0, rows: 1, col: 0, cols: 16 };
    let float = FloatType::F32;
    let (delta, base, mut out) = ([0.0; 16], [0; 64], [0; 64]);
    let rounding = Rounding::Nearest;
    add_tile(Isa::Scalar, 96, region, &delta, &base, float, &mut out, float, rounding);
}

#[test]
#[should_panic(expected = "is not a tile")]
fn regions_that_split_a_panel_are_refused() {
    let factors = Factors::new(1, 96, 0, &[], &[], 1.0);
    let region = TileRegion { row: 0, rows: 1, col: 16, cols: 80 };
    let float = FloatType::F32;
    merge_tile(Isa::Scalar, &factors, region, &[], float, &mut [], float, Rounding::Nearest);
}
