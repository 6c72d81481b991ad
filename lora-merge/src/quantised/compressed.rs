//! compressed-tensors other than FP8: integers plain and packed, and packed FP4.
//!
//! | `format`               | tensors of a weight                                              |
//! |------------------------|------------------------------------------------------------------|
//! | `int-quantized`        | `weight` I8, `weight_scale`, `weight_zero_point` I8              |
//! | `pack-quantized`       | `weight_packed` I32, `weight_scale`, `weight_shape`, `weight_zero_point` I32, `weight_g_idx` |
//! | `nvfp4-pack-quantized` | `weight_packed` U8, `weight_scale` F8_E4M3, `weight_global_scale` |
//! | `mxfp4-pack-quantized` | `weight_packed` U8, `weight_scale` U8 or F8_E8M0                 |
//!
//! ```text
//! W[i,j] = (q[i,j] − zero[i,g]) · scale[i,g]          g = ⌊j / group size⌋, or g_idx[j]
//! W[i,j] = fp4[i,j] · (scale[i,g] / global)
//! ```
//!
//! (`_dequantize` in `quantization/lifecycle/forward_helpers.py` of compressed-tensors 0.20). A
//! packed integer is stored with 2^(bits − 1) added to it, the first of a row in the lowest bits
//! of the row's first word; packed zero points likewise, along the first dimension. The first
//! FP4 value of a byte is in its lower nibble.

use lora_format::Dtype;

use super::grid::Grid;
use super::number::Codes;
use super::rules::Kind;
use super::scaled::{Order, Scaled, Zero};
use super::survey::{Part, Result, Survey};
use super::{QuantisedWeight, Scheme};

const METHOD: &str = "compressed-tensors";

/// What scales of integers are stored as.
const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

pub(super) fn find(survey: &mut Survey<'_>) {
    for (module, codes) in survey.ending_in("weight_packed") {
        claim_companions(survey, module);
        let weight = match codes.dtype() {
            Dtype::U8 => packed_fp4(survey, module, codes),
            _ => packed_integers(survey, module, codes),
        };
        survey.enter(METHOD, weight);
    }
    for codes in survey.of_dtype(&[Dtype::I8]) {
        let Some(module) = codes.name().strip_suffix("weight") else { continue };
        let Some(scale) = survey.part(&format!("{module}weight_scale")) else { continue };
        claim_companions(survey, module);
        survey.claim(&codes);
        let weight = integers(survey, module, codes, scale);
        survey.enter(METHOD, weight);
    }
}

/// Claims whatever a weight of this module may consist of, so that one that does not fit is
/// reported once.
fn claim_companions(survey: &mut Survey<'_>, module: &str) {
    for name in ["packed", "scale", "shape", "zero_point", "g_idx", "global_scale"] {
        if let Some(part) = survey.part(&format!("{module}weight_{name}")) {
            survey.claim(&part);
        }
    }
}

/// `int-quantized`: a byte per element.
fn integers(
    survey: &mut Survey<'_>,
    module: &str,
    codes: Part<'_>,
    scale: Part<'_>,
) -> Result<QuantisedWeight> {
    let (name, kind) = (format!("{module}weight"), (Kind::Int, 8));
    scale.expect_dtype(&FLOATS)?;
    let (rows, columns) = codes.matrix()?;
    let blocks = survey.rules().blocks(&codes, kind.0, kind.1, [rows, columns])?;
    let grid = Grid::of(&codes, codes.shape(), &scale, &blocks)?;
    let mut parts = vec![codes, scale];
    let zero = match survey.part(&format!("{name}_zero_point")) {
        Some(zero) => {
            zero.expect_dtype(&[Dtype::I8])?;
            zero.expect_shape(scale.shape())?;
            parts.push(zero);
            Some(Zero::Int8 { part: parts.len() - 1 })
        }
        None => None,
    };
    survey.rules().check(&codes, &name, kind, &grid, zero.is_none())?;
    let scheme = Scheme::Scaled(Scaled {
        codes: Codes::Int8,
        row_bytes: columns,
        grid,
        scale: scale.scale_type()?,
        zero,
        global: None,
        order: None,
    });
    let dtype = survey.dtype_beside(&scale);
    Ok(QuantisedWeight::new(name, vec![rows, columns], dtype, &parts, scheme))
}

