use std::sync::Arc;

use lora_format::Dtype;
use lora_format::fingerprint::BaseIdentity;
use lora_format::model::{Component, Experts, Scaling, ScalingRule, Target};

use super::*;

fn tensor(shape: &[usize], values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor::new("t".to_owned(), Dtype::F32, shape.to_vec(), bytes).unwrap()
}

/// A change of n × n with the singular values `values`, its rank `rank`: scaled unit vectors.
fn diagonal(module: &str, n: usize, rank: usize, values: &[f32]) -> Component {
    let (mut a, mut b) = (vec![0.0; rank * n], vec![0.0; n * rank]);
    for (k, &value) in values.iter().enumerate() {
        a[k * n + k] = value;
        b[k * rank + k] = 1.0;
    }
    let scaling = Scaling { alpha: rank as f64, rule: ScalingRule::AlphaOverRank };
    let form = LowRank::linear(tensor(&[rank, n], &a), tensor(&[n, rank], &b), scaling);
    Component { target: Target::weight(module), form: Form::LowRank(form) }
}

fn adapter(components: Vec<Component>) -> Adapter {
    Adapter::new("adapter", components, BaseIdentity::default())
}

fn by<'a>(policy: RankPolicy, rules: impl IntoIterator<Item = &'a str>) -> Ranks {
    Ranks::PerTensor(Box::new(RankRules::new(policy, RankLimits::default(), rules).unwrap()))
}

fn ranks(report: &ResizeReport) -> Vec<usize> {
    report.targets.iter().map(|one| one.rank).collect()
}

fn two() -> Adapter {
    adapter(vec![
        diagonal("x.k_proj", 16, 8, &[8.0, 4.0, 2.0, 1.0]),
        diagonal("x.q_proj", 32, 4, &[5.0, 5.0, 5.0, 5.0]),
    ])
}

#[test]
fn policies_and_rules_choose_by_component() {
    let original = two();
    let (resized, report) =
        resize(&original, by(RankPolicy::Energy(0.9), ["k_proj=3", "k_.*=2"]), None, None, false)
            .unwrap();
    assert_eq!(ranks(&report), [3, 4]);
    assert_eq!(report.shadowed, ["k_.*"]);
    let mistyped = by(RankPolicy::Rank(2), ["k_porj=3"]);
    let error = resize(&original, mistyped, None, None, false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no module matches --rank-for k_porj (nearest: `k_proj`, `q_proj`)"
    );
    // The parameter, as reports name it; the first rule decides, whatever it names.
    let named = by(RankPolicy::Rank(4), ["x.k_proj.weight=1", "k_proj=2", "q_proj=3"]);
    let (_, named) = resize(&original, named, None, None, false).unwrap();
    assert_eq!((ranks(&named), named.shadowed), (vec![1, 3], vec!["k_proj".to_owned()]));
    let [k, q] = &report.targets[..] else { panic!("two") };
    assert!((k.certificate.residual - 1.0).abs() < 1e-6 && !k.kept);
    assert!((k.certificate.energy - 85.0).abs() < 1e-9);
    assert_eq!((q.kept, q.reason, q.certificate.residual), (true, Reason::Full, 0.0));
    // 16 + 16 and 32 + 32 elements a rank.
    assert_eq!((k.bytes_before, k.bytes), (8 * 32 * 4, 3 * 32 * 4));
    assert_eq!(report.bytes(), (1024 + 1024, 384 + 1024));
    let (Form::LowRank(before), Form::LowRank(after)) =
        (&original.components[1].form, &resized.components[1].form)
    else {
        panic!("two low-rank changes")
    };
    assert_eq!((before.a.bytes(), before.b.bytes()), (after.a.bytes(), after.b.bytes()));
    assert_eq!(before.scaling, after.scaling);
    let total = report.total();
    assert!((total.relative() - (1.0f64 / 185.0).sqrt()).abs() < 1e-6);
}

#[test]
fn ranks_never_increase_and_zeros_keep_one() {
    let components =
        vec![diagonal("a", 8, 4, &[3.0, 2.0]), diagonal("b", 8, 4, &[]), diagonal("c", 8, 1, &[])];
    let original = adapter(components);
    let (_, report) = resize(&original, by(RankPolicy::Rank(64), []), None, None, false).unwrap();
    assert_eq!(ranks(&report), [4, 1, 1]);
    let reasons: Vec<(Reason, bool)> =
        report.targets.iter().map(|one| (one.reason, one.kept)).collect();
    assert_eq!(reasons, [(Reason::Full, true), (Reason::Least, false), (Reason::Least, true)]);
    // Everything within the tolerance: the best factors of rank 1 rather than none.
    let norms = BaseNorms(vec![10.0; 3]);
    let ranks_of = by(RankPolicy::Tolerance(0.9), []);
    let (_, report) = resize(&original, ranks_of, None, Some(&norms), true).unwrap();
    assert_eq!(ranks(&report), [1, 1, 1]);
    assert_eq!(report.targets[0].reason, Reason::Least);
    assert!((report.targets[0].certificate.residual - 2.0).abs() < 1e-6);
    // All of the energy is two ranks' of four.
    let (_, report) =
        resize(&original, by(RankPolicy::Energy(1.0), []), None, None, false).unwrap();
    assert_eq!(ranks(&report), [2, 1, 1]);
}

