//! AWQ in the layout of AutoAWQ's `WQLinear_GEMM`: 4 bits.
//!
//! For a module `X` with G groups of in/G input channels:
//!
//! | tensor      | dtype          | shape       |
//! |-------------|----------------|-------------|
//! | `X.qweight` | I32            | (in, out/8) |
//! | `X.qzeros`  | I32            | (G, out/8)  |
//! | `X.scales`  | F16, BF16, F32 | (G, out)    |
//!
//! ```text
//! W[o][i] = (q[i][o] − z[i / (in/G)][o]) · s[i / (in/G)][o]
//! ```
//!
//! A word holds 8 neighbouring output channels; from its lowest nibble up they are the channels
//! 0, 2, 4, 6, 1, 3, 5, 7.

use std::ops::Range;

use lora_format::Dtype;

use super::grouped::{self, GroupOf, Grouped, LANES, Packing, Square, word};
use super::survey::{Part, Result, Survey};
use super::{QuantisedWeight, Scheme};

const METHOD: &str = "awq";
const BITS: usize = 4;
/// Codes per word.
const PER_WORD: usize = 8;
/// How far up in its word each of 8 neighbouring output channels is.
const SHIFTS: [u32; PER_WORD] = [0, 16, 4, 20, 8, 24, 12, 28];

/// Enters every weight that AWQ quantised. Shapes leave no doubt, so that a base without a
/// configuration can be read too.
pub(super) fn find(survey: &mut Survey<'_>) {
    if !matches!(survey.method(), None | Some(METHOD)) {
        return;
    }
    let settings = check_settings(survey);
    for (module, codes) in survey.ending_in(".qweight") {
        survey.claim(&codes);
        for name in ["qzeros", "scales"] {
            if let Some(part) = survey.part(&format!("{module}.{name}")) {
                survey.claim(&part);
            }
        }
        let weight = settings.clone().and_then(|size| weight(survey, module, &codes, size));
        survey.enter(METHOD, weight);
    }
}

/// Refuses a configuration of another width or layout; gives `group_size`, −1 for all channels.
fn check_settings(survey: &Survey<'_>) -> Result<Option<i64>> {
    let Some(config) = survey.config() else { return Ok(None) };
    if config.positive("bits")?.is_some_and(|bits| bits != BITS) {
        return Err(config.problem("bits", "4, the width that AWQ is read with"));
    }
    for key in ["version", "format", "checkpoint_format"] {
        let layout = config.string(key)?;
        if layout.is_some_and(|layout| !layout.eq_ignore_ascii_case("gemm")) {
            return Err(config.problem(key, "gemm, the layout that AWQ is read in"));
        }
    }
    config.integer("group_size")
}

fn weight(
    survey: &Survey<'_>,
    module: &str,
    codes: &Part<'_>,
    group_size: Option<i64>,
) -> Result<QuantisedWeight> {
    let zeros = survey.required(codes, &format!("{module}.qzeros"))?;
    let scales = survey.required(codes, &format!("{module}.scales"))?;
    codes.expect_dtype(&[Dtype::I32])?;
    zeros.expect_dtype(&[Dtype::I32])?;
    let (columns, words) = codes.matrix()?;
    if columns == 0 || words == 0 {
        return Err(codes.wrong_shape("no empty dimension".to_owned()));
    }
    let rows = words * PER_WORD;
    let (groups, _) = scales.matrix()?;
    scales.expect_shape(&[groups, rows])?;
    zeros.expect_shape(&[groups, words])?;
    if groups == 0 || !columns.is_multiple_of(groups) {
        return Err(scales.wrong_shape(format!("[a divisor of {columns}, {rows}]")));
    }
    let size = columns / groups;
    match group_size {
        None => {}
        Some(-1) if groups == 1 => {}
        Some(says) if usize::try_from(says) == Ok(size) => {}
        Some(says) => {
            let says = format!("group_size {says}");
            return Err(scales.contradiction(says, format!("groups of {size}")));
        }
    }
    let scheme = Grouped {
        packing: Words { words },
        rows,
        columns,
        groups,
        group_of: GroupOf::Size(size),
        scales: grouped::float_type(&scales)?,
    };
    let (name, dtype) = (format!("{module}.weight"), scales.dtype());
    let parts = [*codes, zeros, scales];
    Ok(QuantisedWeight::new(name, vec![rows, columns], dtype, &parts, Scheme::Awq(scheme)))
}

/// Words of 8 output channels.
#[derive(Clone, Debug)]
pub(super) struct Words {
    /// Words per input channel, and per group of zero points.
    words: usize,
}

#[cfg(test)]
impl Words {
    pub(super) fn for_test(words: usize) -> Words {
        Words { words }
    }
}

impl Packing for Words {
    const ALIGNMENT: usize = PER_WORD;

    fn codes(
        &self,
        words: &[u8],
        rows: Range<usize>,
        channels: Range<usize>,
        codes: &mut Square<i32>,
    ) {
        for (channel, codes) in channels.zip(codes) {
            let at = channel * self.words + rows.start / PER_WORD;
            let bytes = words[4 * at..][..rows.len().div_ceil(PER_WORD) * 4].chunks(4);
            for (codes, bytes) in codes.chunks_exact_mut(LANES).zip(bytes) {
                let word = word(bytes, 0);
                for (code, shift) in codes.iter_mut().zip(SHIFTS) {
                    *code = (word >> shift & 15) as i32;
                }
            }
        }
    }

    fn zeros(&self, words: &[u8], group: usize, rows: Range<usize>, zeros: &mut [i32]) {
        for (zero, row) in zeros.iter_mut().zip(rows) {
            let word = word(words, group * self.words + row / PER_WORD);
            *zero = (word >> SHIFTS[row % PER_WORD] & 15) as i32;
        }
    }

    fn largest(&self) -> i32 {
        15
    }
}

impl Grouped<Words> {
    /// Output channels are neighbours in memory, so that a run of a row is spread over the tensor:
    /// from its first word to the last.
    pub(super) fn codes(&self, first: usize, count: usize) -> Range<usize> {
        let words = self.packing.words;
        let (first_row, last_row) = (first / self.columns, (first + count - 1) / self.columns);
        let last = (self.columns - 1) * words + last_row / PER_WORD;
        4 * (first_row / PER_WORD)..4 * (last + 1)
    }
}
