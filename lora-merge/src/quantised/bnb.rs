//! bitsandbytes: 4-bit codes of a table (NF4, FP4), and rows of int8 (LLM.int8).
//!
//! # Four bits
//!
//! For a weight `X` of n elements, row-major, in blocks of `blocksize`:
//!
//! | tensor                               | dtype   | elements                  |
//! |--------------------------------------|---------|---------------------------|
//! | `X`                                  | any     | ⌈n/2⌉ bytes of codes      |
//! | `X.absmax`                           | F32, U8 | ⌈n/blocksize⌉             |
//! | `X.quant_map`                        | F32     | 16                        |
//! | `X.nested_absmax`                    | F32     | ⌈blocks/nested_blocksize⌉ |
//! | `X.nested_quant_map`                 | F32     | 256                       |
//! | `X.quant_state.bitsandbytes__nf4`    | U8      | JSON; or `__fp4`          |
//!
//! The higher half of a byte is the earlier element. With q the codes and a the block's scale,
//!
//! ```text
//! W[i] = quant_map[q[i]] · a[i / blocksize]
//! a[b] = absmax[b]                                                                    (plain)
//! a[b] = nested_quant_map[absmax[b]] · nested_absmax[b / nested_blocksize] + nested_offset
//! ```
//!
//! where every operation rounds to f32, as in `bitsandbytes.functional.dequantize_4bit`. The codes
//! are bytes whatever dtype the tensor has: `bnb_4bit_quant_storage` only names them differently.
//!
//! # Eight bits
//!
//! `X.weight` I8 (out, in), `X.SCB` F32 (out) and `X.weight_format`, which is 0 for row-major:
//! W[o][i] = (q[o][i] · SCB[o]) · (1/127), as `int8_vectorwise_dequant` multiplies it.

use std::ops::Range;

use lora_format::{Dtype, json, limits};
use serde_json::{Map, Value};

use super::survey::{Part, Result, Survey};
use super::{QuantisedProblem, QuantisedWeight, Scheme, config};

const METHOD: &str = "bitsandbytes";
/// The most bytes of a quant state; real ones have less than 300.
const STATE_BYTES: u64 = 16 * 1024;
/// The block sizes that bitsandbytes quantises with.
const BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];
/// The step of int8: a row's largest magnitude has the code 127.
const STEP: f32 = 1.0 / 127.0;

// Positions among the parts; the nested tensors are there only if the scales are quantised.
const CODES: usize = 0;
const ABSMAX: usize = 1;
const MAP: usize = 2;
const NESTED_ABSMAX: usize = 3;
const NESTED_MAP: usize = 4;

/// Enters every weight that bitsandbytes quantised.
pub(super) fn find(survey: &mut Survey<'_>) {
    for kind in ["nf4", "fp4"] {
        for (name, state) in survey.ending_in(&format!(".quant_state.bitsandbytes__{kind}")) {
            survey.claim(&state);
            let weight = four_bit(survey, name, kind, &state);
            survey.enter(METHOD, weight);
        }
    }
    for (module, scales) in survey.ending_in(".SCB") {
        survey.claim(&scales);
        let weight = eight_bit(survey, module, &scales);
        survey.enter(METHOD, weight);
    }
}

/// Refuses a configuration that names another method, or a model whose weights were transposed.
fn check_model(survey: &Survey<'_>, part: &Part<'_>) -> Result<()> {
    refuse_transposed(survey, part)?;
    match survey.method() {
        None | Some(METHOD) => Ok(()),
        Some(other) => Err(part.contradiction(format!("quant_method {other}"), METHOD)),
    }
}

/// Models whose matrices are those of Conv1D, (in, out): transformers transposes them before they
/// are quantised, so that the quantised ones are not the parameters of the full-precision model.
const OF_CONV1D: [&str; 4] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];

/// Refuses a model whose weights were transposed to be quantised.
pub(super) fn refuse_transposed(survey: &Survey<'_>, part: &Part<'_>) -> Result<()> {
    match survey.model_type() {
        Some(model) if OF_CONV1D.contains(&model) => {
            Err(part.unsupported(format!("a quantised {model}, whose weights are transposed,")))
        }
        _ => Ok(()),
    }
}

