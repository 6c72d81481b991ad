//! An adapter's modules spelled as another format spells them.
//!
//! What a name means is looked up in the catalogue of its architecture ([`crate::naming`]), never
//! guessed. Where one format has in one module what another has in several (query, key and value of
//! Flux, of CLIP-G), factors are cut apart or put together, exactly:
//!
//! ```text
//! apart      B's rows are shared out, each part with a copy of A. Where B is block-diagonal, as one
//!            that was put together is, each part gets its own ranks back.
//! together   the A are stacked, B is block-diagonal, the rank is the sum. Parts that all have one A,
//!            as those that were cut apart do, keep it.
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

use super::{WriteOptions, Written, folding, rearrange};
use crate::error::{Error, Result};
use crate::model::{
    Adapter, AdapterFormat, Component, Form, Layer, LowRank, Scaling, ScalingRule, Target,
};
use crate::naming::{Catalogue, Naming, Observed, Resolved, SpelledPiece, detect};
use crate::tensor::Tensor;

/// The parameters of a base model with their shapes.
pub type BaseShapes = BTreeMap<String, Vec<usize>>;

/// How a format spells modules; `None` of one that names them as their model does.
fn naming_of(format: AdapterFormat) -> Option<Naming> {
    Some(match format {
        AdapterFormat::Kohya => Naming::Kohya,
        AdapterFormat::Diffusers => Naming::Diffusers,
        AdapterFormat::Comfy => Naming::Comfy,
        AdapterFormat::OneTrainer => Naming::OneTrainer,
        // Of a pipeline's denoiser alone.
        AdapterFormat::Peft => Naming::Peft,
        _ => return None,
    })
}

/// The adapter as `format` spells it. `base` says which architecture it is where its own names do
/// not.
///
/// # Errors
/// [`Error::Names`] with every name that has no meaning, or several, or that the format has no name
/// for.
pub fn respell(
    adapter: &Adapter,
    format: AdapterFormat,
    base: Option<&BaseShapes>,
    options: &WriteOptions,
) -> Result<(Adapter, Written)> {
    let Some(naming) = naming_of(format) else { return Ok((adapter.clone(), Written::default())) };
    let names = (format != AdapterFormat::Peft).then_some(format);
    let same = || Ok((Adapter { names, ..adapter.clone() }, Written::default()));
    if adapter.names == names {
        return same();
    }
    let names_problem = |problems: Vec<String>| Error::Names {
        path: adapter.path.clone(),
        format: format.name(),
        problems,
    };
    let (catalogue, from) =
        architecture(adapter, base).map_err(|text| names_problem(vec![text]))?;
    if from == naming {
        return same();
    }
    let meanings = catalogue.names(from);
    let mut problems = Vec::new();
    let mut respelled = Respelled { written: Written::default(), parts: BTreeMap::new() };
    let mut components = Vec::new();
    for component in &adapter.components {
        let module = &component.target.module;
        let pieces = meanings.resolve(module).map_err(|problem| problem.to_string());
        let pieces = pieces.and_then(|resolved| pieces_of(&catalogue, resolved, naming, module));
        match pieces {
            Ok(pieces) => match respelled.component(component, &pieces) {
                Ok(made) => components.extend(made),
                Err(problem) => problems.push(problem),
            },
            Err(problem) => problems.push(problem),
        }
    }
    let Respelled { mut written, parts } = respelled;
    for ((module, parameter), parts) in parts {
        match together(&module, parts, options, &mut written) {
            Ok(form) => components.push(Component { target: Target { module, parameter }, form }),
            Err(problem) => problems.push(problem),
        }
    }
    if !problems.is_empty() {
        return Err(names_problem(problems));
    }
    components.sort_by(Component::compare);
    Ok((Adapter { components, names, ..adapter.clone() }, written))
}

/// The architecture of an adapter and how its modules are spelled.
fn architecture(
    adapter: &Adapter,
    base: Option<&BaseShapes>,
) -> Result<(Catalogue, Naming), String> {
    if let Some(base) = base
        && let Some(linked) = Catalogue::of_base(base).map_err(|problem| problem.to_string())?
    {
        let catalogue = linked.catalogue().clone();
        let modules = adapter.components.iter().map(|one| one.target.module.as_str());
        let naming = catalogue.naming_of(modules).0;
        return Ok((catalogue, naming));
    }
    let shape = |component: &Component| match &component.form {
        Form::LowRank(form) => Some((form.out_features(), form.in_features())),
        _ => None,
    };
    let observed: Vec<Observed<'_>> = adapter
        .components
        .iter()
        .map(|one| Observed { name: &one.target.module, shape: shape(one) })
        .collect();
    let found = detect(&observed);
    if let Some((architecture, naming)) = found.unique() {
        return Ok((Catalogue::of(architecture), naming));
    }
    Err(match found.fitting.as_slice() {
        [] => "its modules are those of no architecture that is listed here".to_owned(),
        several => {
            let names: Vec<&str> = several.iter().map(|one| one.0.name()).collect();
            format!("its modules fit several architectures: {}", names.join(", "))
        }
    })
}

