use lora_format::fingerprint::BaseIdentity;
use lora_format::model::{Scaling, ScalingRule};

use super::*;

fn tensor(dtype: Dtype, shape: &[usize], values: &[f64]) -> Tensor {
    let bytes = concatenate::encode(values.iter().copied(), dtype).unwrap();
    Tensor::new("x".to_owned(), dtype, shape.to_vec(), bytes).unwrap()
}

/// Small dyadic numbers, so that products and sums of few are exact.
fn dyadic(seed: u64, count: usize) -> Vec<f64> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            ((state >> 40) % 17) as f64 / 8.0 - 1.0
        })
        .collect()
}

fn low_rank(seed: u64, (m, n, r): (usize, usize, usize), alpha: f64, dtype: Dtype) -> LowRank {
    let a = tensor(dtype, &[r, n], &dyadic(seed, r * n));
    let b = tensor(dtype, &[m, r], &dyadic(seed + 100, m * r));
    LowRank::linear(a, b, Scaling { alpha, rule: ScalingRule::AlphaOverRank })
}

fn weighted(components: Vec<(&str, Form)>, weight: f64) -> WeightedAdapter {
    let components = components
        .into_iter()
        .map(|(module, form)| Component { target: Target::weight(module), form })
        .collect();
    let adapter = Adapter::new("x", components, BaseIdentity::default());
    WeightedAdapter { weight, ..WeightedAdapter::from(adapter) }
}

fn run(
    adapters: &[WeightedAdapter],
    method: Method,
    options: CombineOptions,
) -> Result<(Adapter, CombineReport), CombineError> {
    combine(adapters, method, options, &Progress::default())
}

/// weight·s·B·A, by the definition.
fn product(form: &LowRank, weight: f64) -> Vec<f64> {
    let (m, r, n) = (form.out_features(), form.rank(), form.in_features());
    let (a, b) = (form.a.to_f32().unwrap(), form.b.to_f32().unwrap());
    let mut out = vec![0.0; m * n];
    for row in 0..m {
        for col in 0..n {
            let sum = (0..r).map(|k| f64::from(b[row * r + k]) * f64::from(a[k * n + col]));
            out[row * n + col] = weight * form.scale() * sum.sum::<f64>();
        }
    }
    out
}

fn only(adapter: &Adapter) -> &LowRank {
    match &adapter.components[..] {
        [Component { form: Form::LowRank(form), .. }] => form,
        other => panic!("{other:?}"),
    }
}

fn difference(found: &[f64], expected: &[f64]) -> (f64, f64) {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut found.iter().zip(expected).map(|(x, y)| x - y));
    (error, norm(&mut expected.iter().copied()))
}

#[test]
fn powers_of_two_are_folded_exactly_and_keep_the_dtype() {
    let (first, second) =
        (low_rank(1, (5, 7, 2), 4.0, Dtype::Bf16), low_rank(2, (5, 7, 3), 3.0, Dtype::Bf16));
    let adapters = [
        weighted(vec![("q", Form::LowRank(first.clone()))], 0.5),
        weighted(vec![("q", Form::LowRank(second.clone()))], -0.25),
    ];
    let (adapter, report) = run(&adapters, Method::Concatenate, CombineOptions::default()).unwrap();
    let form = only(&adapter);
    assert_eq!((form.rank(), form.a.dtype, form.b.dtype), (5, Dtype::Bf16, Dtype::Bf16));
    let expected: Vec<f64> =
        product(&first, 0.5).iter().zip(product(&second, -0.25)).map(|(x, y)| x + y).collect();
    assert_eq!(product(form, 1.0), expected);
    let target = &report.targets[0];
    assert_eq!(target.residual, 0.0);
    assert!(target.parts.iter().all(|part| part.rounded == Some(0)));
    // One factor is as it was.
    assert_eq!(form.a.bytes(), [first.a.bytes(), second.a.bytes()].concat());
}

