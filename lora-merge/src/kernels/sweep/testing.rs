//! Checks that every instruction set must pass: the bits of the oracle.
//!
//! What the oracle itself must do is asked in the second half.

use super::super::native::{FLUSHING, read_control, write_control};
use super::super::testing::{Noise, Taste, elements, landmarks};
use super::*;

const TASTES: [Taste; 3] = [Taste::Plain, Taste::Sprinkled, Taste::Wild];
const COLS: [usize; 20] =
    [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 143, 144, 145, 255, 257, 390];

/// `count` values. Sprinkled and wild ones hold NaN of every kind, infinities,
/// subnormals and both zeros.
fn floats(noise: &mut Noise, count: usize, taste: Taste) -> Vec<f32> {
    let bytes = elements(noise, FloatType::F32, count, taste);
    bytes.as_chunks().0.iter().map(|bits| f32::from_le_bytes(*bits)).collect()
}

/// A block of vectors.
fn block<const G: usize>(noise: &mut Noise, rows: usize, taste: Taste) -> Vec<BlockRow<G>> {
    let values = floats(noise, rows * G * LANES, taste);
    let row = |row: usize| {
        let values = &values[row * G * LANES..][..G * LANES];
        BlockRow(std::array::from_fn(|group| {
            std::array::from_fn(|lane| values[group * LANES + lane])
        }))
    };
    (0..rows).map(row).collect()
}

fn bits<const G: usize>(rows: &[BlockRow<G>]) -> Vec<u32> {
    rows.iter().flat_map(|row| row.0.as_flattened()).map(|value| value.to_bits()).collect()
}

/// A matrix in one of the ways there are.
struct Matrix {
    plain: Option<Vec<f32>>,
    tuned: (Vec<u8>, FloatType),
    base: Option<(Vec<u8>, FloatType)>,
}

impl Matrix {
    /// Stored elements begin at an odd address.
    fn new(noise: &mut Noise, count: usize, taste: Taste) -> Self {
        let stored = |noise: &mut Noise| {
            let float = FloatType::ALL[noise.below(3) as usize];
            let mut bytes = vec![0xAA];
            bytes.extend(elements(noise, float, count, taste));
            (bytes, float)
        };
        let kind = noise.below(6);
        Self {
            plain: (kind == 0).then(|| floats(noise, count, taste)),
            tuned: stored(noise),
            base: (kind > 1).then(|| stored(noise)),
        }
    }

    /// Rows `first..last`.
    fn rows(&self, cols: usize, first: usize, last: usize) -> Rows<'_> {
        let (first, last) = (first * cols, last * cols);
        if let Some(plain) = &self.plain {
            return Rows::Plain(&plain[first..last]);
        }
        fn part(
            (bytes, float): &(Vec<u8>, FloatType),
            first: usize,
            last: usize,
        ) -> (&[u8], FloatType) {
            (&bytes[1..][first * float.size()..last * float.size()], *float)
        }
        let (tuned, tuned_type) = part(&self.tuned, first, last);
        let base = self.base.as_ref().map(|base| part(base, first, last));
        Rows::Stored { tuned, tuned_type, base }
    }
}

/// `W` and `Z` of a sweep, of its halves, and of its halves on a `W` that no
/// product would give.
fn passes<const G: usize>(
    isa: Isa,
    rows: Rows<'_>,
    cols: usize,
    v: &[BlockRow<G>],
    given: &[BlockRow<G>],
    z: &[BlockRow<G>],
) -> [Vec<u32>; 5] {
    let mut scratch = SweepScratch::new();
    let dirty = BlockRow([[f32::NAN; LANES]; G]);
    let (mut w, mut both) = (vec![dirty; given.len()], z.to_vec());
    sweep(isa, rows, cols, v, &mut w, &mut both, &mut scratch);
    let mut applied = vec![dirty; given.len()];
    apply(isa, rows, cols, v, &mut applied, &mut scratch);
    let mut transposed = z.to_vec();
    apply_transposed(isa, rows, cols, &w, &mut transposed, &mut scratch);
    let mut from_given = z.to_vec();
    apply_transposed(isa, rows, cols, given, &mut from_given, &mut scratch);
    assert!(scratch.lines.len() * size_of::<Line>() <= SweepScratch::bytes(cols));
    [bits(&w), bits(&both), bits(&applied), bits(&transposed), bits(&from_given)]
}

