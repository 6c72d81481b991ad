//! The methods of one or two tensors per module: IA³, VeRA, MiSS, C³A, SHiRA, layer norms, token
//! rows, biases.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::PREFIX;
use super::build::Builder;
use super::config::Configuration;
use super::methods::part;
use super::tensors::Parts;
use crate::blocks;
use crate::dtype::Dtype;
use crate::error::{AdapterProblem, Error, Result, Shape, Unsupported};
use crate::model::{Form, Gain, GainAxis, GainStored, Shared, Sparse, Target, Tiled, TiledRule};
use crate::pattern::PatternTable;
use crate::tensor::Tensor;

fn parameter(module: &str, parameter: &str) -> Target {
    Target { module: module.to_owned(), parameter: parameter.to_owned() }
}

/// Builds the components of an IA³ adapter: the gain of a weight, and of its bias where the outputs
/// are scaled.
///
/// A linear layer's l is 1 × in or out × 1, so its shape shows the axis; a convolution's does not.
pub(super) fn build_gains(
    builder: &mut Builder<'_>,
    modules: BTreeMap<String, Parts>,
) -> Result<()> {
    let mut feedforward = Feedforward::of(&builder.config)?;
    for (module, mut parts) in modules {
        let Some(gain) = builder.require(&module, &mut parts, part::GAIN) else { continue };
        builder.reject_rest(parts);
        let fits = |shape: &[usize]| match shape {
            [rows, columns] => *rows == 1 || *columns == 1,
            [1, _, kernel @ ..] => {
                (1..=3).contains(&kernel.len()) && kernel.iter().all(|&k| k == 1)
            }
            _ => false,
        };
        let expected = "l is 1 × in or out × 1, of a convolution 1 × channels × 1…";
        if !builder.check(&gain, fits, expected) {
            continue;
        }
        let configured = feedforward.has(&module)?;
        let axis = match *gain.shape {
            [1, columns] if columns != 1 => GainAxis::In,
            [rows, 1] if rows != 1 => GainAxis::Out,
            _ => match configured {
                Some(true) => GainAxis::In,
                Some(false) => GainAxis::Out,
                None => {
                    let missing = &Value::Null;
                    let expected = "a list of names, or a pattern";
                    let path = builder.config.path;
                    return Err(Error::config(path, "feedforward_modules", expected, missing));
                }
            },
        };
        if configured.is_some_and(|inputs| inputs != (axis == GainAxis::In)) {
            let (tensor, shape) = (gain.name, Shape(gain.shape));
            let expected = "`feedforward_modules` says that l belongs to the other features";
            builder.problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
            continue;
        }
        if axis == GainAxis::Out {
            let form = Form::Gain(Gain { gain: gain.clone(), axis, stored: GainStored::Whole });
            builder.push(parameter(&module, "bias"), form);
        }
        builder.push(
            Target::weight(module),
            Form::Gain(Gain { gain, axis, stored: GainStored::Whole }),
        );
    }
    Ok(())
}

/// IA³'s `feedforward_modules`.
enum Feedforward<'a> {
    Unknown,
    /// Ends of names, without regard to dots.
    Ends(Vec<&'a str>),
    /// A pattern that a whole name must match.
    Pattern(Box<PatternTable>),
}

impl<'a> Feedforward<'a> {
    const FIELD: &'static str = "feedforward_modules";

