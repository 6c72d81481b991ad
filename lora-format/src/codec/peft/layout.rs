//! What of an adapter goes where in a PEFT directory, as PEFT 0.21 reads it back.
//!
//! PEFT looks for the tensors of the modules that its configuration makes it wrap, and loads every
//! other tensor into the parameter of that name. So a whole parameter is written in one of three
//! ways:
//!
//! - either end of the vocabulary as PEFT saves one that was resized: under its own name, which no
//!   field speaks of. The parameter itself is loaded, so that a tied one changes in both places.
//! - a bias alone by `bias`, which loads it likewise.
//! - anything else by `modules_to_save`, which replaces modules, not parameters: every parameter
//!   (and every stored buffer) of such a module, and of the modules in it, must be in the file.
//!
//! PEFT compares names by their ends and by unescaped patterns. What would make it take another
//! module for the one that is meant is refused.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde_json::Value;

use super::PREFIX;
use super::tensors;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::model::{Adapter, Component, Form, Layer, LowRank};
use crate::pattern;
use crate::tensor::Tensor;
use crate::vocabulary;

/// A tensor of the file.
pub(super) struct Stored<'a> {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Cow<'a, [usize]>,
    pub(super) bytes: &'a [u8],
}

/// Whose biases are replaced, as the field `bias` says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Biases {
    /// Nobody's.
    #[default]
    None,
    /// Those of modules with factors.
    Targets,
    /// Others' too.
    All,
}

impl Biases {
    pub(super) fn name(self) -> &'static str {
        match self {
            Biases::None => "none",
            Biases::Targets => "lora_only",
            Biases::All => "all",
        }
    }

    fn from_name(name: &str) -> Option<Biases> {
        [Biases::None, Biases::Targets, Biases::All].into_iter().find(|it| it.name() == name)
    }
}

/// The components of an adapter, by what PEFT makes of them.
#[derive(Default)]
pub(super) struct Layout<'a> {
    /// Modules with factors.
    pub(super) factors: BTreeMap<&'a str, &'a LowRank>,
    /// The changes that are added to their biases.
    added: BTreeMap<&'a str, (&'a Tensor, f64)>,
    /// Rows of weights.
    pub(super) rows: BTreeMap<&'a str, (&'a [u64], &'a Tensor)>,
    /// Whole parameters, by module.
    replaced: BTreeMap<&'a str, BTreeMap<&'a str, &'a Tensor>>,
    /// Modules that PEFT replaces, none of which lies in another.
    pub(super) saved: BTreeSet<&'a str>,
    pub(super) biases: Biases,
}

