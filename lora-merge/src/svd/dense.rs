//! Decompositions of matrices that fit in memory: one small trait, two libraries.
//!
//! All that is large is streamed (`krylov.rs`, `gram.rs`); what is left are eigenvalues
//! of Gram matrices, QR of factors, and SVDs of small cores, in f64. [`Faer`] does that in pure
//! Rust. With the feature `lapack`, `Lapack` does it with the system's OpenBLAS, as the reference
//! that tests hold the other one against, and because its eigensolver is faster beyond a few
//! thousand columns.
//!
//! Everything here runs on the calling thread: results do not depend on how many there are. They do
//! depend, in their last bits, on the library and on the processor it chooses its kernels for.

use std::fmt;

use ndarray::{Array2, ArrayView2};

/// A decomposition did not converge. Inputs without NaN and infinities do not cause this as far as
/// is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{library}: the {what} of a {rows} × {cols} matrix did not converge")]
pub struct NotConverged {
    /// The library.
    pub library: &'static str,
    /// What was computed.
    pub what: &'static str,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub cols: usize,
}

/// Eigenvalues of a symmetric matrix, descending, and its eigenvectors as columns in that order.
#[derive(Clone, Debug)]
pub struct Eigen {
    /// The eigenvalues.
    pub values: Vec<f64>,
    /// The eigenvectors, n × n.
    pub vectors: Array2<f64>,
}

/// `A = U·diag(σ)·Vᵀ` with k = min(m, n) values, descending.
#[derive(Clone, Debug)]
pub struct Svd {
    /// U, m × k.
    pub left: Array2<f64>,
    /// σ.
    pub values: Vec<f64>,
    /// Vᵀ, k × n.
    pub right: Array2<f64>,
}

/// What is asked of a library of dense linear algebra.
pub trait Dense: Sync + fmt::Debug {
    /// Its name, for reports.
    fn name(&self) -> &'static str;

