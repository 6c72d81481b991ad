//! Low-rank terms: what every additive method with factors comes down to.
//!
//! A [`Term`] is `s·L·R` placed somewhere in a stored matrix: L and R are strided views of the
//! adapter's tensors, so that the transpose of Conv1D, a convolution's flattening, one expert of a
//! fused tensor and every other row of an interleaved one are all the same arithmetic. The terms
//! of one matrix, of however many adapters, are packed into one pair of factors with their ranks
//! side by side: they are summed in the accumulator and rounded once.

use std::ops::Range;

use lora_format::Tensor;
use lora_format::model::{Form, LowRank, Shared};

use crate::kernels::{Factors, Segment};
use crate::numbers::decode_into;
use crate::orientation::Orientation;

/// `s·L·R`, and where in the stored matrix it goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// Index of the adapter.
    pub adapter: usize,
    /// Index of its component.
    pub component: usize,
    /// L, rows × rank.
    pub left: View,
    /// R, rank × columns.
    pub right: View,
    /// The stored rows that L's rows belong to.
    pub rows: Stride,
    /// The stored columns that R's columns belong to.
    pub cols: Stride,
    /// s, with the weight of the adapter.
    pub scale: f64,
    /// The factor whose elements another term of the component accounts for: where the parts of a
    /// fused projection are stored apart, each of them takes the same inputs.
    pub again: Option<Factor>,
}

/// Which factor of a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factor {
    /// A.
    A,
    /// B.
    B,
}

/// A matrix inside a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The tensor.
    pub factor: Factor,
    /// Its element at row 0, column 0.
    pub offset: usize,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl View {
    /// A whole row-major matrix.
    pub(crate) fn whole(factor: Factor, rows: usize, cols: usize) -> View {
        View { factor, offset: 0, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub(crate) fn transposed(self) -> View {
        let View { factor, offset, rows, cols, row_stride, col_stride } = self;
        let (row_stride, col_stride) = (col_stride, row_stride);
        View { factor, offset, rows: cols, cols: rows, row_stride, col_stride }
    }

    /// Its columns `columns` of row `row`.
    fn read(&self, tensor: &Tensor, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let first = self.offset + row * self.row_stride + columns.start * self.col_stride;
        decode_into(tensor, first, self.col_stride, out);
    }
}

/// Places `start, start + step, …` in a row or a column of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stride {
    /// The first.
    pub start: usize,
    /// From one to the next.
    pub step: usize,
}

impl Stride {
    /// All places.
    pub const ALL: Stride = Stride { start: 0, step: 1 };

    fn place(self, index: usize) -> usize {
        self.start + index * self.step
    }

    /// The indices whose places lie in `places`.
    fn indices(self, places: &Range<usize>) -> Range<usize> {
        let index = |place: usize| place.saturating_sub(self.start).div_ceil(self.step);
        index(places.start)..index(places.end)
    }
}

/// The term of a whole component in a matrix that it fits; `None` for forms that are no product of
/// two factors.
pub(crate) fn term(
    form: &Form,
    orientation: Orientation,
    (adapter, component): (usize, usize),
    weight: f64,
) -> Option<Term> {
    let (b, a, scale) = match form {
        Form::LowRank(form) if form.magnitude.is_none() => low_rank(form),
        Form::Shared(form) => shared(form),
        _ => return None,
    };
    let (left, right) = match orientation {
        Orientation::OutIn => (b, a),
        Orientation::InOut => (a.transposed(), b.transposed()),
    };
    let scale = scale * weight;
    let (rows, cols) = (Stride::ALL, Stride::ALL);
    Some(Term { adapter, component, left, right, rows, cols, scale, again: None })
}

fn low_rank(form: &LowRank) -> (View, View, f64) {
    let rank = form.rank();
    let b = View::whole(Factor::B, form.out_features(), rank);
    let a = View::whole(Factor::A, rank, form.in_features());
    (b, a, form.scale())
}

/// The first columns of A and the first rows of B are this layer's. How many columns, the file
/// does not know: see [`Term::fit`].
fn shared(form: &Shared) -> (View, View, f64) {
    let (rank, widest) = match *form.a.shape.as_slice() {
        [rank, widest] => (rank, widest),
        _ => (0, 0),
    };
    let b = View::whole(Factor::B, form.out_gain.elements(), rank);
    (b, View::whole(Factor::A, rank, widest), 1.0)
}

impl Term {
    /// Cuts the factors to the matrix: VeRA's are wider than most layers.
    pub(crate) fn fit(mut self, rows: usize, cols: usize) -> Term {
        self.left.rows = self.left.rows.min(rows);
        self.right.cols = self.right.cols.min(cols);
        self
    }

    /// How many elements of each tensor of its form it takes, by the tensor's position in
    /// [`Form::tensors`].
    pub(crate) fn elements(&self, form: &Form) -> Vec<(usize, usize)> {
        let size = |view: &View| match self.again {
            Some(factor) if factor == view.factor => 0,
            _ => view.rows * view.cols,
        };
        let (a, b) = match self.left.factor {
            Factor::A => (&self.left, &self.right),
            Factor::B => (&self.right, &self.left),
        };
        let mut taken = vec![(0, size(a)), (1, size(b))];
        match form {
            Form::LowRank(form) if form.rank_gain.is_some() => taken.push((2, self.rank())),
            Form::Shared(_) => {
                let out = match self.left.factor {
                    Factor::B => self.left.rows,
                    Factor::A => self.right.cols,
                };
                taken.extend([(2, self.rank()), (3, out)]);
            }
            _ => {}
        }
        taken
    }

    /// Whether it has no element outside a matrix, and its factors fit each other.
    pub(crate) fn lies_within(&self, rows: usize, cols: usize) -> bool {
        let last = |stride: Stride, count: usize| {
            let steps = count.checked_sub(1)?.checked_mul(stride.step)?;
            stride.start.checked_add(steps)
        };
        let inside = |stride, count, length| {
            count == 0 || last(stride, count).is_some_and(|last| last < length)
        };
        self.left.cols == self.right.rows
            && inside(self.rows, self.left.rows, rows)
            && inside(self.cols, self.right.cols, cols)
    }

    /// The rank.
    pub fn rank(&self) -> usize {
        self.right.rows
    }
}

/// The factors of a matrix from its terms, decoded straight into their place, so that no factor is
/// held twice. `form` gives the form that a term belongs to.
pub(crate) fn pack<'a>(
    (rows, cols): (usize, usize),
    terms: &[Term],
    form: &dyn Fn(&Term) -> &'a Form,
) -> Factors {
    let sources: Vec<Source<'_>> = terms.iter().map(|term| Source::new(term, form(term))).collect();
    let total: usize = terms.iter().map(Term::rank).sum();
    let mut left = vec![0.0; rows * total];
    let mut before = 0;
    for (term, source) in terms.iter().zip(&sources) {
        for row in 0..term.left.rows {
            let at = term.rows.place(row) * total + before;
            source.left_row(row, &mut left[at..at + term.rank()]);
        }
        before += term.rank();
    }
    let segments: Vec<Segment> =
        terms.iter().map(|term| Segment { ranks: term.rank(), scale: term.scale }).collect();
    let mut owner = Vec::with_capacity(total);
    for (index, term) in terms.iter().enumerate() {
        owner.extend((0..term.rank()).map(|k| (index, k)));
    }
    Factors::pack_segments(rows, cols, &segments, left, |k, columns, row| {
        let (index, k) = owner[k];
        let (term, source) = (&terms[index], &sources[index]);
        let indices = term.cols.indices(&columns);
        let indices = indices.start.min(term.right.cols)..indices.end.min(term.right.cols);
        if term.cols == Stride::ALL && indices.len() == row.len() {
            source.right_row(k, indices, row);
            return;
        }
        row.fill(0.0);
        let mut values = vec![0.0; indices.len()];
        source.right_row(k, indices.clone(), &mut values);
        for (index, value) in indices.zip(values) {
            row[term.cols.place(index) - columns.start] = value;
        }
    })
}

