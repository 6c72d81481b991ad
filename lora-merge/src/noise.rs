//! What of a spectrum is noise: a threshold for singular values, and the rank above it.
//!
//! A change of weights is read off two models that were rounded when they were stored, so it is
//! signal plus noise. If the noise is a matrix of independent elements of mean 0 and standard
//! deviation `level`, its singular values fill a *bulk* that ends at the *edge*
//! level·(√m + √n) (Marchenko and Pastur), whatever the elements' distribution. A value above it
//! is signal.
//!
//! The level is not known. It is estimated twice, and the larger estimate is used:
//!
//! - **storage**: what rounding to the stored dtypes leaves per element, ulp²/12 each. The caller
//!   measures it. It is right where changes are large against an ulp. Where they are not, most
//!   elements do not change at all (a stored weight lies on the grid, and a change of less than half
//!   an ulp is lost), and what was lost is more than it says.
//! - **bulk**: what the spectrum's own tail says, if it is noise: the energy beyond rank r, over the
//!   (m−r)(n−r) degrees of freedom that r components leave. r itself depends on the level, so the
//!   two are iterated. The start must not take signal for noise: it is a level at which the *small*
//!   values, known from the middle of the spectrum on (or as far as they are known), are where
//!   Marchenko and Pastur's law puts them; the iteration goes up from rank 0 to the smallest rank
//!   that agrees with itself. From there the whole tail is used: where noise is uneven, its large
//!   values exceed what its small ones suggest.
//!
//! Real noise is uneven: an ulp grows with the weight, and weights differ by row and column; and
//! what is lost of changes below an ulp grows with the change. Its bulk ends later than that of
//! even noise of the same energy, by a factor that [`Profile::unevenness`] computes from the sums
//! over rows and over columns: for storage from those of the variances ([`Storage::of`]), for the
//! bulk from those of what is left at the rank ([`estimate_uneven`], for callers that have the
//! singular vectors).
//!
//! This is a heuristic. It finds the rank of a matrix of low rank under noise that leaves its values
//! above the edge. It cannot find a rank where there is none: the spectrum of a full fine-tune falls
//! slowly, and where it is cut is then a convention, the smallest rank that agrees with itself.
//! [`NoiseEstimate::is_clear`] tells the two apart.

use ndarray::ArrayView2;

use crate::spectrum::{Reached, Spectrum, UNRESOLVED};

/// Which values are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rule {
    /// Those that bring the approximation nearer to the signal: above λ*(β)·√n·level with
    /// β = m/n ≤ 1, from 1.15 times the edge (square) to 1.41 times (m ≪ n). Below, a direction is
    /// so mixed with noise that it is better left out.
    ///
    /// M. Gavish, D. L. Donoho: The optimal hard threshold for singular values is 4/√3.
    /// IEEE Trans. Inf. Theory 60(8), 2014, arXiv 1305.5870, eq. 11.
    #[default]
    GavishDonoho,
    /// Those that noise alone does not produce: above the edge, and above what the largest value
    /// of noise exceeds once in a thousand times (I. M. Johnstone, Ann. Statist. 29(2), 2001).
    BulkEdge,
}

/// What says how large the noise is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Nothing: there is no noise, or there are no values.
    Nothing,
    /// What the dtypes round off.
    Storage,
    /// The tail of the spectrum.
    Bulk,
    /// Single precision, in which a change is computed and its factors are stored: values below
    /// 2⁻²³ of the largest are not told from rounding.
    Precision,
}

/// Why a spectrum does not say how large the noise is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoBulk {
    /// The matrix has fewer than [`SMALLEST`] rows or columns.
    TooSmall,
    /// The energy beyond the known values is below their accuracy, [`crate::spectrum::UNRESOLVED`].
    Unresolved,
    /// All of it would be noise, and it does not look like noise: its values are too equal.
    NotNoise,
}

/// The noise that storing left in a matrix, by its dtypes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Storage {
    /// Standard deviation per element: the root of the mean over all elements.
    pub level: f64,
    /// How much further its bulk reaches than that of even noise: 1 or more.
    pub unevenness: f64,
}

impl Storage {
    /// From the sums over rows and over columns of each element's variance: ulp(W₁)²/12 where the
    /// element changed and 0 where it did not; and the same of W₀, if the W₀ in hand was rounded and
    /// the one that was trained was not.
    #[must_use]
    pub fn of(variances: &Profile) -> Storage {
        let elements = variances.rows.len() as f64 * variances.cols.len() as f64;
        let sum: f64 = variances.rows.iter().sum();
        let level = if elements > 0.0 { (sum / elements).sqrt() } else { 0.0 };
        Storage { level, unevenness: variances.unevenness() }
    }
}

