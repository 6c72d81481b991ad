//! How many singular values of a change are kept: rank policies, limits, and rules by module.
//!
//! A policy reads a [`Spectrum`] and says the smallest rank that meets it. Where the known part of
//! the spectrum does not decide, [`Choice::bound`] says so and the caller computes more. A matrix
//! of zeros has rank 0 whatever is asked: there is nothing to store.
//!
//! The three `sv_` policies are those of kohya's `resize_lora.py` (sd-scripts), read from its
//! source: they keep at least one value. What differs: its arithmetic is f32, and it gives rank 1
//! to a matrix whose σ₁ ≤ 10⁻⁶. LyCORIS' `ratio:x` is `sv_ratio:1/x`; its `quantile:x` is one less
//! than `sv_cumulative:x`.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use lora_format::limits;
use lora_format::pattern::PatternTable;
use serde_json::{Map, Value};

use crate::noise::{self, NoiseEstimate};
use crate::spectrum::{Reached, Spectrum};

/// How the rank of a matrix is chosen from its singular values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RankPolicy {
    /// This rank.
    Rank(usize),
    /// The smallest with this share of the energy: Σ_{i≤r} σᵢ² ≥ share·‖A‖²_F.
    Energy(f64),
    /// The smallest with ‖A − A_r‖_F ≤ t·reference: the reference is ‖A‖_F, or ‖W₀‖_F of the base.
    Tolerance(f64),
    /// As many as stand out of the noise: [`noise`].
    Auto,
    /// kohya's `sv_ratio`: the number of σᵢ > σ₁/p.
    SvRatio(f64),
    /// kohya's `sv_fro`: the smallest with Σ_{i≤r} σᵢ² ≥ p²·Σ σᵢ², which is `energy:p²`.
    SvFro(f64),
    /// kohya's `sv_cumulative`: the smallest with Σ_{i≤r} σᵢ ≥ p·Σ σᵢ. It needs all values.
    SvCumulative(f64),
}

/// The least and the greatest rank that a policy may choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankLimits {
    /// At least this, as far as the matrix has it.
    pub minimum: usize,
    /// At most this; it wins over the minimum.
    pub maximum: Option<usize>,
}

/// A rank, and why it is not another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The rank: at most min(m, n).
    pub rank: usize,
    /// What decided.
    pub bound: Bound,
}

/// What decided a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// The policy.
    Policy,
    /// The matrix, which has no larger rank.
    Shape,
    /// The minimum: the policy asks for less.
    Minimum,
    /// The maximum: the policy asks for more.
    Maximum,
    /// Nothing yet: the values that are known are too few, and the rank is at least this.
    Known,
}

impl Bound {
    /// Whether the rank is final, and not for want of singular values.
    #[must_use]
    pub fn is_final(self) -> bool {
        self != Bound::Known
    }
}

/// Chooses the rank of a matrix. `reference` is the norm that a tolerance is relative to; a noise
/// estimate, which only [`RankPolicy::Auto`] reads, is made from the spectrum alone if absent.
#[must_use]
pub fn choose(
    policy: RankPolicy,
    spectrum: &Spectrum,
    noise: Option<&NoiseEstimate>,
    reference: f64,
    limits: RankLimits,
) -> Choice {
    if spectrum.is_zero() {
        return Choice { rank: 0, bound: Bound::Policy };
    }
    let asked = match policy {
        RankPolicy::Rank(rank) => Reached::At(rank),
        RankPolicy::Energy(share) => spectrum.rank_for_energy(share),
        RankPolicy::Tolerance(tolerance) => spectrum.rank_for_residual(tolerance * reference),
        RankPolicy::Auto => match noise {
            Some(estimate) => estimate.reached(),
            None => noise::estimate(spectrum, 0.0, noise::Rule::default()).reached(),
        },
        RankPolicy::SvRatio(ratio) => at_least_one(sv_ratio(spectrum, ratio)),
        RankPolicy::SvFro(share) => at_least_one(spectrum.rank_for_energy(share * share)),
        RankPolicy::SvCumulative(share) => at_least_one(sv_cumulative(spectrum, share)),
    };
    limited(asked, spectrum.short_side(), limits)
}

fn at_least_one(reached: Reached) -> Reached {
    match reached {
        Reached::At(rank) => Reached::At(rank.max(1)),
        beyond @ Reached::Beyond(_) => beyond,
    }
}