fn four_bit(
    survey: &mut Survey<'_>,
    name: &str,
    kind: &str,
    state_part: &Part<'_>,
) -> Result<QuantisedWeight> {
    let members = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"];
    let members = members.map(|suffix| survey.part(&format!("{name}.{suffix}")));
    members.iter().flatten().for_each(|part| survey.claim(part));
    let [absmax, map, nested_absmax, nested_map] = members;
    let codes = survey.required(state_part, name)?;
    survey.claim(&codes);
    let missing = |suffix: &str| QuantisedProblem::Missing {
        tensor: codes.name().to_owned(),
        missing: format!("{name}.{suffix}"),
    };
    let absmax = absmax.ok_or_else(|| missing("absmax"))?;
    let map = map.ok_or_else(|| missing("quant_map"))?;
    check_model(survey, state_part)?;
    let state = State::read(survey, state_part, kind, nested_absmax.is_some())?;

    if codes.info.bytes() != state.elements.div_ceil(2) as u64 {
        let expected = format!("{} bytes, two codes each", state.elements.div_ceil(2));
        return Err(codes.wrong_value(&expected, format!("{} bytes", codes.info.bytes())));
    }
    let blocks = state.elements.div_ceil(state.block);
    absmax.expect_elements(blocks)?;
    map.expect_dtype(&[Dtype::F32])?;
    map.expect_elements(16)?;
    let mut parts = vec![codes, absmax, map];
    match (state.nested, nested_absmax) {
        (Some(nested), Some(nested_absmax)) => {
            let nested_map = nested_map.ok_or_else(|| missing("nested_quant_map"))?;
            absmax.expect_dtype(&[Dtype::U8])?;
            nested_absmax.expect_dtype(&[Dtype::F32])?;
            nested_absmax.expect_elements(blocks.div_ceil(nested.block))?;
            nested_map.expect_dtype(&[Dtype::F32])?;
            nested_map.expect_elements(256)?;
            parts.extend([nested_absmax, nested_map]);
        }
        _ => absmax.expect_dtype(&[Dtype::F32])?,
    }
    parts.push(*state_part);
    let scheme = FourBit { elements: state.elements, block: state.block, nested: state.nested };
    let (name, dtype) = (name.to_owned(), state.dtype);
    Ok(QuantisedWeight::new(name, state.shape, dtype, &parts, Scheme::FourBit(scheme)))
}

/// What the JSON text of a quant state says.
struct State {
    shape: Vec<usize>,
    elements: usize,
    /// Elements per scale.
    block: usize,
    dtype: Dtype,
    nested: Option<Nested>,
}

/// How the scales themselves are quantised.
#[derive(Clone, Copy, Debug)]
struct Nested {
    /// Scales per scale of scales.
    block: usize,
    /// What is added to each.
    offset: f32,
}

impl State {
    fn read(survey: &mut Survey<'_>, part: &Part<'_>, kind: &str, nested: bool) -> Result<State> {
        part.expect_dtype(&[Dtype::U8])?;
        let bytes = part.info.bytes();
        if bytes > STATE_BYTES {
            let expected = format!("at most {STATE_BYTES} bytes of JSON");
            return Err(part.wrong_value(&expected, format!("{bytes} bytes")));
        }
        let object = "a JSON object";
        let value = json::parse(part.name().as_ref(), survey.bytes(part)?).map_err(|error| {
            let why =
                std::error::Error::source(&error).map_or_else(String::new, |why| why.to_string());
            part.wrong_value(object, format!("something else: {why}"))
        })?;
        let Value::Object(map) = value else {
            return Err(part.wrong_value(object, config::brief(&value)));
        };
        let fields = StateFields { part, map };
        fields.get("quant_type", "that of the tensor's name", |value| {
            (value.as_str()? == kind).then_some(())
        })?;
        let shape: Vec<usize> = fields.get("shape", "a list of sizes", |value| {
            let size = |value: &Value| usize::try_from(value.as_u64()?).ok();
            value.as_array()?.iter().map(size).collect()
        })?;
        // Not more elements than there are addresses.
        let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        let ranks = 1..=limits::DIMENSIONS;
        let elements = elements.filter(|&elements| elements > 0 && ranks.contains(&shape.len()));
        let elements = elements.ok_or_else(|| {
            fields.problem("shape", "sizes whose product is a number of elements")
        })?;
        let block = fields.get("blocksize", "a power of two from 32 to 4096", |value| {
            BLOCK_SIZES.into_iter().find(|&size| value.as_u64() == Some(size as u64))
        })?;
        let dtype = fields.get("dtype", "float32, float16 or bfloat16", |value| {
            match value.as_str()? {
                "float32" => Some(Dtype::F32),
                "float16" => Some(Dtype::F16),
                "bfloat16" => Some(Dtype::Bf16),
                _ => None,
            }
        })?;
        let nested = match nested {
            false => None,
            true => Some(Nested {
                block: fields.get("nested_blocksize", "a positive number", |value| {
                    usize::try_from(value.as_u64()?).ok().filter(|&size| size > 0)
                })?,
                offset: fields.get("nested_offset", "a number that fits an F32", |value| {
                    Some(value.as_f64()? as f32).filter(|offset| offset.is_finite())
                })?,
            }),
        };
        Ok(State { shape, elements, block, dtype, nested })
    }
}

/// The fields of a quant state.
struct StateFields<'a> {
    part: &'a Part<'a>,
    map: Map<String, Value>,
}

