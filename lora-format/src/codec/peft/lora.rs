//! LoRA: linear layers, embeddings, convolutions, MultiheadAttention, bare parameters; with DoRA's
//! magnitudes, a bias on B, block-diagonal factors and trained token rows.

use std::collections::{BTreeMap, BTreeSet};

use super::build::Builder;
use super::config::{Configuration, Configured, ScalingTable};
use super::methods::part;
use super::small::{TokenTable, push_rows};
use super::tensors::Parts;
use super::{A_SUFFIX, B_SUFFIX, PREFIX};
use crate::blocks::{self, Expansions};
use crate::error::{AdapterProblem, Error, ExpansionProblem, Result, Shape};
use crate::factors::{self, FactorTensors};
use crate::model::{Candidate, Experts, Form, Layer, LowRank, Note, Scaling, Target};

/// A module, less the wrappers that PEFT puts into its name.
enum Site<'a> {
    /// An ordinary layer, or one that bare parameters belong to.
    Layer { module: &'a str },
    /// A layer with another wrapper around it: a further bare parameter. `level` counts those
    /// outside.
    Nested { module: &'a str, level: usize },
    /// A part of a wrapped layer, `mha.base_layer.out_proj`, and that layer, `mha`.
    Inner { module: String, outer: &'a str },
}

impl Site<'_> {
    const WRAPPED: &'static str = ".base_layer";

    fn of(name: &str) -> Site<'_> {
        let mut module = name;
        let mut level = 0;
        while let Some(outer) = module.strip_suffix(Site::WRAPPED) {
            module = outer;
            level += 1;
        }
        match module.split_once(".base_layer.") {
            Some((outer, inner)) => {
                let module = format!("{outer}.{}", inner.replace("base_layer.", ""));
                Site::Inner { module, outer }
            }
            None if level > 0 => Site::Nested { module, level },
            None => Site::Layer { module },
        }
    }
}

/// What the configuration says of LoRA's variants.
struct Variants<'a> {
    /// `None` without a configuration: then the tensors tell.
    dora: Option<bool>,
    bias: Option<bool>,
    blocks: Option<BlockDiagonal<'a>>,
    parameters: Vec<&'a str>,
    tokens: TokenTable<'a>,
}

/// BD-LoRA: A or B of some layers is block-diagonal, and only its blocks are stored.
struct BlockDiagonal<'a> {
    count: usize,
    of_a: Vec<&'a str>,
    of_b: Vec<&'a str>,
}