fn limited(asked: Reached, full: usize, limits: RankLimits) -> Choice {
    let (ceiling, cap) = match limits.maximum {
        Some(maximum) if maximum < full => (maximum, Bound::Maximum),
        _ => (full, Bound::Shape),
    };
    let floor = limits.minimum.min(ceiling);
    match asked {
        Reached::At(rank) if rank > ceiling => Choice { rank: ceiling, bound: cap },
        Reached::At(rank) if rank < floor => Choice { rank: floor, bound: Bound::Minimum },
        Reached::At(rank) => Choice { rank, bound: Bound::Policy },
        // More than are known are asked for, and no more are allowed.
        Reached::Beyond(known) if known >= ceiling => Choice { rank: ceiling, bound: cap },
        Reached::Beyond(known) => Choice { rank: known.max(floor), bound: Bound::Known },
    }
}

fn sv_ratio(spectrum: &Spectrum, ratio: f64) -> Reached {
    let Some(largest) = spectrum.largest() else {
        return Reached::Beyond(0);
    };
    let least = largest / ratio;
    let count = spectrum.values.partition_point(|&value| value > least);
    if count == spectrum.values.len() && !spectrum.is_complete() {
        return Reached::Beyond(count);
    }
    Reached::At(count)
}

fn sv_cumulative(spectrum: &Spectrum, share: f64) -> Reached {
    if !spectrum.is_complete() {
        return Reached::Beyond(0);
    }
    let demand = share * spectrum.values.iter().sum::<f64>();
    let sums = spectrum.values.iter().scan(0.0, |sum, value| {
        *sum += value;
        Some(*sum)
    });
    Reached::At((sums.take_while(|&sum| sum < demand).count() + 1).min(spectrum.values.len()))
}

impl fmt::Display for RankPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RankPolicy::Rank(rank) => write!(f, "{rank}"),
            RankPolicy::Energy(share) => write!(f, "energy:{share}"),
            RankPolicy::Tolerance(tolerance) => write!(f, "tolerance:{tolerance}"),
            RankPolicy::Auto => f.write_str("auto"),
            RankPolicy::SvRatio(ratio) => write!(f, "sv_ratio:{ratio}"),
            RankPolicy::SvFro(share) => write!(f, "sv_fro:{share}"),
            RankPolicy::SvCumulative(share) => write!(f, "sv_cumulative:{share}"),
        }
    }
}

/// A policy is written `16`, `auto`, `energy:0.9`, `tolerance:0.01`, `sv_ratio:2`, `sv_fro:0.9` or
/// `sv_cumulative:0.8`.
impl FromStr for RankPolicy {
    type Err = RankError;

    fn from_str(text: &str) -> Result<RankPolicy, RankError> {
        if text == "auto" {
            return Ok(RankPolicy::Auto);
        }
        let Some((name, number)) = text.split_once(':') else {
            return rank(text, text).map(RankPolicy::Rank);
        };
        let policy = match name {
            "energy" => RankPolicy::Energy,
            "tolerance" => RankPolicy::Tolerance,
            "sv_ratio" => RankPolicy::SvRatio,
            "sv_fro" => RankPolicy::SvFro,
            "sv_cumulative" => RankPolicy::SvCumulative,
            _ => return Err(RankError::new(text, "there is no such policy")),
        };
        let number = number.parse().map_err(|_| RankError::new(text, "it needs a number"))?;
        policy(number).checked()
    }
}

impl RankPolicy {
    /// The energy that it allows a matrix of this energy to leave over, if that is what it says;
    /// `reference` is the norm that a tolerance is relative to.
    #[must_use]
    pub fn leaves(self, energy: f64, reference: f64) -> Option<f64> {
        match self {
            RankPolicy::Energy(share) => Some((1.0 - share) * energy),
            RankPolicy::SvFro(share) => Some((1.0 - share * share) * energy),
            RankPolicy::Tolerance(tolerance) => Some((tolerance * reference).powi(2)),
            _ => None,
        }
    }

    /// Whether the leading singular values never decide it: only all of them do.
    #[must_use]
    pub fn needs_all(self) -> bool {
        matches!(self, RankPolicy::SvCumulative(_))
    }