fn pieces_of(
    catalogue: &Catalogue,
    resolved: &Resolved,
    naming: Naming,
    module: &str,
) -> Result<Vec<SpelledPiece>, String> {
    let pieces = catalogue.pieces(resolved, naming);
    pieces
        .filter(|pieces| !pieces.is_empty())
        .ok_or_else(|| format!("the format has no name for `{module}`"))
}

/// What is gathered on the way.
struct Respelled {
    written: Written,
    /// Parts of modules that the format has in one: rows, of how many, and the form.
    parts: BTreeMap<(String, String), Vec<(SpelledPiece, Form)>>,
}

impl Respelled {
    /// A component under its new names; parts of a fused module are kept for later.
    fn component(
        &mut self,
        component: &Component,
        pieces: &[SpelledPiece],
    ) -> Result<Vec<Component>, String> {
        let Component { target, form } = component;
        if let [piece] = pieces
            && piece.rows == piece.total
        {
            let module = piece.name.clone();
            let target = Target { module, parameter: target.parameter.clone() };
            return Ok(vec![Component { target, form: form.clone() }]);
        }
        let mut whole = Vec::new();
        for (piece, form) in pieces.iter().zip(apart(&target.module, form, pieces)?) {
            let Some(form) = form else {
                let text = format!("`{}` is not changed: its rows of B are zero", piece.name);
                self.written.changes.push(text);
                continue;
            };
            let key = (piece.name.clone(), target.parameter.clone());
            if piece.rows == piece.total {
                let target = Target { module: key.0, parameter: key.1 };
                whole.push(Component { target, form });
            } else {
                self.parts.entry(key).or_default().push((piece.clone(), form));
            }
        }
        Ok(whole)
    }
}

/// A change cut into those of some of its rows, in the order of the pieces; `None` for a piece that
/// it does not change.
fn apart(module: &str, form: &Form, pieces: &[SpelledPiece]) -> Result<Vec<Option<Form>>, String> {
    let refuse = || format!("`{module}` is cut apart there, and {} of it cannot be", form.method());
    let rows = |tensor: &Tensor, piece: &SpelledPiece| {
        rearrange::rows(tensor, piece.from..piece.from.checked_add(piece.rows)?)
    };
    match form {
        Form::LowRank(form) if form.layer == Layer::Linear && form.rank_gain.is_none() => {
            let blocks = blocks(&form.b, pieces);
            let part = |(number, piece): (usize, &SpelledPiece)| {
                let b = rows(&form.b, piece)?;
                let magnitude = match &form.magnitude {
                    Some(magnitude) => Some(rows(magnitude, piece)?),
                    None => None,
                };
                let (a, b, scaling) = match &blocks {
                    Some(blocks) => {
                        let ranks = blocks.get(number)?.clone();
                        if ranks.is_empty() && magnitude.is_none() {
                            return Some(None);
                        }
                        let a = rearrange::rows(&form.a, ranks.clone())?;
                        let scaling = of_scale(form.scale(), ranks.len());
                        (a, rearrange::columns(&b, ranks)?, scaling)
                    }
                    None => (form.a.clone(), b, form.scaling),
                };
                Some(Some(Form::LowRank(LowRank { magnitude, ..LowRank::linear(a, b, scaling) })))
            };
            let parts: Option<Vec<Option<Form>>> = pieces.iter().enumerate().map(part).collect();
            parts.ok_or_else(refuse)
        }
        Form::Added { tensor, scale } => {
            let part =
                |piece| Some(Some(Form::Added { tensor: rows(tensor, piece)?, scale: *scale }));
            let parts: Option<Vec<Option<Form>>> = pieces.iter().map(part).collect();
            parts.ok_or_else(refuse)
        }
        _ => Err(refuse()),
    }
}

