//! Writing a LoRA adapter for llama.cpp.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::names::{Architecture, EMBEDDING};
use super::{
    A_SUFFIX, ADAPTER_TYPE, ALPHA, ARCHITECTURE, B_SUFFIX, BASE_COUNT, BASE_NAME, BASE_URL, FORMAT,
    HUB, QUANTIZATION_VERSION, TYPE,
};
use crate::codec::base::Base;
use crate::codec::{WriteOptions, Written, folding, rearrange};
use crate::container::gguf::{Encoded, GgufValue};
use crate::error::{BaseProblem, Error, Result};
use crate::io::atomic::{AtomicFile, Durability, Overwrite};
use crate::model::{Adapter, Form, Layer, LowRank};
use crate::tensor::Tensor;

/// How many of the alphas in an adapter are tried as the one of the file.
const ALPHAS_TRIED: usize = 16;

/// Writes an adapter as a GGUF file for llama.cpp. The same adapter gives the same bytes. The base's
/// `config.json` is needed: its architecture decides the names, its heads the order of rows.
///
/// Factors keep their dtype, and their bits unless their scale differs from the one that the file's
/// alpha gives them (see [`Written`]).
///
/// # Errors
/// [`Error::OutputExists`], [`Error::Io`], [`Error::Base`] if the base's configuration is missing
/// or of an architecture without known names, [`Error::Inexpressible`] for what GGUF has no place
/// for and, unless it is allowed, for what could only be written rounded.
pub fn write(
    adapter: &Adapter,
    destination: &Path,
    options: &WriteOptions,
    overwrite: Overwrite,
    durability: Durability,
) -> Result<Written> {
    let mut written = Written::default();
    let writer = Writer::new(adapter, options)?;
    let (alpha, tensors) = writer.tensors(&mut written)?;
    let values = values(adapter, writer.architecture, alpha);
    let encoded = Encoded::of(&values, &tensors)
        .ok_or_else(|| writer.refuse("tensors of these shapes and types".to_owned()))?;
    let output = AtomicFile::create(destination, overwrite)?;
    output.write_parts(&encoded.parts())?;
    adapter.ensure_unchanged()?;
    output.commit(durability)?;
    Ok(written)
}

/// The values of the file, in the order of llama.cpp's converter.
fn values(adapter: &Adapter, architecture: &Architecture, alpha: f32) -> Vec<(String, GgufValue)> {
    let text = |text: &str| GgufValue::String(text.to_owned());
    let mut values = vec![
        (ARCHITECTURE.to_owned(), text(architecture.name)),
        (TYPE.to_owned(), text("adapter")),
        (ADAPTER_TYPE.to_owned(), text("lora")),
    ];
    let own = |key: &str| {
        key.starts_with("general.")
            && !key.starts_with("general.base_model.")
            && ![ARCHITECTURE, TYPE, QUANTIZATION_VERSION, "general.alignment"].contains(&key)
    };
    let kept: BTreeMap<&String, &String> = adapter
        .metadata
        .iter()
        .filter(|entry| own(&entry.0))
        .map(|entry| (&entry.0, &entry.1))
        .collect();
    values.extend(kept.into_iter().map(|(key, value)| (key.clone(), text(value))));
    if let Some(name) = &adapter.base.name {
        values.push((BASE_COUNT.to_owned(), GgufValue::U32(1)));
        let parts: Vec<&str> = name.split('/').collect();
        match parts.as_slice() {
            // The name of a repository: an owner and a model.
            [owner, model] if !owner.is_empty() && !owner.starts_with('.') && !model.is_empty() => {
                values.push((BASE_NAME.to_owned(), text(model)));
                values.push((BASE_URL.to_owned(), text(&format!("{HUB}{name}"))));
            }
            _ => values.push((BASE_NAME.to_owned(), text(name))),
        }
    }
    values.push((ALPHA.to_owned(), GgufValue::F32(alpha)));
    values.push((QUANTIZATION_VERSION.to_owned(), GgufValue::U32(2)));
    values
}

/// One change, and where it goes.
struct Change<'a> {
    module: &'a str,
    low_rank: &'a LowRank,
    tensor: String,
    expert: Option<usize>,
    /// The rank that is written: of stacked experts, the largest of them.
    rank: usize,
}

