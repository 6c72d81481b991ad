//! The search for quantised weights: every scheme looks for its tensors, claims them, and what
//! looks quantised but is claimed by none is a problem.

use std::collections::HashSet;

use lora_format::checkpoint::{Checkpoint, Location};
use lora_format::container::safetensors::TensorInfo;
use lora_format::io::mmap::Mapping;
use lora_format::{Dtype, Shape};

use super::config::Fields;
use super::number::ScaleType;
use super::rules::Rules;
use super::{MAX_PARTS, QuantisedBase, QuantisedProblem, QuantisedWeight, Scheme};

pub(super) type Result<T> = std::result::Result<T, QuantisedProblem>;

/// A tensor of the base.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part<'a> {
    pub(super) location: Location,
    pub(super) info: &'a TensorInfo,
}

impl<'a> Part<'a> {
    pub(super) fn name(&self) -> &'a str {
        &self.info.name
    }

    pub(super) fn dtype(&self) -> Dtype {
        self.info.dtype
    }

    pub(super) fn shape(&self) -> &'a [usize] {
        &self.info.shape
    }

    /// The two dimensions of a matrix.
    pub(super) fn matrix(&self) -> Result<(usize, usize)> {
        match *self.shape() {
            [rows, columns] => Ok((rows, columns)),
            _ => Err(self.wrong_shape("[rows, columns]".to_owned())),
        }
    }

    /// Refuses any dtype but these.
    pub(super) fn expect_dtype(&self, allowed: &[Dtype]) -> Result<()> {
        if allowed.contains(&self.dtype()) {
            return Ok(());
        }
        let names: Vec<&str> = allowed.iter().map(|dtype| dtype.name()).collect();
        let (tensor, found) = (self.name().to_owned(), self.dtype());
        Err(QuantisedProblem::Dtype { tensor, expected: names.join(" or "), found })
    }

    /// Refuses any shape but this.
    pub(super) fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape() == expected {
            return Ok(());
        }
        Err(self.wrong_shape(format!("{expected:?}")))
    }

    /// Refuses any number of elements but this; for tensors whose shape libraries vary.
    pub(super) fn expect_elements(&self, expected: usize) -> Result<()> {
        if self.info.elements() == expected as u64 {
            return Ok(());
        }
        Err(self.wrong_shape(format!("of {expected} elements")))
    }

    /// How this tensor of scales is stored.
    pub(super) fn scale_type(&self) -> Result<ScaleType> {
        self.expect_dtype(&ScaleType::DTYPES)?;
        ScaleType::of(self.dtype()).ok_or_else(|| self.unsupported("this dtype of scales"))
    }

    pub(super) fn wrong_shape(&self, expected: String) -> QuantisedProblem {
        let found = Shape(self.shape().to_vec());
        QuantisedProblem::Shape { tensor: self.name().to_owned(), expected, found }
    }

    pub(super) fn wrong_value(&self, expected: &str, found: String) -> QuantisedProblem {
        let (tensor, expected) = (self.name().to_owned(), expected.to_owned());
        QuantisedProblem::Value { tensor, expected, found }
    }

    pub(super) fn unsupported(&self, what: impl Into<String>) -> QuantisedProblem {
        QuantisedProblem::Unsupported { tensor: self.name().to_owned(), what: what.into() }
    }

    pub(super) fn contradiction(
        &self,
        config: impl Into<String>,
        tensors: impl Into<String>,
    ) -> QuantisedProblem {
        let (config, tensors) = (config.into(), tensors.into());
        QuantisedProblem::Contradiction { tensor: self.name().to_owned(), config, tensors }
    }
}

/// The base, and what has been found in it so far.
pub(super) struct Survey<'a> {
    base: &'a Checkpoint,
    config: Option<Fields<'a>>,
    method: Option<&'a str>,
    rules: Rules,
    /// What a scheme calls the method, for a base without a configuration.
    shown: Option<&'static str>,
    claimed: HashSet<Location>,
    weights: Vec<QuantisedWeight>,
    problems: Vec<QuantisedProblem>,
    mappings: Vec<Option<Mapping>>,
}

impl<'a> Survey<'a> {
    pub(super) fn new(base: &'a Checkpoint) -> Result<Survey<'a>> {
        let config = Fields::of(base)?;
        let method = match &config {
            Some(config) => config.string("quant_method")?,
            None => None,
        };
        Ok(Survey {
            base,
            config,
            method,
            rules: Rules::of(base)?,
            shown: None,
            claimed: HashSet::new(),
            weights: Vec::new(),
            problems: Vec::new(),
            mappings: base.shards().iter().map(|_| None).collect(),
        })
    }

    /// `quantization_config`, if there is one.
    pub(super) fn config(&self) -> Option<Fields<'a>> {
        self.config.clone()
    }

