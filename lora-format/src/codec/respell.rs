//! An adapter's modules spelled as another format spells them.
//!
//! What a name means is looked up in the catalogue of its architecture ([`crate::naming`]), never
//! guessed. Where one format has in one module what another has in several (query, key and value of
//! Flux, of CLIP-G), factors are cut apart or put together, exactly:
//!
//! ```text
//! apart      B's rows are shared out, each part with a copy of A. Where B is block-diagonal, as one
//!            that was put together is, each part gets its own ranks back.
//! together   the A are stacked, B is block-diagonal, the rank is the sum.
//! ```

use std::collections::BTreeMap;

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
    let spelled = naming_of(adapter.format).is_some() && adapter.format != AdapterFormat::Peft;
    if adapter.format == format || (!spelled && naming == Naming::Peft) {
        return Ok((adapter.clone(), Written::default()));
    }
    let names_problem = |problems: Vec<String>| Error::Names {
        path: adapter.path.clone(),
        format: format.name(),
        problems,
    };
    let (catalogue, from) =
        architecture(adapter, base).map_err(|text| names_problem(vec![text]))?;
    if from == naming {
        return Ok((adapter.clone(), Written::default()));
    }
    let names = catalogue.names(from);
    let mut problems = Vec::new();
    let mut respelled = Respelled { written: Written::default(), parts: BTreeMap::new() };
    let mut components = Vec::new();
    for component in &adapter.components {
        let module = &component.target.module;
        let pieces = names.resolve(module).map_err(|problem| problem.to_string());
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
    Ok((Adapter { components, ..adapter.clone() }, written))
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
        let known = |naming: &Naming| {
            let names = catalogue.names(*naming);
            let all = &adapter.components;
            all.iter().filter(|one| names.resolve(&one.target.module).is_ok()).count()
        };
        let mut best = (0, Naming::Kohya);
        for naming in Naming::ALL {
            let count = known(&naming);
            if count > best.0 {
                best = (count, naming);
            }
        }
        return Ok((catalogue, best.1));
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

/// A change cut into those of some of its rows, in the order of the pieces.
fn apart(module: &str, form: &Form, pieces: &[SpelledPiece]) -> Result<Vec<Form>, String> {
    let refuse = || format!("`{module}` is cut apart there, and {} of it cannot be", form.method());
    match form {
        Form::LowRank(form) if form.layer == Layer::Linear && form.rank_gain.is_none() => {
            let blocks = blocks(&form.b, pieces);
            let part = |(number, piece): (usize, &SpelledPiece)| {
                let rows = piece.from..piece.from.checked_add(piece.rows)?;
                let b = rearrange::rows(&form.b, rows.clone())?;
                let magnitude = match &form.magnitude {
                    Some(magnitude) => Some(rearrange::rows(magnitude, rows)?),
                    None => None,
                };
                let (a, b, scaling) = match blocks {
                    Some(rank) => {
                        let ranks = number * rank..(number + 1) * rank;
                        let a = rearrange::rows(&form.a, ranks.clone())?;
                        (a, rearrange::columns(&b, ranks)?, of_scale(form.scale(), rank))
                    }
                    None => (form.a.clone(), b, form.scaling),
                };
                Some(Form::LowRank(LowRank { magnitude, ..LowRank::linear(a, b, scaling) }))
            };
            let parts: Option<Vec<Form>> = pieces.iter().enumerate().map(part).collect();
            parts.ok_or_else(refuse)
        }
        Form::Added { tensor, scale } => {
            let part = |piece: &SpelledPiece| {
                let rows = piece.from..piece.from.checked_add(piece.rows)?;
                let tensor = rearrange::rows(tensor, rows)?;
                Some(Form::Added { tensor, scale: *scale })
            };
            let parts: Option<Vec<Form>> = pieces.iter().map(part).collect();
            parts.ok_or_else(refuse)
        }
        _ => Err(refuse()),
    }
}

/// The rank of the equal blocks on B's diagonal, if outside them it is zero: what was put together.
fn blocks(b: &Tensor, pieces: &[SpelledPiece]) -> Option<usize> {
    let &[_, rank] = b.shape.as_slice() else { return None };
    let count = pieces.len();
    if count < 2 || rank % count != 0 || rank == 0 {
        return None;
    }
    let each = rank / count;
    let row_bytes = b.bytes().len().checked_div(b.shape[0])?;
    let element = row_bytes / rank;
    let outside_is_zero = pieces.iter().enumerate().all(|(number, piece)| {
        let own = number * each * element..(number + 1) * each * element;
        let rows = b.bytes().chunks_exact(row_bytes).skip(piece.from).take(piece.rows);
        rows.into_iter().all(|row| {
            let zero = |bytes: &[u8]| bytes.iter().all(|&byte| byte == 0);
            zero(&row[..own.start]) && zero(&row[own.end..])
        })
    });
    outside_is_zero.then_some(each)
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
    let overlap = parts.windows(2).any(|two| two[0].0.row + two[0].0.rows > two[1].0.row);
    if overlap {
        return Err(format!("two changes of the same rows of `{module}`"));
    }
    let factors: Option<Vec<(&SpelledPiece, &LowRank)>> = parts
        .iter()
        .map(|(piece, form)| match form {
            Form::LowRank(form) if form.is_plain() => Some((piece, form)),
            _ => None,
        })
        .collect();
    let Some(factors) = factors else {
        return Err(format!(
            "`{module}` is one module there, and only plain low-rank changes of its parts can be \
             put together"
        ));
    };
    // One scale for all: the first's, the others are multiplied into their B.
    let scale = factors.first().map_or(1.0, |first| first.1.scale());
    let mut stacked = Vec::new();
    let mut blocks = Vec::new();
    for (piece, form) in &factors {
        stacked.push(form.a.clone());
        let b = folding::fold(module, &form.b, (form.scale(), scale), options, written)?;
        blocks.push((piece.row, b));
    }
    let a = rearrange::concatenated(&stacked);
    let b = rearrange::block_diagonal(total, &blocks);
    let (Some(a), Some(b)) = (a, b) else {
        return Err(format!("the parts of `{module}` have different dtypes or inputs"));
    };
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
