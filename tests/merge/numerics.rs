//! W' = W0 + s·B·A against an f64 oracle that shares nothing with the kernels.

use lora_format::Dtype;
use lora_merge::MergeOptions;
use lora_merge::engine::RunOptions;
use lora_merge::orientation::Orientation;
use serde_json::json;

use crate::Case;
use crate::support::{
    Factors, Prng, Tensor, decode, encode, least, products, rounded, unit_roundoff, write_adapter,
};

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// |ours − f64| ≤ u·|W'| + γ_r·|s|·(|B||A|) for one random case.
fn random_case(prng: &mut Prng) {
    let wide = prng.below(8) == 0;
    let out = prng.between(1, 40);
    let input = if wide { 48 * prng.between(1, 5) + prng.below(48) } else { prng.between(1, 40) };
    let rank = if prng.below(4) == 0 { prng.between(1, 70) } else { prng.between(1, 9) };
    let transposed = prng.below(2) == 1;
    let (base_dtype, a_dtype, b_dtype) =
        (prng.pick(&FLOATS), prng.pick(&FLOATS), prng.pick(&FLOATS));
    let dtype = prng.pick(&[None, Some(Dtype::F32), Some(Dtype::F16), Some(Dtype::Bf16)]);
    let scale = prng.pick(&[1.0, 2.0, 0.125, -4.0, 1.7, -0.3, 1.0 / 3.0, 0.0]);
    let size = prng.pick(&[1.0, 0.01, 1e-4, 20.0]);

    let shape = if transposed { [input, out] } else { [out, input] };
    let mut base = Tensor::random(prng, "block.0.x.weight", base_dtype, &shape, 1.0);
    let mut factors = Factors {
        module: "block.0.x".to_owned(),
        a: Tensor::random(prng, "", a_dtype, &[rank, input], size),
        b: Tensor::random(prng, "", b_dtype, &[out, rank], 0.1),
    };
    // Rows and columns without a delta, and every kind of zero under them.
    let zero_row = prng.below(out);
    let width = (b_dtype.bits() / 8) as usize * rank;
    factors.b.data[zero_row * width..][..width].fill(0);
    let negative_zero = if base_dtype == Dtype::F32 { 0x8000_0000 } else { 0x8000 };
    let mut bits = base.bits();
    for _ in 0..bits.len() / 3 + 1 {
        let at = prng.below(bits.len());
        bits[at] = prng.pick(&[negative_zero, 0, 1, negative_zero + 1]);
    }
    base = Tensor::of_bits(&base.name, base_dtype, &shape, &bits);

    let case = Case::file(std::slice::from_ref(&base), &[]);
    write_adapter(&case.adapter, &[factors], &json!({"lora_alpha": rank}));
    let options =
        MergeOptions { dtype, scale, fan_in_fan_out: Some(transposed), ..MergeOptions::default() };
    let merged = case.merge(&options, &RunOptions::default()).unwrap();
    let [change] = merged.report.targets[0].changes.as_slice() else { panic!() };
    // A square weight follows the option, another its shape.
    let expected = if transposed { Orientation::InOut } else { Orientation::OutIn };
    assert_eq!(change.orientation, Some(expected));
    assert_eq!(change.scale, Some(scale));

    let stored = crate::support::read_tensors(&case.adapter.join("adapter_model.safetensors"));
    let factor = |which| &stored[&format!("base_model.model.block.0.x.{which}.weight")];
    let (product, absolute) = products(factor("lora_A"), factor("lora_B"), transposed);
    let out_dtype = dtype.unwrap_or(base_dtype);
    let ours = &merged.tensors["block.0.x.weight"];
    assert_eq!(ours.dtype, out_dtype);
    let gamma = rank as f64 * 2f64.powi(-24) / (1.0 - rank as f64 * 2f64.powi(-24));
    let u = unit_roundoff(out_dtype);
    for (index, (&got, &bits)) in ours.bits().iter().zip(&base.bits()).enumerate() {
        let weight = decode(bits, base_dtype);
        let wanted = weight + scale * product[index];
        let accumulated = gamma * scale.abs() * absolute[index];
        let tiny = least(out_dtype) + rank as f64 * 2f64.powi(-149);
        let off = (decode(got, out_dtype) - wanted).abs();
        let at = || {
            format!(
                "{shape:?} r {rank} s {scale} {base_dtype}+{a_dtype}·{b_dtype}→{out_dtype} \
                 {transposed} [{index}]"
            )
        };
        assert!(off <= u * wanted.abs() + (1.0 + u) * accumulated + tiny, "{}: {off:e}", at());
        if absolute[index] == 0.0 || scale == 0.0 {
            let kept = if out_dtype == base_dtype { bits } else { encode(weight, out_dtype) };
            assert_eq!(got, kept, "{}: no delta, other bits", at());
        }
    }
}