#[test]
fn other_ratios_are_rounded_once_and_the_error_is_measured() {
    let (first, second) =
        (low_rank(1, (9, 7, 2), 4.0, Dtype::Bf16), low_rank(2, (9, 7, 3), 3.0, Dtype::Bf16));
    let adapters = [
        weighted(vec![("q", Form::LowRank(first.clone()))], 0.7),
        weighted(vec![("q", Form::LowRank(second.clone()))], 0.3),
    ];
    let expected: Vec<f64> =
        product(&first, 0.7).iter().zip(product(&second, 0.3)).map(|(x, y)| x + y).collect();
    for (dtype, bound) in [(None, 2f64.powi(-24)), (Some(Dtype::Bf16), 2f64.powi(-8))] {
        let options = CombineOptions { dtype, ..CombineOptions::default() };
        let (adapter, report) = run(&adapters, Method::Concatenate, options).unwrap();
        let form = only(&adapter);
        assert_eq!(form.b.dtype, dtype.unwrap_or(Dtype::F32));
        let (error, norm) = difference(&product(form, 1.0), &expected);
        let target = &report.targets[0];
        assert!(error > 0.0 && error < 4.0 * bound * norm, "{error} {norm}");
        // The certificate is the error, and not a bound of it.
        assert!((target.residual / error - 1.0).abs() < 1e-6, "{} {error}", target.residual);
        assert!((target.energy.sqrt() / norm - 1.0).abs() < 1e-12);
        // The scale is one of the two, whose part is exact.
        let exact = target.parts.iter().filter(|part| part.rounded == Some(0)).count();
        assert_eq!(exact, 1, "{:?}", target.parts);
    }
}

#[test]
fn gains_are_folded_and_targets_of_one_adapter_scaled() {
    let mut first = low_rank(3, (4, 6, 2), 2.0, Dtype::F32);
    first.rank_gain = Some(tensor(Dtype::F32, &[2, 1], &[2.0, -0.5]));
    let second = low_rank(4, (8, 6, 1), 1.0, Dtype::F16);
    let adapters = [
        weighted(vec![("q", Form::LowRank(first.clone()))], 2.0),
        weighted(vec![("v", Form::LowRank(second.clone()))], -1.0),
    ];
    let (adapter, report) = run(&adapters, Method::Concatenate, CombineOptions::default()).unwrap();
    assert_eq!(adapter.components.len(), 2);
    assert_eq!(report.targets.iter().map(|one| one.residual).sum::<f64>(), 0.0);
    let forms: Vec<&LowRank> = adapter
        .components
        .iter()
        .filter_map(|one| if let Form::LowRank(form) = &one.form { Some(form) } else { None })
        .collect();
    let mut scaled = first.clone();
    let b = first.b.to_f32().unwrap();
    let gained: Vec<f64> =
        b.chunks(2).flat_map(|row| [f64::from(row[0]) * 2.0, f64::from(row[1]) * -0.5]).collect();
    scaled.b = tensor(Dtype::F32, &[4, 2], &gained);
    scaled.rank_gain = None;
    assert_eq!(product(forms[0], 1.0), product(&scaled, 2.0));
    assert_eq!(product(forms[1], 1.0), product(&second, -1.0));
    assert_eq!(forms[1].b.dtype, Dtype::F16);
}

#[test]
fn weights_by_module_and_zero_weights() {
    let form = || Form::LowRank(low_rank(3, (4, 6, 2), 2.0, Dtype::F32));
    let adapters = [
        weighted(vec![("a.q", form()), ("a.v", form())], 1.0),
        weighted(vec![("a.q", form()), ("a.v", form())], 2.0),
    ];
    let weights = Some(WeightRules::new(["q=0", r".*\.v=0.5", "nothing=3"]).unwrap());
    let options = CombineOptions { weights, ..CombineOptions::default() };
    let (adapter, report) = run(&adapters, Method::Concatenate, options).unwrap();
    assert_eq!(adapter.components.len(), 1);
    assert_eq!(report.left_out, ["a.q.weight"]);
    assert_eq!(report.unmatched, ["nothing"]);
    assert_eq!(report.targets[0].parts.iter().map(|part| part.weight).sum::<f64>(), 1.5);
    for rule in ["q", "=1", "q=x", "q=inf", "(=1"] {
        assert!(WeightRules::new([rule]).is_err(), "{rule}");
    }
    assert!(WeightRules::new(["q=1", "q=2"]).is_err());
}