    /// The policy, if its number makes sense.
    ///
    /// # Errors
    /// [`RankError::Syntax`] for a rank of 0 or beyond [`limits::RANK`], a share that is not in
    /// (0, 1], a ratio below 1, a tolerance that is not in [0, 1), and what is not finite.
    pub fn checked(self) -> Result<RankPolicy, RankError> {
        let (holds, demand) = match self {
            RankPolicy::Rank(rank) => ((1..=limits::RANK).contains(&rank), OUTSIDE),
            RankPolicy::Energy(share)
            | RankPolicy::SvFro(share)
            | RankPolicy::SvCumulative(share) => {
                (share > 0.0 && share <= 1.0, "the share must be above 0 and at most 1")
            }
            RankPolicy::Tolerance(tolerance) => {
                // An error of 1 is what no change at all leaves.
                ((0.0..1.0).contains(&tolerance), "the tolerance must be at least 0 and below 1")
            }
            RankPolicy::SvRatio(ratio) => {
                (ratio >= 1.0 && ratio.is_finite(), "the ratio must be 1 or more")
            }
            RankPolicy::Auto => (true, ""),
        };
        if holds { Ok(self) } else { Err(RankError::new(&self.to_string(), demand)) }
    }
}

const OUTSIDE: &str = "the rank must be from 1 to 65,536";

fn rank(number: &str, text: &str) -> Result<usize, RankError> {
    let rank = number.parse().map_err(|_| RankError::new(text, "it is no policy and no rank"))?;
    if (1..=limits::RANK).contains(&rank) { Ok(rank) } else { Err(RankError::new(text, OUTSIDE)) }
}

/// A rank policy or a rule cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RankError {
    /// It is not written as one.
    #[error("`{text}`: {problem}")]
    Syntax {
        /// The policy or rule.
        text: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Two rules have the same pattern.
    #[error("two rules are for `{pattern}`")]
    Repeated {
        /// The pattern.
        pattern: String,
    },
    /// The minimum is above the maximum.
    #[error("`{text}`: the minimum rank {minimum} is above the maximum {maximum}")]
    Limits {
        /// The rule.
        text: String,
        /// The minimum that holds with it.
        minimum: usize,
        /// The maximum that holds with it.
        maximum: usize,
    },
    /// A pattern cannot be evaluated.
    #[error(transparent)]
    Pattern(#[from] lora_format::Error),
}

impl RankError {
    fn new(text: &str, problem: &'static str) -> RankError {
        RankError::Syntax { text: text.to_owned(), problem }
    }
}

/// A policy and limits for all modules, and others for those that match a pattern.
///
/// A rule is `PATTERN=SETTINGS`, the settings separated by commas: a policy, `min:N`, `max:N`, or
/// `skip` alone. What a rule does not set is as for all modules, except that a rule with a policy
/// and without a maximum has none if it asks for a fixed rank. Patterns match as the keys of PEFT's
/// `rank_pattern` do ([`lora_format::pattern`]): `q_proj` is every module whose last part it is,
/// `.*\.mlp\..*` all below an `mlp`. The first rule that matches decides.
#[derive(Debug)]
pub struct RankRules {
    default: Ruling,
    rules: Vec<Rule>,
    table: PatternTable,
}

/// What one rule says, and whether it was the one that decided for something.
#[derive(Debug)]
struct Rule {
    pattern: String,
    ruling: Ruling,
    decided: bool,
}

/// What the rules say of a module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ruling {
    /// It is left out.
    Skip,
    /// Its rank is chosen so.
    Choose(RankPolicy, RankLimits),
}

