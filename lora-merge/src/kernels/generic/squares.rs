//! Sums of squares: 32 lanes of `f64`.

use super::super::factors::LANES;
use super::super::stats::canonical;
use super::super::sweep::SQUARE_LANES;
use super::super::vector::Vector;

/// [`energy`](super::super::sweep::energy).
#[inline(always)]
pub(crate) fn energy<V: Vector>(v: V, a: &[f32]) -> f64 {
    let mut sums = Squares::new(v);
    let (whole, rest) = a.as_chunks::<SQUARE_LANES>();
    for a in whole {
        let [lower, upper] = halves(a);
        sums.add([v.widen(v.load(lower)), v.widen(v.load(upper))]);
    }
    sums.total(rest.iter().map(|a| f64::from(*a)))
}

/// [`residual_energy`](super::super::sweep::residual_energy).
#[inline(always)]
pub(crate) fn residual_energy<V: Vector>(v: V, a: &[f32], product: &[f64]) -> f64 {
    let mut sums = Squares::new(v);
    let (whole, rest) = a.as_chunks::<SQUARE_LANES>();
    let (products, rest_product) = product.as_chunks::<SQUARE_LANES>();
    // The product is exact, so the fused operation is a subtraction.
    let minus = v.splat_f64(-1.0);
    for (a, p) in whole.iter().zip(products) {
        let ([lower, upper], [lower_p, upper_p]) = (halves(a), halves(p));
        sums.add([
            v.mul_add_f64(v.load_f64(lower_p), minus, v.widen(v.load(lower))),
            v.mul_add_f64(v.load_f64(upper_p), minus, v.widen(v.load(upper))),
        ]);
    }
    sums.total(rest.iter().zip(rest_product).map(|(a, p)| f64::from(*a) - p))
}

/// The two groups of sixteen. `SQUARE_LANES` is two groups, so nothing here
/// can fail and no check remains.
#[inline(always)]
fn halves<T>(from: &[T; SQUARE_LANES]) -> [&[T; LANES]; 2] {
    let (halves, _) = from.as_chunks::<LANES>();
    [&halves[0], &halves[1]]
}

struct Squares<V: Vector> {
    v: V,
    lanes: [V::Doubles; 2],
}

impl<V: Vector> Squares<V> {
    #[inline(always)]
    fn new(v: V) -> Self {
        Self { v, lanes: [v.splat_f64(0.0); 2] }
    }

    #[inline(always)]
    fn add(&mut self, [lower, upper]: [V::Doubles; 2]) {
        self.lanes = [
            self.v.mul_add_f64(lower, lower, self.lanes[0]),
            self.v.mul_add_f64(upper, upper, self.lanes[1]),
        ];
    }

    /// The sum of all lanes, once the `rest` of the elements has joined them.
    #[inline(always)]
    fn total(self, rest: impl Iterator<Item = f64>) -> f64 {
        let mut lanes = [[0.0; LANES]; 2];
        self.v.store_f64(self.lanes[0], &mut lanes[0]);
        self.v.store_f64(self.lanes[1], &mut lanes[1]);
        let lanes = lanes.as_flattened_mut();
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane = x.mul_add(x, *lane);
        }
        canonical(lanes.iter().fold(0.0, |sum, lane| sum + lane))
    }
}