impl<'a> Layout<'a> {
    /// Sorts the components of an adapter.
    ///
    /// # Errors
    /// [`Error::Inexpressible`] for the first one that PEFT has no place for.
    pub(super) fn of(adapter: &'a Adapter) -> Result<Layout<'a>> {
        let refuse = |what| inexpressible(adapter, what);
        let mut layout = Layout::default();
        for component in &adapter.components {
            if !layout.take(component) {
                let (name, method) = (component.target.name(), component.form.method());
                return Err(refuse(format!("a change of `{name}` by {method}")));
            }
        }
        if adapter.components.is_empty() {
            return Err(refuse("an adapter without components".to_owned()));
        }
        layout.save_modules();
        Ok(layout)
    }

    /// Whether there is a place for it.
    fn take(&mut self, component: &'a Component) -> bool {
        let (module, parameter) =
            (component.target.module.as_str(), component.target.parameter.as_str());
        let named = !module.is_empty();
        match &component.form {
            Form::LowRank(low_rank) => {
                named
                    && parameter == "weight"
                    && low_rank.rank_gain.is_none()
                    && low_rank.layer != Layer::Merged
                    && self.factors.insert(module, low_rank).is_none()
            }
            Form::Added { tensor, scale } => {
                named
                    && parameter == "bias"
                    && self.added.insert(module, (tensor, *scale)).is_none()
            }
            Form::Rows { indices, rows } => {
                named
                    && parameter == "weight"
                    && self.rows.insert(module, (indices, rows)).is_none()
            }
            Form::Replaced(tensor) => {
                named
                    && !parameter.is_empty()
                    && !parameter.contains('.')
                    && self.replaced.entry(module).or_default().insert(parameter, tensor).is_none()
            }
            _ => false,
        }
    }

    /// Decides how each whole parameter is written.
    fn save_modules(&mut self) {
        let is_saved = |(module, parameters): (&&'a str, &BTreeMap<&str, &Tensor>)| {
            let alone = vocabulary::may_be_saved_whole(module)
                && parameters.keys().all(|parameter| ["weight", "bias"].contains(parameter));
            let biases = parameters.keys().all(|parameter| is_bias(parameter));
            (!alone && !biases && !self.factors.contains_key(*module)).then_some(*module)
        };
        let mut saved: BTreeSet<&str> = self.replaced.iter().filter_map(is_saved).collect();
        let all = saved.clone();
        saved.retain(|module| !ancestors(module).any(|outer| all.contains(outer)));
        self.saved = saved;
        for (module, parameters) in &self.replaced {
            let of_vocabulary =
                vocabulary::may_be_saved_whole(module) && !self.factors.contains_key(module);
            if of_vocabulary || self.is_in_saved(module) {
                continue;
            }
            let own =
                self.factors.contains_key(module) && parameters.keys().all(|it| *it == "bias");
            self.biases = self.biases.max(if own { Biases::Targets } else { Biases::All });
        }
    }

    fn is_in_saved(&self, module: &str) -> bool {
        self.saved.contains(module) || ancestors(module).any(|outer| self.saved.contains(outer))
    }

    /// The magnitudes are of all modules with factors, or of none.
    pub(super) fn dora(&self) -> bool {
        self.factors.values().any(|low_rank| low_rank.magnitude.is_some())
    }

    /// The same of what is added to their biases.
    pub(super) fn lora_bias(&self) -> bool {
        !self.added.is_empty()
    }

    /// What PEFT would read otherwise than it is meant, if anything.
    pub(super) fn misread(&self) -> Option<String> {
        let change = |module: &str, method: &str, why: &str| {
            Some(format!("a change of `{module}` by {method} {why}"))
        };
        for (module, low_rank) in &self.factors {
            let weight = format!("{module}.weight");
            let method = Form::LowRank((*low_rank).clone()).method();
            if self.dora() && low_rank.magnitude.is_none() {
                return change(&weight, method, "beside others by DoRA");
            }
            if let Some(other) = self.replaced.get(module)
                && other.keys().any(|parameter| !is_bias(parameter))
            {
                return change(&weight, method, "beside a replacement of the same module");
            }
            if self.rows.contains_key(module) {
                return change(&weight, method, "beside rows of the same weight");
            }
            if self.is_in_saved(module) {
                return change(&weight, method, "inside a module that is replaced");
            }
            if self.lora_bias() && !self.has_bias(module, low_rank) {
                let why = "without a change of its bias that has the same scale, beside others \
                           with one";
                return change(&weight, method, why);
            }
        }
        if let Some(module) = self.added.keys().find(|module| !self.factors.contains_key(*module)) {
            return change(
                &format!("{module}.bias"),
                "added",
                "of whose weight there is no factor",
            );
        }
        let bad = |module: &&&str| self.replaced.contains_key(*module) || self.is_in_saved(module);
        if let Some(module) = self.rows.keys().find(bad) {
            let why = "beside a replacement of the same module";
            return change(&format!("{module}.weight"), "token rows", why);
        }
        let saved: Vec<&str> = self.saved.iter().copied().collect();
        self.mistaken(&saved).or_else(|| self.mistaken_rows())
    }

    fn has_bias(&self, module: &str, low_rank: &LowRank) -> bool {
        low_rank.layer != Layer::Embedding
            && self.added.get(module).is_some_and(|(tensor, scale)| {
                scale.to_bits() == low_rank.scale().to_bits()
                    && *tensor.shape == [low_rank.out_features()]
            })
    }

    /// Which of the adapter's modules PEFT would take for one of `names` in `modules_to_save`, if
    /// any. It wraps each module whose name *ends* with such a name, and applies no factors to a
    /// module that `(^|.*\.){name}($|\..*)` matches, in which nothing is escaped.
    fn mistaken(&self, names: &[&str]) -> Option<String> {
        /// Modules that PEFT puts into those with factors.
        const INNER: [&str; 9] = [
            ".base_layer",
            ".lora_A.default",
            ".lora_B.default",
            ".lora_dropout.default",
            ".lora_embedding_A",
            ".lora_embedding_B",
            ".lora_magnitude_vector.default",
            ".lora_A",
            ".lora_B",
        ];
        let say = |name: &str, other: &str| {
            Some(format!(
                "`{name}` in modules_to_save, by which PEFT would also understand `{other}`"
            ))
        };
        let special = |name: &&&str| name.is_empty() || !pattern::is_plain(name);
        if let Some(name) = names.iter().find(special) {
            return Some(format!("`{name}` in modules_to_save, which PEFT takes for a pattern"));
        }
        let names = Names::of(names);
        for inner in INNER {
            if let Some(name) = names.end_of(inner).filter(|_| !self.factors.is_empty()) {
                return say(name, inner);
            }
        }
        for module in self.factors.keys().chain(self.rows.keys()) {
            let mistaken = names.pattern_in(module).or_else(|| {
                [*module].into_iter().chain(ancestors(module)).find_map(|it| names.end_of(it))
            });
            if let Some(name) = mistaken {
                return say(name, module);
            }
        }
        // Of these the rest is not in the file.
        let partly = self.replaced.iter().filter(|(module, parameters)| {
            !self.is_in_saved(module) && parameters.keys().all(|it| is_bias(it))
        });
        partly.into_iter().find_map(|(module, _)| say(names.end_of(module)?, module))
    }

    /// The same of the names of token rows, which stand for any module that ends with them.
    fn mistaken_rows(&self) -> Option<String> {
        let names: Vec<&str> = self.rows.keys().copied().collect();
        let names = Names::of(&names);
        let modules = self.factors.keys().chain(self.replaced.keys()).chain(self.rows.keys());
        modules.flat_map(|module| [*module].into_iter().chain(ancestors(module))).find_map(|it| {
            let name = names.end_of(it).filter(|name| *name != it)?;
            Some(format!(
                "`{name}` in trainable_token_indices, by which PEFT would also understand `{it}`"
            ))
        })
    }

    /// Whether a configuration's `bias` has PEFT load the same biases.
    pub(super) fn bias_agrees(&self, value: Option<&Value>) -> bool {
        let given = value.map_or(Some(Biases::None), |it| Biases::from_name(it.as_str()?));
        match self.biases {
            Biases::None => given == Some(Biases::None),
            needed => given >= Some(needed),
        }
    }

    /// Whether a configuration's `modules_to_save` has PEFT replace the same parameters.
    pub(super) fn saved_agree(&self, value: Option<&Value>) -> bool {
        /// Those that PEFT adds by itself for a classifier, whether or not there is one.
        const CLASSIFIERS: [&str; 2] = ["classifier", "score"];
        let names = match value {
            None | Some(Value::Null) => Vec::new(),
            Some(value) => match super::config::strings(value) {
                Some(names) => names,
                None => return false,
            },
        };
        let means = |name: &str| {
            CLASSIFIERS.contains(&name)
                || self.replaced.keys().any(|module| tensors::is_saved(&[name], module))
        };
        self.saved.iter().all(|module| tensors::is_saved(&names, module))
            && names.iter().all(|name| means(name))
            && self.mistaken(&names).is_none()
    }

    /// The tensors of the file, in no particular order.
    pub(super) fn tensors(&self) -> Vec<Stored<'a>> {
        let mut stored = Vec::with_capacity(self.factors.len() * 2);
        let mut push = |name: String, tensor: &'a Tensor, shape: Cow<'a, [usize]>| {
            let name = format!("{PREFIX}{name}");
            stored.push(Stored { name, dtype: tensor.dtype, shape, bytes: tensor.bytes() });
        };
        for (module, low_rank) in &self.factors {
            let [a, b] = match low_rank.layer {
                Layer::Embedding => ["lora_embedding_A", "lora_embedding_B"],
                _ => ["lora_A.weight", "lora_B.weight"],
            };
            push(format!("{module}.{a}"), &low_rank.a, Cow::from(&*low_rank.a.shape));
            push(format!("{module}.{b}"), &low_rank.b, Cow::from(&*low_rank.b.shape));
            if let Some(magnitude) = &low_rank.magnitude {
                // Of a convolution with ones around: 1 × out × 1….
                let mut shape = vec![1; low_rank.b.shape.len().max(2)];
                shape[1] = magnitude.elements();
                if low_rank.layer != Layer::Convolution {
                    shape = vec![magnitude.elements()];
                }
                push(format!("{module}.lora_magnitude_vector"), magnitude, shape.into());
            }
        }
        for (module, (tensor, _)) in &self.added {
            push(format!("{module}.lora_B.bias"), tensor, Cow::from(&*tensor.shape));
        }
        for (module, (_, rows)) in &self.rows {
            let name = format!("{module}.token_adapter.trainable_tokens_delta");
            push(name, rows, Cow::from(&*rows.shape));
        }
        for (module, parameters) in &self.replaced {
            let wrapper = if self.factors.contains_key(module) { ".base_layer" } else { "" };
            for (parameter, tensor) in parameters {
                let name = format!("{module}{wrapper}.{parameter}");
                push(name, tensor, Cow::from(&*tensor.shape));
            }
        }
        stored
    }