fn check<const G: usize>(noise: &mut Noise, rows: usize, cols: usize, taste: Taste) {
    let matrix = Matrix::new(noise, rows * cols, taste);
    let (v, given) = (block::<G>(noise, cols, taste), block(noise, rows, taste));
    let mut z = block(noise, cols, taste);
    if noise.below(2) == 0 {
        z.fill(BlockRow([[-0.0; LANES]; G]));
    }
    let all = matrix.rows(cols, 0, rows);
    let expected = passes(Isa::Scalar, all, cols, &v, &given, &z);
    assert_eq!(expected[0], expected[2], "the halves of a sweep are a sweep");
    assert_eq!(expected[1], expected[3], "the halves of a sweep are a sweep");
    for isa in Isa::available() {
        let got = passes(isa, all, cols, &v, &given, &z);
        assert!(got == expected, "{isa} {rows}×{cols} G = {G} {taste:?} {all:?}");
        // Any division into calls gives the same.
        let mut scratch = SweepScratch::new();
        let (mut w, mut z) = (vec![BlockRow::ZERO; rows], z.clone());
        let mut row = 0;
        while row < rows {
            let end = rows.min(row + 1 + noise.below(24) as usize);
            let part = matrix.rows(cols, row, end);
            sweep(isa, part, cols, &v, &mut w[row..end], &mut z, &mut scratch);
            row = end;
        }
        assert!([bits(&w), bits(&z)] == expected[..2], "{isa} {rows}×{cols} G = {G} in parts");
    }
}

#[test]
fn shapes() {
    let mut noise = Noise::new(21);
    for rows in (0..=20).chain([31, 32, 33, 47]) {
        for cols in COLS {
            let taste = TASTES[noise.below(3) as usize];
            match noise.below(8) {
                0 => check::<3>(&mut noise, rows, cols, taste),
                1 => check::<4>(&mut noise, rows, cols, taste),
                2..5 => check::<2>(&mut noise, rows, cols, taste),
                _ => check::<1>(&mut noise, rows, cols, taste),
            }
        }
    }
}

/// So wide that more rows are held at once.
#[test]
fn wide_matrices() {
    let mut noise = Noise::new(22);
    let cols = 3101;
    assert_ne!(SweepScratch::rows_for::<4>(cols), SweepScratch::rows_for::<1>(cols));
    check::<4>(&mut noise, 67, cols, Taste::Plain);
    check::<4>(&mut noise, 32, cols, Taste::Sprinkled);
}

#[test]
fn differences() {
    let mut noise = Noise::new(23);
    let lengths = (0..70).chain([1000]);
    for (length, taste) in lengths.flat_map(|length| TASTES.map(|taste| (length, taste))) {
        for tuned_type in FloatType::ALL {
            let bases = FloatType::ALL.map(Some).into_iter().chain([None]);
            for base_type in bases {
                let mut stored = |float: FloatType| {
                    let mut bytes = vec![0xAA];
                    bytes.extend(elements(&mut noise, float, length, taste));
                    bytes
                };
                let tuned = stored(tuned_type);
                let base = base_type.map(|float| (stored(float), float));
                let base = base.as_ref().map(|(bytes, float)| (&bytes[1..], *float));
                let run = |isa| {
                    let mut out = vec![1e30; length];
                    difference(isa, &tuned[1..], tuned_type, base, &mut out);
                    out.iter().map(|value| value.to_bits()).collect::<Vec<_>>()
                };
                for isa in Isa::available() {
                    assert_eq!(run(isa), run(Isa::Scalar), "{isa} {tuned_type} {base_type:?}");
                }
            }
        }
    }
}