    /// `quant_method`, if the configuration has it.
    pub(super) fn method(&self) -> Option<&'a str> {
        self.method
    }

    /// What the configuration says about FP8, FP4 and plain integers.
    pub(super) fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The dtype that `config.json` says the model computes in: `torch_dtype`, or `dtype` as newer
    /// transformers write it. BF16 where it says nothing that a merge can write.
    pub(super) fn model_dtype(&self) -> Dtype {
        let Some(top) = Fields::top(self.base) else { return Dtype::Bf16 };
        let text = top.text_model();
        let named = |fields: &Fields<'a>| {
            ["dtype", "torch_dtype"].into_iter().find_map(|key| fields.string(key).ok().flatten())
        };
        match named(&top).or_else(|| text.as_ref().and_then(named)) {
            Some("float32") => Dtype::F32,
            Some("float16") => Dtype::F16,
            _ => Dtype::Bf16,
        }
    }

    /// The dtype that codes times these scales are to be in: the scales' own if it is a half
    /// precision, as the libraries have it, and otherwise the model's.
    pub(super) fn dtype_beside(&self, scale: &Part<'_>) -> Dtype {
        match scale.dtype() {
            half @ (Dtype::F16 | Dtype::Bf16) => half,
            _ => self.model_dtype(),
        }
    }

    /// `model_type` of `config.json`.
    pub(super) fn model_type(&self) -> Option<&'a str> {
        Fields::top(self.base)?.string("model_type").ok().flatten()
    }

    /// The tensors not yet claimed whose names end in `suffix`, sorted by name, each with its name
    /// up to there.
    pub(super) fn ending_in(&self, suffix: &str) -> Vec<(&'a str, Part<'a>)> {
        let tensors = self.base.tensors();
        tensors
            .filter(|(location, _)| !self.claimed.contains(location))
            .filter_map(|(location, info)| {
                let stem = info.name.strip_suffix(suffix)?;
                Some((stem, Part { location, info }))
            })
            .collect()
    }

    /// The tensors not yet claimed whose dtype is one of `dtypes`, sorted by name.
    pub(super) fn of_dtype(&self, dtypes: &[Dtype]) -> Vec<Part<'a>> {
        let tensors = self.base.tensors();
        tensors
            .filter(|(location, info)| {
                dtypes.contains(&info.dtype) && !self.claimed.contains(location)
            })
            .map(|(location, info)| Part { location, info })
            .collect()
    }

    /// The tensor called `name`.
    pub(super) fn part(&self, name: &str) -> Option<Part<'a>> {
        let location = self.base.find(name)?;
        Some(Part { location, info: self.base.info(location) })
    }

    /// The tensor called `name`, which `owner` cannot do without.
    pub(super) fn required(&self, owner: &Part<'_>, name: &str) -> Result<Part<'a>> {
        self.part(name).ok_or_else(|| QuantisedProblem::Missing {
            tensor: owner.name().to_owned(),
            missing: name.to_owned(),
        })
    }

    /// The data of a small tensor that describes others: a shape, a table, a JSON text.
    pub(super) fn bytes(&mut self, part: &Part<'_>) -> Result<&[u8]> {
        let file = &self.base.shards()[part.location.shard].file;
        let slot = &mut self.mappings[part.location.shard];
        let mapping = match slot {
            Some(mapping) => mapping,
            None => slot.insert(file.map().map_err(|error| QuantisedProblem::Unreadable {
                path: file.path().to_owned(),
                message: error.to_string(),
            })?),
        };
        let start = (file.header().data_start + part.info.start) as usize;
        Ok(&mapping[start..start + part.info.bytes() as usize])
    }

    /// Marks a tensor as explained, whether or not the explanation turns out sound: a weight that
    /// has a problem is not reported a second time as a leftover.
    pub(super) fn claim(&mut self, part: &Part<'_>) {
        self.claimed.insert(part.location);
    }

    /// Enters a weight, or why it is none. `method` names the scheme where no configuration does.
    pub(super) fn enter(&mut self, method: &'static str, weight: Result<QuantisedWeight>) {
        self.shown.get_or_insert(method);
        match weight {
            Ok(weight) => {
                self.claimed.extend(&weight.parts);
                self.weights.push(weight);
            }
            Err(problem) => self.problems.push(problem),
        }
    }

    /// Enters a problem that belongs to no single weight.
    pub(super) fn object(&mut self, problem: QuantisedProblem) {
        self.problems.push(problem);
    }

    /// What was found, once every scheme has looked.
    pub(super) fn finish(
        mut self,
    ) -> std::result::Result<Option<QuantisedBase>, Vec<QuantisedProblem>> {
        let quantised = self.config().is_some() || !self.weights.is_empty();
        let mut dropped = Vec::new();
        for (location, info) in self.base.tensors() {
            if self.claimed.contains(&location) {
                continue;
            }
            if quantised && is_of_activations(info) {
                dropped.push(location);
            } else if looks_quantised(info) {
                let (tensor, dtype) = (info.name.clone(), info.dtype);
                self.problems.push(QuantisedProblem::Unexplained { tensor, dtype });
            }
        }
        self.weights.sort_by(|a, b| a.name.cmp(&b.name));
        self.refuse_doubles();
        let nothing = self.weights.is_empty() && !self.rules.is_without_weights();
        if quantised && nothing && self.problems.is_empty() {
            let method = self.method.unwrap_or("no quant_method").to_owned();
            self.problems.push(QuantisedProblem::NothingQuantised { method });
        }
        if !self.problems.is_empty() {
            return Err(self.problems);
        }
        if !quantised {
            return Ok(None);
        }
        let method = self.method.or(self.shown).unwrap_or_default().to_owned();
        Ok(Some(QuantisedBase { weights: self.weights, method, dropped }))
    }

    /// A parameter that two weights stand for, or a weight and a plain tensor.
    fn refuse_doubles(&mut self) {
        let described = |weight: &QuantisedWeight| match weight.parts.first() {
            Some(&codes) => format!("`{}`", self.base.info(codes).name),
            None => String::new(),
        };
        let mut problems = Vec::new();
        for pair in self.weights.windows(2) {
            if pair[0].name == pair[1].name {
                problems.push(QuantisedProblem::Twice {
                    parameter: pair[0].name.clone(),
                    first: described(&pair[0]),
                    second: described(&pair[1]),
                });
            }
        }
        for weight in &self.weights {
            let plain = self.base.find(&weight.name);
            if plain.is_some_and(|plain| !weight.parts.contains(&plain)) {
                problems.push(QuantisedProblem::Twice {
                    parameter: weight.name.clone(),
                    first: described(weight),
                    second: format!("`{}`", weight.name),
                });
            }
        }
        self.problems.append(&mut problems);
    }
}

