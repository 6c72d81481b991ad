//! FP8 weights: `X` with `X_scale_inv` (DeepSeek and whoever follows it) or `X_scale`
//! (compressed-tensors, AutoFP8, FBGEMM).
//!
//! ```text
//! W[i,j] = fp8[i,j] · s[⌊i/b₀⌋, ⌊j/b₁⌋]
//! ```
//!
//! `scale_inv` is, in spite of its name, what codes are multiplied with (`weight_dequant` in
//! DeepSeek-V3's `inference/kernel.py`, `Fp8Dequantize` in transformers). Blocks are 128×128 there;
//! per tensor, per row and per group of a row elsewhere (compressed-tensors' `_dequantize`).
//! Blocks at the edges are smaller, and scales are f32, half precision or powers of two (E8M0,
//! also as U8).

use lora_format::Dtype;

use super::grid::Grid;
use super::number::{Codes, ScaleType};
use super::rules::Kind;
use super::scaled::Scaled;
use super::survey::{Part, Result, Survey};
use super::{QuantisedProblem, QuantisedWeight, Scheme};

const FP8: [Dtype; 2] = [Dtype::F8_E4M3, Dtype::F8_E5M2];

pub(super) fn find(survey: &mut Survey<'_>) {
    for (name, scale) in survey.ending_in("_scale_inv") {
        survey.claim(&scale);
        let weight = survey.required(&scale, name).and_then(|codes| {
            survey.claim(&codes);
            codes.expect_dtype(&FP8)?;
            weight(survey, name, codes, scale)
        });
        survey.enter("fp8", weight);
    }
    for (name, scale) in survey.ending_in("_scale") {
        // Other methods call their scales so too; theirs belong to other dtypes.
        let Some(codes) = survey.part(name).filter(|codes| FP8.contains(&codes.dtype())) else {
            continue;
        };
        survey.claim(&codes);
        survey.claim(&scale);
        let weight = weight(survey, name, codes, scale);
        survey.enter("compressed-tensors", weight);
    }
    // With a method that has scales, a weight without one is not a mystery but a loss.
    if matches!(survey.method(), Some("fp8" | "fbgemm_fp8" | "compressed-tensors")) {
        let suffix = if survey.method() == Some("fp8") { "_scale_inv" } else { "_scale" };
        for codes in survey.of_dtype(&FP8) {
            if codes.name().ends_with("weight") {
                survey.claim(&codes);
                survey.object(QuantisedProblem::Missing {
                    tensor: codes.name().to_owned(),
                    missing: format!("{}{suffix}", codes.name()),
                });
            }
        }
    }
}

fn weight(
    survey: &mut Survey<'_>,
    name: &str,
    codes: Part<'_>,
    scale: Part<'_>,
) -> Result<QuantisedWeight> {
    let zero = format!("{name}_zero_point");
    if survey.part(&zero).is_some() {
        return Err(codes.unsupported(format!("FP8 with a zero point (`{zero}`)")));
    }
    scale.expect_dtype(&ScaleType::DTYPES)?;
    let shape = codes.shape().to_vec();
    let [.., rows, columns] = *shape else {
        return Err(codes.wrong_shape("of at least two dimensions".to_owned()));
    };
    let kind = (Kind::Float, 8);
    let blocks = survey.rules().blocks(&codes, kind.0, kind.1, [rows, columns])?;
    let grid = Grid::of(&codes, &shape, &scale, &blocks)?;
    survey.rules().check(&codes, name, kind, &grid, true)?;
    let scheme = Scheme::Scaled(Scaled {
        codes: if codes.dtype() == Dtype::F8_E5M2 { Codes::E5m2 } else { Codes::E4m3 },
        row_bytes: columns,
        grid,
        scale: scale.scale_type()?,
        zero: None,
        global: None,
        order: None,
    });
    let dtype = survey.dtype_beside(&scale);
    Ok(QuantisedWeight::new(name.to_owned(), shape, dtype, &[codes, scale], scheme))
}