    fn of(config: &Configuration<'a>) -> Result<Feedforward<'a>> {
        Ok(match config.get(Self::FIELD) {
            None => Feedforward::Unknown,
            Some(Value::String(pattern)) => {
                // The table lets anything that ends in a dot come before a key, unless it is
                // anchored.
                let table = Value::Object(Map::from_iter([(format!("^(?:{pattern})"), json!(1))]));
                let table = PatternTable::compile(config.path, Self::FIELD, Some(&table))?;
                Feedforward::Pattern(Box::new(table))
            }
            Some(_) => Feedforward::Ends(config.names(Self::FIELD)?),
        })
    }

    fn has(&mut self, module: &str) -> Result<Option<bool>> {
        Ok(match self {
            Feedforward::Unknown => None,
            Feedforward::Ends(ends) => Some(ends.iter().any(|end| module.ends_with(end))),
            Feedforward::Pattern(table) => Some(table.lookup(module)?.is_some()),
        })
    }
}

/// Builds the components of a VeRA adapter.
pub(super) fn build_shared(
    builder: &mut Builder<'_>,
    modules: BTreeMap<String, Parts>,
    shared: &mut Parts,
) -> Result<()> {
    let (a, b) = match (shared.take(part::A), shared.take(part::B)) {
        (Some(a), Some(b)) => (a, b),
        (None, None) => {
            let feature = builder.config.describe("save_projection");
            let reason = "the factors that all layers share are not in the file, and PyTorch's \
                          random numbers, which they came from, differ between versions; save \
                          the adapter with save_projection=True";
            let features = vec![Unsupported { feature, reason: reason.to_owned() }];
            return Err(Error::Unsupported { path: builder.config.path.to_owned(), features });
        }
        (found, other) => {
            let present = found.or(other).map(|tensor| tensor.name).unwrap_or_default();
            let missing = if present.ends_with('A') { "vera_B" } else { "vera_A" };
            let missing = format!("base_model.{missing}");
            builder.problems.push(AdapterProblem::MissingFactor { present, missing });
            return Ok(());
        }
    };
    let matrix = |shape: &[usize]| shape.len() == 2 && !shape.contains(&0);
    if !builder.check(&a, matrix, "the shared A is rank × inputs")
        || !builder.check(&b, matrix, "the shared B is outputs × rank")
    {
        return Ok(());
    }
    let rank = a.shape[0];
    if b.shape[1] != rank {
        let (a, b) = (Shape(a.shape), Shape(b.shape));
        let module = "base_model".to_owned();
        builder.problems.push(AdapterProblem::RankMismatch { module, a, b });
        return Ok(());
    }
    let most = b.shape[0];
    for (module, mut parts) in modules {
        let in_gain = builder.require(&module, &mut parts, part::LAMBDA_D);
        let out_gain = builder.require(&module, &mut parts, part::LAMBDA_B);
        builder.reject_rest(parts);
        let (Some(in_gain), Some(out_gain)) = (in_gain, out_gain) else { continue };
        let of_rank = |shape: &[usize]| shape == [rank];
        let of_outputs = |shape: &[usize]| matches!(shape, &[out] if out > 0 && out <= most);
        if builder.check(&in_gain, of_rank, "λd is one value per row of the shared A")
            && builder.check(&out_gain, of_outputs, "λb is one value per output, at most B's rows")
        {
            let shared = Shared { a: a.clone(), b: b.clone(), in_gain, out_gain };
            builder.push(Target::weight(module), Form::Shared(shared));
        }
    }
    Ok(())
}

/// Builds the components of a MiSS adapter.
pub(super) fn build_tiles(
    builder: &mut Builder<'_>,
    modules: BTreeMap<String, Parts>,
) -> Result<()> {
    const FIELD: &str = "init_weights";
    let config = builder.config;
    let mini = config.count("mini_r")?.unwrap_or(1);
    let (rule, columns) = match config.get(FIELD) {
        None | Some(Value::Bool(_)) => (TiledRule::Add, None),
        Some(Value::String(name)) if name == "bat" => (TiledRule::Bat, None),
        Some(Value::String(name)) if name == "mini" => (TiledRule::Add, Some(mini)),
        Some(other) => {
            let expected = "a boolean, `bat` or `mini`";
            return Err(Error::config(config.path, FIELD, expected, other));
        }
    };
    for (module, mut parts) in modules {
        let Some(block) = builder.require(&module, &mut parts, part::BLOCK) else { continue };
        builder.reject_rest(parts);
        let fits = |shape: &[usize]| match (rule, shape) {
            (_, shape) if shape.contains(&0) => false,
            (TiledRule::Add, &[_, stored]) => columns.is_none_or(|columns| columns == stored),
            (TiledRule::Bat, &[_, rows, columns]) => rows == columns,
            _ => false,
        };
        let expected = match (rule, columns) {
            (TiledRule::Bat, _) => "a `bat` block is out/rank × rank × rank",
            (TiledRule::Add, Some(_)) => "a `mini` block is rank × mini_r",
            (TiledRule::Add, None) => "a block is rank × out",
        };
        if builder.check(&block, fits, expected) {
            builder.push(Target::weight(module), Form::Tiled(Tiled { block, rule }));
        }
    }
    Ok(())
}

/// Builds the components of a C³A adapter.
pub(super) fn build_circulants(builder: &mut Builder<'_>, modules: BTreeMap<String, Parts>) {
    for (module, mut parts) in modules {
        let Some(kernels) = builder.require(&module, &mut parts, part::BLOCK) else { continue };
        builder.reject_rest(parts);
        let fits = |shape: &[usize]| shape.len() == 3 && !shape.contains(&0);
        if builder.check(&kernels, fits, "the kernels are out/b × in/b × b") {
            builder.push(Target::weight(module), Form::Circulant(kernels));
        }
    }
}

/// Builds the components of a SHiRA adapter.
pub(super) fn build_sparse(builder: &mut Builder<'_>, modules: BTreeMap<String, Parts>) {
    for (module, mut parts) in modules {
        let indices = builder.require(&module, &mut parts, part::INDICES);
        let values = builder.require(&module, &mut parts, part::WEIGHT);
        builder.reject_rest(parts);
        let (Some(indices), Some(values)) = (indices, values) else { continue };
        if !builder.check(&values, |shape| shape.len() == 1, "the values are a vector") {
            continue;
        }
        let (tensor, dtype) = (indices.name.clone(), indices.dtype);
        if indices.shape != [2, values.shape[0]] {
            let (shape, expected) = (Shape(indices.shape), "the indices are 2 × the values");
            builder.problems.push(AdapterProblem::FactorShape { tensor, shape, expected });
        } else if let Some(indices) = integers(indices) {
            let form = Form::Sparse(Sparse { indices, values });
            builder.push(Target::weight(module), form);
        } else {
            builder.problems.push(AdapterProblem::IndexDtype { tensor, dtype });
        }
    }
}

/// Indices as integers: on Windows PEFT saves them as F32.
fn integers(indices: Tensor) -> Option<Tensor> {
    match indices.dtype {
        Dtype::I32 | Dtype::I64 => Some(indices),
        Dtype::F32 => {
            let whole = |value: f32| {
                let integer = value as i32;
                (integer as f32 == value).then_some(integer.to_le_bytes())
            };
            let bytes: Option<Vec<[u8; 4]>> = indices.to_f32()?.into_iter().map(whole).collect();
            Tensor::new(indices.name, Dtype::I32, indices.shape, bytes?.concat())
        }
        _ => None,
    }
}

/// Builds the components of a layer norm adapter: norms trained in full.
pub(super) fn build_norms(builder: &mut Builder<'_>, modules: BTreeMap<String, Parts>) {
    for (module, mut parts) in modules {
        for (part, name) in [(part::WEIGHT, "weight"), (part::BIAS, "bias")] {
            if let Some(tensor) = parts.take(part) {
                builder.push(parameter(&module, name), Form::Replaced(tensor));
            }
        }
        builder.reject_rest(parts);
    }
}

/// Builds the components of a BEFT adapter: what is added to biases, stored as 1 × out.
pub(super) fn build_biases(builder: &mut Builder<'_>, modules: BTreeMap<String, Parts>) {
    for (module, mut parts) in modules {
        let Some(mut bias) = builder.require(&module, &mut parts, part::BIAS) else { continue };
        builder.reject_rest(parts);
        if builder.check(&bias, |shape| matches!(shape, [1, _]), "the addition is 1 × out") {
            bias.shape.remove(0);
            builder.push(parameter(&module, "bias"), Form::Added { tensor: bias, scale: 1.0 });
        }
    }
}

/// Builds the components of a trainable-tokens adapter.
pub(super) fn build_tokens(
    builder: &mut Builder<'_>,
    modules: BTreeMap<String, Parts>,
) -> Result<()> {
    let table = TokenTable::of(&builder.config, "token_indices")?;
    for (module, mut parts) in modules {
        if let Some(rows) = builder.require(&module, &mut parts, part::TOKENS) {
            push_rows(builder, &table, &module, rows)?;
        }
        builder.reject_rest(parts);
    }
    Ok(())
}

/// Which rows were trained: only the configuration says.
pub(super) struct TokenTable<'a> {
    config: Configuration<'a>,
    field: &'static str,
    /// Ends of module names, and their rows; the end of a plain list is empty and fits every name.
    entries: Vec<(&'a str, Vec<u64>)>,
}

impl<'a> TokenTable<'a> {
    pub(super) fn of(config: &Configuration<'a>, field: &'static str) -> Result<TokenTable<'a>> {
        let indices = |name: &'a str, value: &'a Value| {
            let indices =
                value.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
            let wrong = || Error::config(config.path, field, "a list of row numbers", value);
            indices.map(|indices| (name, indices)).ok_or_else(wrong)
        };
        let entries = match config.get(field) {
            None => Vec::new(),
            Some(Value::Object(table)) => {
                table.iter().map(|(name, value)| indices(name, value)).collect::<Result<_>>()?
            }
            Some(value) => vec![indices("", value)?],
        };
        Ok(TokenTable { config: *config, field, entries })
    }

