//! The singular values of a matrix, as far as they are known, and the numbers read off them.
//!
//! A truncated decomposition knows the leading singular values and the energy ‖A‖²_F, which is the
//! sum of the squares of all of them; a complete one knows them all. A number that needs values
//! that are not there is an [`Option`] or [`Reached::Beyond`]; nothing is extrapolated.
//!
//! Energies are squares: σᵢ² and ‖A‖²_F. By Eckart and Young, no matrix of rank r is nearer to A
//! than its truncated SVD, at the distance `residual(r)` = (Σ_{i>r} σᵢ²)^½.

/// The leading singular values of a matrix, and its energy.
///
/// The values are finite, not negative and descend; whoever fills this in sees to that. A matrix
/// that is known as a product of factors of rank R has R values and then zeros: see
/// [`Spectrum::of_rank`].
#[derive(Clone, Debug, PartialEq)]
pub struct Spectrum {
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub cols: usize,
    /// ‖A‖²_F, summed over the elements.
    pub energy: f64,
    /// σ₁ ≥ σ₂ ≥ …, as many as are known.
    pub values: Vec<f64>,
}

/// The smallest rank that meets a demand, as far as the known values tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// This rank meets it, and no smaller one does.
    At(usize),
    /// This many values are known, and they do not meet it.
    Beyond(usize),
}

impl Reached {
    /// The rank, or all that are known.
    #[must_use]
    pub fn known(self) -> usize {
        let (Reached::At(rank) | Reached::Beyond(rank)) = self;
        rank
    }

    /// The rank, if it is known.
    #[must_use]
    pub fn at(self) -> Option<usize> {
        match self {
            Reached::At(rank) => Some(rank),
            Reached::Beyond(_) => None,
        }
    }
}

impl Spectrum {
    /// The spectrum of a matrix that is known to have no more values than `values`: a product of
    /// factors whose inner dimension is their number. It is complete; the energy is their sum.
    #[must_use]
    pub fn of_rank(rows: usize, cols: usize, mut values: Vec<f64>) -> Spectrum {
        values.resize(rows.min(cols), 0.0);
        let energy = sum_of_squares(&values);
        Spectrum { rows, cols, energy, values }
    }

    /// min(m, n), the largest rank that the matrix can have.
    #[must_use]
    pub fn short_side(&self) -> usize {
        self.rows.min(self.cols)
    }