impl RankRules {
    /// Reads the rules.
    ///
    /// # Errors
    /// [`RankError`] for the first that cannot be used.
    pub fn new<'a>(
        policy: RankPolicy,
        limits: RankLimits,
        rules: impl IntoIterator<Item = &'a str>,
    ) -> Result<RankRules, RankError> {
        let default = checked("for all modules", policy, limits)?;
        let (mut patterns, mut rulings) = (Map::new(), Vec::new());
        for text in rules {
            // The last one: a pattern may hold `=`, as look-around does; settings do not.
            let Some((pattern, settings)) = text.rsplit_once('=') else {
                return Err(RankError::new(text, "it is not PATTERN=SETTINGS"));
            };
            if pattern.is_empty() {
                return Err(RankError::new(text, "the pattern is empty"));
            }
            if patterns.insert(pattern.to_owned(), Value::from(rulings.len())).is_some() {
                return Err(RankError::Repeated { pattern: pattern.to_owned() });
            }
            let ruling = ruling(text, settings, policy, limits)?;
            rulings.push(Rule { pattern: pattern.to_owned(), ruling, decided: false });
        }
        let patterns = Value::Object(patterns);
        let table =
            PatternTable::compile(Path::new("command line"), "rank rules", Some(&patterns))?;
        Ok(RankRules { default, rules: rulings, table })
    }

    /// What holds for a module, or a parameter by its name.
    ///
    /// # Errors
    /// [`RankError::Pattern`] if a pattern takes too long.
    pub fn of(&mut self, module: &str) -> Result<Ruling, RankError> {
        let found = self.lookup(module)?;
        Ok(self.decide(found))
    }

    /// What holds for a parameter, whose rules may name its module or itself.
    ///
    /// # Errors
    /// [`RankError::Pattern`] if a pattern takes too long.
    pub fn of_parameter(&mut self, name: &str) -> Result<Ruling, RankError> {
        let module = name.rsplit_once('.').map(|(module, _)| self.lookup(module)).transpose()?;
        let itself = self.lookup(name)?;
        let first = module.flatten().into_iter().chain(itself).min();
        Ok(self.decide(first))
    }

    /// The index of the first rule that matches.
    fn lookup(&mut self, name: &str) -> Result<Option<usize>, RankError> {
        // The values of the table are indices of rules.
        Ok(self.table.lookup(name)?.map(|found| found.value as usize))
    }

    fn decide(&mut self, rule: Option<usize>) -> Ruling {
        match rule.and_then(|rule| self.rules.get_mut(rule)) {
            Some(rule) => {
                rule.decided = true;
                rule.ruling
            }
            None => self.default,
        }
    }

    /// The patterns of rules that matched something and decided for nothing so far: rules before them
    /// did.
    pub fn shadowed(&self) -> impl Iterator<Item = &str> {
        let unmatched: Vec<&str> = self.unmatched().collect();
        let idle = self.rules.iter().filter(|rule| !rule.decided);
        idle.map(|rule| rule.pattern.as_str()).filter(move |pattern| !unmatched.contains(pattern))
    }

    /// The patterns that have matched nothing so far.
    pub fn unmatched(&self) -> impl Iterator<Item = &str> {
        self.table.dead_keys()
    }
}

fn ruling(
    text: &str,
    settings: &str,
    default: RankPolicy,
    limits: RankLimits,
) -> Result<Ruling, RankError> {
    if settings == "skip" {
        return Ok(Ruling::Skip);
    }
    let (mut policy, mut minimum, mut maximum) = (None, None, None);
    for setting in settings.split(',') {
        let repeated = match setting.split_once(':') {
            Some(("min", number)) => minimum.replace(rank(number, text)?).is_some(),
            Some(("max", number)) => maximum.replace(rank(number, text)?).is_some(),
            _ => policy.replace(setting.parse::<RankPolicy>()?).is_some(),
        };
        if repeated {
            return Err(RankError::new(text, "it sets something twice"));
        }
    }
    let fixed = matches!(policy, Some(RankPolicy::Rank(_)));
    let limits = RankLimits {
        minimum: minimum.unwrap_or(if fixed { 0 } else { limits.minimum }),
        maximum: maximum.or(if fixed { None } else { limits.maximum }),
    };
    checked(text, policy.unwrap_or(default), limits)
}

