//! The names of experts and of what stands beside them.
//!
//! transformers 5 holds the experts of a layer in two stacks, `experts.gate_up_proj` and
//! `experts.down_proj`. Files have them so, or as transformers 4 had them in memory, or as their
//! makers wrote them: one matrix per expert and projection, mostly. The tables here follow
//! transformers 5.23's `conversion_mapping.py`, which loads (and saves) one as the other; the gate
//! projection always comes before the up projection.

use std::borrow::Cow;

/// A projection of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Projection {
    /// The gate and the up projection as one matrix.
    GateUp,
    Gate,
    Up,
    Down,
}

impl Projection {
    pub(super) fn name(self) -> &'static str {
        match self {
            Projection::GateUp => "gate and up projection",
            Projection::Gate => "gate projection",
            Projection::Up => "up projection",
            Projection::Down => "down projection",
        }
    }
}

/// How the outputs of the gate and the up projection share a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Sharing {
    /// First all of the gate's, then all of the up projection's.
    Halves,
    /// In turn, the gate's first.
    Interleaved,
}

/// A matrix that belongs to one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OfExpert<'a> {
    /// The module that has the experts: `model.layers.0.mlp.experts`.
    pub(super) container: &'a str,
    pub(super) expert: usize,
    pub(super) projection: Projection,
}

/// `experts.3.gate_proj`, as Qwen2-MoE and most others name it; Mixtral, MiniMax, Phi-MoE, LFM2 and
/// Kimi have w1, w3, w2, dots3 fc1, fc3, fc2.
const OF_EXPERT: [(&str, Projection); 9] = [
    ("gate_proj", Projection::Gate),
    ("up_proj", Projection::Up),
    ("down_proj", Projection::Down),
    ("w1", Projection::Gate),
    ("w3", Projection::Up),
    ("w2", Projection::Down),
    ("fc1", Projection::Gate),
    ("fc3", Projection::Up),
    ("fc2", Projection::Down),
];

/// `experts.gate_up_projs.3`: gpt-oss as unsloth takes it apart for bitsandbytes.
const PLURALS: [(&str, Projection); 2] =
    [("gate_up_projs", Projection::GateUp), ("down_projs", Projection::Down)];

/// The expert's matrix that a module is, by its name.
pub(super) fn of_expert(module: &str) -> Option<OfExpert<'_>> {
    let (rest, last) = module.rsplit_once('.')?;
    let (before, middle) = rest.rsplit_once('.')?;
    let known = |table: &[(&str, Projection)], leaf: &str| {
        table.iter().find(|entry| entry.0 == leaf).map(|entry| entry.1)
    };
    let (container, expert, projection) = match number(middle) {
        Some(expert) => (before, expert, known(&OF_EXPERT, last)?),
        None => (before, number(last)?, known(&PLURALS, middle)?),
    };
    is_experts(container).then_some(OfExpert { container, expert, projection })
}

fn number(part: &str) -> Option<usize> {
    // One spelling per number.
    let canonical = part == "0" || !part.starts_with(['0', '+']);
    if canonical { part.parse().ok() } else { None }
}

fn is_experts(module: &str) -> bool {
    module == "experts" || module.ends_with(".experts")
}

/// A stack of matrices, one per expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OfStack<'a> {
    /// The module that has the experts in transformers 5.
    pub(super) container: Cow<'a, str>,
    pub(super) projection: Projection,
    /// How gate and up share it, where the name says so.
    pub(super) sharing: Option<Sharing>,
    /// Whether the stack lies in the file as transformers 5 has it in memory.
    pub(super) as_in_memory: bool,
}