/// The ranks of each piece, if B is block-diagonal with a block for every piece or none: what was
/// put together.
fn blocks(b: &Tensor, pieces: &[SpelledPiece]) -> Option<Vec<Range<usize>>> {
    let &[rows, rank] = b.shape.as_slice() else { return None };
    let row_bytes = b.bytes().len().checked_div(rows)?;
    let element = row_bytes.checked_div(rank)?;
    let mut found = Vec::with_capacity(pieces.len());
    let mut next = 0;
    for piece in pieces {
        let mut used: Option<Range<usize>> = None;
        for row in b.bytes().chunks_exact(row_bytes).skip(piece.from).take(piece.rows) {
            let nonzero = |at: &usize| row[at * element..][..element].iter().any(|&byte| byte != 0);
            let Some(first) = (0..rank).find(nonzero) else { continue };
            let end = (0..rank).rev().find(nonzero).map_or(first, |last| last + 1);
            used = Some(match used {
                Some(range) => range.start.min(first)..range.end.max(end),
                None => first..end,
            });
        }
        match used {
            None => found.push(next..next),
            Some(range) if range.start == next => {
                next = range.end;
                found.push(range);
            }
            Some(_) => return None,
        }
    }
    // One block by itself has nothing that is zero beside it.
    let several = found.iter().filter(|range| !range.is_empty()).count() > 1;
    (next == rank && (several || found.iter().any(Range::is_empty))).then_some(found)
}

/// Changes of parts of one module as one change of all of it.
fn together(
    module: &str,
    mut parts: Vec<(SpelledPiece, Form)>,
    options: &WriteOptions,
    written: &mut Written,
) -> Result<Form, String> {
    parts.sort_by_key(|part| part.0.row);
    let total = parts.first().map_or(0, |part| part.0.total);
    if parts.windows(2).any(|two| two[0].0.row.saturating_add(two[0].0.rows) > two[1].0.row) {
        return Err(format!("two changes of the same rows of `{module}`"));
    }
    let factors: Option<Vec<(&SpelledPiece, &LowRank)>> = parts
        .iter()
        .map(|(piece, form)| match form {
            Form::LowRank(form) if form.is_plain() => Some((piece, form)),
            _ => None,
        })
        .collect();
    let Some(factors) = factors.filter(|factors| !factors.is_empty()) else {
        return Err(format!(
            "`{module}` is one module there, and only plain low-rank changes of its parts can be \
             put together"
        ));
    };
    let first = factors[0].1;
    let mismatch = || format!("the parts of `{module}` have different dtypes or inputs");
    // Parts that were cut from one change have one A.
    let one = |(_, form): &(&SpelledPiece, &LowRank)| {
        form.scaling == first.scaling
            && (form.a.dtype, &form.a.shape) == (first.a.dtype, &first.a.shape)
            && form.a.bytes() == first.a.bytes()
    };
    let covered: usize = factors.iter().map(|(piece, _)| piece.rows).sum();
    if covered == total && factors.iter().all(one) {
        let parts: Vec<Tensor> = factors.iter().map(|(_, form)| form.b.clone()).collect();
        let b = rearrange::concatenated(&parts).ok_or_else(mismatch)?;
        return Ok(Form::LowRank(LowRank::linear(first.a.clone(), b, first.scaling)));
    }
    // One scale for all: the first's, the others are multiplied into their B.
    let scale = first.scale();
    let mut stacked = Vec::new();
    let mut blocks = Vec::new();
    for (piece, form) in &factors {
        stacked.push(form.a.clone());
        let b = folding::fold(module, &form.b, (form.scale(), scale), options, written)?;
        blocks.push((piece.row, b));
    }
    let a = rearrange::concatenated(&stacked).ok_or_else(mismatch)?;
    let b = rearrange::block_diagonal(total, &blocks).ok_or_else(mismatch)?;
    let rank = a.shape.first().copied().unwrap_or(0);
    Ok(Form::LowRank(LowRank::linear(a, b, of_scale(scale, rank))))
}