#[test]
fn sums_of_squares() {
    let mut noise = Noise::new(24);
    for length in (0..70).chain([96, 1000, 4133]) {
        for taste in TASTES {
            let a = floats(&mut noise, length, taste);
            let factor = floats(&mut noise, length, taste);
            let product: Vec<f64> =
                a.iter().zip(&factor).map(|(a, b)| f64::from(*a) * f64::from(*b)).collect();
            for isa in Isa::available() {
                let of = |isa| {
                    let sums = [energy(isa, &a), residual_energy(isa, &a, &product)];
                    sums.map(f64::to_bits)
                };
                assert_eq!(of(isa), of(Isa::Scalar), "{isa} {length} {taste:?}");
            }
        }
    }
}

/// Flush-to-zero in the caller's thread changes nothing, and survives.
#[test]
fn environment() {
    const COLS: usize = 150;
    // Subnormal elements, sums and products.
    let plain: Vec<f32> = (0..20 * COLS as u32).map(|n| f32::from_bits(1 + n % 997)).collect();
    let stored: Vec<u8> = plain.iter().flat_map(|value| value.to_le_bytes()).collect();
    let v = [BlockRow([[0.7; LANES]; 2]); COLS];
    let given = [BlockRow([[0.6; LANES]; 2]); 20];
    let rows = Rows::Stored { tuned: &stored, tuned_type: FloatType::F32, base: None };
    let run = |isa| passes(isa, rows, COLS, &v, &given, &[BlockRow::ZERO; COLS]);
    let expected = run(Isa::Scalar);
    assert!(expected[0].iter().all(|bits| (1..0x0080_0000).contains(bits)));
    for isa in Isa::available() {
        let before = read_control();
        write_control(before | FLUSHING);
        let got = run(isa);
        let mut out = vec![0.0; plain.len()];
        difference(isa, &stored, FloatType::F32, None, &mut out);
        let sum = energy(isa, &plain);
        let after = read_control();
        write_control(before);
        assert_eq!(after & FLUSHING, FLUSHING, "the caller's setting is restored");
        assert!(got == expected, "{isa}");
        assert!(out == plain, "{isa}");
        assert!(sum > 0.0, "{isa}");
    }
}

/// Small integers, where nothing rounds: what the products are.
#[test]
fn products_are_products() {
    const ROWS: usize = 21;
    const COLS: usize = 301;
    let mut noise = Noise::new(25);
    let mut small =
        |count: usize| -> Vec<i32> { (0..count).map(|_| noise.below(15) as i32 - 7).collect() };
    let (tuned, base) = (small(ROWS * COLS), small(ROWS * COLS));
    let (v, z) = (small(COLS * LANES), small(COLS * LANES));
    let encode = |values: &[i32]| -> Vec<u8> {
        let bits = values.iter().map(|value| FloatType::Bf16.encode(f64::from(*value)));
        bits.flat_map(|bits| (bits as u16).to_le_bytes()).collect()
    };
    let rows_of = |values: &[i32]| -> Vec<BlockRow<1>> {
        let row = |row: &[i32; LANES]| BlockRow([row.map(|value| value as f32)]);
        values.as_chunks().0.iter().map(row).collect()
    };
    let a = |i: usize, k: usize| tuned[i * COLS + k] - base[i * COLS + k];
    let mut expected_w = vec![0; ROWS * LANES];
    let mut expected_z = z.clone();
    for (i, j) in (0..ROWS).flat_map(|i| (0..LANES).map(move |j| (i, j))) {
        let sum = (0..COLS).map(|k| a(i, k) * v[k * LANES + j]).sum();
        expected_w[i * LANES + j] = sum;
        for k in 0..COLS {
            expected_z[k * LANES + j] += a(i, k) * sum;
        }
    }
    // Every partial sum is an integer that f32 holds.
    let largest = (0..COLS).map(|k| (0..ROWS).map(|i| a(i, k).abs()).sum::<i32>()).max();
    let largest_w = expected_w.iter().map(|w| w.abs()).max();
    assert!(largest.unwrap() * largest_w.unwrap() < 1 << 24);

    let (tuned, base) = (encode(&tuned), encode(&base));
    let tuned_type = FloatType::Bf16;
    let rows = Rows::Stored { tuned: &tuned, tuned_type, base: Some((&base, tuned_type)) };
    for isa in Isa::available() {
        let (mut w, mut z) = (vec![BlockRow::ZERO; ROWS], rows_of(&z));
        sweep(isa, rows, COLS, &rows_of(&v), &mut w, &mut z, &mut SweepScratch::new());
        assert!(w == rows_of(&expected_w) && z == rows_of(&expected_z), "{isa}");
    }
}