/// The stack of experts that a parameter of three dimensions is, by its name.
pub(super) fn of_stack(parameter: &str) -> Option<OfStack<'_>> {
    let (module, leaf) = parameter.rsplit_once('.')?;
    if leaf == "weight" {
        let (owner, leaf) = module.rsplit_once('.')?;
        let halves = Some(Sharing::Halves);
        let (container, projection, sharing, as_in_memory) = match leaf {
            // Granite-MoE.
            "input_linear" => (within(owner, "experts"), Projection::GateUp, halves, true),
            "output_linear" => (within(owner, "experts"), Projection::Down, None, true),
            // Aria.
            "fc1" if is_experts(owner) => (owner.into(), Projection::GateUp, halves, true),
            "fc2" if is_experts(owner) => (owner.into(), Projection::Down, None, true),
            // Step-3.7, where transformers 5 joins gate and up.
            _ => {
                let layer = owner.strip_suffix(".moe")?;
                let container = within(layer, "mlp.experts");
                match leaf {
                    "gate_proj" => (container, Projection::Gate, None, false),
                    "up_proj" => (container, Projection::Up, None, false),
                    "down_proj" => (container, Projection::Down, None, true),
                    _ => return None,
                }
            }
        };
        return Some(OfStack { container, projection, sharing, as_in_memory });
    }
    let (projection, sharing, as_in_memory) = match leaf {
        "gate_up_proj" => (Projection::GateUp, None, true),
        "gate_proj" => (Projection::Gate, None, true),
        "up_proj" => (Projection::Up, None, true),
        "down_proj" => (Projection::Down, None, true),
        // Inkling, whose stack transformers 5 sorts into halves.
        "w13_weight" => (Projection::GateUp, Some(Sharing::Interleaved), false),
        "w2_weight" => (Projection::Down, None, true),
        _ => return None,
    };
    is_experts(module).then_some(OfStack {
        container: module.into(),
        projection,
        sharing,
        as_in_memory,
    })
}

fn within(module: &str, part: &str) -> Cow<'static, str> {
    format!("{module}.{part}").into()
}

/// The projection that a bare parameter of the module that has the experts is.
pub(super) fn of_parameter(parameter: &str) -> Option<Projection> {
    match parameter {
        "gate_up_proj" => Some(Projection::GateUp),
        "gate_proj" => Some(Projection::Gate),
        "up_proj" => Some(Projection::Up),
        "down_proj" => Some(Projection::Down),
        _ => None,
    }
}

/// The parameters of modules of experts in the order in which every such class of transformers
/// registers them.
const REGISTERED: [&str; 7] = [
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "up_proj",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
];

/// Whether these parameters are known to be registered in this order.
pub(super) fn in_order<'a>(parameters: impl Iterator<Item = &'a str>) -> bool {
    let mut last = None;
    for parameter in parameters {
        let Some(place) = REGISTERED.iter().position(|known| *known == parameter) else {
            return false;
        };
        if last.is_some_and(|last| last >= place) {
            return false;
        }
        last = Some(place);
    }
    true
}

/// The name that the module of a layer's experts has in transformers 5: Mixtral and its kin have
/// them in `block_sparse_moe` elsewhere.
pub(super) fn canonical(container: &str) -> String {
    replaced(container, "block_sparse_moe", "mlp").unwrap_or_else(|| container.to_owned())
}

/// What stands beside the experts and has one name in files and another in transformers 5, by
/// `conversion_mapping.py`: whole dotted parts.
const BESIDE: [(&str, &str); 8] = [
    // Mixtral, MiniMax, Kimi-Linear.
    ("block_sparse_moe", "mlp"),
    // Phi-MoE.
    ("block_sparse_moe.gate", "mlp.router"),
    // Granite-MoE.
    ("block_sparse_moe.router.layer", "block_sparse_moe.router"),
    // HY-V3.
    ("mlp.router.gate", "mlp.gate"),
    ("mlp.shared_mlp", "mlp.shared_experts"),
    // Laguna.
    ("mlp.shared_expert", "mlp.shared_experts"),
    // Step-3.7.
    ("moe.gate", "mlp.gate"),
    ("share_expert", "mlp.shared_experts"),
];

/// The other names of a module of a mixture of experts, in either direction.
pub(super) fn other_names(module: &str) -> Vec<String> {
    let both = BESIDE.iter().flat_map(|&(file, memory)| [(file, memory), (memory, file)]);
    both.filter_map(|(from, to)| replaced(module, from, to)).collect()
}