fn checked(text: &str, policy: RankPolicy, limits: RankLimits) -> Result<Ruling, RankError> {
    let minimum = limits.minimum;
    match limits.maximum {
        Some(maximum) if maximum < minimum => {
            Err(RankError::Limits { text: text.to_owned(), minimum, maximum })
        }
        _ => Ok(Ruling::Choose(policy.checked()?, limits)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 8, 4, 2, 1, 1: the squares add up to 86, the values to 16.
    fn steps(known: usize) -> Spectrum {
        let values = [8.0, 4.0, 2.0, 1.0, 1.0];
        Spectrum { rows: 5, cols: 9, energy: 86.0, values: values[..known].to_vec() }
    }

    fn of(policy: RankPolicy, spectrum: &Spectrum) -> Choice {
        choose(policy, spectrum, None, spectrum.norm(), RankLimits::default())
    }

    fn by(rank: usize, bound: Bound) -> Choice {
        Choice { rank, bound }
    }

    #[test]
    fn policies_choose_the_smallest_rank() {
        let all = steps(5);
        for (policy, rank) in [
            (RankPolicy::Rank(3), 3),
            (RankPolicy::Energy(0.9), 2), // 80/86 = 0.930
            (RankPolicy::Energy(1.0), 5),
            (RankPolicy::Tolerance(0.27), 2), // √(6/86) = 0.264
            (RankPolicy::Tolerance(0.26), 3),
            (RankPolicy::Tolerance(1.0), 0),
            (RankPolicy::SvRatio(4.0), 2), // more than 2, and not 2 itself
            (RankPolicy::SvRatio(4.001), 3),
            (RankPolicy::SvRatio(1.0), 1), // kohya clamps its index to 0
            (RankPolicy::SvFro(0.964), 2), // 0.964² = 0.9293
            (RankPolicy::SvFro(0.966), 3),
            (RankPolicy::SvCumulative(0.75), 2), // 12/16
            (RankPolicy::SvCumulative(0.76), 3),
            (RankPolicy::SvCumulative(0.01), 1),
            (RankPolicy::SvCumulative(1.0), 5),
        ] {
            assert_eq!(of(policy, &all), by(rank, Bound::Policy), "{policy}");
        }
        assert_eq!(of(RankPolicy::Rank(99), &all), by(5, Bound::Shape));
    }

    #[test]
    fn the_sv_policies_are_kohyas() {
        // Read off index_sv_ratio, index_sv_fro and index_sv_cumulative of sd-scripts'
        // networks/resize_lora.py, plus 1, for S = 10, 9, …, 1.
        let values: Vec<f64> = (1..=10).rev().map(f64::from).collect();
        let spectrum = Spectrum { rows: 10, cols: 10, energy: 385.0, values };
        for (policy, rank) in [
            (RankPolicy::SvRatio(2.0), 5),
            (RankPolicy::SvRatio(3.0), 7),
            (RankPolicy::SvRatio(20.0), 10),
            (RankPolicy::SvFro(0.5), 1),
            (RankPolicy::SvFro(0.9), 5),
            (RankPolicy::SvFro(0.99), 8),
            (RankPolicy::SvCumulative(0.5), 4),
            (RankPolicy::SvCumulative(0.9), 8),
            (RankPolicy::SvCumulative(0.99), 10),
        ] {
            assert_eq!(of(policy, &spectrum), by(rank, Bound::Policy), "{policy}");
        }
    }

    #[test]
    fn a_tolerance_is_relative_to_the_reference() {
        let all = steps(5);
        let limits = RankLimits::default();
        let chosen = choose(RankPolicy::Tolerance(0.01), &all, None, 245.0, limits);
        assert_eq!(chosen.rank, 2, "√6 = 2.449");
        assert_eq!(choose(RankPolicy::Tolerance(0.01), &all, None, 244.0, limits).rank, 3);
    }

    #[test]
    fn what_the_known_values_do_not_decide_is_said() {
        let few = steps(2);
        assert_eq!(of(RankPolicy::Rank(4), &few), by(4, Bound::Policy));
        assert_eq!(of(RankPolicy::Energy(0.9), &few), by(2, Bound::Policy));
        assert_eq!(of(RankPolicy::Energy(0.95), &few), by(2, Bound::Known));
        assert_eq!(of(RankPolicy::Tolerance(0.1), &few), by(2, Bound::Known));
        assert_eq!(of(RankPolicy::SvRatio(1.5), &few), by(1, Bound::Policy));
        assert_eq!(of(RankPolicy::SvRatio(4.0), &few), by(2, Bound::Known));
        assert_eq!(of(RankPolicy::SvFro(0.99), &few), by(2, Bound::Known));
        assert_eq!(of(RankPolicy::SvCumulative(0.5), &few), by(0, Bound::Known));
        assert!(!Bound::Known.is_final() && Bound::Shape.is_final());
    }

    #[test]
    fn limits_bind_and_say_so() {
        let all = steps(5);
        let limited = |policy, minimum, maximum| {
            choose(policy, &all, None, all.norm(), RankLimits { minimum, maximum })
        };
        assert_eq!(limited(RankPolicy::Energy(0.9), 4, None), by(4, Bound::Minimum));
        assert_eq!(limited(RankPolicy::Energy(0.9), 9, None), by(5, Bound::Minimum));
        assert_eq!(limited(RankPolicy::Energy(0.9), 0, Some(1)), by(1, Bound::Maximum));
        assert_eq!(limited(RankPolicy::Energy(0.9), 2, Some(2)), by(2, Bound::Policy));
        assert_eq!(limited(RankPolicy::Rank(99), 0, Some(9)), by(5, Bound::Shape));
        let limits = RankLimits { minimum: 0, maximum: Some(2) };
        let few = steps(2);
        let chosen = choose(RankPolicy::Energy(0.99), &few, None, 1.0, limits);
        assert_eq!(chosen, by(2, Bound::Maximum), "no more values are needed");
    }

    #[test]
    fn zeros_have_rank_zero() {
        let zero = Spectrum { rows: 5, cols: 9, energy: 0.0, values: vec![] };
        for policy in [
            RankPolicy::Rank(4),
            RankPolicy::Energy(0.9),
            RankPolicy::Tolerance(0.0),
            RankPolicy::Auto,
            RankPolicy::SvRatio(2.0),
            RankPolicy::SvCumulative(0.5),
        ] {
            let limits = RankLimits { minimum: 2, maximum: None };
            assert_eq!(choose(policy, &zero, None, 0.0, limits), by(0, Bound::Policy));
        }
    }

    #[test]
    fn auto_reads_the_estimate_or_makes_one() {
        let spectrum = Spectrum::of_rank(40, 50, vec![3.0, 2.0, 1.0, 0.5]);
        assert_eq!(of(RankPolicy::Auto, &spectrum), by(4, Bound::Policy));
        let noise = noise::estimate(&spectrum, 0.1, noise::Rule::default());
        let chosen = choose(RankPolicy::Auto, &spectrum, Some(&noise), 1.0, RankLimits::default());
        assert_eq!(chosen, by(2, Bound::Policy), "{noise:?}");
    }

    #[test]
    fn policies_are_written_as_they_are_read() {
        for text in [
            "16",
            "auto",
            "energy:0.9",
            "tolerance:0.01",
            "sv_ratio:2",
            "sv_fro:0.9",
            "sv_cumulative:1",
            "tolerance:0",
        ] {
            assert_eq!(text.parse::<RankPolicy>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "0",
            "-1",
            "65537",
            "energy:0",
            "energy:1.1",
            "energy:NaN",
            "energy:",
            "energy",
            "sv_ratio:0.5",
            "sv_ratio:inf",
            "tolerance:-1",
            "tolerance:inf",
            "full:1",
            "1.5",
        ] {
            let error = text.parse::<RankPolicy>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{text}`")), "{text}: {error}");
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let all = RankLimits { minimum: 2, maximum: Some(32) };
        let policy = RankPolicy::Energy(0.9);
        let rules = [
            "lm_head=skip",
            r".*\.0\..*=64",
            "q_proj=energy:0.5,max:8",
            "k_proj=min:4",
            "x=auto",
            r"(?=v)v_proj=tolerance:0.1",
        ];
        let mut rules = RankRules::new(policy, all, rules).unwrap();
        let limits = |minimum, maximum| RankLimits { minimum, maximum };
        for (module, ruling) in [
            ("lm_head", Ruling::Skip),
            ("model.0.q_proj", Ruling::Choose(RankPolicy::Rank(64), limits(0, None))),
            ("model.1.q_proj", Ruling::Choose(RankPolicy::Energy(0.5), limits(2, Some(8)))),
            ("model.1.k_proj", Ruling::Choose(policy, limits(4, Some(32)))),
            ("model.1.v_proj", Ruling::Choose(RankPolicy::Tolerance(0.1), all)),
            ("model.1.o_proj", Ruling::Choose(policy, all)),
        ] {
            assert_eq!(rules.of(module).unwrap(), ruling, "{module}");
        }
        assert_eq!(rules.unmatched().collect::<Vec<_>>(), ["x"]);
    }

    #[test]
    fn rules_that_cannot_be_meant_are_refused() {
        let limits = RankLimits { minimum: 4, maximum: None };
        for (rule, problem) in [
            ("q_proj", "PATTERN=SETTINGS"),
            ("=4", "pattern is empty"),
            ("q_proj=", "no policy"),
            ("q_proj=4,5", "twice"),
            ("q_proj=auto,max:2", "above the maximum"),
            ("q_proj=min:x", "no rank"),
            ("q_proj=skip,max:2", "no rank"),
            ("(=4", "not a valid regular expression"),
        ] {
            let error = RankRules::new(RankPolicy::Auto, limits, [rule]).unwrap_err().to_string();
            assert!(error.contains(problem), "{rule}: {error}");
        }
        let twice = RankRules::new(RankPolicy::Auto, limits, ["q=4", "q=5"]);
        assert!(matches!(twice, Err(RankError::Repeated { .. })));
    }
}
