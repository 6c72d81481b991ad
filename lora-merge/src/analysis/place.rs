//! Where in a model a parameter is: its projection and its depth.
//!
//! The depth is the first number in a name, the projection what comes after it, as short as it can
//! be without being that of another one: `model.layers.3.self_attn.q_proj.weight` is `q_proj` of
//! layer 3, and BERT's three `dense` are `intermediate.dense`, `output.dense` and
//! `attention.output.dense`. Further numbers (experts) are `*`.

use std::collections::BTreeMap;

use crate::names::is_number;

/// Where in a model a parameter is.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The layer; `None` of what is in none.
    pub depth: Option<usize>,
    /// What it is within the layer, such as `q_proj`.
    pub projection: String,
}

/// The places of all parameters of a model or an adapter, in the order of `names`. Projections are
/// told apart among these.
#[must_use]
pub fn places<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<Place> {
    let long: Vec<(Option<usize>, String)> = names.into_iter().map(template).collect();
    let mut suffixes: BTreeMap<&str, Option<&str>> = BTreeMap::new();
    for (_, template) in &long {
        for suffix in suffixes_of(template) {
            // Who has it: one template, or several.
            let owner = suffixes.entry(suffix).or_insert(Some(template));
            *owner = owner.filter(|&owner| owner == template);
        }
    }
    let shortest = |template: &str| {
        let own =
            suffixes_of(template).find(|suffix| suffixes.get(suffix) == Some(&Some(template)));
        own.unwrap_or(template).to_owned()
    };
    long.iter()
        .map(|(depth, template)| Place { depth: *depth, projection: shortest(template) })
        .collect()
}

/// The depth in a name and its template: what follows the depth, without `weight`.
fn template(name: &str) -> (Option<usize>, String) {
    let name = name.strip_suffix(".weight").unwrap_or(name);
    let parts: Vec<&str> = name.split('.').collect();
    let at = parts.iter().position(|part| is_number(part));
    let depth = at.and_then(|at| parts[at].parse().ok());
    let within = match at {
        Some(at) if at + 1 < parts.len() => &parts[at + 1..],
        // A layer that is only a number is called as the list that it is in.
        Some(at) if at > 0 => &parts[..at],
        _ => &parts[..],
    };
    let starred: Vec<&str> =
        within.iter().map(|part| if is_number(part) { "*" } else { *part }).collect();
    (depth, starred.join("."))
}

/// The suffixes of whole parts that begin with a word, the shortest first. A bias is not called
/// `bias`.
fn suffixes_of(template: &str) -> impl Iterator<Item = &str> {
    let starts = template.rmatch_indices('.').map(|(at, _)| at + 1).chain([0]);
    let suffixes = starts.map(move |start| &template[start..]);
    suffixes.filter(move |&suffix| {
        let first = suffix.split('.').next().unwrap_or(suffix);
        suffix == template || first != "*" && first != "bias"
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(names: &[&str]) -> Vec<String> {
        let show = |place: Place| match place.depth {
            Some(depth) => format!("{} {depth}", place.projection),
            None => place.projection,
        };
        places(names.iter().copied()).into_iter().map(show).collect()
    }

    #[test]
    fn projections_are_as_short_as_they_can_be() {
        let llama = [
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.12.self_attn.q_proj.weight",
            "model.layers.12.self_attn.q_proj.bias",
            "model.layers.12.mlp.down_proj.weight",
            "model.norm.weight",
            "lm_head.weight",
        ];
        assert_eq!(
            shown(&llama),
            ["q_proj 0", "q_proj 12", "q_proj.bias 12", "down_proj 12", "norm", "lm_head"]
        );
        let bert = [
            "bert.encoder.layer.3.attention.output.dense.weight",
            "bert.encoder.layer.3.intermediate.dense.weight",
            "bert.encoder.layer.3.output.dense.weight",
            "bert.encoder.layer.3.attention.self.query.weight",
        ];
        assert_eq!(
            shown(&bert),
            ["attention.output.dense 3", "intermediate.dense 3", "output.dense 3", "query 3"]
        );
    }

    #[test]
    fn experts_and_names_without_layers_have_places() {
        let names = [
            "model.layers.1.block_sparse_moe.experts.5.w1.weight",
            "model.layers.1.mlp.experts.gate_up_proj",
            "net.4.weight",
            "w",
            "",
        ];
        assert_eq!(shown(&names), ["w1 1", "gate_up_proj 1", "net 4", "w", ""]);
        assert!(shown(&["model.layers.99999999999999999999999.q.weight"]) == ["q"]);
    }
}
