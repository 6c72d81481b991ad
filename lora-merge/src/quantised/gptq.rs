//! GPTQ, as AutoGPTQ and GPTQModel write it: 2, 3, 4 or 8 bits.
//!
//! For a module `X` with b bits and G groups of input channels:
//!
//! | tensor      | dtype          | shape           |
//! |-------------|----------------|-----------------|
//! | `X.qweight` | I32            | (⌈in·b/32⌉, out) |
//! | `X.qzeros`  | I32            | (G, ⌈out·b/32⌉)  |
//! | `X.scales`  | F16, BF16, F32 | (G, out)        |
//! | `X.g_idx`   | I32            | (in); may be missing |
//!
//! ```text
//! W[o][i] = (q[i][o] − z[g(i)][o]) · s[g(i)][o]        g(i) = g_idx[i], or i / group_size
//! ```
//!
//! The codes of one output channel (and the zero points of one group) are a stream of bits, the
//! first code in the lowest bits of the first word. Codes of 3 bits straddle words, three of which
//! hold 32. With `desc_act` the groups are those of the channels sorted by activation, and `g_idx`
//! is not ascending.
//!
//! # Zero points
//!
//! `checkpoint_format: gptq_v2` stores z. `gptq`, the default, stores z − 1, which for z = 0 wraps
//! around, and what that does to the neighbours in the word is a matter of the writer. GPTQModel
//! (`convert_gptq_v2_to_v1_format_module`) subtracts 1 from every field of 2, 4 or 8 bits at once,
//! in one subtraction per word that borrows from field to field, and so the inverse is one addition
//! per word; zero points of 3 bits it wraps each for itself.

use std::ops::Range;

use lora_format::Dtype;

use super::bnb::refuse_transposed;
use super::config::Fields;
use super::grouped::{self, GroupOf, Grouped, LANES, Packing, Square, word};
use super::survey::{Part, Result, Survey};
use super::{QuantisedWeight, Scheme};

pub(super) const METHOD: &str = "gptq";
/// The widths of codes.
const WIDTHS: [usize; 4] = [2, 3, 4, 8];

/// Enters every weight that GPTQ quantised.
pub(super) fn find(survey: &mut Survey<'_>) {
    if survey.method() != Some(METHOD) {
        return;
    }
    let Some(config) = survey.config() else { return };
    let settings = Settings::read(&config);
    for (module, codes) in survey.ending_in(".qweight") {
        survey.claim(&codes);
        let others = ["qzeros", "scales", "g_idx"];
        let [zeros, scales, groups] = others.map(|name| survey.part(&format!("{module}.{name}")));
        for part in [zeros, scales, groups].iter().flatten() {
            survey.claim(part);
        }
        let weight = match &settings {
            Ok(settings) => settings.weight(survey, module, &codes, groups),
            Err(problem) => Err(problem.clone()),
        };
        survey.enter(METHOD, weight);
    }
}

/// What `quantization_config` says of all weights.
struct Settings {
    bits: usize,
    /// `None` for one group of all input channels.
    group_size: Option<usize>,
    /// `checkpoint_format`.
    format: String,
    /// Whether some modules have settings of their own (`dynamic`).
    dynamic: bool,
}

impl Settings {
    fn read(config: &Fields<'_>) -> Result<Settings> {
        let bits =
            config.positive("bits")?.ok_or_else(|| config.problem("bits", "2, 3, 4 or 8"))?;
        let group_size = match config.integer("group_size")? {
            None | Some(-1) => None,
            Some(size) => {
                let size = usize::try_from(size).ok().filter(|&size| size > 0);
                Some(size.ok_or_else(|| config.problem("group_size", "-1 or a positive integer"))?)
            }
        };
        // transformers prefers the older name, which GPTQModel writes.
        let format = match config.string("checkpoint_format")? {
            Some(format) => Some(format),
            None => config.string("format")?,
        };
        let marlin = config.boolean("is_marlin_format")?.unwrap_or(false);
        let format = if marlin { "marlin" } else { format.unwrap_or("gptq") };
        let dynamic = config.object("dynamic")?.is_some_and(|rules| rules.keys().next().is_some());
        Ok(Settings { bits, group_size, format: format.to_lowercase(), dynamic })
    }