/// The chains of the contract, by values that tell them from other orders.
#[test]
fn chains_are_those_of_the_contract() {
    let tiny = 2f32.powi(-25);
    let one = |value: f32| BlockRow([[value; LANES]]);
    let mut scratch = SweepScratch::new();
    let mut w_of = |a: &[f32]| {
        let (v, mut w) = (vec![one(1.0); a.len()], [one(9.0)]);
        apply(Isa::Scalar, Rows::Plain(a), a.len(), &v, &mut w, &mut scratch);
        w[0].0[0][0]
    };
    // Lost one by one beside 1 in its panel, but not in a panel of their own.
    let mut a = vec![tiny; 2 * COLUMN_PANEL];
    a[0] = 1.0;
    assert_eq!(w_of(&a[..COLUMN_PANEL]), 1.0);
    assert_eq!(w_of(&a[..COLUMN_PANEL + 2]), 1.0);
    assert_eq!(w_of(&a), 1.0 + COLUMN_PANEL as f32 * tiny);
    // In order: the tiny ones first survive.
    a.swap(0, COLUMN_PANEL - 1);
    assert_eq!(w_of(&a[..COLUMN_PANEL]), 1.0 + (COLUMN_PANEL / 2) as f32 * 2.0 * tiny);
    // Fused: the square's last bit cancels nothing if it is rounded off first.
    let x = 1.0 + 2f32.powi(-12);
    let mut z = [one(-(x * x))];
    apply_transposed(Isa::Scalar, Rows::Plain(&[x]), 1, &[one(x)], &mut z, &mut scratch);
    assert_eq!(z[0].0[0][0], 2f32.powi(-24));
    // Rows in order, from what is there.
    let rows = [1.0, tiny, tiny, tiny];
    let mut z = [one(0.0)];
    apply_transposed(Isa::Scalar, Rows::Plain(&rows), 1, &[one(1.0); 4], &mut z, &mut scratch);
    assert_eq!(z[0].0[0][0], 1.0);
    let mut z = [one(3.0 * tiny)];
    apply_transposed(Isa::Scalar, Rows::Plain(&rows), 1, &[one(1.0); 4], &mut z, &mut scratch);
    assert!(z[0].0[0][0] > 1.0);
}

#[test]
fn errors_stay_within_the_bounds() {
    const ROWS: usize = 300;
    const COLS: usize = 1000;
    let mut noise = Noise::new(26);
    let a = floats(&mut noise, ROWS * COLS, Taste::Plain);
    let v = block::<1>(&mut noise, COLS, Taste::Plain);
    let (mut w, mut z) = (vec![BlockRow::ZERO; ROWS], vec![BlockRow::ZERO; COLS]);
    let isa = Isa::detect();
    sweep(isa, Rows::Plain(&a), COLS, &v, &mut w, &mut z, &mut SweepScratch::new());
    let gamma = |n: usize| {
        let nv = n as f64 * 2f64.powi(-24);
        nv / (1.0 - nv)
    };
    let within = |terms: &mut dyn Iterator<Item = (f32, f32)>, got: f32, n: usize| {
        let (mut sum, mut size) = (0.0, 0.0);
        for (a, b) in terms {
            let term = f64::from(a) * f64::from(b);
            (sum, size) = (sum + term, size + term.abs());
        }
        assert!((f64::from(got) - sum).abs() <= gamma(n) * size);
    };
    for (i, w) in w.iter().enumerate() {
        let mut terms = (0..COLS).map(|k| (a[i * COLS + k], v[k].0[0][5]));
        within(&mut terms, w.0[0][5], COLUMN_PANEL + COLS.div_ceil(COLUMN_PANEL));
    }
    for (k, z) in z.iter().enumerate() {
        let mut terms = (0..ROWS).map(|i| (a[i * COLS + k], w[i].0[0][5]));
        within(&mut terms, z.0[0][5], ROWS);
    }
}