impl StateFields<'_> {
    fn get<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T> {
        let found = self.map.get(key).and_then(convert);
        found.ok_or_else(|| self.problem(key, expected))
    }

    fn problem(&self, key: &str, expected: &str) -> QuantisedProblem {
        let found = self.map.get(key).map_or("nothing".to_owned(), config::brief);
        self.part.wrong_value(&format!("`{key}` to be {expected}"), found)
    }
}

fn eight_bit(survey: &mut Survey<'_>, module: &str, scales: &Part<'_>) -> Result<QuantisedWeight> {
    let format = survey.part(&format!("{module}.weight_format"));
    format.iter().for_each(|part| survey.claim(part));
    let codes = survey.required(scales, &format!("{module}.weight"))?;
    survey.claim(&codes);
    check_model(survey, scales)?;
    codes.expect_dtype(&[Dtype::I8])?;
    let (rows, columns) = codes.matrix()?;
    scales.expect_dtype(&[Dtype::F32])?;
    scales.expect_elements(rows)?;
    let mut parts = vec![codes, *scales];
    if let Some(format) = format {
        format.expect_dtype(&[Dtype::U8])?;
        format.expect_elements(1)?;
        let code = survey.bytes(&format)?.first().copied().unwrap_or_default();
        if code != 0 {
            return Err(format.wrong_value("0, which means rows", code.to_string()));
        }
        parts.push(format);
    }
    let (name, dtype) = (codes.name().to_owned(), survey.model_dtype());
    let scheme = Scheme::EightBit(EightBit { columns });
    Ok(QuantisedWeight::new(name, vec![rows, columns], dtype, &parts, scheme))
}

/// NF4 or FP4: codes of a table of sixteen, scaled by blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct FourBit {
    elements: usize,
    /// Elements per scale; even.
    block: usize,
    nested: Option<Nested>,
}

impl FourBit {
    pub(super) fn read(&self, parts: &[&[u8]], first: usize, out: &mut [f32]) {
        let map: [f32; 16] = std::array::from_fn(|code| float(parts[MAP], code));
        for (block, run) in runs(self.block, first, out.len()) {
            let scale = self.scale(parts, block);
            let table = map.map(|value| value * scale);
            decode(parts[CODES], &table, first + run.start, &mut out[run]);
        }
    }

    pub(super) fn requantise(
        &self,
        parts: &[&[u8]],
        first: usize,
        values: &[f32],
        out: &mut [f32],
    ) {
        let map: [f32; 16] = std::array::from_fn(|code| float(parts[MAP], code));
        for (block, run) in runs(self.block, first, out.len()) {
            let scale = self.scale(parts, block);
            let table = map.map(|value| value * scale);
            nearest(&table, &values[run.clone()], &mut out[run]);
        }
    }

    pub(super) fn codes(&self, first: usize, count: usize) -> Range<usize> {
        debug_assert!(first + count <= self.elements, "a run of this weight");
        first / 2..(first + count).div_ceil(2)
    }

    /// The scale of a block.
    fn scale(&self, parts: &[&[u8]], block: usize) -> f32 {
        let Some(nested) = self.nested else { return float(parts[ABSMAX], block) };
        let code = usize::from(parts[ABSMAX][block]);
        let of_scales = float(parts[NESTED_ABSMAX], block / nested.block);
        float(parts[NESTED_MAP], code) * of_scales + nested.offset
    }
}

/// The blocks of `size` elements that the elements `first .. first + count` lie in, each with its
/// part of them counted from `first`.
fn runs(size: usize, first: usize, count: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut start = 0;
    std::iter::from_fn(move || {
        if start == count {
            return None;
        }
        let block = (first + start) / size;
        let end = count.min((block + 1) * size - first);
        let run = start..end;
        start = end;
        Some((block, run))
    })
}

/// The entries that the codes from element `first` on stand for.
fn decode(codes: &[u8], table: &[f32; 16], first: usize, out: &mut [f32]) {
    let higher = |byte: u8| table[usize::from(byte >> 4)];
    let lower = |byte: u8| table[usize::from(byte & 15)];
    let (odd, rest) = out.split_at_mut((first % 2).min(out.len()));
    if let [only] = odd {
        *only = lower(codes[first / 2]);
    }
    let bytes = &codes[first.div_ceil(2)..];
    let (pairs, last) = rest.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(bytes) {
        *pair = [higher(byte), lower(byte)];
    }
    if let [last] = last {
        *last = higher(bytes[pairs.len()]);
    }
}