    /// Whether every element is zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.energy == 0.0
    }

    /// Whether all singular values are known. Those of a zero matrix are.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.values.len() >= self.short_side() || self.is_zero()
    }

    /// σ₁, the spectral norm; `None` if no value is known and the matrix is not zero.
    #[must_use]
    pub fn largest(&self) -> Option<f64> {
        if self.is_zero() { Some(0.0) } else { self.values.first().copied() }
    }

    /// ‖A‖_F.
    #[must_use]
    pub fn norm(&self) -> f64 {
        self.energy.sqrt()
    }

    /// σᵢ², i = 1, 2, …: what each further rank captures.
    #[must_use]
    pub fn gains(&self) -> Vec<f64> {
        self.values.iter().map(|value| value * value).collect()
    }

    /// The energy of the best approximation of rank r: Σ σᵢ² over the first r values, or over all
    /// that are known.
    #[must_use]
    pub fn captured(&self, rank: usize) -> f64 {
        sum_of_squares(&self.values[..rank.min(self.values.len())])
    }

    /// ‖A‖²_F of a complete spectrum by its values, which [`captured`](Spectrum::captured) attains
    /// exactly; as it was measured, otherwise.
    fn total(&self) -> f64 {
        if self.is_complete() { self.captured(usize::MAX) } else { self.energy }
    }

    /// The energy that the first r values leave.
    ///
    /// A complete spectrum's is summed over the values themselves. An incomplete one's is
    /// `energy − captured`, a difference that the accuracy of a single-precision decomposition
    /// does not carry once it is below some 10⁻⁶ of the energy; see [`Spectrum::resolves`].
    #[must_use]
    pub fn remaining(&self, rank: usize) -> f64 {
        let known = rank.min(self.values.len());
        let tail = sum_of_squares(&self.values[known..]);
        if self.is_complete() {
            return tail;
        }
        tail + (self.energy - self.captured(usize::MAX)).max(0.0)
    }

    /// ‖A − A_r‖_F, the distance to the best approximation of rank r; see
    /// [`Spectrum::remaining`] for its accuracy.
    #[must_use]
    pub fn residual(&self, rank: usize) -> f64 {
        self.remaining(rank).sqrt()
    }

    /// Whether [`Spectrum::remaining`] is more than the error of a difference: the spectrum is
    /// complete, or what lies beyond the known values is at least [`UNRESOLVED`] of the energy, or
    /// known values after the first r are.
    #[must_use]
    pub fn resolves(&self, rank: usize) -> bool {
        self.is_complete() || self.remaining(rank) >= UNRESOLVED * self.energy
    }

    /// The smallest rank whose best approximation has at least `share` of the energy, from 0 (none
    /// needed) to 1 (all of it: the number of values that are not zero). A zero matrix has all of
    /// its energy at rank 0.
    #[must_use]
    pub fn rank_for_energy(&self, share: f64) -> Reached {
        if share >= 1.0 {
            return self.rank_for_residual(0.0);
        }
        let demand = share * self.total();
        self.first(|captured| captured >= demand)
    }

    /// The smallest rank whose best approximation is no further away than `distance`, a Frobenius
    /// norm.
    #[must_use]
    pub fn rank_for_residual(&self, distance: f64) -> Reached {
        let limit = if distance > 0.0 { distance * distance } else { 0.0 };
        // From the end: a small tail is not lost in a large sum.
        let mut remaining = self.remaining(usize::MAX);
        if remaining > limit {
            return Reached::Beyond(self.values.len());
        }
        let mut rank = self.values.len();
        while let Some(value) = rank.checked_sub(1).and_then(|last| self.values.get(last)) {
            remaining += value * value;
            if remaining > limit {
                break;
            }
            rank -= 1;
        }
        Reached::At(rank)
    }

    /// The smallest rank whose captured energy is enough.
    fn first(&self, enough: impl Fn(f64) -> bool) -> Reached {
        if self.is_zero() || enough(0.0) {
            return Reached::At(0);
        }
        let mut captured = 0.0;
        for (index, value) in self.values.iter().enumerate() {
            captured += value * value;
            if enough(captured) {
                return Reached::At(index + 1);
            }
        }
        Reached::Beyond(self.values.len())
    }

    /// The smallest rank with half of the energy.
    #[must_use]
    pub fn r50(&self) -> Reached {
        self.rank_for_energy(0.50)
    }

    /// The smallest rank with 90 % of the energy.
    #[must_use]
    pub fn r90(&self) -> Reached {
        self.rank_for_energy(0.90)
    }

    /// The smallest rank with 95 % of the energy.
    #[must_use]
    pub fn r95(&self) -> Reached {
        self.rank_for_energy(0.95)
    }

    /// The smallest rank with 99 % of the energy.
    #[must_use]
    pub fn r99(&self) -> Reached {
        self.rank_for_energy(0.99)
    }

    /// ‖A‖²_F / σ₁², from 1 to the rank; 0 of a zero matrix. `None` if no value is known.
    #[must_use]
    pub fn stable_rank(&self) -> Option<f64> {
        match self.largest()? {
            largest if largest > 0.0 => Some(self.energy / (largest * largest)),
            _ => Some(0.0),
        }
    }

    /// ‖A‖_* = Σ σᵢ, of a complete spectrum.
    #[must_use]
    pub fn nuclear_norm(&self) -> Option<f64> {
        // The smallest first, so that they count.
        self.is_complete().then(|| self.values.iter().rev().sum())
    }

    /// Roy and Vetterli's effective rank of a complete spectrum: exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ,
    /// the singular values and not their squares. From 1 to the rank, which it attains where all
    /// values are equal; 0 of a zero matrix.
    ///
    /// O. Roy, M. Vetterli: The effective rank: a measure of effective dimensionality. EUSIPCO
    /// 2007.
    #[must_use]
    pub fn entropy_rank(&self) -> Option<f64> {
        let norm = self.nuclear_norm()?;
        if norm == 0.0 {
            return Some(0.0);
        }
        let shares = self.values.iter().rev().map(|value| value / norm);
        let entropy: f64 = shares.filter(|&share| share > 0.0).map(|p| -p * p.ln()).sum();
        Some(entropy.exp())
    }
}

/// The share of the energy below which a difference of an energy and the squares of the known
/// values is not told from their errors. They come from sweeps in f32, whose relative error in a
/// σ² is some 10⁻⁷.
pub const UNRESOLVED: f64 = 1e-6;