/// `pack-quantized`: several elements in an i32.
fn packed_integers(
    survey: &mut Survey<'_>,
    module: &str,
    codes: Part<'_>,
) -> Result<QuantisedWeight> {
    let name = format!("{module}weight");
    codes.expect_dtype(&[Dtype::I32])?;
    let scale = survey.required(&codes, &format!("{name}_scale"))?;
    scale.expect_dtype(&FLOATS)?;
    let shape = survey.required(&codes, &format!("{name}_shape"))?;
    let (rows, columns) = logical_shape(survey, &shape)?;
    let (packed_rows, words) = codes.matrix()?;
    if packed_rows != rows {
        return Err(codes.wrong_shape(format!("[{rows}, …], as `{}` says", shape.name())));
    }
    let (codes_are, bits) = packing(survey, &codes, columns, words)?;
    let kind = (Kind::Int, bits);
    let blocks = survey.rules().blocks(&codes, kind.0, kind.1, [rows, columns])?;
    let mut grid = Grid::of(&codes, &[rows, columns], &scale, &blocks)?;
    let mut parts = vec![codes, scale, shape];
    let zero = match survey.part(&format!("{name}_zero_point")) {
        Some(zero) => {
            parts.push(zero);
            Some(zero_points(&zero, parts.len() - 1, &scale, &grid, bits)?)
        }
        None => None,
    };
    survey.rules().check(&codes, &name, kind, &grid, zero.is_none())?;
    let mut order = None;
    if let Some(table) = survey.part(&format!("{name}_g_idx")) {
        parts.push(table);
        if is_ordered(survey, &table, &grid)? {
            order = Some(Order { part: parts.len() - 1, groups: grid.scales()[1] });
            grid.block = [1, columns];
        }
    }
    let scheme = Scheme::Scaled(Scaled {
        codes: codes_are,
        row_bytes: words * 4,
        grid,
        scale: scale.scale_type()?,
        zero,
        global: None,
        order,
    });
    let dtype = survey.dtype_beside(&scale);
    Ok(QuantisedWeight::new(name, vec![rows, columns], dtype, &parts, scheme))
}

/// The two numbers of a `weight_shape`.
fn logical_shape(survey: &mut Survey<'_>, shape: &Part<'_>) -> Result<(usize, usize)> {
    shape.expect_dtype(&[Dtype::I64, Dtype::I32])?;
    shape.expect_shape(&[2])?;
    let bytes = survey.bytes(shape)?;
    let numbers: Vec<i64> = match shape.dtype() {
        Dtype::I64 => bytes.as_chunks().0.iter().map(|&word| i64::from_le_bytes(word)).collect(),
        _ => bytes.as_chunks().0.iter().map(|&w| i64::from(i32::from_le_bytes(w))).collect(),
    };
    let positive = |number: i64| usize::try_from(number).ok().filter(|&number| number > 0);
    match *numbers {
        [rows, columns] if positive(rows).is_some() && positive(columns).is_some() => {
            Ok((positive(rows).unwrap_or(0), positive(columns).unwrap_or(0)))
        }
        _ => Err(shape.wrong_value("two positive numbers", format!("{numbers:?}"))),
    }
}

/// Of how many bits the codes of a row are that take `words` i32 for `columns` elements. Rows may
/// be longer than they need be if the configuration leaves no doubt.
fn packing(
    survey: &Survey<'_>,
    codes: &Part<'_>,
    columns: usize,
    words: usize,
) -> Result<(Codes, usize)> {
    let all = [(Codes::Offset2, 2), (Codes::Offset4, 4), (Codes::Offset8, 8)];
    let allowed = all.into_iter().filter(|&(_, bits)| survey.rules().allows_bits(bits));
    let allowed: Vec<(Codes, usize)> = allowed.collect();
    // Words that a row needs; a number of columns that overflows needs more than there are.
    let needed = |bits: usize| columns.div_ceil(32 / bits);
    let exact: Vec<_> = allowed.iter().filter(|&&(_, bits)| needed(bits) == words).collect();
    match (&*exact, &*allowed) {
        (&[&only], _) => Ok(only),
        (&[], &[only]) if needed(only.1) <= words => Ok(only),
        (&[], _) => {
            let wanted = allowed.iter().map(|&(_, bits)| format!("{} ({bits} bits)", needed(bits)));
            let wanted: Vec<String> = wanted.collect();
            Err(codes.wrong_shape(format!("[…, {}]", wanted.join(" or "))))
        }
        _ => Err(codes.unsupported("packing whose bits config.json does not tell")),
    }
}