impl<'a> Variants<'a> {
    fn of(config: &Configuration<'a>) -> Result<Variants<'a>> {
        let flag = |field| -> Result<Option<bool>> {
            Ok(config.recorded.then_some(config.flag(field)?.unwrap_or(false)))
        };
        Ok(Variants {
            dora: flag("use_dora")?,
            bias: flag("lora_bias")?,
            blocks: BlockDiagonal::of(config)?,
            parameters: config.names("target_parameters")?,
            tokens: TokenTable::of(config, "trainable_token_indices")?,
        })
    }
}

impl<'a> BlockDiagonal<'a> {
    fn of(config: &Configuration<'a>) -> Result<Option<BlockDiagonal<'a>>> {
        const FIELD: &str = "use_bdlora";
        let Some(fields) = config.object(FIELD)? else {
            return Ok(None);
        };
        let inner = Configuration { fields, ..*config };
        let count = inner.count("nblocks")?.unwrap_or(1);
        for field in fields.keys() {
            let known = ["match_strict", "nblocks", "target_modules_bd_a", "target_modules_bd_b"];
            if !known.contains(&field.as_str()) {
                let found = serde_json::Value::from(field.as_str());
                return Err(Error::config(config.path, FIELD, "of known fields", &found));
            }
        }
        let of_a = inner.names("target_modules_bd_a")?;
        let of_b = inner.names("target_modules_bd_b")?;
        Ok(Some(BlockDiagonal { count, of_a, of_b }))
    }

    /// Fills in the zeros of a factor that is stored as blocks. PEFT looks for its patterns
    /// anywhere in the name.
    fn expand(
        &self,
        module: &str,
        factors: &mut FactorTensors,
        expansions: &mut Expansions,
    ) -> Result<(), AdapterProblem> {
        let matches = |patterns: &[&str]| patterns.iter().any(|pattern| module.contains(pattern));
        for (factor, patterns) in [(&mut factors.a, &self.of_a), (&mut factors.b, &self.of_b)] {
            let Some(stored) = factor else { continue };
            if matches(patterns) {
                let expanded = blocks::block_diagonal(stored, self.count, expansions);
                *stored = expanded.map_err(|problem| match problem {
                    ExpansionProblem::TooLarge(limit) => limit.into(),
                    ExpansionProblem::Shape => AdapterProblem::FactorShape {
                        tensor: stored.name.clone(),
                        shape: Shape(stored.shape.clone()),
                        expected: "its rows must divide into the configuration's nblocks",
                    },
                })?;
            }
        }
        Ok(())
    }
}

/// Builds the components of a LoRA adapter.
pub(super) fn build(builder: &mut Builder<'_>, modules: BTreeMap<String, Parts>) -> Result<()> {
    let variants = Variants::of(&builder.config)?;
    let mut scaling = builder.scaling_table()?;
    let levels = levels(&modules);
    require_levels(builder, &modules, &levels);
    let attentions = attentions(&modules, &variants);
    for (name, mut parts) in modules {
        if let Some(rows) = parts.take(part::TOKENS) {
            push_rows(builder, &variants.tokens, &name, rows)?;
        }
        if parts.any_name().is_none() {
            continue;
        }
        match Site::of(&name) {
            Site::Nested { module, level } => {
                let depth = levels.get(module).map_or(0, |deepest| deepest - level);
                build_experts(builder, &variants, &mut scaling, (module, depth), &mut parts)?;
            }
            Site::Layer { module } => {
                if attentions.contains(module) {
                    build_in_projection(builder, &mut scaling, module, &mut parts)?;
                } else if let Some(&depth) = levels.get(module) {
                    build_experts(builder, &variants, &mut scaling, (module, depth), &mut parts)?;
                } else {
                    match owner(&variants, &mut scaling, module, &parts)? {
                        Owner::Bare => {
                            let site = (module, 0);
                            build_experts(builder, &variants, &mut scaling, site, &mut parts)?;
                        }
                        Owner::Layer { called } => {
                            let names = (module, &*called);
                            build_layer(builder, &variants, &mut scaling, names, &mut parts)?;
                        }
                    }
                }
            }
            Site::Inner { module, outer } if attentions.contains(outer) => {
                build_out_projection(builder, &mut scaling, (&name, module, outer), &mut parts)?;
            }
            // A layer inside a module of which bare parameters are trained too.
            Site::Inner { module, .. } => {
                build_layer(builder, &variants, &mut scaling, (&module, &module), &mut parts)?;
            }
        }
        builder.reject_rest(parts);
    }
    builder.notes.extend(scaling.dead_patterns());
    Ok(())
}

/// How many wrappers the innermost one of each module with nested wrappers has outside.
fn levels(modules: &BTreeMap<String, Parts>) -> BTreeMap<String, usize> {
    let mut levels: BTreeMap<String, usize> = BTreeMap::new();
    for name in modules.keys() {
        if let Site::Nested { module, level } = Site::of(name) {
            let deepest = levels.entry(module.to_owned()).or_default();
            *deepest = level.max(*deepest);
        }
    }
    levels
}

/// Of nested wrappers each has its factors: without one, the depths of the others would be wrong.
fn require_levels(
    builder: &mut Builder<'_>,
    modules: &BTreeMap<String, Parts>,
    levels: &BTreeMap<String, usize>,
) {
    for (module, &deepest) in levels {
        let name = |level| format!("{module}{}", Site::WRAPPED.repeat(level));
        let missing = (0..deepest).find(|&level| !modules.contains_key(&name(level)));
        if let Some(level) = missing {
            let [present, missing] =
                [deepest, level].map(|level| format!("{PREFIX}{}{A_SUFFIX}", name(level)));
            builder.problems.push(AdapterProblem::MissingFactor { present, missing });
        }
    }
}

/// The modules that are MultiheadAttention: PEFT wraps such a module and the `out_proj` in it, and
/// the outer B has three times as many rows as A has columns.
fn attentions(modules: &BTreeMap<String, Parts>, variants: &Variants<'_>) -> BTreeSet<String> {
    let outer = |name: &String| match Site::of(name) {
        Site::Inner { module, outer } => {
            let parts = modules.get(outer)?;
            let (a, b) = (parts.shape(part::A)?, parts.shape(part::B)?);
            let fused = a.len() == 2 && b.len() == 2 && Some(b[0]) == a[1].checked_mul(3);
            let is_attention = fused
                && module.strip_suffix(".out_proj") == Some(outer)
                && named(&variants.parameters, outer, true).is_empty();
            is_attention.then(|| outer.to_owned())
        }
        _ => None,
    };
    modules.keys().filter_map(outer).collect()
}

/// The low-rank change of a layer, with its variants.
fn build_layer(
    builder: &mut Builder<'_>,
    variants: &Variants<'_>,
    scaling: &mut ScalingTable,
    (module, called): (&str, &str),
    parts: &mut Parts,
) -> Result<()> {
    let configured = scaling.of(called)?;
    let is_embedding = parts.has(part::EMBEDDING_A) || parts.has(part::EMBEDDING_B);
    let [a, b] =
        if is_embedding { [part::EMBEDDING_A, part::EMBEDDING_B] } else { [part::A, part::B] };
    let mut found = FactorTensors { a: parts.take(a), b: parts.take(b) };
    if let Some(blocks) = &variants.blocks
        && let Err(problem) = blocks.expand(module, &mut found, &mut builder.expansions)
    {
        builder.problems.push(problem);
        return Ok(());
    }
    let layer = match &found.a {
        _ if is_embedding => Layer::Embedding,
        Some(a) if (3..=5).contains(&a.shape.len()) => Layer::Convolution,
        _ => Layer::Linear,
    };
    if let (Layer::Convolution, Some(a), Some(b)) = (layer, &found.a, &found.b)
        && is_grouped(&a.shape, &b.shape)
    {
        builder.refuse(GROUPED, &b.name);
        return Ok(());
    }
    let names = if is_embedding {
        let name = |suffix| format!("{PREFIX}{module}.lora_embedding_{suffix}");
        (name("A"), name("B"))
    } else {
        (format!("{PREFIX}{module}{A_SUFFIX}"), format!("{PREFIX}{module}{B_SUFFIX}"))
    };
    let (magnitude, bias) = (parts.take(part::MAGNITUDE), parts.take(part::B_BIAS));
    let built =
        factors::of_layer(module, layer, found, names, configured.scaling, &mut builder.problems);
    let Some(mut low_rank) = built else { return Ok(()) };
    let out = low_rank.out_features();
    match magnitude {
        Some(magnitude) if variants.dora == Some(false) => {
            builder.refuse("DoRA's magnitude, though `use_dora` is not set", &magnitude.name);
        }
        Some(mut magnitude) => {
            let fits = |shape: &[usize]| shape.iter().product::<usize>() == out;
            if builder.check(&magnitude, fits, "a magnitude is one value per output feature") {
                // Of a convolution it comes with ones around.
                magnitude.shape = vec![out];
                low_rank.magnitude = Some(magnitude);
            }
        }
        None if variants.dora == Some(true) => {
            let missing = format!("{PREFIX}{module}.lora_magnitude_vector");
            let present = low_rank.a.name.clone();
            builder.problems.push(AdapterProblem::MissingFactor { present, missing });
        }
        None => {}
    }
    match bias {
        Some(bias) if variants.bias == Some(false) => {
            builder.refuse("a bias on B, though `lora_bias` is not set", &bias.name);
        }
        Some(bias) => push_bias(builder, module, bias, out, low_rank.scale()),
        None if variants.bias == Some(true) && !is_embedding => {
            let missing = format!("{PREFIX}{module}.lora_B.bias");
            let present = low_rank.b.name.clone();
            builder.problems.push(AdapterProblem::MissingFactor { present, missing });
        }
        None => {}
    }
    builder.compare_ranks(module, &configured, low_rank.rank());
    builder.push(Target::weight(module), Form::LowRank(low_rank));
    Ok(())
}

/// A bias on B is added to the layer's.
fn push_bias(
    builder: &mut Builder<'_>,
    module: &str,
    bias: crate::tensor::Tensor,
    out: usize,
    scale: f64,
) {
    if builder.check(&bias, |shape| shape == [out], "a bias is one value per output feature") {
        let target = Target { module: module.to_owned(), parameter: "bias".to_owned() };
        builder.push(target, Form::Added { tensor: bias, scale });
    }
}

const GROUPED: &str = "a convolution in groups: B acts within each group, and PEFT merges it \
                       neither";

/// Whether B of a convolution has the columns of one group only.
fn is_grouped(a: &[usize], b: &[usize]) -> bool {
    matches!((a.first(), b.get(1)), (Some(&rank), Some(&columns))
        if columns > 0 && columns < rank && rank % columns == 0 && a.len() == b.len())
}

/// MultiheadAttention's fused input projection, which is a bare parameter.
fn build_in_projection(
    builder: &mut Builder<'_>,
    scaling: &mut ScalingTable,
    module: &str,
    parts: &mut Parts,
) -> Result<()> {
    let Some((low_rank, configured)) = plain(builder, scaling, (module, module), parts)? else {
        return Ok(());
    };
    builder.compare_ranks(module, &configured, low_rank.rank());
    if let Some(bias) = parts.take(part::B_BIAS) {
        let reason = "PEFT never adds the bias on B of MultiheadAttention's input projection";
        builder.pass_over(Note::PassedOver { tensor: bias.name, reason });
    }
    let parameter = "in_proj_weight".to_owned();
    builder.push(Target { module: module.to_owned(), parameter }, Form::LowRank(low_rank));
    Ok(())
}

/// MultiheadAttention's output projection. PEFT adds its change twice, in training as when it
/// merges (`MultiheadAttention.merge` adds it and then calls `out_proj.merge`), so that is what the
/// factors mean. The bias on B is added once. Rank and alpha are those of the attention.
fn build_out_projection(
    builder: &mut Builder<'_>,
    scaling: &mut ScalingTable,
    (name, module, outer): (&str, String, &str),
    parts: &mut Parts,
) -> Result<()> {
    let Some((mut low_rank, _)) = plain(builder, scaling, (name, outer), parts)? else {
        return Ok(());
    };
    if let Some(bias) = parts.take(part::B_BIAS) {
        push_bias(builder, &module, bias, low_rank.out_features(), low_rank.scale());
    }
    low_rank.scaling.alpha *= 2.0;
    builder.notes.push(Note::AddedTwice { module: module.clone() });
    builder.push(Target::weight(module), Form::LowRank(low_rank));
    Ok(())
}

/// A and B of the module that the file calls `name`, a linear layer, with the scaling of the one
/// that the patterns match as `called`.
fn plain(
    builder: &mut Builder<'_>,
    scaling: &mut ScalingTable,
    (name, called): (&str, &str),
    parts: &mut Parts,
) -> Result<Option<(LowRank, Configured)>> {
    let configured = scaling.of(called)?;
    let found = FactorTensors { a: parts.take(part::A), b: parts.take(part::B) };
    let names = (format!("{PREFIX}{name}{A_SUFFIX}"), format!("{PREFIX}{name}{B_SUFFIX}"));
    let built = factors::low_rank(name, found, names, configured.scaling, &mut builder.problems);
    Ok(built.map(|low_rank| (low_rank, configured)))
}

/// The parameters of a module that `target_parameters` names: equal, or the end of their full name
/// after a dot. `precise` leaves out those named without a module, which fit every module.
fn named<'a>(parameters: &[&'a str], module: &str, precise: bool) -> Vec<&'a str> {
    let mut named: Vec<&str> = parameters
        .iter()
        .filter_map(|target| match target.rsplit_once('.') {
            Some((owner, parameter)) => {
                let rest = module.strip_suffix(owner)?;
                (rest.is_empty() || rest.ends_with('.')).then_some(parameter)
            }
            None => (!precise).then_some(*target),
        })
        .collect();
    named.sort_unstable();
    named.dedup();
    named
}