#[test]
fn what_has_no_sum_is_refused_by_name() {
    let plain = low_rank(3, (4, 6, 2), 2.0, Dtype::F32);
    let mut dora = plain.clone();
    dora.magnitude = Some(tensor(Dtype::F32, &[4], &[1.0; 4]));
    let one = weighted(vec![("q", Form::LowRank(plain.clone()))], 1.0);
    let replaced = |value: f64| Form::Replaced(tensor(Dtype::F32, &[2, 1], &[value, 1.0]));
    let other_shape = low_rank(3, (5, 6, 2), 2.0, Dtype::F32);
    for (form, words) in [
        (Form::LowRank(dora), "DoRA: its change depends on the weight"),
        (Form::LowRank(other_shape), "a linear layer of 4 × 6 in one adapter and"),
        (replaced(1.0), "one adapter stores it in full, another changes it"),
    ] {
        let two = weighted(vec![("q", form)], 1.0);
        let error = run(&[one.clone(), two], Method::Concatenate, CombineOptions::default());
        let text = error.unwrap_err().to_string();
        assert!(text.starts_with("`q.weight`: ") && text.contains(words), "{text}");
    }
    let whole = |value, weight| weighted(vec![("n", replaced(value))], weight);
    let with = |adapters: [WeightedAdapter; 2]| {
        run(&adapters, Method::Concatenate, CombineOptions::default())
    };
    assert_eq!(with([whole(1.0, 0.7), whole(1.0, 0.3)]).unwrap().0.components.len(), 1);
    let text = with([whole(1.0, 0.7), whole(2.0, 0.3)]).unwrap_err().to_string();
    assert!(text.contains("with different values"), "{text}");
    let text = with([whole(1.0, 0.5), whole(1.0, 0.3)]).unwrap_err().to_string();
    assert!(text.contains("cannot be weighted"), "{text}");
    assert!(matches!(with([whole(1.0, f64::NAN), one]), Err(CombineError::Weight { .. })));
}

