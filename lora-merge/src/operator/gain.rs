//! IA³ (Liu et al. 2022, arXiv 2205.05638; PEFT's `ia3_l`): `W' = W ⊙ l`.
//!
//! The gain belongs to input features (of feed-forward layers) or to output features, and then to
//! the bias as well. LyCORIS stores l − 1. In the stored matrix it multiplies rows or columns; the columns of a
//! convolution are in·kernel, and every position of an input channel's kernel has its gain. In a
//! grouped convolution, an output channel sees the input channels of its group only, whose gains
//! they are.

use std::ops::Range;

use lora_format::model::{Gain, GainAxis, GainStored};

use super::shapes::{self, Fits, count, decode};
use super::{Features, Matrix, Operator};
use crate::kernels::Isa;
use crate::orientation::Orientation;

struct Gains {
    matrix: Matrix,
    gain: Vec<f64>,
    place: Place,
}

/// Which gain an element has.
enum Place {
    /// That of its row.
    Row,
    /// That of its column's channel; of a grouped convolution, in the row's group.
    Column {
        /// Rows that share their gains: all, or those of a group.
        rows: usize,
        /// Channels that a row sees.
        channels: usize,
    },
}

/// What the gain's length fixes. Of a convolution's input it is the channels, and how many rows
/// of the kernel each has only the matrix knows.
pub(super) fn features(form: &Gain) -> Features {
    let length = count(&form.gain.shape);
    match form.axis {
        GainAxis::Out => Features { out: Some(length), input: None },
        GainAxis::In if form.gain.shape.len() > 2 => Features { out: None, input: None },
        GainAxis::In => Features { out: None, input: Some(length) },
    }
}

pub(super) fn check(form: &Gain, matrix: Matrix) -> Fits {
    let length = count(&form.gain.shape);
    let (expected, fits) = match form.axis {
        GainAxis::Out => (matrix.out(), length == matrix.out()),
        GainAxis::In => {
            let channels = matrix.input() / matrix.kernel.max(1);
            let groups = length.checked_div(channels).unwrap_or(0);
            let whole = groups * channels == length && channels * matrix.kernel == matrix.input();
            let convolution = form.gain.shape.len() > 2;
            let grouped = convolution && matrix.orientation == Orientation::OutIn;
            let shared =
                groups == 1 || (grouped && groups > 0 && matrix.rows.is_multiple_of(groups));
            (channels, whole && shared && (convolution || matrix.kernel == 1))
        }
    };
    shapes::tensor(&form.gain, format!("{expected} values"), fits && length > 0)
}

pub(super) fn prepare(form: &Gain, matrix: Matrix) -> Box<dyn Operator> {
    let one = match form.stored {
        GainStored::Whole => 0.0,
        GainStored::LessOne => 1.0,
    };
    let gain: Vec<f64> = decode(&form.gain).into_iter().map(|l| one + f64::from(l)).collect();
    let place = match (form.axis, matrix.orientation) {
        (GainAxis::Out, Orientation::OutIn) | (GainAxis::In, Orientation::InOut) => Place::Row,
        (GainAxis::Out, Orientation::InOut) => {
            Place::Column { rows: matrix.rows, channels: matrix.cols }
        }
        (GainAxis::In, Orientation::OutIn) => {
            let channels = matrix.cols / matrix.kernel;
            Place::Column { rows: matrix.rows / (gain.len() / channels), channels }
        }
    };
    Box::new(Gains { matrix, gain, place })
}