/// What the factors of a module without nested wrappers belong to.
enum Owner {
    /// The layer itself; the patterns match it under this name.
    Layer { called: String },
    /// A bare parameter.
    Bare,
}

/// The keys do not say what factors belong to, so the configuration and the rows of A do: of E
/// experts there are E·r. A bare `weight` of two dimensions is the weight of a linear layer.
fn owner(
    variants: &Variants<'_>,
    scaling: &mut ScalingTable,
    module: &str,
    parts: &Parts,
) -> Result<Owner> {
    let layer = Owner::Layer { called: module.to_owned() };
    let Some(&rows) = parts.shape(part::A).and_then(|shape| shape.first()) else {
        return Ok(layer);
    };
    let candidates = candidates(scaling, module, &named(&variants.parameters, module, true))?;
    Ok(match candidates.as_slice() {
        // Parameters named without a module fit every linear layer's name as well.
        [] => {
            let unowned = named(&variants.parameters, module, false);
            let of_layer = scaling.of(module)?.rank.unwrap_or(ScalingTable::DEFAULT_RANK);
            if unowned.is_empty() || rows == of_layer { layer } else { Owner::Bare }
        }
        [only] if only.parameter == "weight" && rows == only.rank => {
            Owner::Layer { called: format!("{module}.weight") }
        }
        _ => Owner::Bare,
    })
}