/// The same noise in every element.
impl From<f64> for Storage {
    fn from(level: f64) -> Storage {
        Storage { level, unevenness: 1.0 }
    }
}

/// The noise of a matrix, and the rank above it.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseEstimate {
    /// Standard deviation per element by the stored dtypes, as given.
    pub storage: f64,
    /// Standard deviation per element by the spectrum.
    pub bulk: Result<f64, NoBulk>,
    /// The one that is used: the one whose noise reaches further.
    pub level: f64,
    /// How much further it reaches than even noise of the same level.
    pub unevenness: f64,
    /// What decided the threshold.
    pub basis: Basis,
    /// Where the noise ends: unevenness·level·(√m + √n).
    pub edge: f64,
    /// Values up to this are noise.
    pub threshold: f64,
    /// Values above the threshold.
    pub rank: usize,
    /// Whether all known values are above it, and others that are not known may be.
    pub beyond: bool,
    /// The rank if the threshold were half as high again: how firm the rank is.
    pub strict: usize,
    /// The rank if the threshold were at the edge.
    pub lenient: usize,
    /// The first value called noise, over the edge. Noise ends near 1; what is higher is neither,
    /// and the rank a convention. `None` without such a value or without noise.
    pub top: Option<f64>,
}

impl NoiseEstimate {
    /// The rank, or that more of the spectrum is needed.
    #[must_use]
    pub fn reached(&self) -> Reached {
        if self.beyond { Reached::Beyond(self.rank) } else { Reached::At(self.rank) }
    }

    /// Whether there is a gap between what is called signal and where noise ends, so that the rank
    /// is a finding. A spectrum that falls gradually through the threshold has none.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        !self.beyond && self.top.is_none_or(|top| top <= 1.05)
    }
}

/// The least number of rows and columns of a matrix whose spectrum is asked for its noise.
pub const SMALLEST: usize = 16;

/// A spectrum that would be all noise has its largest value at the edge, less its fluctuation:
/// at least this much of it, for matrices from [`SMALLEST`] on.
const LEAST_TOP: f64 = 0.75;

/// The relative accuracy of values, 2⁻²³.
const PRECISION: f64 = f32::EPSILON as f64;

/// Estimates the noise from the spectrum and from what storing left (a number is its level, of even
/// noise).
#[must_use]
pub fn estimate(spectrum: &Spectrum, storage: impl Into<Storage>, rule: Rule) -> NoiseEstimate {
    conclude(spectrum, storage.into(), rule, bulk(spectrum, rule), 1.0)
}

/// Takes the noise that reaches further, and what follows from it.
fn conclude(
    spectrum: &Spectrum,
    storage: Storage,
    rule: Rule,
    bulk: Result<f64, NoBulk>,
    bulk_unevenness: f64,
) -> NoiseEstimate {
    let found = bulk.unwrap_or(0.0);
    let (level, unevenness, mut basis) =
        if storage.level * storage.unevenness >= found * bulk_unevenness {
            (storage.level, storage.unevenness, Basis::Storage)
        } else {
            (found, bulk_unevenness, Basis::Bulk)
        };
    let shape = Bulk::of(spectrum, 0);
    let edge = level * unevenness * shape.edge();
    let mut threshold = level * unevenness * shape.threshold(rule);
    let floor = PRECISION * spectrum.largest().unwrap_or(0.0);
    if threshold <= floor {
        basis = if floor > 0.0 { Basis::Precision } else { Basis::Nothing };
        threshold = floor;
    }
    let rank = above(spectrum, threshold);
    let told = matches!(basis, Basis::Storage | Basis::Bulk);
    let top = spectrum.values.get(rank).filter(|_| told).map(|value| value / edge);
    NoiseEstimate {
        storage: storage.level,
        bulk,
        level,
        unevenness,
        basis,
        edge,
        threshold,
        rank,
        beyond: rank == spectrum.values.len() && !spectrum.is_complete(),
        strict: above(spectrum, 1.5 * threshold),
        lenient: above(spectrum, edge.max(floor)),
        top,
    }
}

/// How many known values are larger than `threshold`.
fn above(spectrum: &Spectrum, threshold: f64) -> usize {
    spectrum.values.partition_point(|&value| value > threshold)
}