/// A term's tensors and the gains that its elements carry.
struct Source<'a> {
    term: &'a Term,
    left: &'a Tensor,
    right: &'a Tensor,
    /// Of every rank.
    rank_gain: Option<Vec<f32>>,
    /// Of every row of L.
    row_gain: Option<Vec<f32>>,
    /// Of every column of R.
    col_gain: Option<Vec<f32>>,
}

impl<'a> Source<'a> {
    fn new(term: &'a Term, form: &'a Form) -> Source<'a> {
        let (a, b) = factors(form);
        let tensor = |view: &View| match view.factor {
            Factor::A => a,
            Factor::B => b,
        };
        let (rank_gain, out_gain) = match form {
            Form::LowRank(form) => (form.rank_gain.as_ref(), None),
            Form::Shared(form) => (Some(&form.in_gain), Some(&form.out_gain)),
            _ => (None, None),
        };
        let values = |tensor: Option<&Tensor>| tensor.and_then(Tensor::to_f32);
        let (row_gain, col_gain) = match term.left.factor {
            Factor::B => (values(out_gain), None),
            Factor::A => (None, values(out_gain)),
        };
        let (left, right) = (tensor(&term.left), tensor(&term.right));
        Source { term, left, right, rank_gain: values(rank_gain), row_gain, col_gain }
    }

    fn left_row(&self, row: usize, out: &mut [f32]) {
        self.term.left.read(self.left, row, 0..out.len(), out);
        if let Some(gain) = &self.row_gain {
            out.iter_mut().for_each(|value| *value *= gain[row]);
        }
    }

    fn right_row(&self, k: usize, columns: Range<usize>, out: &mut [f32]) {
        self.term.right.read(self.right, k, columns.clone(), out);
        if let Some(gain) = &self.rank_gain {
            out.iter_mut().for_each(|value| *value *= gain[k]);
        }
        if let Some(gain) = &self.col_gain {
            for (value, gain) in out.iter_mut().zip(&gain[columns]) {
                *value *= gain;
            }
        }
    }
}

/// A and B of a form that has them.
fn factors(form: &Form) -> (&Tensor, &Tensor) {
    match form {
        Form::LowRank(form) => (&form.a, &form.b),
        Form::Experts(form) => (&form.a, &form.b),
        Form::Shared(form) => (&form.a, &form.b),
        _ => unreachable!("only forms with factors have terms"),
    }
}