/// What the configuration says of each parameter of `module`.
fn candidates(
    scaling: &mut ScalingTable,
    module: &str,
    parameters: &[&str],
) -> Result<Vec<Candidate>> {
    let candidate = |&parameter: &&str| -> Result<Candidate> {
        let configured = scaling.of(&format!("{module}.{parameter}"))?;
        let rank = configured.rank.unwrap_or(ScalingTable::DEFAULT_RANK);
        let Scaling { alpha, rule } = configured.scaling;
        Ok(Candidate { parameter: parameter.to_owned(), scaling: Scaling { alpha, rule }, rank })
    };
    parameters.iter().map(candidate).collect()
}

/// The factors of a bare parameter. Which one, only the base can tell where there are several.
fn build_experts(
    builder: &mut Builder<'_>,
    variants: &Variants<'_>,
    scaling: &mut ScalingTable,
    (module, depth): (&str, usize),
    parts: &mut Parts,
) -> Result<()> {
    let (a, b) = match (parts.take(part::A), parts.take(part::B)) {
        (Some(a), Some(b)) => (a, b),
        (present, other) => {
            let found = FactorTensors { a: present, b: other };
            let name = |suffix: &str| match parts_name(&found) {
                Some(name) => name.replace(A_SUFFIX, suffix).replace(B_SUFFIX, suffix),
                None => format!("{PREFIX}{module}{suffix}"),
            };
            let names = (name(A_SUFFIX), name(B_SUFFIX));
            let scaling = scaling.of(module)?.scaling;
            factors::low_rank(module, found, names, scaling, &mut builder.problems);
            return Ok(());
        }
    };
    let parameters = named(&variants.parameters, module, false);
    if parameters.is_empty() {
        builder.refuse(
            "the factors of a bare parameter that `target_parameters` does not name",
            &a.name,
        );
        return Ok(());
    }
    let candidates = candidates(scaling, module, &parameters)?;
    for parameter in &parameters {
        let module = format!("{module}.{parameter}");
        let configured = scaling.of(&module)?;
        if configured.alpha_contested {
            let alpha = configured.scaling.alpha.to_string();
            builder.notes.push(Note::ContestedAlpha { module, alpha });
        }
    }
    let two = |shape: &[usize]| shape.len() == 2;
    if !builder.check(&a, two, "A of a bare parameter is (experts·rank) × in")
        || !builder.check(&b, two, "B of a bare parameter is out × (rank·experts)")
    {
        return Ok(());
    }
    let rows = a.shape[0];
    if b.shape[1] != rows || rows == 0 {
        let (a, b) = (Shape(a.shape), Shape(b.shape));
        let module = module.to_owned();
        builder.problems.push(AdapterProblem::RankMismatch { module, a, b });
        return Ok(());
    }
    let divides = |candidate: &Candidate| candidate.rank > 0 && rows % candidate.rank == 0;
    let fitting: Vec<Candidate> = candidates.iter().filter(|it| divides(it)).cloned().collect();
    let Some(first) = fitting.first() else {
        let module = module.to_owned();
        let configured = candidates.first().map_or(0, |candidate| candidate.rank);
        builder.problems.push(AdapterProblem::ExpertRank { module, configured, rows });
        return Ok(());
    };
    if let Some(wrong) = fitting.iter().find(|it| !it.scaling.scale(it.rank).is_finite()) {
        let scale = wrong.scaling.scale(wrong.rank);
        let module = module.to_owned();
        builder.problems.push(AdapterProblem::Scale { module, scale });
        return Ok(());
    }
    let parameter = fitting
        .iter()
        .skip(1)
        .fold(first.parameter.clone(), |joined, next| format!("{joined}|{}", next.parameter));
    let target = Target { module: module.to_owned(), parameter };
    builder.push(target, Form::Experts(Experts { a, b, depth, candidates: fitting }));
    Ok(())
}

fn parts_name(found: &FactorTensors) -> Option<String> {
    found.a.as_ref().or(found.b.as_ref()).map(|tensor| tensor.name.clone())
}