/// The zero points of packed integers: packed themselves, or (by the first versions of the
/// library) one byte each.
fn zero_points(
    zero: &Part<'_>,
    part: usize,
    scale: &Part<'_>,
    grid: &Grid,
    bits: usize,
) -> Result<Zero> {
    zero.expect_dtype(&[Dtype::I32, Dtype::I8])?;
    if zero.dtype() == Dtype::I8 {
        zero.expect_shape(scale.shape())?;
        return Ok(Zero::Int8 { part });
    }
    let [down, groups] = grid.scales();
    if down != grid.rows {
        return Err(zero.unsupported("packing zero points of which there is not one per row"));
    }
    zero.expect_shape(&[grid.rows.div_ceil(32 / bits), groups])?;
    Ok(Zero::Packed { part, bits, groups })
}

/// Whether `weight_g_idx` says which group each column belongs to; filled with −1, it does not.
///
/// The library sorts the columns by group and cuts them into groups of equal size: the table says
/// what is done only if every group has as many columns as the others.
fn is_ordered(survey: &mut Survey<'_>, table: &Part<'_>, grid: &Grid) -> Result<bool> {
    table.expect_dtype(&[Dtype::I32])?;
    table.expect_shape(&[grid.columns])?;
    let groups = grid.scales()[1];
    if grid.block[0] != 1 {
        return Err(table.unsupported("an order of columns without groups of columns"));
    }
    let bytes = survey.bytes(table)?;
    let indices: Vec<i32> =
        bytes.as_chunks().0.iter().map(|&word| i32::from_le_bytes(word)).collect();
    if indices.contains(&-1) {
        return Ok(false);
    }
    let mut sizes = vec![0_usize; groups];
    for index in indices {
        let size = usize::try_from(index).ok().and_then(|index| sizes.get_mut(index));
        let expected = format!("groups below {groups}");
        *size.ok_or_else(|| table.wrong_value(&expected, index.to_string()))? += 1;
    }
    if let Some(size) = sizes.iter().find(|&&size| size * groups != grid.columns) {
        let expected = format!("{groups} groups of equal size");
        return Err(table.wrong_value(&expected, format!("one of {size}")));
    }
    Ok(true)
}

/// `nvfp4-pack-quantized` and `mxfp4-pack-quantized`: two elements in a byte.
fn packed_fp4(survey: &mut Survey<'_>, module: &str, codes: Part<'_>) -> Result<QuantisedWeight> {
    let (name, kind) = (format!("{module}weight"), (Kind::Float, 4));
    let scale = survey.required(&codes, &format!("{name}_scale"))?;
    scale.expect_dtype(&[Dtype::F8_E4M3, Dtype::U8, Dtype::F8_E8M0])?;
    let (rows, row_bytes) = codes.matrix()?;
    let zero = format!("{name}_zero_point");
    if survey.part(&zero).is_some() {
        return Err(codes.unsupported(format!("FP4 with a zero point (`{zero}`)")));
    }
    let Some(columns) = row_bytes.checked_mul(2) else {
        return Err(codes.wrong_shape("that is not as large".to_owned()));
    };
    let mut parts = vec![codes, scale];
    let (mut size, mut global) = (32, None);
    if scale.dtype() == Dtype::F8_E4M3 {
        let divisor = survey.required(&codes, &format!("{name}_global_scale"))?;
        divisor.expect_dtype(&[Dtype::F32])?;
        divisor.expect_elements(1)?;
        parts.push(divisor);
        (size, global) = (16, Some(parts.len() - 1));
    }
    survey.rules().blocks(&codes, kind.0, kind.1, [rows, columns])?;
    let grid = Grid::of(&codes, &[rows, columns], &scale, &[[1, size]])?;
    survey.rules().check(&codes, &name, kind, &grid, true)?;
    let scheme = Scheme::Scaled(Scaled {
        codes: Codes::E2m1,
        row_bytes,
        grid,
        scale: scale.scale_type()?,
        zero: None,
        global,
        order: None,
    });
    let dtype = survey.dtype_beside(&scale);
    Ok(QuantisedWeight::new(name, vec![rows, columns], dtype, &parts, scheme))
}
