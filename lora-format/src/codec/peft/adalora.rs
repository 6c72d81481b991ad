//! AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): `W' = W + s·B·diag(E)·A`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::build::Builder;
use super::config::Configuration;
use super::methods::part;
use super::small::{TokenTable, push_rows};
use super::tensors::Parts;
use crate::error::{AdapterProblem, Error, Result};
use crate::factors::{self, FactorTensors};
use crate::model::{Form, Scaling, ScalingRule, Target};

/// What PEFT adds to the rank that it divides by.
const EPSILON: f64 = 1e-5;
/// PEFT's initial rank where the configuration gives none.
const INITIAL_RANK: usize = 12;

/// Builds the components of an AdaLoRA adapter. The scale divides by the initial rank, whatever
/// ranks the allocation of the budget left: PEFT keeps `ranknum` when it cuts the factors down.
pub(super) fn build(builder: &mut Builder<'_>, modules: BTreeMap<String, Parts>) -> Result<()> {
    let config = builder.config;
    let Some(alpha) = config.number("lora_alpha")? else {
        return Err(Error::config(config.path, "lora_alpha", "a number", &Value::Null));
    };
    let initial = config.count("init_r")?.unwrap_or(INITIAL_RANK);
    let kept = kept_ranks(&config)?;
    let tokens = TokenTable::of(&config, "trainable_token_indices")?;
    for (module, mut parts) in modules {
        if let Some(rows) = parts.take(part::TOKENS) {
            push_rows(builder, &tokens, &module, rows)?;
            if parts.any_name().is_none() {
                continue;
            }
        }
        let Some(mut gain) = builder.require(&module, &mut parts, part::E) else { continue };
        let fits = |shape: &[usize]| matches!(shape, [_] | [_, 1]);
        if !builder.check(&gain, fits, "E is one value per rank") {
            continue;
        }
        let stored = gain.elements();
        let configured = kept.get(&module).copied().unwrap_or(initial);
        if configured != stored {
            let module = module.clone();
            builder.problems.push(AdapterProblem::ConfiguredRank { module, configured, stored });
            continue;
        }
        let (a, b) = (parts.take(part::A), parts.take(part::B));
        if stored == 0 {
            builder.prune(&module, [Some(gain), a, b].into_iter().flatten());
            continue;
        }
        // Without a positive alpha PEFT puts the rank in its place.
        let numerator = if alpha > 0.0 { alpha } else { stored as f64 };
        let scaling =
            Scaling { alpha: numerator / (initial as f64 + EPSILON), rule: ScalingRule::Direct };
        let name = |suffix| format!("{}{module}.lora_{suffix}", super::PREFIX);
        let found = FactorTensors { a, b };
        let problems = &mut builder.problems;
        let built = factors::low_rank(&module, found, (name("A"), name("B")), scaling, problems);
        let Some(mut low_rank) = built else { continue };
        if low_rank.rank() != stored {
            let configured = low_rank.rank();
            builder.problems.push(AdapterProblem::ConfiguredRank { module, configured, stored });
            continue;
        }
        gain.shape = vec![stored];
        low_rank.rank_gain = Some(gain);
        builder.push(Target::weight(module), Form::LowRank(low_rank));
        builder.reject_rest(parts);
    }
    Ok(())
}

/// The ranks that `rank_pattern` left: it holds a mask per module, under the name of its E.
fn kept_ranks(config: &Configuration<'_>) -> Result<BTreeMap<String, usize>> {
    const FIELD: &str = "rank_pattern";
    let mut kept = BTreeMap::new();
    for (name, mask) in config.object(FIELD)?.into_iter().flatten() {
        let flags: Option<Vec<bool>> =
            mask.as_array().and_then(|mask| mask.iter().map(Value::as_bool).collect());
        let wrong =
            || Error::config(config.path, &format!("{FIELD}.{name}"), "a list of booleans", mask);
        let flags = flags.ok_or_else(wrong)?;
        let name = name.strip_suffix(".default").unwrap_or(name);
        let module = name.strip_suffix(".lora_E").unwrap_or(name);
        kept.insert(module.to_owned(), flags.into_iter().filter(|&flag| flag).count());
    }
    Ok(kept)
}