    fn weight(
        &self,
        survey: &mut Survey<'_>,
        module: &str,
        codes: &Part<'_>,
        groups: Option<Part<'_>>,
    ) -> Result<QuantisedWeight> {
        refuse_transposed(survey, codes)?;
        // GPTQModel packs embeddings along their rows, and nothing but the name tells.
        let last = module.rsplit_once('.').map_or(module, |(_, last)| last);
        if last.contains("embed") || last == "wte" {
            return Err(codes.unsupported("an embedding quantised with GPTQ"));
        }
        let stored_less_one = match self.format.as_str() {
            "gptq" => true,
            "gptq_v2" => false,
            other => return Err(codes.unsupported(format!("checkpoint_format {other}"))),
        };
        if !WIDTHS.contains(&self.bits) {
            return Err(codes.unsupported(format!("GPTQ with {} bits", self.bits)));
        }
        let zeros = survey.required(codes, &format!("{module}.qzeros"))?;
        let scales = survey.required(codes, &format!("{module}.scales"))?;
        codes.expect_dtype(&[Dtype::I32])?;
        zeros.expect_dtype(&[Dtype::I32])?;
        let (words, rows) = codes.matrix()?;
        let (group_count, _) = scales.matrix()?;
        if words == 0 || rows == 0 || group_count == 0 {
            let empty = [codes, &scales][usize::from(words > 0 && rows > 0)];
            return Err(empty.wrong_shape("no empty dimension".to_owned()));
        }
        if let Some(groups) = &groups {
            groups.expect_dtype(&[Dtype::I32])?;
            groups.expect_elements(groups.shape().first().copied().unwrap_or(0))?;
        }
        let inputs = groups.as_ref().map(|groups| groups.info.elements() as usize);
        let (bits, columns) = self.width(codes, words, inputs)?;
        let zero_words = (rows * bits).div_ceil(32);
        scales.expect_shape(&[group_count, rows])?;
        zeros.expect_shape(&[group_count, zero_words])?;
        let mut parts = vec![*codes, zeros, scales];
        let group_of = match groups {
            Some(groups) => {
                check_groups(&groups, survey.bytes(&groups)?, group_count)?;
                parts.push(groups);
                GroupOf::Index
            }
            None => {
                let size = self.group_size.unwrap_or(columns);
                if group_count != columns.div_ceil(size) {
                    let expected = format!("[{}, {rows}]", columns.div_ceil(size));
                    return Err(scales.wrong_shape(expected));
                }
                GroupOf::Size(size)
            }
        };
        let scheme = Grouped {
            packing: Words { bits, rows, words, zero_words, stored_less_one },
            rows,
            columns,
            groups: group_count,
            group_of,
            scales: grouped::float_type(&scales)?,
        };
        let (name, dtype) = (format!("{module}.weight"), scales.dtype());
        Ok(QuantisedWeight::new(name, vec![rows, columns], dtype, &parts, Scheme::Gptq(scheme)))
    }

    /// The width of the codes and the number of input channels, given the number of words per
    /// output channel and, where `g_idx` is there to say, the number of input channels.
    fn width(
        &self,
        codes: &Part<'_>,
        words: usize,
        inputs: Option<usize>,
    ) -> Result<(usize, usize)> {
        let wrong = |words: String| codes.wrong_shape(format!("[{words}, out]"));
        let Some(inputs) = inputs else {
            let bits = words.checked_mul(32).filter(|bits| bits.is_multiple_of(self.bits));
            let bits = bits.ok_or_else(|| wrong(format!("a multiple of {}", self.bits)))?;
            return Ok((self.bits, bits / self.bits));
        };
        let fits = |bits: usize| words == (inputs * bits).div_ceil(32) && inputs > 0;
        if fits(self.bits) {
            return Ok((self.bits, inputs));
        }
        let mut others = WIDTHS.into_iter().filter(|&bits| fits(bits));
        match (others.next(), others.next()) {
            (Some(bits), None) if self.dynamic => Ok((bits, inputs)),
            (Some(bits), None) => {
                let (says, found) = (format!("{} bits", self.bits), format!("{bits} bits"));
                Err(codes.contradiction(says, found))
            }
            _ => Err(wrong((inputs * self.bits).div_ceil(32).to_string())),
        }
    }
}

/// Refuses a `g_idx` that names a group that is not there, or one group where there are several.
fn check_groups(part: &Part<'_>, bytes: &[u8], groups: usize) -> Result<()> {
    let mut largest = 0;
    for channel in 0..bytes.len() / 4 {
        let group = word(bytes, channel) as i32;
        if usize::try_from(group).is_ok_and(|group| group < groups) {
            largest = largest.max(group);
            continue;
        }
        let expected = format!("groups from 0 to {}", groups - 1);
        return Err(part.wrong_value(&expected, format!("{group} for input channel {channel}")));
    }
    // Old writers left it blank where groups are neighbours; no loader of today reads it so.
    if largest == 0 && groups > 1 {
        let expected = format!("{groups} groups");
        return Err(part.wrong_value(&expected, "group 0 for every input channel".to_owned()));
    }
    Ok(())
}

/// Streams of codes along the input channels, of zero points along the output channels.
#[derive(Clone, Debug)]
pub(super) struct Words {
    bits: usize,
    /// Output channels.
    rows: usize,
    /// Words per output channel.
    words: usize,
    /// Words of zero points per group.
    zero_words: usize,
    /// Whether zero points are stored less 1.
    stored_less_one: bool,
}

impl Packing for Words {
    const ALIGNMENT: usize = 1;

    fn codes(
        &self,
        words: &[u8],
        rows: Range<usize>,
        channels: Range<usize>,
        codes: &mut Square<i32>,
    ) {
        match self.bits {
            2 => self.unpack::<2>(words, rows, channels, codes),
            3 => self.unpack::<3>(words, rows, channels, codes),
            4 => self.unpack::<4>(words, rows, channels, codes),
            _ => self.unpack::<8>(words, rows, channels, codes),
        }
    }