struct Writer<'a> {
    adapter: &'a Adapter,
    options: &'a WriteOptions,
    base: Base<'a>,
    architecture: &'static Architecture,
}

impl<'a> Writer<'a> {
    fn new(adapter: &'a Adapter, options: &'a WriteOptions) -> Result<Writer<'a>> {
        let base = Base::needed(&adapter.path, options.base_config.as_ref(), || {
            "its architecture decides the names in a GGUF file".to_owned()
        })?;
        let class = base.class()?;
        let architecture = Architecture::of_class(class).ok_or_else(|| {
            let architecture = class.to_owned();
            base.problem(BaseProblem::Architecture { format: FORMAT, architecture })
        })?;
        Ok(Writer { adapter, options, base, architecture })
    }

    fn refuse(&self, what: String) -> Error {
        Error::Inexpressible { path: self.adapter.path.clone(), format: FORMAT, what }
    }

    /// Every component, if GGUF has a place for it.
    fn changes(&self) -> Result<Vec<Change<'a>>> {
        let mut changes = Vec::with_capacity(self.adapter.components.len());
        for component in &self.adapter.components {
            let target = &component.target;
            let low_rank = match &component.form {
                Form::LowRank(low_rank)
                    if target.parameter == "weight"
                        && low_rank.magnitude.is_none()
                        && low_rank.rank_gain.is_none()
                        && matches!(low_rank.layer, Layer::Linear | Layer::Embedding) =>
                {
                    low_rank
                }
                form => {
                    let what = format!("a change of `{}` by {}", target.name(), form.method());
                    return Err(self.refuse(what));
                }
            };
            let module = target.module.as_str();
            let place = self.architecture.place(module);
            let is_embedding = low_rank.layer == Layer::Embedding;
            let Some(place) = place.filter(|place| (place.tensor == EMBEDDING) == is_embedding)
            else {
                let name = self.architecture.name;
                return Err(
                    self.refuse(format!("a change of `{module}`: {name} has no such tensor"))
                );
            };
            let (tensor, expert, rank) = (place.tensor, place.expert, low_rank.rank());
            changes.push(Change { module, low_rank, tensor, expert, rank });
        }
        if changes.is_empty() {
            return Err(self.refuse("an adapter without components".to_owned()));
        }
        let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
        for change in &changes {
            let rank = ranks.entry(change.tensor.clone()).or_default();
            *rank = change.rank.max(*rank);
        }
        for change in &mut changes {
            change.rank = ranks.get(&change.tensor).copied().unwrap_or(change.rank);
        }
        Ok(changes)
    }

    /// The file's alpha and its tensors.
    fn tensors(&self, written: &mut Written) -> Result<(f32, Vec<Tensor>)> {
        let changes = self.changes()?;
        let (alpha, units) = choose_alpha(&changes);
        let mut groups: BTreeMap<&str, BTreeMap<Option<usize>, (&Change<'_>, Tensor)>> =
            BTreeMap::new();
        for (change, unit) in changes.iter().zip(units) {
            let scale = change.low_rank.scale();
            let b = folding::fold(
                change.module,
                &change.low_rank.b,
                (scale, unit),
                self.options,
                written,
            )
            .map_err(|what| self.refuse(what))?;
            let group = groups.entry(&change.tensor).or_default();
            if group.insert(change.expert, (change, b)).is_some() {
                return Err(self.refuse(format!("two changes of `{}`", change.module)));
            }
        }
        let mut tensors = Vec::with_capacity(2 * groups.len());
        for (name, group) in groups {
            let (mut a, mut b) = match group.get(&None) {
                Some((change, b)) => self.one(name, change, b)?,
                None => self.stack(name, &group, written)?,
            };
            a.name = format!("{name}{A_SUFFIX}");
            b.name = format!("{name}{B_SUFFIX}");
            tensors.extend([a, b]);
        }
        Ok((alpha, tensors))
    }

    fn one(&self, name: &str, change: &Change<'_>, b: &Tensor) -> Result<(Tensor, Tensor)> {
        let mut a = change.low_rank.a.clone();
        let mut b = b.clone();
        if name == EMBEDDING {
            a = rearrange::transposed(&a).ok_or_else(|| self.malformed(change))?;
        }
        if let Some(heads) = self.architecture.paired_heads(name) {
            let heads = self.base.heads(heads)?;
            b = rearrange::paired(&b, heads).ok_or_else(|| {
                let (module, rows) = (change.module.to_owned(), change.low_rank.out_features());
                self.base.problem(BaseProblem::Heads { module, rows, heads })
            })?;
        }
        Ok((a, b))
    }

    fn malformed(&self, change: &Change<'_>) -> Error {
        self.refuse(format!("the factors of `{}`", change.module))
    }

    /// The factors of all experts; of those without a change, zeros.
    fn stack(
        &self,
        name: &str,
        group: &BTreeMap<Option<usize>, (&Change<'_>, Tensor)>,
        written: &mut Written,
    ) -> Result<(Tensor, Tensor)> {
        let last = group.keys().flatten().max().copied().unwrap_or(0);
        let count = match self.base.experts()? {
            Some(count) => count,
            None if last + 1 == group.len() => last + 1,
            None => {
                let field = "num_experts";
                let (expected, found) = ("a count", "nothing".to_owned());
                return Err(self.base.problem(BaseProblem::Field { field, expected, found }));
            }
        };
        if last >= count {
            return Err(self.refuse(format!("expert {last} of `{name}`: the base has {count}")));
        }
        let mut padded = Vec::with_capacity(group.len());
        for (change, b) in group.values() {
            let a = &change.low_rank.a;
            let a = rearrange::padded(a, change.rank, change.low_rank.in_features());
            let b = rearrange::padded(b, change.low_rank.out_features(), change.rank);
            padded.push(a.zip(b).ok_or_else(|| self.malformed(change))?);
            if change.rank > change.low_rank.rank() {
                let (module, rank) = (change.module, change.rank);
                written.changes.push(format!(
                    "`{module}`: zeros make its rank {rank}, that of the other experts, exactly"
                ));
            }
        }
        let mut parts: BTreeMap<Option<usize>, (Tensor, Tensor)> =
            group.keys().copied().zip(padded).collect();
        let Some((zero_a, zero_b)) = parts
            .values()
            .next()
            .and_then(|(a, b)| Some((rearrange::zeros_like(a)?, rearrange::zeros_like(b)?)))
        else {
            return Err(self.refuse(format!("`{name}`")));
        };
        if parts.len() < count {
            let missing = count - parts.len();
            written.changes.push(format!(
                "`{name}`: zeros stand for the {missing} experts without a change, exactly"
            ));
        }
        for expert in 0..count {
            parts.entry(Some(expert)).or_insert_with(|| (zero_a.clone(), zero_b.clone()));
        }
        let (all_a, all_b): (Vec<Tensor>, Vec<Tensor>) = parts.into_values().unzip();
        rearrange::stacked(name.to_owned(), &all_a)
            .zip(rearrange::stacked(name.to_owned(), &all_b))
            .ok_or_else(|| {
                self.refuse(format!("experts of `{name}` of different shapes or dtypes"))
            })
    }
}

/// The alpha of the file, and the scale that it gives each change. 0 stands for a scale of 1.
fn choose_alpha(changes: &[Change<'_>]) -> (f32, Vec<f64>) {
    let scales: Vec<f64> = changes.iter().map(|change| change.low_rank.scale()).collect();
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for (change, scale) in changes.iter().zip(&scales) {
        let alpha = (scale * change.rank as f64) as f32;
        if alpha.is_finite() && alpha != 0.0 {
            *counts.entry(alpha.to_bits()).or_default() += 1;
        }
    }
    // The commonest first; of equally common ones, the smallest bits.
    let order: BTreeSet<(std::cmp::Reverse<usize>, u32)> =
        counts.into_iter().map(|(bits, count)| (std::cmp::Reverse(count), bits)).collect();
    let mut alphas: Vec<f32> =
        order.into_iter().take(ALPHAS_TRIED).map(|entry| f32::from_bits(entry.1)).collect();
    alphas.push(0.0);
    let units = |alpha: &f32| -> Vec<f64> {
        let unit = |change: &Change<'_>| {
            if *alpha == 0.0 { 1.0 } else { f64::from(*alpha) / change.rank as f64 }
        };
        changes.iter().map(unit).collect()
    };
    let mut candidates: Vec<Vec<f64>> = alphas.iter().map(units).collect();
    let chosen = folding::choose(&scales, &candidates).unwrap_or(0);
    (alphas.swap_remove(chosen), candidates.swap_remove(chosen))
}