impl QuantisedWeight {
    /// A weight of checked parts, the codes first.
    pub(super) fn new(
        name: String,
        shape: Vec<usize>,
        dtype: Dtype,
        parts: &[Part<'_>],
        scheme: Scheme,
    ) -> QuantisedWeight {
        debug_assert!(parts.len() <= MAX_PARTS, "`{name}` has more parts than any scheme");
        let parts = parts.iter().map(|part| part.location).collect();
        QuantisedWeight { name, shape, parts, dtype, scheme }
    }
}

/// Last parts of the names of tensors that describe activations or the key-value cache.
const OF_ACTIVATIONS: [&str; 14] = [
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "input_g_idx",
    "input_scale_ub",
    "activation_scale",
    "output_scale",
    "output_zero_point",
    "q_scale",
    "k_scale",
    "v_scale",
    "k_zero_point",
    "v_zero_point",
    "kv_scale",
];

fn last_part(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(_, last)| last)
}

fn is_of_activations(info: &TensorInfo) -> bool {
    OF_ACTIVATIONS.contains(&last_part(&info.name))
}

/// Last parts of names that only quantisation gives.
const OF_QUANTISATION: [&str; 19] = [
    "SCB",
    "absmax",
    "bitsandbytes__fp4",
    "bitsandbytes__nf4",
    "g_idx",
    "nested_absmax",
    "nested_quant_map",
    "quant_map",
    "qweight",
    "qzeros",
    "weight_format",
    "weight_g_idx",
    "weight_global_scale",
    "weight_packed",
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "weight_shape",
    "weight_zero_point",
];

/// Whether a full-precision model would not have this tensor: a dtype that only quantisation uses,
/// integers called `weight`, or a name that only quantisation gives. Integer buffers (position
/// ids, masks, counters) are none of these.
fn looks_quantised(info: &TensorInfo) -> bool {
    let last = last_part(&info.name);
    let is_weight = last == "weight" || last.ends_with("_blocks") || last.ends_with("_proj");
    match info.dtype {
        Dtype::F4 | Dtype::F6_E2M3 | Dtype::F6_E3M2 => true,
        Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0 => true,
        Dtype::F8_E4M3Fnuz | Dtype::F8_E5M2Fnuz => true,
        Dtype::U8 | Dtype::I8 | Dtype::I16 | Dtype::U16 | Dtype::I32 | Dtype::U32 if is_weight => {
            true
        }
        _ => OF_QUANTISATION.contains(&last),
    }
}
