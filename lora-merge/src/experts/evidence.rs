//! What an adapter's configuration tells of the program that wrote it.

use lora_format::model::Adapter;
use serde_json::{Map, Value};

use super::base::Model;
use super::layout::{Packing, Side};
use crate::orientation::Orientation;

/// The configuration, asked for what it tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Evidence<'a> {
    config: Option<&'a Map<String, Value>>,
}

/// What decides, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told<T> {
    pub(super) what: T,
    pub(super) by: String,
}

/// What PEFT of some releases does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Release {
    /// Up to 0.18.
    First,
    /// 0.19.0.
    Outputs,
    /// 0.19.1 and later.
    Inputs,
}

impl<'a> Evidence<'a> {
    pub(super) fn of(adapter: &'a Adapter) -> Evidence<'a> {
        Evidence { config: adapter.source.as_ref().map(|source| &source.config) }
    }

    fn text(&self, field: &str) -> Option<&'a str> {
        self.config?.get(field)?.as_str()
    }

    /// The side that A takes of a stack stored so, by `peft_version`. PEFT writes it since 0.18;
    /// without it the writer may be an older PEFT or another program, which is no evidence.
    ///
    /// What a module stored as (E, in, out) is to PEFT since 0.19.0 depends on the transformers
    /// release as well, which no file names.
    pub(super) fn side(&self, stored: Option<Orientation>, model: Model<'_>) -> Option<Told<Side>> {
        let version = self.text("peft_version")?;
        let what = match (release(version)?, stored) {
            (Release::First | Release::Outputs, Some(Orientation::OutIn)) => Side::First,
            (Release::Inputs, Some(Orientation::OutIn)) => Side::Last,
            (Release::First, None) => Side::First,
            (Release::First, Some(Orientation::InOut)) if model.keeps_in_out() => Side::First,
            _ => return None,
        };
        Some(Told { what, by: format!("PEFT {version}, which wrote it, does") })
    }

    /// Which columns of B are whose: what unsloth noted, PEFT's own packing if unsloth had no hand
    /// in it.
    ///
    /// # Errors
    /// Why it cannot be told.
    pub(super) fn packing(&self, parameter: &str) -> Result<Packing, String> {
        match self.marker(parameter) {
            Some("rank_major") => Ok(Packing::RankMajor),
            Some("grouped_by_expert") => Ok(Packing::Blocks),
            Some(other) => Err(format!("`lora_B_layout` is {other:?}, which is not known")),
            None if self.unsloth() => {
                Err("unsloth trained it without noting `lora_B_layout`, and \
                                           which columns of B belong to which expert depends on \
                                           its release"
                    .to_owned())
            }
            None => Ok(Packing::RankMajor),
        }
    }

    /// What unsloth noted (unsloth-zoo#1232): for each parameter, or for all.
    pub(super) fn marker(&self, parameter: &str) -> Option<&'a str> {
        const FIELD: &str = "lora_B_layout";
        let own = self.config?.get("unsloth_fused_expert_lora");
        let own = own.and_then(|detail| detail.get("parameters")?.get(parameter)?.get(FIELD));
        own.and_then(Value::as_str).or_else(|| self.text(FIELD))
    }

    /// Whether unsloth trained it: its patched models leave this mark in what PEFT saves.
    fn unsloth(&self) -> bool {
        let mapping = self.config.and_then(|config| config.get("auto_mapping"));
        mapping.and_then(|mapping| mapping.get("unsloth_fixed")) == Some(&Value::Bool(true))
    }
}

/// What a version is known to do. The main branch between two releases is either.
fn release(version: &str) -> Option<Release> {
    let (number, rest) = match version.find(|c: char| !c.is_ascii_digit() && c != '.') {
        Some(end) => version.split_at(end),
        None => (version, ""),
    };
    let mut parts = number.trim_end_matches('.').split('.').map(str::parse::<u32>);
    let major = parts.next()?.ok()?;
    let minor = parts.next()?.ok()?;
    let patch = parts.next().map_or(Some(0), Result::ok)?;
    Some(match (major, minor, patch) {
        (0, ..=17, _) | (0, 18, 0) => Release::First,
        (0, 18 | 19, _) if !rest.is_empty() => return None,
        (0, 18, _) => Release::First,
        (0, 19, 0) => Release::Outputs,
        _ => Release::Inputs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_release_is_known_to_do_counts() {
        let of = release;
        for (version, known) in [
            ("0.17.1", Some(Release::First)),
            ("0.18.0", Some(Release::First)),
            ("0.18.0.rc0", Some(Release::First)),
            ("0.18.1", Some(Release::First)),
            ("0.18.2.dev0@UNKNOWN", None),
            ("0.19.0", Some(Release::Outputs)),
            ("0.19.1.dev0@abc", None),
            ("0.19.1", Some(Release::Inputs)),
            ("0.20.1.dev0", Some(Release::Inputs)),
            ("0.21.2", Some(Release::Inputs)),
            ("1.0", Some(Release::Inputs)),
            ("", None),
            ("new", None),
            ("0.", None),
            ("99999999999.0.0", None),
        ] {
            assert_eq!(of(version), known, "{version}");
        }
    }
}