/// The level of the noise by the tail of the spectrum.
fn bulk(spectrum: &Spectrum, rule: Rule) -> Result<f64, NoBulk> {
    if spectrum.short_side() < SMALLEST {
        return Err(NoBulk::TooSmall);
    }
    let middle = spectrum.values.len().min(spectrum.short_side() / 2);
    if !spectrum.resolves(middle) {
        return Err(NoBulk::Unresolved);
    }
    let whole = Bulk::of(spectrum, 0);
    let count = |level: f64| above(spectrum, level * whole.threshold(rule));

    // A larger rank leaves less noise, hence a lower threshold, hence no smaller a rank: both
    // iterations are monotone, and end.
    let (mut rank, mut level);
    rank = 0;
    loop {
        level = level_of_small_values(spectrum, middle, rank);
        let next = count(level);
        if next <= rank {
            break;
        }
        rank = next;
    }
    while spectrum.resolves(rank) && rank < spectrum.short_side() {
        let shape = Bulk::of(spectrum, rank);
        level = (spectrum.remaining(rank) / (shape.short * shape.long)).sqrt();
        let next = count(level);
        if next == rank {
            break;
        }
        rank = next;
    }
    let edge = level * whole.edge();
    match spectrum.values.first() {
        Some(&largest) if rank == 0 && largest < LEAST_TOP * edge => Err(NoBulk::NotNoise),
        _ => Ok(level),
    }
}

/// The level at which noise has the small values that the spectrum has, if its first `rank` values
/// are signal: the value in the middle of a complete one (the median, but for the signal), the
/// energy beyond the first `middle` values of another.
fn level_of_small_values(spectrum: &Spectrum, middle: usize, rank: usize) -> f64 {
    let rank = rank.min(middle);
    let shape = Bulk::of(spectrum, rank);
    let noise_before = (middle - rank) as f64;
    if spectrum.is_complete() {
        let value = spectrum.values.get(middle).copied().unwrap_or(0.0);
        return value / shape.value_after((noise_before + 0.5) / shape.short);
    }
    let share = 1.0 - shape.energy_before(noise_before / shape.short);
    (spectrum.remaining(middle) / (shape.short * shape.long * share)).sqrt()
}

/// The singular values of an m × n matrix of independent noise of level 1, m ≤ n, by Marchenko and
/// Pastur: their squares over n have a density on [(1−√β)², (1+√β)²], β = m/n. With
/// t = 1 + β + 2√β·cos θ it is (2/π)·sin²θ/t dθ, from the largest value (θ = 0) to the smallest
/// (θ = π).
#[derive(Clone, Copy, Debug)]
struct Bulk {
    /// m.
    short: f64,
    /// n.
    long: f64,
    beta: f64,
}

impl Bulk {
    /// Of the noise that is left when `rank` components are taken from a matrix.
    fn of(spectrum: &Spectrum, rank: usize) -> Bulk {
        let side = |length: usize| length.saturating_sub(rank).max(1) as f64;
        let short = side(spectrum.short_side());
        let long = side(spectrum.rows.max(spectrum.cols));
        Bulk { short, long, beta: short / long }
    }

    /// √m + √n.
    fn edge(self) -> f64 {
        self.short.sqrt() + self.long.sqrt()
    }

    fn threshold(self, rule: Rule) -> f64 {
        let beta = self.beta;
        match rule {
            Rule::GavishDonoho => {
                let root = (beta * beta + 14.0 * beta + 1.0).sqrt();
                let square = 2.0 * (beta + 1.0) + 8.0 * beta / (beta + 1.0 + root);
                (self.long * square).sqrt()
            }
            Rule::BulkEdge => {
                // The largest squared value is at edge² + spread·TW₁, and TW₁ exceeds 3.27 once in
                // a thousand times.
                let edge = self.edge();
                let spread = edge * (self.short.recip().sqrt() + self.long.recip().sqrt()).cbrt();
                (edge * edge + 3.27 * spread).sqrt()
            }
        }
    }

    /// The share of values before the angle θ.
    fn count_before(self, angle: f64) -> f64 {
        let beta = self.beta;
        let atan = ((1.0 - beta.sqrt()) / (1.0 + beta.sqrt()) * (angle / 2.0).tan()).atan();
        let terms = (1.0 + beta) * angle - 2.0 * beta.sqrt() * angle.sin();
        (terms - 2.0 * (1.0 - beta) * atan) / (2.0 * std::f64::consts::PI * beta)
    }