impl Operator for Gains {
    fn add_rows(&self, _: Isa, rows: Range<usize>, base: &[f32], weight: f64, delta: &mut [f64]) {
        let cols = self.matrix.cols;
        let add = |gain: f64, w: f32, delta: &mut f64| {
            let w = f64::from(w);
            *delta += weight * (w * gain - w);
        };
        let lines = base.chunks_exact(cols).zip(delta.chunks_exact_mut(cols));
        for (row, (base, delta)) in rows.zip(lines) {
            match self.place {
                Place::Row => {
                    let elements = base.iter().zip(delta);
                    elements.for_each(|(&w, delta)| add(self.gain[row], w, delta));
                }
                Place::Column { rows, channels } => {
                    let gain = &self.gain[row / rows * channels..][..channels];
                    let kernel = cols / channels;
                    let blocks = base.chunks_exact(kernel).zip(delta.chunks_exact_mut(kernel));
                    for (&gain, (base, delta)) in gain.iter().zip(blocks) {
                        base.iter().zip(delta).for_each(|(&w, delta)| add(gain, w, delta));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lora_format::Tensor;
    use lora_format::model::Form;

    use super::super::testing::{self, Noise, assert_change, assert_refused, at, floats};
    use super::*;

    fn form(gain: &Tensor, axis: GainAxis) -> Form {
        Form::Gain(Gain { gain: gain.clone(), axis, stored: GainStored::Whole })
    }

    #[test]
    fn gains_multiply_what_they_belong_to() {
        let mut noise = Noise::new(1);
        let (out, input, kernel) = (6, 10, 9);
        let outs = testing::tensor(&mut noise, &[out, 1]);
        let ins = testing::tensor(&mut noise, &[1, input]);
        let (l_out, l_in) = (at(&outs), at(&ins));
        let base = floats(&mut noise, out * input * kernel);
        let w = |index: usize| f64::from(base[index]);
        let short = &base[..out * input];

        let channels = testing::tensor_of(&[1, input, 1, 1], &ins.to_f32().unwrap());
        let channels = form(&channels, GainAxis::In);
        let (outs, ins) = (form(&outs, GainAxis::Out), form(&ins, GainAxis::In));
        let linear = testing::out_in(out, input);
        let conv1d = testing::in_out(input, out);
        let convolution = testing::convolution(out, input, kernel);
        assert_change(&outs, linear, short, 1e-15, |r, c| (l_out(r) - 1.0) * w(r * input + c));
        assert_change(&ins, linear, short, 1e-15, |r, c| (l_in(c) - 1.0) * w(r * input + c));
        assert_change(&outs, conv1d, short, 1e-15, |r, c| (l_out(c) - 1.0) * w(r * out + c));
        assert_change(&ins, conv1d, short, 1e-15, |r, c| (l_in(r) - 1.0) * w(r * out + c));
        let at = |r, c| w(r * input * kernel + c);
        assert_change(&outs, convolution, &base, 1e-15, |r, c| (l_out(r) - 1.0) * at(r, c));
        assert_change(&channels, convolution, &base, 1e-15, |r, c| {
            (l_in(c / kernel) - 1.0) * at(r, c)
        });
        let bias = testing::in_out(1, out);
        assert_change(&outs, bias, &base[..out], 1e-15, |_, c| (l_out(c) - 1.0) * w(c));
    }

    #[test]
    fn gains_may_be_stored_less_one() {
        let mut noise = Noise::new(3);
        let tensor = testing::tensor(&mut noise, &[7]);
        let l = at(&tensor);
        let base = floats(&mut noise, 5 * 7);
        let gain = Gain { gain: tensor, axis: GainAxis::In, stored: GainStored::LessOne };
        assert_change(&Form::Gain(gain), testing::out_in(5, 7), &base, 1e-15, |r, c| {
            l(c) * f64::from(base[r * 7 + c])
        });
    }

    #[test]
    fn groups_have_their_own_input_gains() {
        let mut noise = Noise::new(2);
        let (groups, out, channels, kernel) = (3, 6, 4, 5);
        let gain = testing::tensor(&mut noise, &[1, groups * channels, 1]);
        let matrix = testing::convolution(out, channels, kernel);
        let base = floats(&mut noise, out * channels * kernel);
        let l = at(&gain);
        assert_change(&form(&gain, GainAxis::In), matrix, &base, 1e-15, |r, c| {
            let group = r / (out / groups);
            (l(group * channels + c / kernel) - 1.0) * f64::from(base[r * channels * kernel + c])
        });
    }

    #[test]
    fn a_gain_of_one_changes_nothing() {
        let base = [0.1_f32, -3.0, 7.5e-40, 0.0];
        let form = form(&testing::tensor_of(&[1, 2], &[1.0, 1.0]), GainAxis::In);
        assert_eq!(testing::change(&form, testing::out_in(2, 2), &base), [0.0; 4]);
    }

    #[test]
    fn other_lengths_are_refused() {
        let gain = testing::tensor_of(&[1, 4], &[1.0; 4]);
        let words = "expected 3 values, found [1, 4]";
        assert_refused(&form(&gain, GainAxis::In), testing::out_in(2, 3), words);
        assert_refused(&form(&gain, GainAxis::Out), testing::in_out(2, 3), words);
        // Twice the inputs of a matrix are no groups.
        let words = "expected 2 values, found [1, 4]";
        assert_refused(&form(&gain, GainAxis::In), testing::out_in(2, 2), words);
        let none = testing::tensor_of(&[1, 0], &[]);
        assert_refused(&form(&none, GainAxis::In), testing::out_in(2, 2), "expected 2 values");
    }
}
