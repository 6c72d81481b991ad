//! The single files of the image world: sd-scripts (kohya) and LyCORIS, diffusers, ComfyUI,
//! OneTrainer.
//!
//! They differ in how they spell a module (`lora_unet_down_blocks_0_…`, `unet.down_blocks.0.…`,
//! `diffusion_model.…`) and in what they call its tensors (`.lora_down.weight`, `.lora_A.weight`),
//! and mix the two freely; so one reader reads all, and notes the format that a file is nearest
//! to. Modules keep the spelling of the file: which module of a model is meant, [`crate::naming`]
//! tells.
//!
//! Alpha is a tensor beside the factors. diffusers has none: either the file's metadata holds the
//! configuration of PEFT, or the scale is 1. A module without alpha has scale 1 in every loader.

mod build;
mod roles;
mod writer;

use std::collections::BTreeMap;

use serde_json::{Map, Value};

pub use writer::write;

use self::build::{Builder, Roles};
use self::roles::{Part, Role};
use super::{ReadOptions, peft};
use crate::container::TensorFile;
use crate::error::{AdapterProblem, DetectProblem, Error, Result, Unsupported};
use crate::fingerprint::BaseIdentity;
use crate::model::{Adapter, AdapterFormat, Component, Note, Scaling, SourceConfig};
use crate::tensor::Tensor;

/// Where diffusers keeps the configuration of PEFT, as JSON.
pub const ADAPTER_METADATA: &str = "lora_adapter_metadata";

/// Whether a file is one of these.
pub(super) fn is_kohya(file: &TensorFile) -> bool {
    file.any_name(roles::is_characteristic)
        || file.any_name(
            |name| matches!(roles::part(name), Part::Role(stem, _) if component(stem).is_some()),
        )
}

/// What a module's name begins with in the formats that have no other mark.
fn component(stem: &str) -> Option<AdapterFormat> {
    let (first, rest) = stem.split_once('.')?;
    match first {
        "unet" | "text_encoder" | "text_encoder_2" | "text_encoder_3" => {
            Some(AdapterFormat::Diffusers)
        }
        // GPT-2 calls itself a transformer, too; its blocks are `h`.
        "transformer" if !rest.starts_with("h.") => Some(AdapterFormat::Diffusers),
        "diffusion_model" | "text_encoders" => Some(AdapterFormat::Comfy),
        _ => None,
    }
}

/// The format that a file is nearest to.
fn format_of(stems: &BTreeMap<String, Roles>) -> AdapterFormat {
    let starts = |prefix: &str| stems.keys().any(|stem| stem.starts_with(prefix));
    if starts("lora_transformer_") {
        return AdapterFormat::OneTrainer;
    }
    let dotted = stems.keys().find_map(|stem| component(stem));
    match dotted {
        Some(format) if !starts("lora_") && !starts("lycoris_") => format,
        _ => AdapterFormat::Kohya,
    }
}

/// Reads a file of these formats.
pub(super) fn read(file: TensorFile, options: &ReadOptions) -> Result<Adapter> {
    refuse_options(&file, options)?;
    let metadata = file.own_metadata();
    let TensorFile { path, tensors, .. } = file;
    let mut builder = Builder::default();
    let stems = sort(tensors, &mut builder.problems)
        .map_err(|features| Error::Unsupported { path: path.clone(), features })?;
    let format = format_of(&stems);
    let (config, metadata): (Vec<_>, Vec<_>) =
        metadata.into_iter().partition(|entry| entry.0 == ADAPTER_METADATA);
    let source = match config.first() {
        Some((_, text)) => Some(recorded(&path, text)?),
        None => None,
    };
    let mut scales = Recorded::of(&path, source.as_ref())?;
    let mut failed = None;
    for (stem, roles) in stems {
        builder.module(&stem, roles, &mut |module| {
            scales.scaling(module).unwrap_or_else(|error| {
                failed.get_or_insert(error);
                None
            })
        });
    }
    if let Some(error) = failed {
        return Err(error);
    }
    let Builder { mut components, problems, mut notes, without_alpha } = builder;
    if !problems.is_empty() {
        return Err(Error::Adapter { path, problems });
    }
    if components.is_empty() {
        let problem = DetectProblem::NotAnAdapter { tensors: 0, first: None };
        return Err(Error::Unrecognised { path, problem });
    }
    if without_alpha > 0 && source.is_none() {
        notes.push(Note::NoAlpha { modules: without_alpha });
    }
    components.sort_by(Component::compare);
    Ok(Adapter {
        path,
        format,
        components,
        base: BaseIdentity { name: None, revision: None, fingerprint: None },
        // None of these models has a Conv1D.
        fan_in_fan_out: Some(false),
        names: Some(format),
        metadata,
        source: source.map(|config| SourceConfig { format: AdapterFormat::Diffusers, config }),
        extensions: Map::new(),
        notes,
    })
}