    /// Which of a base's tensors PEFT will look for in the file and not find there: the rest of
    /// what it replaces.
    pub(super) fn missing<'b>(&self, stored: &[&'b str]) -> Vec<&'b str> {
        let mut modules: BTreeSet<&str> = BTreeSet::new();
        for name in stored {
            modules.extend(ancestors(name));
        }
        // Whatever ends with the name of one that is replaced is replaced as well.
        let mut taken: BTreeSet<&str> = BTreeSet::new();
        let mut names: Vec<&str> = self.saved.iter().copied().collect();
        while !names.is_empty() {
            let ends = Names::of(&names);
            let found: Vec<&str> = modules
                .iter()
                .copied()
                .filter(|module| !taken.contains(module) && ends.end_of(module).is_some())
                .collect();
            taken.extend(&found);
            names = found;
        }
        let has = |name: &str| {
            name.rsplit_once('.').is_some_and(|(module, parameter)| {
                self.replaced.get(module).is_some_and(|it| it.contains_key(parameter))
            })
        };
        let wanted = |name: &&&str| ancestors(name).any(|it| taken.contains(it)) && !has(name);
        stored.iter().filter(wanted).copied().collect()
    }
}

/// Whether PEFT counts a parameter among the biases that its field `bias` speaks of.
fn is_bias(parameter: &str) -> bool {
    parameter == "bias" || parameter.ends_with("_bias")
}

