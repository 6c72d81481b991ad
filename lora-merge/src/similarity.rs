//! How alike the directions of two changes are, and how a change meets the weights it changes:
//! sections 7.2 and 7.3 and appendices G and H of the LoRA paper (Hu et al., arXiv 2106.09685).
//!
//! Bases are matrices with orthonormal columns in the order of their singular values. The first i
//! columns of one and the first j of another span subspaces with min(i, j) principal angles θ. With
//! p = min(i, j):
//!
//! ```text
//!   φ(i, j)              = ‖U_Aⁱᵀ·U_Bʲ‖²_F / p = Σ cos²θ / p      1: one holds the other, 0: orthogonal
//!   projection distance  = (Σ sin²θ)^½ = (p·(1 − φ))^½
//!   geodesic distance    = (Σ θ²)^½
//! ```
//!
//! φ of unrelated directions is not 0: two random subspaces of ℝⁿ have max(i, j)/n on average.

use ndarray::{Array2, ArrayView2, Axis};

use crate::svd::dense::{NotConverged, dense};

/// Two bases cannot be compared.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SimilarityError {
    /// Their vectors have different lengths.
    #[error("directions of {left} and of {right} elements are not comparable")]
    Lengths {
        /// Elements of the first basis' vectors.
        left: usize,
        /// Elements of the other's.
        right: usize,
    },
    /// The angles' decomposition failed.
    #[error(transparent)]
    NotConverged(#[from] NotConverged),
}

fn comparable(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Result<(), SimilarityError> {
    let (left, right) = (a.nrows(), b.nrows());
    if left == right { Ok(()) } else { Err(SimilarityError::Lengths { left, right }) }
}

/// φ(A, B, i, j) for all i ≤ I and j ≤ J, of bases with I (n × I) and J (n × J) columns: I × J, the
/// element at (i−1, j−1) for the first i and the first j columns. One product, and sums of squares
/// along both of its axes.
///
/// # Errors
/// [`SimilarityError::Lengths`] if the bases are of different spaces.
pub fn subspace_similarity(
    a: ArrayView2<'_, f64>,
    b: ArrayView2<'_, f64>,
) -> Result<Array2<f64>, SimilarityError> {
    comparable(a, b)?;
    let mut sums = a.t().dot(&b);
    sums.mapv_inplace(|product| product * product);
    for axis in [Axis(0), Axis(1)] {
        sums.accumulate_axis_inplace(axis, |&before, sum| *sum += before);
    }
    for ((i, j), sum) in sums.indexed_iter_mut() {
        *sum /= (i.min(j) + 1) as f64;
    }
    Ok(sums)
}

/// What φ(i, j) is on average for two random subspaces of ℝⁿ of dimensions i and j: max(i, j)/n.
#[must_use]
pub fn random_similarity(n: usize, i: usize, j: usize) -> f64 {
    if n == 0 { 0.0 } else { i.max(j) as f64 / n as f64 }
}

/// The principal angles between the spans of two bases, n × I and n × J: min(I, J) of them,
/// ascending, in radians.
///
/// Small ones are taken from their sines (the singular values of the part of one basis that is
/// orthogonal to the other), large ones from their cosines, since a cosine near 1 does not tell its
/// angle (Å. Björck, G. H. Golub, Math. Comp. 27, 1973).
///
/// # Errors
/// [`SimilarityError`] if the bases are of different spaces.
pub fn principal_angles(
    a: ArrayView2<'_, f64>,
    b: ArrayView2<'_, f64>,
) -> Result<Vec<f64>, SimilarityError> {
    comparable(a, b)?;
    let (large, small) = if a.ncols() >= b.ncols() { (a, b) } else { (b, a) };
    if small.ncols() == 0 {
        return Ok(Vec::new());
    }
    let product = large.t().dot(&small);
    let cosines = dense().singular_values(product.view())?;
    let rest = &small - &large.dot(&product);
    // Of an n × J matrix by the J × J triangle of its QR decomposition.
    let (_, triangle) = dense().qr(rest.view())?;
    let mut sines = dense().singular_values(triangle.view())?;
    // More columns than rows: the spaces' dimensions add up to more than n, and some sines are 0.
    sines.resize(small.ncols(), 0.0);
    sines.reverse();
    let angle = |(&cosine, &sine): (&f64, &f64)| {
        if cosine * cosine >= 0.5 { sine.min(1.0).asin() } else { cosine.max(0.0).acos() }
    };
    let mut angles: Vec<f64> = cosines.iter().zip(&sines).map(angle).collect();
    angles.sort_by(f64::total_cmp);
    Ok(angles)
}

/// (Σ sin²θ)^½, the projection metric; p = Σ cos²θ + its square. `‖P_A − P_B‖_F` of spans of equal
/// dimension is √2 of it.
#[must_use]
pub fn projection_distance(angles: &[f64]) -> f64 {
    angles.iter().map(|angle| angle.sin().powi(2)).sum::<f64>().sqrt()
}

/// (Σ θ²)^½, the length of the shortest path between two spans on the Grassmann manifold.
#[must_use]
pub fn geodesic_distance(angles: &[f64]) -> f64 {
    angles.iter().map(|angle| angle * angle).sum::<f64>().sqrt()
}

/// What W₀ has in r directions of the input and r of the output: table 7 of the paper.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Amplification {
    /// r.
    pub rank: usize,
    /// ‖U_rᵀ·W₀·V_r‖_F with the leading singular vectors of the change.
    pub through_change: f64,
    /// The same with those of W₀ itself, the most that r directions can have: (Σ_{i≤r} σᵢ(W₀)²)^½.
    /// `None` if fewer of its singular values are known.
    pub through_itself: Option<f64>,
    /// The same with random directions, the root of its mean square: r·‖W₀‖_F/(m·n)^½.
    pub through_random: f64,
    /// ‖ΔW‖_F / `through_change`: how much the change amplifies what W₀ has in its directions.
    /// `None` if W₀ has nothing there.
    pub factor: Option<f64>,
}

