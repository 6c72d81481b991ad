//! Where the energy of a difference lies, and where the noise that storing it left: sums over rows
//! and columns, for the estimate of [`crate::noise`].

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::delta::Delta;
use super::measure::grids;
use crate::kernels::with_ieee_floats;
use crate::noise::Profile;

/// Rows whose sums one task makes.
const SPAN: usize = 128;

/// The energies of ΔW by row and column, and the variances of what rounding W₁ (and a base stored
/// with less precision) left in it, as [`super::Change::storage_variance`] defines them.
pub fn profiles(delta: &Delta<'_>) -> (Profile, Profile) {
    let (rows, cols) = delta.shape();
    let (base_grid, tuned_grid) = grids(delta.base.float(), delta.tuned.float());
    let empty = || Profile { rows: Vec::new(), cols: vec![0.0; cols] };
    let parts: Vec<(Profile, Profile)> = (0..rows.div_ceil(SPAN))
        .into_par_iter()
        .map(|part| {
            with_ieee_floats(|| {
                let (mut energy, mut noise) = (empty(), empty());
                let mut run = vec![0.0f32; 4 * cols];
                let (difference, rest) = run.split_at_mut(cols);
                let (base, rest) = rest.split_at_mut(cols);
                let (tuned, steps) = rest.split_at_mut(cols);
                for row in part * SPAN..((part + 1) * SPAN).min(rows) {
                    delta.read(row, difference);
                    energy.add_row(difference, 1.0);
                    let mut variance = 0.0;
                    delta.read_base(row, base);
                    delta.read_tuned(row, tuned);
                    for (grid, values) in [(tuned_grid, &*tuned), (base_grid, &*base)] {
                        if let Some(grid) = grid {
                            grid.spacings(difference, values, steps);
                            noise.add_row(steps, 1.0 / 12.0);
                            variance += noise.rows.pop().unwrap_or(0.0);
                        }
                    }
                    noise.rows.push(variance);
                }
                (energy, noise)
            })
        })
        .collect();
    let (mut energy, mut noise) = (empty(), empty());
    for (more_energy, more_noise) in parts {
        energy.append(more_energy);
        noise.append(more_noise);
    }
    (energy, noise)
}

impl Profile {
    /// One more row of elements, whose squares times `weight` are added.
    fn add_row(&mut self, elements: &[f32], weight: f64) {
        let mut row = 0.0;
        for (sum, &element) in self.cols.iter_mut().zip(elements) {
            let square = f64::from(element) * f64::from(element) * weight;
            *sum += square;
            row += square;
        }
        self.rows.push(row);
    }

    /// The rows below these.
    fn append(&mut self, below: Profile) {
        self.rows.extend(below.rows);
        self.cols.iter_mut().zip(below.cols).for_each(|(sum, more)| *sum += more);
    }
}