/// The modules that a module (or a parameter) lies in, from the inside out.
fn ancestors(module: &str) -> impl Iterator<Item = &str> {
    module.rmatch_indices('.').map(|(at, _)| &module[..at])
}

pub(super) fn inexpressible(adapter: &Adapter, what: String) -> Error {
    Error::Inexpressible { path: adapter.path.clone(), format: "PEFT", what }
}

/// Names, to be looked for in many others.
struct Names<'a> {
    all: HashSet<&'a str>,
    lengths: BTreeSet<usize>,
    /// Their lengths in characters, with the places of the dots, which stand for any character.
    shapes: HashMap<(usize, Vec<usize>), HashMap<String, &'a str>>,
}

impl<'a> Names<'a> {
    fn of(names: &[&'a str]) -> Names<'a> {
        let mut shapes: HashMap<(usize, Vec<usize>), HashMap<String, &'a str>> = HashMap::new();
        for name in names {
            let dots = name.chars().enumerate().filter(|it| it.1 == '.').map(|it| it.0).collect();
            let group = shapes.entry((name.chars().count(), dots)).or_default();
            group.insert((*name).to_owned(), *name);
        }
        let lengths = names.iter().map(|name| name.len()).collect();
        Names { all: names.iter().copied().collect(), lengths, shapes }
    }

    /// One that `text` ends with.
    fn end_of(&self, text: &str) -> Option<&'a str> {
        let end = |&length: &usize| {
            let at = text.len().checked_sub(length)?;
            self.all.get(text.get(at..)?).copied()
        };
        self.lengths.iter().find_map(end)
    }

    /// One that, as a pattern, matches whole segments of `text`.
    fn pattern_in(&self, text: &str) -> Option<&'a str> {
        let starts = [0].into_iter().chain(text.match_indices('.').map(|(at, _)| at + 1));
        for rest in starts.map(|at| &text[at..]) {
            for ((length, dots), names) in &self.shapes {
                let mut characters: Vec<char> = rest.chars().take(*length + 1).collect();
                if characters.len() < *length || characters.get(*length).is_some_and(|&c| c != '.')
                {
                    continue;
                }
                characters.truncate(*length);
                dots.iter().for_each(|&at| characters[at] = '.');
                let found = names.get(&characters.iter().collect::<String>());
                if let Some(name) = found {
                    return Some(name);
                }
            }
        }
        None
    }
}