#[test]
fn random_merges_stay_within_the_bound() {
    let mut prng = Prng::new(7);
    for _ in 0..600 {
        random_case(&mut prng);
    }
}

/// Adapters of a zero scale or a zero factor leave every bit alone, −0.0 and NaN payloads included.
#[test]
fn no_delta_keeps_the_bits() {
    let mut prng = Prng::new(8);
    for dtype in FLOATS {
        let shift = if dtype == Dtype::F32 { 16 } else { 0 };
        let odd = [0x8000, 0x0001, 0x8001, 0x7FFF, 0xFFC1, 0x7F81, 0x7C01, 0x7C00, 0xFF80];
        let bits: Vec<u32> = (0..12 * 60).map(|at| odd[at % odd.len()] << shift).collect();
        let base = [Tensor::of_bits("m.weight", dtype, &[12, 60], &bits)];
        let mut factors = Factors::random(&mut prng, "m", (12, 60, 3), Dtype::F32, 1.0);
        factors.b.data.fill(0);
        let case = Case::file(&base, &[factors]);
        let merged = case.merge(&MergeOptions::default(), &RunOptions::default()).unwrap();
        assert_eq!(merged.tensors["m.weight"], base[0], "{dtype}");
        assert_eq!(merged.report.realised.nonzero, 0);
        assert_eq!(merged.report.realised.changed, 0);

        let factors = Factors::random(&mut prng, "m", (12, 60, 3), Dtype::F32, 1.0);
        let case = Case::file(&base, &[factors]);
        let options = MergeOptions { scale: 0.0, ..MergeOptions::default() };
        let merged = case.merge(&options, &RunOptions::default()).unwrap();
        assert_eq!(merged.tensors["m.weight"], base[0], "{dtype}");
    }
}

/// Of a million elements at least 99.99 % are what exact arithmetic, rounded once, gives: bf16,
/// r = 64 and r = 16, |Δ| ≤ 0.1·|W|.
#[test]
fn bf16_is_correctly_rounded_almost_always() {
    for (rank, base_dtype, seed) in
        [(64, Dtype::Bf16, 9), (16, Dtype::Bf16, 10), (64, Dtype::F32, 11)]
    {
        let mut prng = Prng::new(seed);
        let (out, input) = (1024, 1024);
        let factors = Factors::random(&mut prng, "m", (out, input, rank), Dtype::F32, 0.05);
        let (product, _) = products(&factors.a, &factors.b, false);
        // Weights at least ten times the delta, of either sign.
        let weights: Vec<f64> = product
            .iter()
            .map(|delta| {
                let sign = if prng.below(2) == 0 { 1.0 } else { -1.0 };
                sign * (10.0 * delta.abs() + 1e-4) * (1.01 + 3.0 * prng.unit().abs())
            })
            .collect();
        let base = Tensor::new("m.weight", base_dtype, &[out, input], &weights);
        let stored = base.values();
        let within = product.iter().zip(&stored).filter(|(d, w)| d.abs() <= 0.1 * w.abs()).count();
        assert_eq!(within, out * input);
        let case = Case::file(&[base], &[factors]);
        let options = MergeOptions { dtype: Some(Dtype::Bf16), ..MergeOptions::default() };
        let merged = case.merge(&options, &RunOptions::default()).unwrap();
        let ours = merged.tensors["m.weight"].bits();
        let pairs = stored.iter().zip(&product);
        let wrong = pairs
            .zip(&ours)
            .filter(|((weight, delta), got)| encode(*weight + *delta, Dtype::Bf16) != **got)
            .count();
        let share = 1.0 - wrong as f64 / (out * input) as f64;
        assert!(share >= 0.9999, "r {rank}, {base_dtype}: {share} correctly rounded");
    }
}