#[test]
fn a_budget_buys_the_largest_gains() {
    let budget = |bytes| Ranks::Budget { bytes, limits: RankLimits::default() };
    // A rank of k takes 128 bytes, one of q 256. The first of each are paid; per byte, the next are
    // 16/128 of k, 25/256 of q.
    let (_, report) = resize(&two(), budget(384 + 128), None, None, false).unwrap();
    assert_eq!(ranks(&report), [2, 1]);
    let (_, report) = resize(&two(), budget(384 + 128 + 256), None, None, false).unwrap();
    assert_eq!(ranks(&report), [2, 2]);
    let spent = report.spent.unwrap();
    assert_eq!((spent.budget, spent.bytes, spent.short_of_best), (768, 768, 0.0));
    assert_eq!(report.bytes().1, 768);
    // A base that makes q small makes its errors large.
    let norms = BaseNorms(vec![100.0, 1.0]);
    let (_, report) = resize(&two(), budget(384 + 256), None, Some(&norms), true).unwrap();
    assert_eq!(ranks(&report), [1, 2]);
    // Only if that is asked for.
    let (_, report) = resize(&two(), budget(384 + 256), None, Some(&norms), false).unwrap();
    assert_eq!(ranks(&report), [3, 1]);
    assert_eq!(report.targets[1].base_norm, Some(1.0));
    // Half the bytes a value, twice the ranks.
    let (_, report) = resize(&two(), budget(384), Some(Dtype::Bf16), None, false).unwrap();
    assert_eq!(ranks(&report), [2, 2]);
    let error = resize(&two(), budget(300), None, None, false).unwrap_err();
    assert!(matches!(error, ResizeError::Budget(BudgetError::MinimumExceeds { .. })));
    // All that is worth something fits.
    let (resized, report) = resize(&two(), budget(1 << 20), None, None, false).unwrap();
    assert_eq!(ranks(&report), [4, 4]);
    assert!(report.targets[1].kept && !report.targets[0].kept);
    assert_eq!(resized.components.len(), 2);
}

#[test]
fn a_tolerance_is_relative_to_the_base() {
    let norms = BaseNorms(vec![200.0, 50.0]);
    let ranks_at = |tolerance| {
        let ranks = by(RankPolicy::Tolerance(tolerance), []);
        let (_, report) = resize(&two(), ranks, None, Some(&norms), true).unwrap();
        assert!(report.targets.iter().all(|one| one.relative() <= tolerance * 1.000_001));
        report.targets.iter().map(|one| one.rank).collect::<Vec<_>>()
    };
    // 200·0.01 = 2 leaves 1 of k; 50·0.1 leaves 5 of q.
    assert_eq!(ranks_at(0.0101), [3, 4]);
    assert_eq!(ranks_at(0.101), [1, 3]);
    let none = BaseNorms(vec![1.0, 0.0]);
    let refused = resize(&two(), by(RankPolicy::Rank(1), []), None, Some(&none), true).unwrap_err();
    assert!(matches!(refused, ResizeError::NoReference { name } if name == "x.q_proj.weight"));
}

#[test]
fn what_is_stored_in_full_passes_and_the_rest_is_refused() {
    let mut components = two().components;
    let replaced = Form::Replaced(tensor(&[2], &[1.0, 2.0]));
    components.push(Component { target: Target::weight("norm"), form: replaced });
    let experts = Experts {
        a: tensor(&[2, 4], &[0.5; 8]),
        b: tensor(&[4, 2], &[0.5; 8]),
        depth: 0,
        candidates: Vec::new(),
    };
    components.push(Component { target: Target::weight("moe"), form: Form::Experts(experts) });
    let original = adapter(components);
    let refused = resize(&original, by(RankPolicy::Rank(1), []), None, None, false).unwrap_err();
    assert!(refused.to_string().starts_with("`moe.weight`: "), "{refused}");
    let ranks = by(RankPolicy::Rank(1), ["moe=skip", "q_proj=skip"]);
    let (resized, report) = resize(&original, ranks, None, None, false).unwrap();
    let passed: Vec<(&str, bool)> =
        report.unchanged.iter().map(|one| (one.name.as_str(), one.skipped)).collect();
    assert_eq!(passed, [("moe.weight", true), ("norm.weight", false), ("x.q_proj.weight", true)]);
    assert_eq!((report.targets.len(), resized.components.len()), (1, 4));
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let original = Arc::new(adapter(
        (0..6).map(|i| diagonal(&format!("m{i}"), 24, 6, &[6.0, 5.0, 4.0, i as f32])).collect(),
    ));
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (resized, _) = pool
            .install(|| resize(&original, by(RankPolicy::Rank(2), []), None, None, false))
            .unwrap();
        resized.tensors().flat_map(|tensor| tensor.bytes().to_vec()).collect::<Vec<u8>>()
    };
    let one = on(1);
    assert!(one == on(2) && one == on(5));
}