/// What W₀ (m × n, of energy ‖W₀‖²_F) has in the leading directions of a change, for every r up to
/// the R that `projected` = U_Rᵀ·W₀·V_R (R × R) was made for: its leading blocks.
///
/// `change` is ‖ΔW‖_F, all of it, as in the paper; `values` are the leading singular values of W₀,
/// as many as are known.
#[must_use]
pub fn amplification(
    projected: ArrayView2<'_, f64>,
    change: f64,
    energy: f64,
    (m, n): (usize, usize),
    values: &[f64],
) -> Vec<Amplification> {
    let (mut block, mut own) = (0.0, Some(0.0));
    let size = projected.nrows().min(projected.ncols());
    let step = |last: usize| {
        // The block grows by the new row and column.
        for before in 0..last {
            block += projected[[before, last]].powi(2) + projected[[last, before]].powi(2);
        }
        block += projected[[last, last]].powi(2);
        own = own.and_then(|sum| values.get(last).map(|value| sum + value * value));
        let rank = last + 1;
        let through_change: f64 = block.sqrt();
        Amplification {
            rank,
            through_change,
            through_itself: own.map(f64::sqrt),
            through_random: rank as f64 * (energy / (m as f64 * n as f64)).sqrt(),
            factor: (through_change > 0.0).then(|| change / through_change),
        }
    };
    (0..size).map(step).collect()
}

#[cfg(test)]
mod tests {
    use ndarray::{array, s};

    use super::*;