/// The oracle itself: a value is rounded to its nearest neighbour, ties to even, and a value that
/// is stored survives.
#[test]
fn the_oracle_rounds_once() {
    for dtype in FLOATS {
        let mut prng = Prng::new(12);
        for _ in 0..20_000 {
            let bits = (prng.next() >> 32) as u32 >> if dtype == Dtype::F32 { 0 } else { 16 };
            let value = decode(bits, dtype);
            if value.is_finite() {
                assert_eq!(encode(value, dtype), bits, "{dtype} {value:e}");
                let next = decode(bits + 1, dtype);
                if next.is_finite() && (bits + 1) & 0x7FFF != 0 {
                    let even = if bits & 1 == 0 { value } else { next };
                    assert_eq!(rounded((value + next) / 2.0, dtype), even, "{dtype} {value:e}");
                }
            }
        }
    }
    assert_eq!(encode(1e300, Dtype::F32), 0x7F80_0000);
    assert_eq!(encode(65519.9, Dtype::F16), 0x7BFF);
    assert_eq!(encode(65520.0, Dtype::F16), 0x7C00);
    // Rounding to f32 first would see a tie here.
    assert_eq!(encode(1.0 + 2f64.powi(-8) + 2f64.powi(-40), Dtype::Bf16), 0x3F81);
}

/// What does not fit the output's dtype is an error that names the tensor: a target, or another
/// tensor that is only converted.
#[test]
fn overflow_is_an_error_that_names_the_tensor() {
    let mut prng = Prng::new(13);
    let small = Tensor::random(&mut prng, "m.weight", Dtype::Bf16, &[4, 6], 1.0);
    let large = Tensor::new("n.weight", Dtype::Bf16, &[2, 2], &[1.0, 1e6, 1.0, 1.0]);
    let factors = |module| Factors::random(&mut Prng::new(14), module, (4, 6, 2), Dtype::F32, 0.1);
    let options = MergeOptions { dtype: Some(Dtype::F16), ..MergeOptions::default() };
    let case = Case::file(&[small.clone(), large.clone()], &[factors("m")]);
    let text = case.refusal(&options);
    let expected = "tensor `n.weight`: at least 1 finite values become infinite in F16, whose \
                    largest is 65504";
    assert_eq!(text, expected);

    let mut values = small.values();
    values[5] = 7e4;
    let target = Tensor::new("m.weight", Dtype::Bf16, &[4, 6], &values);
    let text = Case::file(&[target], &[factors("m")]).refusal(&options);
    assert!(text.starts_with("tensor `m.weight`: at least 1 finite values"), "{text}");
    // Infinities of the base stay what they are.
    let infinite = Tensor::new("n.weight", Dtype::Bf16, &[2], &[f64::INFINITY, f64::NAN]);
    let case = Case::file(&[small, infinite], &[factors("m")]);
    let merged = case.merge(&options, &RunOptions::default()).unwrap();
    assert_eq!(merged.tensors["n.weight"].bits(), [0x7C00, 0x7E00]);
}

/// Finite factors whose product is beyond f32, and a scale that makes it so, are errors too.
#[test]
fn a_delta_beyond_the_range_is_an_error() {
    let base = [Tensor::new("m.weight", Dtype::F32, &[1, 2], &[1.0, 2.0])];
    let factors = |value: f64| Factors {
        module: "m".to_owned(),
        a: Tensor::new("", Dtype::F32, &[1, 2], &[value, 1.0]),
        b: Tensor::new("", Dtype::F32, &[1, 1], &[value]),
    };
    let text = Case::file(&base, &[factors(1e30)]).refusal(&MergeOptions::default());
    assert!(text.starts_with("tensor `m.weight`: at least 1 finite values"), "{text}");
    let options = MergeOptions { scale: 1e300, ..MergeOptions::default() };
    let text = Case::file(&base, &[factors(1.0)]).refusal(&options);
    assert!(text.starts_with("tensor `m.weight`: at least 2 finite values"), "{text}");
}