/// These formats leave nothing open that the user could say.
fn refuse_options(file: &TensorFile, options: &ReadOptions) -> Result<()> {
    let (option, reason) = if options.alpha.is_some() {
        ("alpha", "its factors have their own, or the scale 1 that loaders give them")
    } else if !options.ignore_fields.is_empty() {
        ("field to ignore", "it has no configuration")
    } else if options.residual_base {
        ("residual base", "it records no initialisation")
    } else if options.enable_lora.is_some() {
        ("enable_lora", "only loralib has fused projections")
    } else {
        return Ok(());
    };
    Err(Error::Meaningless { path: file.path.clone(), option, reason })
}

/// The tensors by module and role.
///
/// # Errors
/// What is recognised and not implemented, each tensor by name.
fn sort(
    tensors: Vec<Tensor>,
    problems: &mut Vec<AdapterProblem>,
) -> Result<BTreeMap<String, Roles>, Vec<Unsupported>> {
    let mut stems: BTreeMap<String, Roles> = BTreeMap::new();
    let mut refused: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
    let mut weights = Vec::new();
    for tensor in tensors {
        match roles::part(&tensor.name) {
            Part::Role(stem, role) => {
                let stem = roles::stem_of(&tensor, stem);
                insert(&mut stems, stem, role, tensor, problems);
            }
            Part::Refused(reason) => refused.entry(reason).or_default().push(tensor.name),
            Part::Unknown => weights.push(tensor),
        }
    }
    // IA³'s gains are called as any weight is: the flag beside them tells.
    for tensor in weights {
        match tensor.name.strip_suffix(".weight") {
            Some(stem) if stems.get(stem).is_some_and(|it| it.contains_key(&Role::OnInput)) => {
                let stem = stem.to_owned();
                insert(&mut stems, stem, Role::Gain, tensor, problems);
            }
            _ => problems.push(AdapterProblem::UnusedTensor { tensor: tensor.name }),
        }
    }
    if refused.is_empty() {
        return Ok(stems);
    }
    let feature = |(reason, names): (&'static str, Vec<String>)| {
        let others = match names.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        let first = names.into_iter().next().unwrap_or_default();
        Unsupported { feature: format!("`{first}`{others}"), reason: reason.to_owned() }
    };
    Err(refused.into_iter().map(feature).collect())
}

fn insert(
    stems: &mut BTreeMap<String, Roles>,
    stem: String,
    role: Role,
    tensor: Tensor,
    problems: &mut Vec<AdapterProblem>,
) {
    let second = tensor.name.clone();
    if let Some(first) = stems.entry(stem).or_default().insert(role, tensor) {
        problems.push(AdapterProblem::DuplicateFactor { first: first.name, second });
    }
}

/// The configuration that diffusers recorded.
fn recorded(path: &std::path::Path, text: &str) -> Result<Map<String, Value>> {
    let value: Value = crate::json::parse(path, text.as_bytes())?;
    crate::json::object(path, value)
}

/// The scales of diffusers' recorded configuration: PEFT's, with the component before each field.
struct Recorded(Vec<(String, peft::Scales)>);

impl Recorded {
    fn of(path: &std::path::Path, config: Option<&Map<String, Value>>) -> Result<Recorded> {
        let mut parts: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
        for (key, value) in config.into_iter().flatten() {
            let (part, field) = key.split_once('.').unwrap_or(("", key));
            parts.entry(part.to_owned()).or_default().insert(field.to_owned(), value.clone());
        }
        let parts = parts.into_iter().map(|(part, fields)| {
            let scales = peft::Scales::of(path, &fields)?;
            Ok((part, scales))
        });
        parts.collect::<Result<_>>().map(Recorded)
    }

    fn of_part(&mut self, module: &str) -> Option<(&str, &mut peft::Scales)> {
        // `text_encoder_2` before `text_encoder`, and a configuration without parts last.
        self.0.iter_mut().rev().find_map(|(part, scales)| match part.is_empty() {
            true => Some((part.as_str(), scales)),
            false => {
                let inside = module.strip_prefix(part.as_str())?.starts_with('.');
                inside.then_some((part.as_str(), scales))
            }
        })
    }

    fn scaling(&mut self, module: &str) -> Result<Option<Scaling>> {
        let Some((part, scales)) = self.of_part(module) else { return Ok(None) };
        let inner = module.strip_prefix(part).unwrap_or(module).trim_start_matches('.').to_owned();
        scales.scaling(&inner).map(Some)
    }
}