/// Σ σ², the last (smallest) first.
fn sum_of_squares(values: &[f64]) -> f64 {
    values.iter().rev().map(|value| value * value).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 4, 3, 2, 1: the squares add up to 30.
    fn ladder(known: usize) -> Spectrum {
        let values = [4.0, 3.0, 2.0, 1.0];
        Spectrum { rows: 4, cols: 9, energy: 30.0, values: values[..known].to_vec() }
    }

    #[test]
    fn energies_and_residuals_are_sums_of_squares() {
        for known in [2, 4] {
            let spectrum = ladder(known);
            assert_eq!(spectrum.is_complete(), known == 4);
            assert_eq!(spectrum.captured(0), 0.0);
            assert_eq!(spectrum.captured(2), 25.0);
            assert_eq!(spectrum.remaining(0), 30.0);
            assert_eq!(spectrum.remaining(1), 14.0);
            assert_eq!(spectrum.residual(2), 5f64.sqrt());
            assert_eq!(spectrum.stable_rank(), Some(30.0 / 16.0));
        }
        assert_eq!(ladder(2).captured(4), 25.0);
        assert_eq!(ladder(4).residual(4), 0.0);
        assert_eq!(ladder(4).residual(usize::MAX), 0.0);
    }

    #[test]
    fn a_rank_for_a_share_of_the_energy_is_the_smallest() {
        let complete = ladder(4);
        for (share, rank) in
            [(0.0, 0), (0.5, 1), (16.0 / 30.0, 1), (0.54, 2), (0.9, 3), (0.97, 4), (1.0, 4)]
        {
            assert_eq!(complete.rank_for_energy(share), Reached::At(rank), "{share}");
        }
        assert_eq!((complete.r50(), complete.r90()), (Reached::At(1), Reached::At(3)));
        assert_eq!((complete.r95(), complete.r99()), (Reached::At(3), Reached::At(4)));
        assert_eq!(ladder(2).rank_for_energy(0.8), Reached::At(2));
        assert_eq!(ladder(2).rank_for_energy(0.9), Reached::Beyond(2));
        assert_eq!(ladder(2).rank_for_energy(1.0), Reached::Beyond(2));
        // Ten equal values have nine tenths of their energy at nine.
        let flat = Spectrum { rows: 10, cols: 10, energy: 10.0, values: vec![1.0; 10] };
        assert_eq!(flat.r90(), Reached::At(9));
    }

    #[test]
    fn a_rank_for_a_distance_is_the_smallest() {
        let complete = ladder(4);
        for (distance, rank) in [(6.0, 0), (5.4, 1), (3.75, 1), (2.3, 2), (1.0, 3), (0.9, 4)] {
            assert_eq!(complete.rank_for_residual(distance), Reached::At(rank), "{distance}");
        }
        assert_eq!(ladder(2).rank_for_residual(2.3), Reached::At(2));
        assert_eq!(ladder(2).rank_for_residual(2.2), Reached::Beyond(2));
        assert_eq!(ladder(2).rank_for_residual(4.0), Reached::At(1));
    }

    #[test]
    fn a_tail_far_below_the_energy_is_told_where_the_spectrum_is_complete() {
        let spectrum = Spectrum::of_rank(9, 5, vec![1.0, 1e-9, 1e-12]);
        assert!(spectrum.is_complete());
        assert!((spectrum.residual(1) / 1e-9 - 1.0).abs() < 1e-6);
        assert!((spectrum.residual(2) / 1e-12 - 1.0).abs() < 1e-15);
        assert_eq!(spectrum.rank_for_residual(1.1e-12), Reached::At(2));
        assert_eq!(spectrum.rank_for_residual(0.9e-12), Reached::At(3));
        assert_eq!(spectrum.rank_for_energy(1.0), Reached::At(3));
        assert!(spectrum.resolves(2));
        let truncated = Spectrum { values: vec![1.0], ..spectrum };
        assert!(!truncated.resolves(1));
        assert!(truncated.resolves(0));
    }

    #[test]
    fn effective_ranks_of_known_spectra() {
        let flat = Spectrum { rows: 7, cols: 8, energy: 28.0, values: vec![2.0; 7] };
        assert!((flat.entropy_rank().unwrap() - 7.0).abs() < 1e-12);
        assert_eq!(flat.stable_rank(), Some(7.0));
        assert_eq!(flat.nuclear_norm(), Some(14.0));
        let single = Spectrum::of_rank(7, 8, vec![3.0]);
        assert_eq!(single.entropy_rank(), Some(1.0));
        // p = (½, ¼, ¼): the entropy is 1.5 bits.
        let mixed = Spectrum::of_rank(7, 8, vec![2.0, 1.0, 1.0]);
        assert!((mixed.entropy_rank().unwrap() - 1.5f64.exp2()).abs() < 1e-12);
        assert_eq!(ladder(2).entropy_rank(), None);
        assert_eq!(ladder(2).nuclear_norm(), None);
    }

    #[test]
    fn a_zero_matrix_has_rank_zero() {
        for values in [vec![], vec![0.0; 3]] {
            let zero = Spectrum { rows: 3, cols: 4, energy: 0.0, values };
            assert!(zero.is_complete() && zero.is_zero());
            assert_eq!(zero.rank_for_energy(0.9), Reached::At(0));
            assert_eq!(zero.rank_for_energy(1.0), Reached::At(0));
            assert_eq!(zero.rank_for_residual(0.0), Reached::At(0));
            assert_eq!(zero.residual(0), 0.0);
            assert_eq!(zero.stable_rank(), Some(0.0));
            assert_eq!(zero.entropy_rank(), Some(0.0));
            assert_eq!(zero.nuclear_norm(), Some(0.0));
        }
    }
}