    fn zeros(&self, words: &[u8], group: usize, rows: Range<usize>, zeros: &mut [i32]) {
        let words = &words[4 * group * self.zero_words..][..4 * self.zero_words];
        match self.bits {
            2 => self.unpack_zeros::<2>(words, rows, zeros),
            3 => self.unpack_zeros::<3>(words, rows, zeros),
            4 => self.unpack_zeros::<4>(words, rows, zeros),
            _ => self.unpack_zeros::<8>(words, rows, zeros),
        }
    }

    fn largest(&self) -> i32 {
        (1 << self.bits) - 1
    }
}

impl Words {
    #[cfg(test)]
    pub(super) fn for_test(bits: usize, rows: usize, words: usize, zero_words: usize) -> Words {
        Words { bits, rows, words, zero_words, stored_less_one: false }
    }

    /// The zero points of one group, whose words these are.
    fn unpack_zeros<const BITS: usize>(&self, words: &[u8], rows: Range<usize>, zeros: &mut [i32]) {
        let mask = (1u32 << BITS) - 1;
        // For whole words, 1 in every field: 0x11111111 for 4 bits.
        let (less, ones) = match (self.stored_less_one, BITS) {
            (false, _) => (0, 0),
            (true, 3) => (1, 0),
            (true, _) => (0, u32::MAX / mask),
        };
        for (zero, row) in zeros.iter_mut().zip(rows) {
            let (at, shift) = (row * BITS / 32, row * BITS % 32);
            let mut field = word(words, at).wrapping_add(ones) >> shift;
            if shift + BITS > 32 {
                field |= word(words, at + 1) << (32 - shift);
            }
            *zero = (field.wrapping_add(less) & mask) as i32;
        }
    }

    fn unpack<const BITS: usize>(
        &self,
        words: &[u8],
        rows: Range<usize>,
        channels: Range<usize>,
        codes: &mut Square<i32>,
    ) {
        let mask = (1u32 << BITS) - 1;
        let first = channels.start / 32 * BITS;
        for (chunk, row) in rows.step_by(LANES).enumerate() {
            let mut lanes = [[0u32; LANES]; BITS];
            for (lanes, stream) in lanes.iter_mut().zip(first..self.words) {
                let at = stream * self.rows + row;
                let count = LANES.min(self.rows - row);
                for (lane, bytes) in lanes.iter_mut().zip(words[4 * at..][..4 * count].chunks(4)) {
                    *lane = word(bytes, 0);
                }
            }
            for (channel, codes) in codes.iter_mut().enumerate() {
                let (at, shift) = (channel * BITS / 32, channel * BITS % 32);
                let codes = &mut codes[chunk * LANES..][..LANES];
                for (lane, code) in codes.iter_mut().enumerate() {
                    let mut field = lanes[at][lane] >> shift;
                    if shift + BITS > 32 {
                        field |= lanes[at + 1][lane] << (32 - shift);
                    }
                    *code = (field & mask) as i32;
                }
            }
        }
    }
}

impl Grouped<Words> {
    /// Output channels are neighbours in memory, so that a run of a row is spread over the tensor:
    /// from its first word to the last.
    pub(super) fn codes(&self, first: usize, count: usize) -> Range<usize> {
        let packing = &self.packing;
        let (first_row, last_row) = (first / self.columns, (first + count - 1) / self.columns);
        let last = (packing.words - 1) * packing.rows + last_row;
        4 * first_row..4 * (last + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeros(bits: usize, words: &[u32], count: usize) -> Vec<i32> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut packing = Words::for_test(bits, count, 0, words.len());
        packing.stored_less_one = true;
        let mut zeros = vec![-1; count];
        packing.zeros(&bytes, 0, 0..count, &mut zeros);
        zeros
    }

    #[test]
    fn zero_points_stored_less_one_undo_the_borrow_of_the_writer() {
        let points = [0u32, 3, 0, 0, 15, 8, 1, 0];
        let word = points.iter().rev().fold(0, |word, point| word << 4 | point);
        let stored = word.wrapping_sub(0x1111_1111);
        assert_eq!(zeros(4, &[stored], 8), points.map(|point| point as i32));
        assert_eq!(zeros(8, &[0x7F7F_7F7Fu32], 4), [128; 4]);
        assert_eq!(zeros(2, &[0x5555_5555], 16), [2; 16]);
    }

    #[test]
    fn zero_points_of_three_bits_wrap_each_for_itself() {
        // 32 fields of 7: every one of them stood for 0.
        assert_eq!(zeros(3, &[u32::MAX; 3], 32), [0; 32]);
        // Field 10 straddles the first two words: 3 is 0b011.
        let words = [3 << 30, 0, 0];
        let mut expected = [1; 32];
        expected[10] = 4;
        assert_eq!(zeros(3, &words, 32), expected);
    }
}