/// Whether a base with these parameters has experts at all.
pub(super) fn has_experts<'a>(mut parameters: impl Iterator<Item = &'a str>) -> bool {
    const TELLING: [&str; 3] = ["experts", "block_sparse_moe", "moe"];
    parameters.any(|name| name.split('.').any(|part| TELLING.contains(&part)))
}

/// `name` with the last occurrence of the dotted parts `from` replaced by `to`.
fn replaced(name: &str, from: &str, to: &str) -> Option<String> {
    let bounded = |start: usize| {
        let end = start + from.len();
        (start == 0 || name.as_bytes()[start - 1] == b'.')
            && (end == name.len() || name.as_bytes()[end] == b'.')
    };
    let start = name.rmatch_indices(from).map(|found| found.0).find(|&start| bounded(start))?;
    Some(format!("{}{to}{}", &name[..start], &name[start + from.len()..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_matrices_of_experts_are_known_by_their_names() {
        let of = |module| of_expert(module).map(|it| (it.container, it.expert, it.projection));
        let layer = "model.layers.0.mlp.experts";
        assert_eq!(of("model.layers.0.mlp.experts.12.up_proj"), Some((layer, 12, Projection::Up)));
        assert_eq!(of("a.block_sparse_moe.experts.0.w2").unwrap().2, Projection::Down);
        assert_eq!(of("experts.7.w1"), Some(("experts", 7, Projection::Gate)));
        assert_eq!(
            of("model.layers.0.mlp.experts.gate_up_projs.3"),
            Some((layer, 3, Projection::GateUp))
        );
        for other in [
            "model.layers.0.mlp.up_proj",
            "model.layers.0.mlp.experts.x.up_proj",
            "model.layers.0.mlp.experts.01.up_proj",
            "model.layers.0.mlp.experts.0.router",
            "model.layers.0.up_proj",
            "w1",
            "",
            "experts.99999999999999999999999.w1",
        ] {
            assert_eq!(of_expert(other), None, "{other}");
        }
    }

    #[test]
    fn stacks_are_known_by_their_names() {
        let of = |name| of_stack(name).map(|it| (it.container.into_owned(), it.projection));
        let at = |container: &str, projection| Some((container.to_owned(), projection));
        assert_eq!(of("l.0.mlp.experts.gate_up_proj"), at("l.0.mlp.experts", Projection::GateUp));
        assert_eq!(
            of("l.0.block_sparse_moe.input_linear.weight"),
            at("l.0.block_sparse_moe.experts", Projection::GateUp)
        );
        assert_eq!(of("l.0.moe.up_proj.weight"), at("l.0.mlp.experts", Projection::Up));
        assert_eq!(of("l.0.mlp.experts.fc2.weight"), at("l.0.mlp.experts", Projection::Down));
        assert_eq!(of("l.0.mlp.up_proj.weight"), None);
        assert_eq!(of("l.0.mlp.gate_up_proj"), None);
    }

    #[test]
    fn the_order_of_registration_is_only_certain_of_known_names() {
        assert!(in_order(["gate_up_proj", "down_proj"].into_iter()));
        assert!(in_order(["up_proj", "down_proj"].into_iter()));
        assert!(!in_order(["down_proj", "gate_up_proj"].into_iter()));
        assert!(!in_order(["gate_up_proj", "gate_up_proj"].into_iter()));
        assert!(!in_order(["gate_up_proj", "other"].into_iter()));
    }

    #[test]
    fn names_are_replaced_by_whole_parts() {
        assert_eq!(canonical("a.block_sparse_moe.experts"), "a.mlp.experts");
        assert_eq!(canonical("a.block_sparse_moes.experts"), "a.block_sparse_moes.experts");
        assert!(other_names("a.0.mlp.gate").contains(&"a.0.block_sparse_moe.gate".to_owned()));
        assert!(other_names("a.0.mlp.gate").contains(&"a.0.mlp.router.gate".to_owned()));
        assert!(other_names("a.0.block_sparse_moe.gate").contains(&"a.0.mlp.router".to_owned()));
        assert!(
            other_names("a.0.mlp.shared_experts.up_proj")
                .contains(&"a.0.mlp.shared_expert.up_proj".to_owned())
        );
        assert!(other_names("lm_head").is_empty());
    }
}