/// NaN out of everything that makes one, and always the same one.
#[test]
fn there_is_one_nan() {
    const NAN: u32 = 0x7FC0_0000;
    let payloads = landmarks(FloatType::F32).into_iter().map(f32::from_bits);
    let payloads: Vec<f32> = payloads.filter(|value| value.is_nan()).collect();
    assert!(payloads.len() > 4);
    for isa in Isa::available() {
        for &nan in &payloads {
            let mut a = vec![1.0; 3 * 40];
            a[45] = nan;
            let v = [BlockRow([[1.0; LANES]]); 40];
            let (mut w, mut z) = ([BlockRow::ZERO; 3], [BlockRow::ZERO; 40]);
            z[7].0[0][3] = nan;
            let mut scratch = SweepScratch::new();
            sweep(isa, Rows::Plain(&a), 40, &v, &mut w, &mut z, &mut scratch);
            assert_eq!(bits(&w[1..2]), [NAN; LANES]);
            assert_eq!([w[0].0[0][3], w[2].0[0][3]], [40.0; 2]);
            assert_eq!(bits(&z), [NAN; LANES * 40]);
            let before = bits(&z);
            sweep(isa, Rows::Plain(&[]), 40, &v, &mut [], &mut z, &mut scratch);
            assert_eq!(bits(&z), before);
            assert_eq!(energy(isa, &a).to_bits(), f64::NAN.to_bits());
            assert_eq!(non_finite(&a), Some(NonFinite { count: 1, first: 45 }));
        }
    }
}

/// Finite if and only if its elements are.
#[test]
fn energy_tells_what_is_not_finite() {
    let mut a = vec![f32::MAX; 5000];
    assert!(energy(Isa::detect(), &a).is_finite());
    assert_eq!(non_finite(&a), None);
    a[4097] = f32::NEG_INFINITY;
    a[4999] = f32::NAN;
    assert!(!energy(Isa::detect(), &a).is_finite());
    assert_eq!(non_finite(&a), Some(NonFinite { count: 2, first: 4097 }));
}

#[test]
fn sums_of_squares_are_sums_of_squares() {
    let a: Vec<f32> = (1..=100).map(|n| n as f32).collect();
    let halves: Vec<f64> = a.iter().map(|a| f64::from(*a) / 2.0).collect();
    for isa in Isa::available() {
        assert_eq!(energy(isa, &a), 338_350.0);
        assert_eq!(residual_energy(isa, &a, &halves), 338_350.0 / 4.0);
        assert_eq!(energy(isa, &[]).to_bits(), 0);
    }
}

#[test]
#[should_panic(expected = "the rows are not w.len()×cols")]
fn shapes_that_do_not_fit_are_refused() {
    let (v, mut w) = ([BlockRow::<1>::ZERO; 4], [BlockRow::ZERO; 2]);
    apply(Isa::Scalar, Rows::Plain(&[0.0; 7]), 4, &v, &mut w, &mut SweepScratch::new());
}

#[test]
#[should_panic(expected = "base is not as many elements")]
fn buffers_of_different_lengths_are_refused() {
    let float = FloatType::Bf16;
    difference(Isa::Scalar, &[0; 8], float, Some((&[0; 6], float)), &mut [0.0; 4]);
}