    /// Eigenvalues and eigenvectors of a symmetric matrix, of which the lower half is read.
    ///
    /// # Errors
    /// [`NotConverged`].
    fn symmetric_eigen(&self, matrix: ArrayView2<'_, f64>) -> Result<Eigen, NotConverged>;

    /// Its eigenvalues alone, descending.
    ///
    /// # Errors
    /// [`NotConverged`].
    fn symmetric_values(&self, matrix: ArrayView2<'_, f64>) -> Result<Vec<f64>, NotConverged>;

    /// The thin SVD of a matrix.
    ///
    /// # Errors
    /// [`NotConverged`].
    fn svd(&self, matrix: ArrayView2<'_, f64>) -> Result<Svd, NotConverged>;

    /// Its singular values alone, descending.
    ///
    /// # Errors
    /// [`NotConverged`].
    fn singular_values(&self, matrix: ArrayView2<'_, f64>) -> Result<Vec<f64>, NotConverged>;

    /// The thin QR decomposition of an m × n matrix: Q is m × k with orthonormal columns, R is
    /// k × n and upper triangular, k = min(m, n). Defined for matrices of any rank.
    ///
    /// # Errors
    /// [`NotConverged`].
    fn qr(&self, matrix: ArrayView2<'_, f64>) -> Result<(Array2<f64>, Array2<f64>), NotConverged>;
}

/// The library that this build uses: LAPACK if it was asked for, faer otherwise.
#[must_use]
pub fn dense() -> &'static dyn Dense {
    #[cfg(feature = "lapack")]
    return &lapack::Lapack;
    #[cfg(not(feature = "lapack"))]
    &Faer
}

/// The pure Rust library.
#[derive(Clone, Copy, Debug)]
pub struct Faer;

mod pure {
    use faer::diag::Diag;
    use faer::dyn_stack::{MemBuffer, MemStack};
    use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
    use faer::linalg::householder;
    use faer::linalg::qr::no_pivoting::factor;
    use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
    use faer::{Conj, Mat, MatRef, Par};
    use ndarray::{Array2, ArrayView2};

    use super::{Dense, Eigen, Faer, NotConverged, Svd};

    /// faer's global setting is for others to choose: here nothing is shared among threads.
    const PAR: Par = Par::Seq;

    fn to_faer(matrix: ArrayView2<'_, f64>) -> Mat<f64> {
        Mat::from_fn(matrix.nrows(), matrix.ncols(), |row, col| matrix[[row, col]])
    }

    fn from_faer(matrix: MatRef<'_, f64>) -> Array2<f64> {
        Array2::from_shape_fn((matrix.nrows(), matrix.ncols()), |(row, col)| matrix[(row, col)])
    }

    fn not_converged(what: &'static str, matrix: ArrayView2<'_, f64>) -> NotConverged {
        NotConverged { library: "faer", what, rows: matrix.nrows(), cols: matrix.ncols() }
    }

    /// Eigenvalues ascending, as faer has them, and vectors if asked for.
    fn eigen(
        matrix: ArrayView2<'_, f64>,
        vectors: Option<&mut Mat<f64>>,
    ) -> Result<Vec<f64>, NotConverged> {
        let n = matrix.nrows();
        if n == 0 {
            return Ok(Vec::new());
        }
        let compute =
            if vectors.is_some() { ComputeEigenvectors::Yes } else { ComputeEigenvectors::No };
        let scratch = self_adjoint_evd_scratch::<f64>(n, compute, PAR, Default::default());
        let mut values = Diag::zeros(n);
        self_adjoint_evd(
            to_faer(matrix).as_ref(),
            values.as_mut(),
            vectors.map(|vectors| vectors.as_mut()),
            PAR,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Default::default(),
        )
        .map_err(|_| not_converged("eigendecomposition", matrix))?;
        Ok(values.column_vector().iter().copied().collect())
    }

    fn decompose(
        matrix: ArrayView2<'_, f64>,
        vectors: Option<(&mut Mat<f64>, &mut Mat<f64>)>,
    ) -> Result<Vec<f64>, NotConverged> {
        let (m, n) = matrix.dim();
        if matrix.is_empty() {
            return Ok(Vec::new());
        }
        let compute =
            if vectors.is_some() { ComputeSvdVectors::Thin } else { ComputeSvdVectors::No };
        let scratch = svd_scratch::<f64>(m, n, compute, compute, PAR, Default::default());
        let mut values = Diag::zeros(m.min(n));
        let (left, right) = vectors.unzip();
        svd(
            to_faer(matrix).as_ref(),
            values.as_mut(),
            left.map(|left| left.as_mut()),
            right.map(|right| right.as_mut()),
            PAR,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Default::default(),
        )
        .map_err(|_| not_converged("singular value decomposition", matrix))?;
        Ok(values.column_vector().iter().copied().collect())
    }

    impl Dense for Faer {
        fn name(&self) -> &'static str {
            "faer"
        }

        fn symmetric_eigen(&self, matrix: ArrayView2<'_, f64>) -> Result<Eigen, NotConverged> {
            let n = matrix.nrows();
            let mut vectors = Mat::zeros(n, n);
            let mut values = eigen(matrix, Some(&mut vectors))?;
            values.reverse();
            Ok(Eigen { values, vectors: from_faer(vectors.as_ref().reverse_cols()) })
        }

        fn symmetric_values(&self, matrix: ArrayView2<'_, f64>) -> Result<Vec<f64>, NotConverged> {
            let mut values = eigen(matrix, None)?;
            values.reverse();
            Ok(values)
        }

        fn svd(&self, matrix: ArrayView2<'_, f64>) -> Result<Svd, NotConverged> {
            let (m, n) = matrix.dim();
            let k = m.min(n);
            let (mut left, mut right) = (Mat::zeros(m, k), Mat::zeros(n, k));
            let values = decompose(matrix, Some((&mut left, &mut right)))?;
            let right = from_faer(right.as_ref().transpose());
            Ok(Svd { left: from_faer(left.as_ref()), values, right })
        }

        fn singular_values(&self, matrix: ArrayView2<'_, f64>) -> Result<Vec<f64>, NotConverged> {
            decompose(matrix, None)
        }

        fn qr(
            &self,
            matrix: ArrayView2<'_, f64>,
        ) -> Result<(Array2<f64>, Array2<f64>), NotConverged> {
            let (m, n) = matrix.dim();
            let k = m.min(n);
            if k == 0 {
                return Ok((Array2::zeros((m, 0)), Array2::zeros((0, n))));
            }
            let block = factor::recommended_block_size::<f64>(m, n);
            let mut packed = to_faer(matrix);
            let mut coefficients = Mat::zeros(block, k);
            let scratch = factor::qr_in_place_scratch::<f64>(m, n, block, PAR, Default::default());
            factor::qr_in_place(
                packed.as_mut(),
                coefficients.as_mut(),
                PAR,
                MemStack::new(&mut MemBuffer::new(scratch)),
                Default::default(),
            );
            let r =
                Array2::from_shape_fn(
                    (k, n),
                    |(row, col)| {
                        if row <= col { packed[(row, col)] } else { 0.0 }
                    },
                );
            let mut q = Mat::<f64>::identity(m, k);
            let scratch =
                householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(
                    m, block, k,
                );
            householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
                packed.as_ref().subcols(0, k),
                coefficients.as_ref(),
                Conj::No,
                q.as_mut(),
                PAR,
                MemStack::new(&mut MemBuffer::new(scratch)),
            );
            Ok((from_faer(q.as_ref()), r))
        }
    }
}

#[cfg(feature = "lapack")]
pub use lapack::Lapack;

#[cfg(feature = "lapack")]
mod lapack {
    use ndarray::{Array1, Array2, ArrayView2, s};
    use ndarray_linalg::{Eigh, JobSvd, QR, SVDDC, UPLO};

    use super::{Dense, Eigen, NotConverged, Svd};

    /// The system's LAPACK through ndarray-linalg.
    #[derive(Clone, Copy, Debug)]
    pub struct Lapack;

    fn not_converged(what: &'static str, matrix: ArrayView2<'_, f64>) -> NotConverged {
        NotConverged { library: "LAPACK", what, rows: matrix.nrows(), cols: matrix.ncols() }
    }

    /// A symmetric matrix of which only the lower half means something, in full: which half of a
    /// row-major matrix is meant, ndarray-linalg and LAPACK do not agree on.
    fn mirrored(matrix: ArrayView2<'_, f64>) -> Array2<f64> {
        let mut full = matrix.to_owned();
        for row in 0..full.nrows() {
            for col in row + 1..full.ncols() {
                full[[row, col]] = full[[col, row]];
            }
        }
        full
    }

    impl Dense for Lapack {
        fn name(&self) -> &'static str {
            "LAPACK"
        }

        fn symmetric_eigen(&self, matrix: ArrayView2<'_, f64>) -> Result<Eigen, NotConverged> {
            if matrix.is_empty() {
                return Ok(Eigen { values: Vec::new(), vectors: Array2::zeros((0, 0)) });
            }
            let (values, vectors) = mirrored(matrix)
                .eigh(UPLO::Lower)
                .map_err(|_| not_converged("eigendecomposition", matrix))?;
            let values = values.iter().rev().copied().collect();
            Ok(Eigen { values, vectors: vectors.slice(s![.., ..;-1]).to_owned() })
        }

        fn symmetric_values(&self, matrix: ArrayView2<'_, f64>) -> Result<Vec<f64>, NotConverged> {
            use ndarray_linalg::EigValsh;
            if matrix.is_empty() {
                return Ok(Vec::new());
            }
            let values: Array1<f64> = mirrored(matrix)
                .eigvalsh(UPLO::Lower)
                .map_err(|_| not_converged("eigendecomposition", matrix))?;
            Ok(values.iter().rev().copied().collect())
        }

        fn svd(&self, matrix: ArrayView2<'_, f64>) -> Result<Svd, NotConverged> {
            let (m, n) = matrix.dim();
            let k = m.min(n);
            if k == 0 {
                let (left, right) = (Array2::zeros((m, 0)), Array2::zeros((0, n)));
                return Ok(Svd { left, values: Vec::new(), right });
            }
            let failed = || not_converged("singular value decomposition", matrix);
            let (left, values, right) =
                matrix.to_owned().svddc(JobSvd::Some).map_err(|_| failed())?;
            let (Some(left), Some(right)) = (left, right) else { return Err(failed()) };
            Ok(Svd { left, values: values.to_vec(), right })
        }

        fn singular_values(&self, matrix: ArrayView2<'_, f64>) -> Result<Vec<f64>, NotConverged> {
            if matrix.is_empty() {
                return Ok(Vec::new());
            }
            let (_, values, _) = matrix
                .to_owned()
                .svddc(JobSvd::None)
                .map_err(|_| not_converged("singular value decomposition", matrix))?;
            Ok(values.to_vec())
        }

        fn qr(
            &self,
            matrix: ArrayView2<'_, f64>,
        ) -> Result<(Array2<f64>, Array2<f64>), NotConverged> {
            let (m, n) = matrix.dim();
            if matrix.is_empty() {
                return Ok((Array2::zeros((m, m.min(n))), Array2::zeros((m.min(n), n))));
            }
            matrix.to_owned().qr().map_err(|_| not_converged("QR decomposition", matrix))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn libraries() -> Vec<&'static dyn Dense> {
        vec![
            &Faer,
            #[cfg(feature = "lapack")]
            &Lapack,
        ]
    }

    /// A matrix of full rank, or with its last columns sums of others.
    fn example(rows: usize, cols: usize, dependent: bool) -> Array2<f64> {
        let mut matrix = Array2::from_shape_fn((rows, cols), |(row, col)| {
            ((row * 31 + col * 17 + row * col * 7) % 23) as f64 - 11.0 + (row == col) as u8 as f64
        });
        if dependent && cols > 2 {
            let sum = &matrix.column(0) + &matrix.column(1);
            matrix.column_mut(cols - 1).assign(&sum);
        }
        matrix
    }

    fn largest(difference: Array2<f64>) -> f64 {
        difference.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()))
    }