#[test]
fn biases_add_up_in_the_scale_of_the_factors_beside_them() {
    let plain = || Form::LowRank(low_rank(3, (4, 6, 2), 8.0, Dtype::F32));
    let bias = |value: f64| Component {
        target: Target { module: "q".to_owned(), parameter: "bias".to_owned() },
        form: Form::Added { tensor: tensor(Dtype::F32, &[1], &[value]), scale: 4.0 },
    };
    let mut adapters = [weighted(vec![("q", plain())], 0.5), weighted(vec![("q", plain())], 2.0)];
    adapters[0].adapter.components.push(bias(3.0));
    adapters[1].adapter.components.push(bias(-1.0));
    let (adapter, report) = run(&adapters, Method::Concatenate, CombineOptions::default()).unwrap();
    let mut scales = Vec::new();
    for component in &adapter.components {
        match &component.form {
            Form::LowRank(form) => scales.push(form.scale()),
            Form::Added { tensor, scale } => {
                scales.push(*scale);
                assert_eq!(f64::from(tensor.to_f32().unwrap()[0]) * scale, 4.0 * (1.5 - 2.0));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(scales.len(), 2);
    assert_eq!(scales[0], scales[1]);
    assert_eq!(report.others[0].rounded, 0);
}

/// TIES by its definition, on whole matrices.
fn ties(deltas: &[Vec<f64>], density: f64) -> Vec<f64> {
    let trimmed: Vec<Vec<f64>> = deltas
        .iter()
        .map(|delta| {
            let mut order: Vec<usize> = (0..delta.len()).collect();
            order.sort_by(|&x, &y| delta[y].abs().total_cmp(&delta[x].abs()));
            let mut kept = vec![0.0; delta.len()];
            let count = (density * delta.len() as f64) as usize;
            order[..count].iter().for_each(|&at| kept[at] = delta[at]);
            kept
        })
        .collect();
    (0..deltas[0].len())
        .map(|at| {
            let total: f64 = trimmed.iter().map(|delta| delta[at]).sum();
            let agrees = |value: f64| if total >= 0.0 { value > 0.0 } else { value < 0.0 };
            let agreeing: Vec<f64> =
                trimmed.iter().map(|delta| delta[at]).filter(|&value| agrees(value)).collect();
            agreeing.iter().sum::<f64>() / agreeing.len().max(1) as f64
        })
        .collect()
}

#[test]
fn ties_acts_on_the_changes_and_not_on_the_factors() {
    let (first, second) =
        (low_rank(5, (70, 11, 2), 2.0, Dtype::F32), low_rank(6, (70, 11, 2), 2.0, Dtype::F32));
    let method = Elementwise {
        sparsifier: Sparsifier::Magnitude,
        density: 0.3,
        election: Some(Election::Total),
        disjoint: Disjoint::Mean,
    };
    let deltas = [product(&first, 0.5), product(&second, 2.0)];
    let expected = ties(&deltas, 0.3);
    let parts = [
        Factors { adapter: 0, form: &first, weight: 0.5 },
        Factors { adapter: 1, form: &second, weight: 2.0 },
    ];
    let formed = dense::formed("q.weight", &parts, &method).unwrap();
    let found: Vec<f64> = formed.iter().map(|&value| f64::from(value)).collect();
    assert_eq!(difference(&found, &expected).0, 0.0);

    // On factors, as PEFT does it, the result is another: B and A each by TIES, then multiplied.
    let wide = |tensor: &Tensor| -> Vec<f64> {
        tensor.to_f32().unwrap().into_iter().map(f64::from).collect()
    };
    let (b, a) = (
        ties(&[wide(&first.b), wide(&second.b)], 0.3),
        ties(&[wide(&first.a), wide(&second.a)], 0.3),
    );
    let (b, a) = (tensor(Dtype::F32, &[70, 2], &b), tensor(Dtype::F32, &[2, 11], &a));
    let crossed = product(&LowRank::linear(a, b, first.scaling), 1.0);
    let (error, norm) = difference(&crossed, &expected);
    assert!(error > 0.3 * norm, "{error} {norm}");
}

#[test]
fn the_result_depends_on_seed_and_inputs_and_not_on_threads() {
    let adapters = [
        weighted(vec![("q", Form::LowRank(low_rank(5, (200, 90, 4), 4.0, Dtype::F32)))], 0.7),
        weighted(vec![("q", Form::LowRank(low_rank(6, (200, 90, 4), 4.0, Dtype::F32)))], 0.3),
    ];
    let result = |threads: usize, seed: u64, election| {
        let method = Elementwise {
            sparsifier: Sparsifier::Random { seed },
            density: 0.5,
            election,
            disjoint: Disjoint::Mean,
        };
        let method = Method::Elementwise { method, ranks: None };
        let (adapter, report) = crate::analysis::on_threads(threads, || {
            run(&adapters, method, CombineOptions::default()).unwrap()
        });
        let form = only(&adapter);
        assert_eq!(form.rank(), 4, "the largest of the inputs' ranks");
        let target = &report.targets[0];
        assert!(target.factoring.unwrap().optimal <= target.residual * (1.0 + 1e-6));
        (form.a.bytes().to_vec(), form.b.bytes().to_vec())
    };
    for election in [None, Some(Election::Total)] {
        let one = result(1, 1, election);
        assert_eq!(one, result(4, 1, election));
        assert_ne!(one, result(1, 2, election));
    }
}

#[test]
fn a_dense_result_is_certified() {
    let first = low_rank(5, (30, 20, 3), 3.0, Dtype::F32);
    let second = low_rank(6, (30, 20, 2), 2.0, Dtype::F32);
    let adapters = [
        weighted(vec![("q", Form::LowRank(first.clone()))], 1.0),
        weighted(vec![("q", Form::LowRank(second.clone()))], 1.0),
    ];
    let method = Elementwise {
        sparsifier: Sparsifier::Magnitude,
        density: 0.4,
        election: None,
        disjoint: Disjoint::Mean,
    };
    let parts = [
        Factors { adapter: 0, form: &first, weight: 1.0 },
        Factors { adapter: 1, form: &second, weight: 1.0 },
    ];
    let formed = dense::formed("q.weight", &parts, &method).unwrap();
    let expected: Vec<f64> = formed.iter().map(|&value| f64::from(value)).collect();
    let (adapter, report) =
        run(&adapters, Method::Elementwise { method, ranks: None }, CombineOptions::default())
            .unwrap();
    let (error, norm) = difference(&product(only(&adapter), 1.0), &expected);
    let target = &report.targets[0];
    assert!((target.residual / error - 1.0).abs() < 1e-6, "{} {error}", target.residual);
    assert!((target.energy.sqrt() / norm - 1.0).abs() < 1e-9);
    // All of it, if the rank allows.
    let rules = RankRules::new(
        crate::rank::RankPolicy::Rank(20),
        crate::rank::RankLimits::default(),
        std::iter::empty(),
    );
    let ranks = Some(Box::new(rules.unwrap()));
    let (adapter, _) =
        run(&adapters, Method::Elementwise { method, ranks }, CombineOptions::default()).unwrap();
    let (error, norm) = difference(&product(only(&adapter), 1.0), &expected);
    assert!(error < 1e-5 * norm, "{error} {norm}");
}
