//! Sorted tensors → components: what all methods share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::config::{Configuration, Configured, ScalingTable};
use super::methods::Method;
use super::tensors::{self, Full, Parts, Sorted};
use super::{adalora, factored, lora, lycoris, rotation, small};
use crate::blocks::Expansions;
use crate::container::TensorFile;
use crate::error::{AdapterProblem, DetectProblem, Error, Result, Shape};
use crate::model::{Component, Form, Note, Target};
use crate::tensor::Tensor;

/// What is gathered while an adapter is read.
pub(super) struct Builder<'a> {
    pub(super) config: Configuration<'a>,
    pub(super) problems: Vec<AdapterProblem>,
    pub(super) notes: &'a mut Vec<Note>,
    pub(super) expansions: Expansions,
    components: Vec<Component>,
    /// Tensors that are understood and cannot be merged, by reason.
    refused: BTreeMap<&'static str, Vec<String>>,
    /// Tensors that make no component.
    passed_over: Vec<String>,
}

/// The components of the adapter in `file`.
pub(super) fn read(
    file: TensorFile,
    config: Configuration<'_>,
    notes: &mut Vec<Note>,
) -> Result<Vec<Component>> {
    let mut problems = Vec::new();
    let TensorFile { path, tensors, .. } = file;
    let stored = tensors.iter().map(|tensor| tensor.bytes().len() as u64).sum();
    let names: BTreeSet<String> = tensors.iter().map(|tensor| tensor.name.clone()).collect();
    let Sorted { modules, full, mut shared, passed_over } =
        tensors::sort(tensors, &config, &mut problems).map_err(|error| error.about(&path))?;
    let mut builder = Builder {
        config,
        problems,
        notes,
        expansions: Expansions::new(stored),
        components: Vec::new(),
        refused: BTreeMap::new(),
        passed_over: Vec::new(),
    };
    for note in passed_over {
        builder.pass_over(note);
    }
    for ((module, parameter), full) in full {
        let form = match full {
            Full::Trained(tensor) => Form::Replaced(tensor),
            Full::Base(tensor) => Form::Base(tensor),
        };
        builder.push(Target { module, parameter }, form);
    }
    match config.method {
        Method::Lora => lora::build(&mut builder, modules)?,
        Method::AdaLora => adalora::build(&mut builder, modules)?,
        Method::LoHa => lycoris::build_hadamard(&mut builder, modules)?,
        Method::LoKr => lycoris::build_kronecker(&mut builder, modules)?,
        Method::Oft => rotation::build(&mut builder, modules)?,
        Method::Ia3 => small::build_gains(&mut builder, modules)?,
        Method::Vera => small::build_shared(&mut builder, modules, &mut shared)?,
        Method::Miss => small::build_tiles(&mut builder, modules)?,
        Method::LayerNorm => small::build_norms(&mut builder, modules),
        Method::Tokens => small::build_tokens(&mut builder, modules)?,
        Method::Bias => small::build_biases(&mut builder, modules),
        Method::Hra => rotation::build_reflections(&mut builder, modules)?,
        Method::Boft => rotation::build_butterflies(&mut builder, modules),
        Method::Hira => factored::build_proportional(&mut builder, modules)?,
        Method::Delora => factored::build_bounded(&mut builder, modules)?,
        Method::Gralora => factored::build_grids(&mut builder, modules)?,
        Method::C3a => small::build_circulants(&mut builder, modules),
        Method::Shira => small::build_sparse(&mut builder, modules),
    }
    builder.finish(&path, &names)
}