    /// The rows of `module`. PEFT compares the ends of names, and of several tables that fit takes
    /// the first; but it sorts them when it saves, so where they differ it cannot be known.
    pub(super) fn rows(&self, module: &str, tensor: &str) -> Result<&[u64], AdapterProblem> {
        let mut fitting = self.entries.iter().filter(|(end, _)| module.ends_with(end));
        let tensor = tensor.to_owned();
        let Some((name, rows)) = fitting.next() else {
            return Err(AdapterProblem::NoTokens { tensor });
        };
        match fitting.find(|(_, others)| others != rows) {
            None => Ok(rows),
            Some((other, _)) => {
                let (first, second) = ((*name).to_owned(), (*other).to_owned());
                Err(AdapterProblem::ContestedTokens { tensor, first, second })
            }
        }
    }

    fn recorded(&self) -> bool {
        self.config.recorded && self.config.get(self.field).is_some()
    }
}

/// Pushes the component of trained rows, in ascending order. Of several for one row the last
/// counts, as for PyTorch's `index_copy` on a CPU.
pub(super) fn push_rows(
    builder: &mut Builder<'_>,
    table: &TokenTable<'_>,
    module: &str,
    rows: Tensor,
) -> Result<()> {
    if !table.recorded() {
        builder.problems.push(AdapterProblem::NoTokens { tensor: rows.name });
        return Ok(());
    }
    let indices = match table.rows(module, &rows.name) {
        Ok(indices) => indices,
        Err(problem) => {
            builder.problems.push(problem);
            return Ok(());
        }
    };
    let matrix = |shape: &[usize]| shape.len() == 2;
    if !builder.check(&rows, matrix, "token rows are tokens × dimension") {
        return Ok(());
    }
    if rows.shape[0] != indices.len() {
        let (tensor, stored, indices) = (rows.name, rows.shape[0], indices.len());
        builder.problems.push(AdapterProblem::TokenCount { tensor, rows: stored, indices });
        return Ok(());
    }
    let places: BTreeMap<u64, usize> =
        indices.iter().enumerate().map(|(place, &index)| (index, place)).collect();
    let in_order = places.len() == indices.len() && indices.is_sorted();
    let ordered = if in_order {
        Some(rows)
    } else {
        blocks::gather_rows(&rows, &places.values().copied().collect::<Vec<_>>())
    };
    // Every place is below the number of rows, so this cannot fail but for want of memory.
    let Some(rows) = ordered else {
        let tensor = format!("{PREFIX}{module}");
        builder.problems.push(AdapterProblem::NoTokens { tensor });
        return Ok(());
    };
    if rows.shape[0] == 0 {
        builder.prune(module, [rows]);
        return Ok(());
    }
    let indices = places.into_keys().collect();
    builder.push(Target::weight(module), Form::Rows { indices, rows });
    Ok(())
}