/// The scaling that gives a scale at a rank, as an alpha where one does.
fn of_scale(scale: f64, rank: usize) -> Scaling {
    let alpha = scale * rank as f64;
    match alpha / rank as f64 == scale {
        true => Scaling { alpha, rule: ScalingRule::AlphaOverRank },
        false => Scaling { alpha: scale, rule: ScalingRule::Direct },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::fingerprint::BaseIdentity;

    fn matrix(rows: usize, cols: usize, seed: usize) -> Tensor {
        let value = |at: usize| ((at * 13 + seed * 7) % 31) as f32 - 15.5;
        let bytes = (0..rows * cols).flat_map(|at| value(at).to_le_bytes()).collect();
        Tensor::new(String::new(), Dtype::F32, vec![rows, cols], bytes).unwrap()
    }

    fn low_rank(rows: usize, rank: usize, seed: usize) -> LowRank {
        let scaling = Scaling { alpha: 2.0, rule: ScalingRule::AlphaOverRank };
        LowRank::linear(matrix(rank, 3072, seed), matrix(rows, rank, seed + 1), scaling)
    }

    fn adapter(format: AdapterFormat, modules: Vec<(&str, LowRank)>) -> Adapter {
        let component = |(name, form): (&str, LowRank)| Component {
            target: Target::weight(name),
            form: Form::LowRank(form),
        };
        let base = BaseIdentity { name: None, revision: None, fingerprint: None };
        let components = modules.into_iter().map(component).collect();
        let names = Some(format);
        Adapter { format, names, ..Adapter::new("adapter", components, base) }
    }

    /// Without these, Qwen-Image has all modules of Flux.1 that the tests name.
    const KOHYA: &str = "lora_unet_single_blocks_0_modulation_lin";
    const DIFFUSERS: &str = "transformer.single_transformer_blocks.0.norm.linear";

    /// The components besides those.
    fn others(adapter: &Adapter) -> Vec<&Component> {
        let all = adapter.components.iter();
        all.filter(|it| !it.target.module.contains("single_")).collect()
    }

    fn respelled(adapter: &Adapter, format: AdapterFormat) -> Adapter {
        let options = WriteOptions::default();
        let made = respell(adapter, format, None, &options).unwrap().0;
        Adapter { format, ..made }
    }

    fn facts(adapter: &Adapter) -> Vec<(String, Vec<u8>, Vec<u8>, u64)> {
        let one = |component: &Component| {
            let Form::LowRank(form) = &component.form else { panic!("low rank") };
            let (a, b) = (form.a.bytes().to_vec(), form.b.bytes().to_vec());
            (component.target.name(), a, b, form.scale().to_bits())
        };
        adapter.components.iter().map(one).collect()
    }

    #[test]
    fn a_fused_projection_is_cut_apart_and_put_together_again() {
        let fused = low_rank(9216, 2, 1);
        let kohya = adapter(
            AdapterFormat::Kohya,
            vec![
                ("lora_unet_double_blocks_3_img_attn_qkv", fused.clone()),
                (KOHYA, low_rank(9216, 1, 3)),
            ],
        );
        let diffusers = respelled(&kohya, AdapterFormat::Diffusers);
        let names: Vec<String> =
            others(&diffusers).iter().map(|it| it.target.module.clone()).collect();
        let of = |name: &str| format!("transformer.transformer_blocks.3.attn.{name}");
        assert_eq!(names, [of("to_k"), of("to_q"), of("to_v")]);
        let Form::LowRank(k) = &others(&diffusers)[0].form else { panic!("low rank") };
        let third = fused.b.bytes().len() / 3;
        assert_eq!(k.b.bytes(), &fused.b.bytes()[third..2 * third]);
        assert_eq!(k.a.bytes(), fused.a.bytes());
        assert_eq!(facts(&respelled(&diffusers, AdapterFormat::Kohya)), facts(&kohya));
        // ComfyUI has BFL's names, too.
        let comfy = respelled(&diffusers, AdapterFormat::Comfy);
        assert_eq!(
            comfy.components[0].target.module,
            "diffusion_model.double_blocks.3.img_attn.qkv"
        );
    }

    #[test]
    fn parts_of_their_own_are_put_together_and_cut_apart_again() {
        let of = |name: &str| format!("transformer.transformer_blocks.0.attn.{name}");
        let (q, v) = (of("to_q"), of("to_v"));
        // Different ranks; the key is not changed.
        let mut other = low_rank(3072, 4, 9);
        other.scaling.alpha = 4.0;
        let parts = vec![
            (q.as_str(), low_rank(3072, 2, 5)),
            (v.as_str(), other),
            (DIFFUSERS, low_rank(9216, 1, 3)),
        ];
        let diffusers = adapter(AdapterFormat::Diffusers, parts);
        let kohya = respelled(&diffusers, AdapterFormat::Kohya);
        let [component] = others(&kohya)[..] else { panic!("one") };
        assert_eq!(component.target.module, "lora_unet_double_blocks_0_img_attn_qkv");
        let Form::LowRank(form) = &component.form else { panic!("low rank") };
        assert_eq!((form.rank(), form.out_features(), form.scale()), (6, 9216, 1.0));
        assert_eq!(facts(&respelled(&kohya, AdapterFormat::Diffusers)), facts(&diffusers));
    }

    #[test]
    fn what_has_no_meaning_or_several_is_listed() {
        let refuse = |name: &str, form: LowRank, format: AdapterFormat| {
            let adapter = adapter(AdapterFormat::Kohya, vec![(name, form)]);
            respell(&adapter, format, None, &WriteOptions::default()).unwrap_err().to_string()
        };
        let unknown = refuse("lora_unet_nothing", low_rank(8, 1, 1), AdapterFormat::Diffusers);
        assert!(unknown.contains("no architecture that is listed"), "{unknown}");
        // SD1 and SD2 have this one, of one width.
        let mut form = low_rank(320, 1, 1);
        form.a = matrix(1, 320, 2);
        let name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
        let several = refuse(name, form, AdapterFormat::Diffusers);
        assert!(several.contains("fit several architectures"), "{several}");
    }
}