/// The entry of `table` nearest to each value, the first of two as near.
fn nearest(table: &[f32; 16], values: &[f32], out: &mut [f32]) {
    const LANES: usize = 16;
    for (values, out) in values.chunks(LANES).zip(out.chunks_mut(LANES)) {
        let mut value = [0.0f32; LANES];
        value[..values.len()].copy_from_slice(values);
        let mut entry = [table[0]; LANES];
        let mut distance = value.map(|value| (value - table[0]).abs());
        for &candidate in &table[1..] {
            for lane in 0..LANES {
                let other = (value[lane] - candidate).abs();
                let nearer = other < distance[lane];
                distance[lane] = if nearer { other } else { distance[lane] };
                entry[lane] = if nearer { candidate } else { entry[lane] };
            }
        }
        out.copy_from_slice(&entry[..out.len()]);
    }
}

/// LLM.int8: one scale per output channel.
#[derive(Clone, Copy, Debug)]
pub(super) struct EightBit {
    columns: usize,
}

impl EightBit {
    pub(super) fn read(&self, parts: &[&[u8]], first: usize, out: &mut [f32]) {
        for (row, run) in runs(self.columns, first, out.len()) {
            let scale = float(parts[1], row);
            let codes = &parts[CODES][first + run.start..first + run.end];
            for (out, &code) in out[run].iter_mut().zip(codes) {
                *out = f32::from(code as i8) * scale * STEP;
            }
        }
    }

    pub(super) fn requantise(
        &self,
        parts: &[&[u8]],
        first: usize,
        values: &[f32],
        out: &mut [f32],
    ) {
        for (row, run) in runs(self.columns, first, out.len()) {
            let scale = float(parts[1], row);
            // A row of zeros has the scale 0 and represents nothing else.
            let inverse = if scale == 0.0 { 0.0 } else { 127.0 / scale };
            for (out, &value) in out[run.clone()].iter_mut().zip(&values[run]) {
                *out = nearest_integer((value * inverse).clamp(-128.0, 127.0)) * scale * STEP;
            }
        }
    }

    pub(super) fn codes(&self, first: usize, count: usize) -> Range<usize> {
        first..first + count
    }
}

/// The nearest integer, ties to even, of a number below 2²² in magnitude: 1.5·2²³ has no room for
/// a fraction, so that adding it rounds. (`round_ties_even` is a function call on x86-64.)
pub(super) fn nearest_integer(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

/// Element `index` of little-endian F32 data.
fn float(bytes: &[u8], index: usize) -> f32 {
    let at = index * 4;
    f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: [f32; 16] = [
        0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0,
        -3.0,
    ];

    #[test]
    fn the_higher_half_of_a_byte_is_the_earlier_element() {
        let codes = [0x12, 0x34, 0x5F];
        let all = [1, 2, 3, 4, 5, 15].map(|code| TABLE[code]);
        for first in 0..6 {
            for end in first..=6 {
                let mut out = vec![f32::NAN; end - first];
                decode(&codes, &TABLE, first, &mut out);
                assert_eq!(out, all[first..end], "{first}..{end}");
            }
        }
        // The last byte of an odd number of codes has one.
        let mut out = [f32::NAN; 5];
        decode(&codes, &TABLE, 0, &mut out);
        assert_eq!(out, all[..5]);
    }

    #[test]
    fn runs_are_the_blocks_that_elements_lie_in() {
        let of = |size, first, count| runs(size, first, count).collect::<Vec<_>>();
        assert_eq!(of(4, 0, 0), []);
        assert_eq!(of(4, 6, 1), [(1, 0..1)]);
        assert_eq!(of(4, 6, 7), [(1, 0..2), (2, 2..6), (3, 6..7)]);
        assert_eq!(of(4, 4, 4), [(1, 0..4)]);
    }

    #[test]
    fn the_nearest_entry_is_found_in_any_order_of_the_table() {
        let values: Vec<f32> = (-1400..1400).map(|step| step as f32 / 100.0).collect();
        let mut out = vec![f32::NAN; values.len()];
        nearest(&TABLE, &values, &mut out);
        for (value, found) in values.iter().zip(out) {
            let distance = |entry: &f32| (value - entry).abs();
            let least = TABLE.iter().map(distance).fold(f32::INFINITY, f32::min);
            assert_eq!(distance(&found), least, "{value} became {found}");
        }
    }

    #[test]
    fn integers_are_rounded_to_nearest_with_ties_to_even() {
        for step in -1200..=1200 {
            let value = step as f32 / 4.0;
            assert_eq!(nearest_integer(value), value.round_ties_even(), "{value}");
        }
    }

    #[test]
    fn rows_of_zeros_stay_rows_of_zeros() {
        let weight = EightBit { columns: 2 };
        let (codes, scales) = ([0u8; 4], [0.0f32, 127.0].map(f32::to_le_bytes).concat());
        let mut out = [f32::NAN; 4];
        weight.requantise(&[&codes, &scales], 0, &[1.0, -3.0, 2.4, 1e9], &mut out);
        assert_eq!(out, [0.0, 0.0, 2.0, 127.0]);
    }
}