    #[test]
    fn decompositions_multiply_back() {
        for library in libraries() {
            for (rows, cols) in [(1, 1), (1, 7), (7, 1), (9, 9), (40, 12), (12, 40), (70, 65)] {
                for dependent in [false, true] {
                    let matrix = example(rows, cols, dependent);
                    let svd = library.svd(matrix.view()).unwrap();
                    let k = rows.min(cols);
                    assert!(svd.values.windows(2).all(|pair| pair[0] >= pair[1]));
                    let scaled = &svd.left * &ndarray::Array1::from(svd.values.clone());
                    assert!(largest(scaled.dot(&svd.right) - &matrix) < 1e-11);
                    let identity = Array2::<f64>::eye(k);
                    assert!(largest(svd.left.t().dot(&svd.left) - &identity) < 1e-12);
                    assert!(largest(svd.right.dot(&svd.right.t()) - &identity) < 1e-12);
                    let values = library.singular_values(matrix.view()).unwrap();
                    for (one, other) in values.iter().zip(&svd.values) {
                        assert!((one - other).abs() < 1e-10 * svd.values[0]);
                    }

                    let (q, r) = library.qr(matrix.view()).unwrap();
                    assert_eq!((q.dim(), r.dim()), ((rows, k), (k, cols)));
                    assert!(largest(q.dot(&r) - &matrix) < 1e-11);
                    assert!(largest(q.t().dot(&q) - &identity) < 1e-12);

                    let gram = matrix.t().dot(&matrix);
                    let eigen = library.symmetric_eigen(gram.view()).unwrap();
                    let scaled = &eigen.vectors * &ndarray::Array1::from(eigen.values.clone());
                    assert!(largest(scaled.dot(&eigen.vectors.t()) - &gram) < 1e-9 * gram[[0, 0]]);
                    let values = library.symmetric_values(gram.view()).unwrap();
                    for (square, value) in values.iter().zip(&svd.values) {
                        assert!((square - value * value).abs() < 1e-11 * eigen.values[0]);
                    }
                }
            }
        }
    }

    #[test]
    fn only_the_lower_half_is_read() {
        let gram = example(12, 8, false).t().dot(&example(12, 8, false));
        let mut lower = gram.clone();
        for row in 0..8 {
            for col in row + 1..8 {
                lower[[row, col]] = f64::NAN;
            }
        }
        for library in libraries() {
            let whole = library.symmetric_values(gram.view()).unwrap();
            assert_eq!(library.symmetric_values(lower.view()).unwrap(), whole);
        }
    }

    #[test]
    fn empty_matrices_have_empty_decompositions() {
        for library in libraries() {
            let svd = library.svd(Array2::zeros((3, 0)).view()).unwrap();
            assert_eq!((svd.left.dim(), svd.values.len(), svd.right.dim()), ((3, 0), 0, (0, 0)));
            let none = Array2::zeros((0, 0));
            assert!(library.symmetric_eigen(none.view()).unwrap().values.is_empty());
            assert!(library.symmetric_values(none.view()).unwrap().is_empty());
        }
    }
}