    /// The angle before which the share `count` of the values lies.
    fn angle_after(self, count: f64) -> f64 {
        let (mut low, mut high) = (0.0, std::f64::consts::PI);
        for _ in 0..60 {
            let angle = 0.5 * (low + high);
            if self.count_before(angle) < count { low = angle } else { high = angle }
        }
        0.5 * (low + high)
    }

    /// The value that the share `count` of the values exceeds.
    fn value_after(self, count: f64) -> f64 {
        let beta = self.beta;
        let square = 1.0 + beta + 2.0 * beta.sqrt() * self.angle_after(count).cos();
        (self.long * square).sqrt()
    }

    /// The share of the energy in the first share `count` of the values.
    fn energy_before(self, count: f64) -> f64 {
        let angle = self.angle_after(count);
        (angle - angle.sin() * angle.cos()) / std::f64::consts::PI
    }
}

/// Sums over every row and over every column of a matrix of squares: the energies Σⱼ Aᵢⱼ² and
/// Σᵢ Aᵢⱼ², or of variances.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// The sums of the m rows.
    pub rows: Vec<f64>,
    /// The sums of the n columns.
    pub cols: Vec<f64>,
}

impl Profile {
    /// The profile of A − A_r: what is left without the components σᵢ·uᵢ·vᵢᵀ. `left` (m × k) and
    /// `right` (n × k) have at least as many columns as there are values.
    fn without(
        &self,
        values: &[f64],
        left: ArrayView2<'_, f64>,
        right: ArrayView2<'_, f64>,
    ) -> Profile {
        let remove = |energies: &[f64], vectors: ArrayView2<'_, f64>| {
            let left_of = |(energy, row): (&f64, ndarray::ArrayView1<'_, f64>)| {
                let taken = row.iter().zip(values).map(|(u, value)| (u * value) * (u * value));
                (energy - taken.sum::<f64>()).max(0.0)
            };
            energies.iter().zip(vectors.rows()).map(left_of).collect()
        };
        Profile { rows: remove(&self.rows, left), cols: remove(&self.cols, right) }
    }

    /// How much further the bulk reaches than if the same energy were spread evenly, for
    /// independent elements of variance (row's sum)·(column's sum)/(whole sum): 1 if the sums are
    /// equal, else more.
    ///
    /// With a and b the rows' and columns' shares of the energy, the resolvent of XXᵀ has
    /// gᵢ = 1/(λ − aᵢ·h), h = Σ bⱼ/(1 − bⱼ·x), x = Σ aᵢ·gᵢ. To the right of the bulk λ falls as x
    /// grows; the edge is where it stops (J. W. Silverstein, S.-I. Choi, J. Multivariate Anal.
    /// 54(2), 1995; for separable variances L. Zhang, NUS 2006).
    #[must_use]
    pub fn unevenness(&self) -> f64 {
        let shares = |energies: &[f64]| -> Vec<f64> {
            let whole: f64 = energies.iter().sum();
            energies.iter().map(|energy| energy / whole).filter(|&share| share > 0.0).collect()
        };
        let (a, b) = (shares(&self.rows), shares(&self.cols));
        let largest = |shares: &[f64]| shares.iter().copied().fold(0.0, f64::max);
        let (a_max, b_max) = (largest(&a), largest(&b));
        if !(a_max > 0.0 && b_max > 0.0) {
            return 1.0;
        }
        // λ(x), by Newton's method from the left: Σ aᵢ/(λ − aᵢ·h) is convex and falls.
        let lambda = |x: f64| {
            let h: f64 = b.iter().map(|b| b / (1.0 - b * x)).sum();
            let mut lambda = a_max * h + a_max / x;
            for _ in 0..100 {
                let (mut sum, mut slope) = (0.0, 0.0);
                for a in &a {
                    let term = a / (lambda - a * h);
                    sum += term;
                    slope += term * term / a;
                }
                let step = (sum - x) / slope;
                lambda += step;
                if step <= 1e-9 * lambda || step.is_nan() {
                    break;
                }
            }
            lambda
        };
        // Golden section: λ falls from infinity at x = 0, and rises to infinity at 1/b_max.
        let golden = (5f64.sqrt() - 1.0) / 2.0;
        let (mut low, mut high) = (0.0, 1.0 / b_max);
        let inner =
            |low: f64, high: f64| (high - golden * (high - low), low + golden * (high - low));
        let (mut x1, mut x2) = inner(low, high);
        let (mut y1, mut y2) = (lambda(x1), lambda(x2));
        for _ in 0..24 {
            if y1 < y2 {
                (high, x2, y2) = (x2, x1, y1);
                x1 = inner(low, high).0;
                y1 = lambda(x1);
            } else {
                (low, x1, y1) = (x1, x2, y2);
                x2 = inner(low, high).1;
                y2 = lambda(x2);
            }
        }
        let even =
            (self.rows.len() as f64).recip().sqrt() + (self.cols.len() as f64).recip().sqrt();
        (y1.min(y2).sqrt() / even).max(1.0)
    }
}