impl Builder<'_> {
    pub(super) fn push(&mut self, target: Target, form: Form) {
        self.components.push(Component { target, form });
    }

    pub(super) fn refuse(&mut self, reason: &'static str, tensor: &str) {
        self.refused.entry(reason).or_default().push(tensor.to_owned());
    }

    pub(super) fn pass_over(&mut self, note: Note) {
        if let Note::PassedOver { tensor, .. } = &note {
            self.passed_over.push(tensor.clone());
        }
        self.notes.push(note);
    }

    /// Tensors that changed nothing in training: they make no component.
    pub(super) fn prune(&mut self, module: &str, tensors: impl IntoIterator<Item = Tensor>) {
        self.passed_over.extend(tensors.into_iter().map(|tensor| tensor.name));
        self.notes.push(Note::Pruned { module: module.to_owned() });
    }

    /// Every tensor of a module that no component took.
    pub(super) fn reject_rest(&mut self, parts: Parts) {
        let unused =
            parts.into_rest().map(|tensor| AdapterProblem::UnusedTensor { tensor: tensor.name });
        self.problems.extend(unused);
    }

    /// Whether a tensor is of floats and its shape passes; a problem otherwise.
    pub(super) fn check(
        &mut self,
        tensor: &Tensor,
        fits: impl Fn(&[usize]) -> bool,
        expected: &'static str,
    ) -> bool {
        let name = || tensor.name.clone();
        if !tensor.dtype.is_merge_float() {
            let dtype = tensor.dtype;
            self.problems.push(AdapterProblem::FactorDtype { tensor: name(), dtype });
            return false;
        }
        if !fits(&tensor.shape) {
            let shape = Shape(tensor.shape.clone());
            self.problems.push(AdapterProblem::FactorShape { tensor: name(), shape, expected });
            return false;
        }
        true
    }

    /// A tensor that must be there, or a problem that says beside which one it is missing.
    pub(super) fn require(
        &mut self,
        module: &str,
        parts: &mut Parts,
        part: &'static str,
    ) -> Option<Tensor> {
        let present = parts.any_name().map(str::to_owned);
        let found = parts.take(part);
        if found.is_none() {
            let suffix = self.config.method.suffixes().iter().find(|entry| entry.1 == part);
            let missing = format!("{}{module}.{}", super::PREFIX, suffix.map_or(part, |it| it.0));
            self.problems.push(match present {
                Some(present) => AdapterProblem::MissingFactor { present, missing },
                None => AdapterProblem::MissingTensor { tensor: missing },
            });
        }
        found
    }

    /// Notes where the stored rank is not the configured one, or an alpha is in doubt.
    pub(super) fn compare_ranks(&mut self, module: &str, configured: &Configured, stored: usize) {
        let module = module.to_owned();
        match configured.rank.filter(|&rank| rank != stored) {
            // The tensors show that the keys are no longer in the order of training, so which
            // alpha was trained with cannot be known.
            Some(_) if configured.alpha_contested => {
                self.problems.push(AdapterProblem::PatternOrder { module });
            }
            Some(configured) => {
                self.notes.push(Note::RankDiffers { module, configured, stored });
            }
            None if configured.alpha_contested => {
                let alpha = configured.scaling.alpha.to_string();
                self.notes.push(Note::ContestedAlpha { module, alpha });
            }
            None => {}
        }
    }

    pub(super) fn scaling_table(&self) -> Result<ScalingTable> {
        let field = self.config.method.alpha_field().unwrap_or("lora_alpha");
        ScalingTable::new(self.config.path, self.config.fields, field)
    }

    /// The components, sorted, if nothing is wrong and no tensor was left out.
    fn finish(mut self, path: &Path, names: &BTreeSet<String>) -> Result<Vec<Component>> {
        let path = path.to_owned();
        if !self.refused.is_empty() {
            let features = self.refused.iter();
            let features = features.map(|(reason, names)| tensors::summarise(reason, names));
            return Err(Error::Unsupported { path, features: features.collect() });
        }
        self.components.sort_by(Component::compare);
        for pair in self.components.windows(2) {
            if pair[0].target == pair[1].target
                && pair[0].form.precedence() == pair[1].form.precedence()
                && pair[0].form.method() == pair[1].form.method()
            {
                let [first, second] = [&pair[0], &pair[1]].map(|component| {
                    component.form.tensors().first().map(|it| it.name.clone()).unwrap_or_default()
                });
                self.problems.push(AdapterProblem::DuplicateFactor { first, second });
            }
        }
        if !self.problems.is_empty() {
            return Err(Error::Adapter { path, problems: self.problems });
        }
        let mut unused: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        for component in &self.components {
            for tensor in component.form.tensors() {
                unused.remove(&*tensor.name);
            }
        }
        for name in &self.passed_over {
            unused.remove(&**name);
        }
        if !unused.is_empty() {
            let unused = unused.into_iter().map(str::to_owned);
            let problems = unused.map(|tensor| AdapterProblem::UnusedTensor { tensor }).collect();
            return Err(Error::Adapter { path, problems });
        }
        if self.components.is_empty() {
            let problem = DetectProblem::NotAnAdapter { tensors: 0, first: None };
            return Err(Error::Unrecognised { path, problem });
        }
        Ok(self.components)
    }
}