    /// Random numbers, seeded; their sum makes them roughly normal.
    fn random(rows: usize, cols: usize, mut state: u64) -> Array2<f64> {
        Array2::from_shape_fn((rows, cols), |_| {
            let mut sum = -6.0;
            for _ in 0..12 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                sum += (state >> 11) as f64 / (1u64 << 53) as f64;
            }
            sum
        })
    }

    fn basis(rows: usize, cols: usize, seed: u64) -> Array2<f64> {
        dense().qr(random(rows, cols, seed).view()).unwrap().0
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-12 * (1.0 + b.abs())
    }

    #[test]
    fn similarity_is_the_definition() {
        let (a, b) = (basis(40, 6, 1), basis(40, 9, 2));
        let found = subspace_similarity(a.view(), b.view()).unwrap();
        assert_eq!(found.dim(), (6, 9));
        for ((i, j), &phi) in found.indexed_iter() {
            let product = a.slice(s![.., ..=i]).t().dot(&b.slice(s![.., ..=j]));
            let energy: f64 = product.iter().map(|x| x * x).sum();
            assert!(close(phi, energy / (i.min(j) + 1) as f64), "{i} {j}");
            assert!((0.0..=1.0).contains(&phi));
        }
        let error = subspace_similarity(a.view(), basis(39, 9, 2).view()).unwrap_err();
        assert_eq!(error, SimilarityError::Lengths { left: 40, right: 39 });
    }

    #[test]
    fn a_subspace_of_another_has_similarity_one() {
        let a = basis(30, 8, 3);
        let same = subspace_similarity(a.view(), a.view()).unwrap();
        assert!(same.iter().all(|&phi| close(phi, 1.0)));
        let (left, right) = (a.slice(s![.., ..4]), a.slice(s![.., 4..]));
        let none = subspace_similarity(left, right).unwrap();
        assert!(none.iter().all(|&phi| phi < 1e-24));
    }

    #[test]
    fn random_subspaces_are_as_alike_as_expected() {
        let mut sum = 0.0;
        for seed in 0..200 {
            let (a, b) = (basis(60, 4, 2 * seed + 1), basis(60, 9, 2 * seed + 2));
            sum += subspace_similarity(a.view(), b.view()).unwrap()[[3, 8]];
        }
        assert!((sum / 200.0 / random_similarity(60, 4, 9) - 1.0).abs() < 0.1);
    }

    #[test]
    fn angles_of_planes_at_known_angles() {
        let known = [1e-9, 0.3, 1.2, std::f64::consts::FRAC_PI_2];
        let (mut a, mut b) = (Array2::zeros((10, 4)), Array2::zeros((10, 4)));
        for (index, angle) in known.iter().enumerate() {
            a[[index, index]] = 1.0;
            b[[index, index]] = angle.cos();
            b[[index + 4, index]] = angle.sin();
        }
        // In other bases of the same spans, and turned in space.
        let turn = basis(10, 10, 5);
        let a = turn.dot(&a).dot(&basis(4, 4, 6));
        let b = turn.dot(&b).dot(&basis(4, 4, 7));
        for angles in [principal_angles(a.view(), b.view()), principal_angles(b.view(), a.view())] {
            for (found, known) in angles.unwrap().iter().zip(known) {
                assert!((found - known).abs() < 1e-14 + 1e-6 * known.min(1e-6), "{found} {known}");
            }
        }
        let few = principal_angles(a.view(), b.slice(s![.., ..2])).unwrap();
        assert_eq!(few.len(), 2);
        assert!(principal_angles(a.view(), b.slice(s![.., ..0])).unwrap().is_empty());
    }

    #[test]
    fn distances_agree_with_the_similarity() {
        let (a, b) = (basis(25, 3, 8), basis(25, 7, 9));
        let angles = principal_angles(a.view(), b.view()).unwrap();
        let phi = subspace_similarity(a.view(), b.view()).unwrap()[[2, 6]];
        let distance = projection_distance(&angles);
        assert!(close(distance * distance, 3.0 * (1.0 - phi)));
        assert!(geodesic_distance(&angles) >= distance);
        assert_eq!(geodesic_distance(&[3.0, 4.0]), 5.0);
        // Spans that fill the space, and more: every direction is in both.
        let (a, b) = (basis(6, 6, 1), basis(6, 5, 2));
        let angles = principal_angles(a.view(), b.view()).unwrap();
        assert!(angles.iter().all(|&angle| angle < 1e-14), "{angles:?}");
    }

    #[test]
    fn amplification_of_a_block() {
        let projected = array![[3.0, 1.0], [1.0, 1.0]];
        let found = amplification(projected.view(), 6.0, 100.0, (5, 20), &[7.0]);
        assert_eq!(found[0].through_change, 3.0);
        assert_eq!(found[0].factor, Some(2.0));
        assert_eq!((found[0].through_itself, found[0].through_random), (Some(7.0), 1.0));
        assert_eq!(found[1].through_change, 12f64.sqrt());
        assert_eq!((found[1].through_itself, found[1].through_random), (None, 2.0));
        let nothing = amplification(array![[0.0]].view(), 6.0, 100.0, (5, 20), &[]);
        assert_eq!(nothing[0].factor, None);
    }

    #[test]
    fn random_directions_meet_the_stated_share_of_the_weights() {
        let weights = random(40, 30, 11);
        let energy: f64 = weights.iter().map(|x| x * x).sum();
        let mut mean = 0.0;
        for seed in 0..300 {
            let (u, v) = (basis(40, 4, 2 * seed + 1), basis(30, 4, 2 * seed + 2));
            let projected = u.t().dot(&weights).dot(&v);
            mean += projected.iter().map(|x| x * x).sum::<f64>() / 300.0;
        }
        let stated = amplification(Array2::eye(4).view(), 1.0, energy, (40, 30), &[]);
        assert!((mean.sqrt() / stated[3].through_random - 1.0).abs() < 0.05);
    }
}