/// As [`estimate`], for a tail that is uneven across rows and columns: its bulk is taken to end
/// where that of independent elements does whose variances are products of what rows and columns
/// have left at the rank.
///
/// `energies` is the profile of A; `left` (m × k) and `right` (n × k) are the singular vectors of
/// its first k values. If the rank is not found within them, the estimate is
/// [`NoiseEstimate::beyond`], or, of a complete spectrum, that of [`estimate`].
#[must_use]
pub fn estimate_uneven(
    spectrum: &Spectrum,
    storage: impl Into<Storage>,
    rule: Rule,
    energies: &Profile,
    left: ArrayView2<'_, f64>,
    right: ArrayView2<'_, f64>,
) -> NoiseEstimate {
    let storage = storage.into();
    let mut found = estimate(spectrum, storage, rule);
    let vectors = left.ncols().min(right.ncols());
    let fits = energies.rows.len() == left.nrows() && energies.cols.len() == right.nrows();
    if found.bulk.is_err() || !fits {
        return found;
    }
    // Downwards: the edge is further away than that of even noise, and moves on as the rank falls.
    let mut rank = found.rank;
    let told = |rank| spectrum.remaining(rank) >= UNRESOLVED * spectrum.energy;
    while rank <= vectors && rank < spectrum.short_side() && told(rank) {
        let tail = energies.without(&spectrum.values[..rank], left, right);
        let shape = Bulk::of(spectrum, rank);
        let level = (spectrum.remaining(rank) / (shape.short * shape.long)).sqrt();
        let next = conclude(spectrum, storage, rule, Ok(level), tail.unevenness());
        if next.rank >= rank {
            return next;
        }
        (rank, found) = (next.rank, next);
    }
    NoiseEstimate { beyond: !spectrum.is_complete(), ..found }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::svd::dense::{Svd, dense};

    /// A seeded generator (splitmix64) of normal numbers (Box and Muller).
    struct Normal(u64);

    impl Normal {
        fn uniform(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut bits = self.0;
            bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((bits ^ (bits >> 31)) >> 11) as f64 / (1u64 << 53) as f64
        }

        fn next(&mut self) -> f64 {
            let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
            radius * (2.0 * std::f64::consts::PI * self.uniform()).cos()
        }

        fn matrix(&mut self, rows: usize, cols: usize) -> Array2<f64> {
            Array2::from_shape_fn((rows, cols), |_| self.next())
        }

        /// A product of random factors, of root mean square 1.
        fn low_rank(&mut self, rows: usize, cols: usize, rank: usize) -> Array2<f64> {
            let product = self.matrix(rows, rank).dot(&self.matrix(rank, cols));
            product / (rank as f64).sqrt()
        }
    }

    fn spectrum(matrix: &Array2<f64>) -> Spectrum {
        let values = dense().singular_values(matrix.view()).unwrap();
        let energy = matrix.iter().map(|element| element * element).sum();
        Spectrum { rows: matrix.nrows(), cols: matrix.ncols(), energy, values }
    }

    fn truncated(spectrum: &Spectrum, known: usize) -> Spectrum {
        Spectrum { values: spectrum.values[..known].to_vec(), ..spectrum.clone() }
    }

    /// Rounds to `bits` of significand, the leading one included: 8 is bf16, 24 is f32.
    fn rounded(value: f64, bits: i32) -> f64 {
        let scale = ulp(value, bits);
        if scale == 0.0 { 0.0 } else { (value / scale).round_ties_even() * scale }
    }

    fn ulp(value: f64, bits: i32) -> f64 {
        if value == 0.0 { 0.0 } else { 2f64.powi(value.abs().log2().floor() as i32 - bits + 1) }
    }

    /// What is read off a base and the base with `change` added, both stored with `bits`: the
    /// difference, and the noise that the rounding of changed elements says.
    fn stored(before: &Array2<f64>, change: &Array2<f64>, bits: i32) -> (Array2<f64>, Storage) {
        let before = before.mapv(|before| rounded(before, bits));
        let after = (&before + change).mapv(|after| rounded(after, bits));
        let difference = &after - &before;
        let variances = Array2::from_shape_fn(change.dim(), |at| {
            if difference[at] == 0.0 { 0.0 } else { ulp(after[at], bits).powi(2) / 12.0 }
        });
        (difference, Storage::of(&sums(&variances)))
    }

    fn sums(squares: &Array2<f64>) -> Profile {
        Profile {
            rows: squares.rows().into_iter().map(|row| row.sum()).collect(),
            cols: squares.columns().into_iter().map(|column| column.sum()).collect(),
        }
    }

    fn energies(matrix: &Array2<f64>) -> Profile {
        sums(&matrix.mapv(|element| element * element))
    }

    #[test]
    fn the_law_of_the_bulk_matches_sampled_noise() {
        for (rows, cols) in [(200, 200), (100, 300), (30, 600)] {
            let noise = Normal(1).matrix(rows, cols);
            let spectrum = spectrum(&noise);
            let law = Bulk::of(&spectrum, 0);
            for count in [0.1, 0.5, 0.9] {
                let index = (count * rows as f64) as usize;
                let middle = (index as f64 + 0.5) / rows as f64;
                let ratio = spectrum.values[index] / law.value_after(middle);
                assert!((ratio - 1.0).abs() < 0.05, "{rows} × {cols}, {count}: {ratio}");
                let share = spectrum.captured(index) / spectrum.energy;
                let expected = law.energy_before(count);
                assert!((share - expected).abs() < 0.03, "{share} {expected}");
            }
            let top = spectrum.values[0] / law.edge();
            assert!((0.95..1.02).contains(&top), "{top}");
            // The law's ends.
            assert!((law.count_before(std::f64::consts::PI) - 1.0).abs() < 1e-9);
            assert!((law.value_after(0.0) / law.edge() - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn thresholds_are_those_of_the_papers() {
        let square = Spectrum { rows: 100, cols: 100, energy: 1.0, values: vec![] };
        let threshold = Bulk::of(&square, 0).threshold(Rule::GavishDonoho);
        assert!((threshold / 10.0 - 4.0 / 3f64.sqrt()).abs() < 1e-12);
        // Table IV of arXiv 1305.5870: ω(β) = λ*(β)/√μ_β.
        for (rows, omega) in [(50, 1.5194), (200, 1.7650), (500, 2.1711), (1000, 2.8582)] {
            let shape = Spectrum { rows, cols: 1000, energy: 1.0, values: vec![] };
            let law = Bulk::of(&shape, 0);
            let found = law.threshold(Rule::GavishDonoho) / law.value_after(0.5);
            assert!((found - omega).abs() < 5e-4, "{rows}: {found} {omega}");
        }
    }

    #[test]
    fn noise_has_rank_zero() {
        let mut normal = Normal(2);
        for (rows, cols) in [(16, 16), (16, 200), (64, 64), (300, 80), (200, 200)] {
            for seed in 0..20 {
                if rows * cols > 5000 && seed > 2 {
                    break;
                }
                let spectrum = spectrum(&(normal.matrix(rows, cols) * 0.01));
                for known in [spectrum.values.len(), 8] {
                    let known = truncated(&spectrum, known);
                    let found = estimate(&known, 0.0, Rule::GavishDonoho);
                    assert_eq!(
                        (found.rank, found.beyond),
                        (0, false),
                        "{rows} × {cols}: {found:?}"
                    );
                    assert_eq!(found.basis, Basis::Bulk);
                    assert!((found.level / 0.01 - 1.0).abs() < 0.1, "{found:?}");
                }
            }
        }
    }

    #[test]
    fn a_low_rank_under_noise_is_found() {
        let mut normal = Normal(3);
        for (rows, cols, rank) in [(200, 200, 8), (100, 300, 40), (64, 64, 8), (300, 40, 3)] {
            for strength in [0.3, 3.0, 3e4] {
                let noise = normal.matrix(rows, cols);
                let signal = normal.low_rank(rows, cols, rank) * strength;
                let clean = spectrum(&signal);
                let edge = Bulk::of(&clean, 0).edge();
                // What is well above the edge is found, what is well below is not.
                let low = clean.values.partition_point(|&value| value > 1.3 * edge);
                let high = clean.values.partition_point(|&value| value > 0.6 * edge);
                let spectrum = spectrum(&(noise + signal));
                for known in [spectrum.values.len(), (rank + 5).min(spectrum.values.len())] {
                    for rule in [Rule::GavishDonoho, Rule::BulkEdge] {
                        let found = estimate(&truncated(&spectrum, known), 0.0, rule);
                        let case =
                            format!("{rows} × {cols}, {rank}, {strength}, {known}: {found:?}");
                        if strength > 1e3 && known < spectrum.values.len() {
                            // The tail is 10⁻⁹ of the energy, and the storage says nothing.
                            assert_eq!(found.bulk, Err(NoBulk::Unresolved), "{case}");
                            let found = estimate(&truncated(&spectrum, known), 1.0, rule);
                            assert_eq!((found.rank, found.basis), (rank, Basis::Storage));
                            continue;
                        }
                        assert!((low..=high).contains(&found.rank), "{case}");
                        assert!(!found.beyond, "{case}");
                        // Signal that is too weak to keep and too strong for noise blurs the end.
                        assert!(found.is_clear() || strength < 1.0, "{case}");
                    }
                }
            }
        }
    }

    #[test]
    fn more_of_the_spectrum_is_asked_for_where_all_that_is_known_is_signal() {
        let mut normal = Normal(4);
        let matrix = normal.matrix(120, 150) + normal.low_rank(120, 150, 20) * 30.0;
        let spectrum = spectrum(&matrix);
        for known in [1, 4, 19, 20] {
            let found = estimate(&truncated(&spectrum, known), 0.0, Rule::GavishDonoho);
            assert_eq!(found.reached(), Reached::Beyond(known), "{found:?}");
        }
        let found = estimate(&truncated(&spectrum, 21), 0.0, Rule::GavishDonoho);
        assert_eq!(found.reached(), Reached::At(20), "{found:?}");
    }

    #[test]
    fn an_exact_low_rank_in_f32_is_found() {
        let mut normal = Normal(5);
        for size in [1.0, 1e-1, 1e-2, 1e-3] {
            let change = normal.low_rank(150, 200, 12) * size;
            let (difference, storage) = stored(&normal.matrix(150, 200), &change, 24);
            let spectrum = spectrum(&difference);
            for known in [150, 40] {
                let found = estimate(&truncated(&spectrum, known), storage, Rule::GavishDonoho);
                assert_eq!((found.rank, found.beyond), (12, false), "{size} {known}: {found:?}");
            }
        }
    }

    #[test]
    fn weights_of_uneven_size_have_uneven_noise() {
        let mut normal = Normal(9);
        let mut weights = normal.matrix(150, 200);
        for mut row in weights.rows_mut() {
            row *= (0.5 * normal.next()).exp();
        }
        for bits in [8, 24] {
            let change = normal.low_rank(150, 200, 6) * if bits == 8 { 0.5 } else { 1e-3 };
            let (difference, storage) = stored(&weights, &change, bits);
            // Truncated, and a tail in f32 that is below what is told from the energy.
            let spectrum = truncated(&spectrum(&difference), 40);
            assert_eq!(spectrum.resolves(40), bits == 8);
            let even = estimate(&spectrum, storage.level, Rule::GavishDonoho);
            assert!(even.rank > 6, "{even:?}");
            let found = estimate(&spectrum, storage, Rule::GavishDonoho);
            assert_eq!((found.rank, found.basis), (6, Basis::Storage), "{found:?}");
            assert!(found.unevenness > 1.2 && found.is_clear(), "{found:?}");
        }
    }

    #[test]
    fn factors_without_noise_have_their_rank() {
        let mut normal = Normal(6);
        for rank in [0, 1, 7, 30] {
            let values = (0..rank).map(|_| 1.0 + normal.uniform()).collect::<Vec<_>>();
            let mut values = values;
            values.sort_by(|a, b| b.total_cmp(a));
            let found = estimate(&Spectrum::of_rank(70, 64, values), 0.0, Rule::GavishDonoho);
            assert_eq!((found.rank, found.beyond), (rank, false), "{found:?}");
            assert_eq!(found.basis, if rank == 0 { Basis::Nothing } else { Basis::Precision });
        }
        // The product formed in f64: what should be zero is 10⁻¹⁶ of the largest.
        let found = estimate(&spectrum(&normal.low_rank(70, 64, 7)), 0.0, Rule::GavishDonoho);
        assert_eq!((found.rank, found.basis), (7, Basis::Precision), "{found:?}");
    }

    #[test]
    fn equal_values_are_not_called_noise() {
        let flat = Spectrum { rows: 64, cols: 64, energy: 64.0, values: vec![1.0; 64] };
        let found = estimate(&flat, 0.0, Rule::GavishDonoho);
        assert_eq!((found.rank, found.bulk), (64, Err(NoBulk::NotNoise)));
    }

    #[test]
    fn a_spectrum_that_falls_slowly_is_cut_and_said_to_be_unclear() {
        let values: Vec<f64> = (1..=1000).map(|index| f64::from(index).powf(-0.5)).collect();
        let energy = values.iter().map(|value| value * value).sum();
        let complete = Spectrum { rows: 1000, cols: 1000, energy, values };
        let found = estimate(&complete, 0.0, Rule::GavishDonoho);
        assert!((30..150).contains(&found.rank), "{found:?}");
        assert!(!found.is_clear() && found.strict < found.rank && found.rank < found.lenient);
        let few = estimate(&truncated(&complete, 16), 0.0, Rule::GavishDonoho);
        assert_eq!(few.reached(), Reached::Beyond(16));
        let more = estimate(&truncated(&complete, 200), 0.0, Rule::GavishDonoho);
        assert_eq!(more.reached(), found.reached(), "the same, however much is known");
    }

    #[test]
    fn zeros_and_tiny_matrices() {
        let zero = Spectrum { rows: 30, cols: 40, energy: 0.0, values: vec![] };
        let found = estimate(&zero, 0.0, Rule::GavishDonoho);
        assert_eq!((found.rank, found.beyond, found.basis), (0, false, Basis::Nothing));
        // One row: its only value is noise by what the storage says, or it is not.
        let row = Spectrum { rows: 1, cols: 400, energy: 4.0, values: vec![2.0] };
        assert_eq!(estimate(&row, 0.0, Rule::GavishDonoho).rank, 1);
        assert_eq!(estimate(&row, 0.05, Rule::GavishDonoho).rank, 1);
        let noise = estimate(&row, 0.1, Rule::GavishDonoho);
        assert_eq!((noise.rank, noise.bulk), (0, Err(NoBulk::TooSmall)));
        let unknown = Spectrum { rows: 30, cols: 40, energy: 1.0, values: vec![] };
        assert!(estimate(&unknown, 0.0, Rule::GavishDonoho).bulk.is_ok());
    }

    #[test]
    fn the_rank_of_an_adapter_survives_bf16_while_its_change_is_not_far_below_an_ulp() {
        let mut normal = Normal(7);
        // Against weights of size 1, whose ulp is 2⁻⁷ or 2⁻⁸.
        for (size, even, uneven) in
            [(0.1, true, true), (0.01, true, true), (0.003, true, true), (0.001, false, true)]
        {
            let change = normal.low_rank(300, 400, 8) * size;
            let (difference, storage) = stored(&normal.matrix(300, 400), &change, 8);
            let Svd { left, values, right } = dense().svd(difference.view()).unwrap();
            let profile = energies(&difference);
            let energy = profile.rows.iter().sum();
            let spectrum = Spectrum { rows: 300, cols: 400, energy, values };
            for known in [300, 64] {
                let spectrum = truncated(&spectrum, known);
                let plain = estimate(&spectrum, storage, Rule::GavishDonoho);
                let (left, right) = (left.view(), right.t());
                let better =
                    estimate_uneven(&spectrum, storage, Rule::GavishDonoho, &profile, left, right);
                assert_eq!(plain.rank == 8, even, "{size}: {plain:?}");
                assert_eq!(better.rank == 8, uneven, "{size}: {better:?}");
            }
        }
    }

    #[test]
    fn unevenness_is_one_where_energies_are_equal_and_finds_the_edge_where_they_are_not() {
        let even = Profile { rows: vec![2.0; 50], cols: vec![1.0; 100] };
        assert!((even.unevenness() - 1.0).abs() < 1e-6, "{}", even.unevenness());
        assert_eq!(Profile::default().unevenness(), 1.0);
        let mut normal = Normal(8);
        let mut noise = normal.matrix(200, 300);
        for ((row, col), element) in noise.indexed_iter_mut() {
            *element *= (1.0 + 3.0 * row as f64 / 200.0) * (1.0 + (col % 7) as f64);
        }
        let profile = energies(&noise);
        let spectrum = spectrum(&noise);
        let level = (spectrum.energy / (200.0 * 300.0)).sqrt();
        let edge = level * Bulk::of(&spectrum, 0).edge();
        let found = spectrum.values[0] / (edge * profile.unevenness());
        assert!((0.95..1.03).contains(&found), "{found} {}", profile.unevenness());
        assert!(profile.unevenness() > 1.15);
    }
}
