//! File → [`Adapter`]. Every tensor and every module the configuration names must be accounted
//! for, and the `.alpha` tensors must agree with the configuration.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::components::{self, Factored, Role};
use super::config::{Config, FingerprintConfig, ScalingConfig};
use super::forms::{self, Facts, Label, Roles};
use super::writer::{hexadecimal, naive_alpha};
use super::{CONFIG_KEY, FEATURES, shapes, validate};
use crate::container::safetensors::{Header, SafetensorsFile};
use crate::dtype::Dtype;
use crate::error::{AdapterProblem, DetectProblem, Error, Result, Shape, Unsupported};
use crate::factors::{self, FactorTensors};
use crate::fingerprint::{self, BaseIdentity, Fingerprint, TargetSamples};
use crate::json;
use crate::limits;
use crate::model::{
    Adapter, AdapterFormat, Component, Decomposed, Form, GainAxis, Layer, LowRank, Scaling,
    ScalingRule, SourceConfig, Target,
};
use crate::tensor::{self, Tensor};

/// Whether a safetensors file is of our format.
pub fn is_native(header: &Header) -> bool {
    header.metadata_value(CONFIG_KEY).is_some()
}

/// Reads an adapter of our format.
///
/// # Errors
/// [`Error::Version`], [`Error::Unsupported`] for a feature the file requires and this reader
/// does not know, [`Error::Adapter`] for tensors that do not form the components described.
pub fn read(file: &SafetensorsFile) -> Result<Adapter> {
    let path = file.path();
    let config = read_config(path, file.header())?;
    let mut overrides = HashMap::new();
    for group in &config.overrides {
        let scaling = scaling(path, "overrides", &group.scaling)?;
        for module in &group.modules {
            if overrides.insert(module.clone(), scaling).is_some() {
                let found = Value::from(module.as_str());
                return Err(Error::config(path, "overrides", "one entry per module", &found));
            }
        }
    }

    let facts = facts(path, &config)?;
    let mut problems = Vec::new();
    let mut targets: BTreeMap<Target, Parts> = BTreeMap::new();
    let mut shared: BTreeMap<usize, Roles> = BTreeMap::new();
    for tensor in tensor::map_all(file)? {
        if let Some((number, factor)) = components::shared_factor(&tensor.name) {
            shared.entry(number).or_default().insert(factor, tensor);
            continue;
        }
        match Role::of(&tensor.name) {
            Some((target, role)) => drop(targets.entry(target).or_default().insert(role, tensor)),
            None => problems.push(AdapterProblem::UnusedTensor { tensor: tensor.name }),
        }
    }
    let scaled = targets.values().any(|parts| parts.keys().any(|role| role.is_factor()));
    let default = default_scaling(path, &config, scaled)?;
    let (components, used) = (Vec::new(), BTreeSet::new());
    let mut reader = Reader { default, overrides, facts, shared, used, components, problems };
    for (target, parts) in targets {
        reader.build(&target, parts);
    }
    let mut components = reader.finish(path)?;
    components.sort_by(Component::compare);
    let sorted: Vec<&Component> = components.iter().collect();
    let problems = components::clashes(&sorted);
    if !problems.is_empty() {
        return Err(Error::Adapter { path: path.to_owned(), problems });
    }
    if components.is_empty() {
        let problem = DetectProblem::NotAnAdapter { tensors: 0, first: None };
        return Err(Error::Unrecognised { path: path.to_owned(), problem });
    }
    check_used(path, &config, &sorted)?;

    let own = ["format", CONFIG_KEY];
    let metadata = &file.header().metadata;
    Ok(Adapter {
        path: path.to_owned(),
        format: AdapterFormat::Native,
        components,
        base: BaseIdentity {
            name: config.base.name,
            revision: config.base.revision,
            fingerprint: match config.base.fingerprint {
                Some(fingerprint) => read_fingerprint(path, fingerprint)?,
                None => None,
            },
        },
        fan_in_fan_out: config.fan_in_fan_out,
        names: match config.names {
            Some(name) => Some(naming(path, &name)?),
            None => None,
        },
        metadata: metadata.iter().filter(|entry| !own.contains(&&*entry.0)).cloned().collect(),
        source: match config.source {
            Some(source) => Some(SourceConfig {
                format: configured(path, &source.format)?,
                config: source.config,
            }),
            None => None,
        },
        extensions: config.extensions,
        notes: Vec::new(),
    })
}

/// The tensors of one target, by role.
type Parts = BTreeMap<Role, Tensor>;

/// What is gathered while tensors become components.
struct Reader {
    /// The scaling of components that no override names.
    default: Scaling,
    /// Those of the others, by what overrides call them; what is left names nothing.
    overrides: HashMap<String, Scaling>,
    facts: BTreeMap<Label, FormFacts>,
    /// The factors that components share, by number.
    shared: BTreeMap<usize, Roles>,
    /// Which of them a component used.
    used: BTreeSet<usize>,
    components: Vec<Component>,
    problems: Vec<AdapterProblem>,
}

/// What the configuration says of the components of one form.
#[derive(Default)]
struct FormFacts {
    /// Of those that no group names.
    default: Option<Facts>,
    /// Of the others, by what groups call them; what is left names nothing.
    named: HashMap<String, Facts>,
    /// Whether there is any component.
    used: bool,
}

impl Reader {
    /// The components of one target.
    fn build(&mut self, target: &Target, mut parts: Parts) {
        for [a, b] in Role::FACTORS {
            if parts.contains_key(&a) || parts.contains_key(&b) {
                self.low_rank(target, [a, b], &mut parts);
            }
        }
        if let Some(tensor) = parts.remove(&Role::Value) {
            self.push(target, Form::Replaced(tensor));
        }
        if let Some(tensor) = parts.remove(&Role::Base) {
            self.push(target, Form::Base(tensor));
        }
        if let Some((rows, indices)) = self.pair(target, [Role::Rows, Role::Indices], &mut parts) {
            self.rows(target, rows, &indices);
        }
        if let Some((tensor, scale)) = self.pair(target, [Role::Added, Role::Scale], &mut parts) {
            self.added(target, tensor, scale);
        }
        let mut forms: BTreeMap<Label, Roles> = BTreeMap::new();
        for (role, tensor) in parts {
            match role {
                Role::Of(label, role) => {
                    drop(forms.entry(label).or_default().insert(role, tensor));
                }
                _ => self.unused(tensor),
            }
        }
        for (label, roles) in forms {
            self.form(target, label, roles);
        }
    }

    /// A change by a form that has roles of its own.
    fn form(&mut self, target: &Target, label: Label, mut roles: Roles) {
        let facts = match self.facts.get_mut(&label) {
            Some(known) => {
                known.used = true;
                known.named.remove(&components::short_name(target)).or(known.default.clone())
            }
            None => (!forms::has_facts(label.form)).then(Facts::default),
        };
        let parameter = target.name();
        let Some(facts) = facts else {
            let what = "facts of its form";
            self.problems.push(AdapterProblem::NoFacts { parameter, what });
            return;
        };
        if let Some(number) = facts.factors {
            let Some(factors) = self.shared.get(&number) else {
                let what = "factors of the number that its facts give";
                self.problems.push(AdapterProblem::NoFacts { parameter, what });
                return;
            };
            roles.extend(factors.iter().map(|(&factor, tensor)| (factor, tensor.clone())));
            self.used.insert(number);
        }
        let name = |role: &str| components::form_tensor(target, label, facts.factors, role);
        let tensors: Vec<_> = roles.iter().map(|(&role, tensor)| (role, tensor)).collect();
        let mut problems = shapes::check(&parameter, label.form, &tensors, &name);
        if problems.is_empty()
            && let Some(form) = forms::put_together(target, label, roles, &facts)
        {
            problems.extend(forms::check(target, &form, &name));
            self.push(target, form);
        }
        self.problems.extend(problems);
    }

    /// The components, if the configuration and the file name nothing else.
    fn finish(mut self, path: &Path) -> Result<Vec<Component>> {
        let mut unknown: Vec<String> = self.overrides.into_keys().collect();
        for (label, facts) in self.facts {
            if !facts.used {
                let expected = "groups of forms that the file has";
                return Err(Error::config(path, "forms", expected, &label.text().into()));
            }
            unknown.extend(facts.named.into_keys());
        }
        unknown.sort_unstable();
        let unknown = unknown.into_iter().map(|module| AdapterProblem::MissingModule { module });
        self.problems.extend(unknown);
        self.shared.retain(|number, _| !self.used.contains(number));
        let unused = self.shared.into_values().flat_map(Roles::into_values);
        self.problems
            .extend(unused.map(|tensor| AdapterProblem::UnusedTensor { tensor: tensor.name }));
        if self.problems.is_empty() {
            return Ok(self.components);
        }
        Err(Error::Adapter { path: path.to_owned(), problems: self.problems })
    }

    fn low_rank(&mut self, target: &Target, [a, b]: [Role; 2], parts: &mut Parts) {
        let found = FactorTensors { a: parts.remove(&a), b: parts.remove(&b) };
        let layer = match &found.a {
            _ if a == Role::EmbeddingA => Layer::Embedding,
            _ if a == Role::MergedA => Layer::Merged,
            Some(a) => components::layer_of(a),
            None => Layer::Linear,
        };
        let is_plain = a == Role::PlainA;
        let alpha = if is_plain { parts.remove(&Role::Alpha) } else { None };
        let is_bare = is_plain || layer == Layer::Merged;
        let mut take = |role| if is_bare { None } else { parts.remove(&role) };
        let rank_gain = take(Role::RankGain);
        let (magnitude, in_magnitude) = (take(Role::Magnitude), take(Role::InMagnitude));
        let name = components::short_name(target);
        let scaling = self.overrides.remove(&name).unwrap_or(self.default);
        let names = (a.name(target), b.name(target));
        let built = factors::of_layer(&name, layer, found, names, scaling, &mut self.problems);
        let Some(mut low_rank) = built else { return };
        if is_plain {
            check_alpha(target, alpha, &low_rank, &mut self.problems);
        }
        low_rank.rank_gain = rank_gain;
        let form = decomposed(low_rank, magnitude, in_magnitude);
        let Some(factored) = form.as_ref().and_then(Factored::of) else {
            let (first, second) = (Role::Magnitude.name(target), Role::InMagnitude.name(target));
            self.problems.push(AdapterProblem::DuplicateFactor { first, second });
            return;
        };
        let gains = factored.gains();
        let problems = gains
            .filter_map(|(role, gain)| validate::gain(role, &gain.name, gain, factored.low_rank));
        self.problems.extend(problems);
        if factored.roles(target) != [a, b] {
            // F10: these names are for what other loaders must not apply.
            let tensor = a.name(target);
            self.problems.push(AdapterProblem::NeedlessName { tensor });
            return;
        }
        if let Some(form) = form {
            self.push(target, form);
        }
    }

    fn rows(&mut self, target: &Target, rows: Tensor, indices: &Tensor) {
        self.problems.extend(validate::rows(&rows.name, &rows));
        let words = indices.bytes().chunks_exact(8);
        let numbers: Option<Vec<u64>> = (indices.dtype == Dtype::I64 && indices.shape.len() == 1)
            .then(|| words.map(|word| word.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))))
            .map(Iterator::collect);
        let count = rows.shape.first().copied().unwrap_or(0);
        let Some(numbers) = numbers else {
            let tensor = indices.name.clone();
            self.problems.push(AdapterProblem::RowIndices { tensor });
            return;
        };
        self.problems.extend(validate::indices(&indices.name, &numbers, count));
        self.push(target, Form::Rows { indices: numbers, rows });
    }

    fn added(&mut self, target: &Target, tensor: Tensor, scale: Tensor) {
        self.problems.extend(validate::float(&tensor.name, &tensor));
        match (scale.dtype, &*scale.shape, <[u8; 8]>::try_from(scale.bytes())) {
            (Dtype::F64, [], Ok(bytes)) => {
                let scale = f64::from_le_bytes(bytes);
                self.problems.extend(validate::scale(&target.name(), scale));
                self.push(target, Form::Added { tensor, scale });
            }
            _ => {
                let (dtype, shape) = (scale.dtype, Shape(scale.shape));
                let tensor = scale.name;
                self.problems.push(AdapterProblem::ScaleTensor { tensor, dtype, shape });
            }
        }
    }

    /// Two tensors of which neither means anything alone.
    fn pair(
        &mut self,
        target: &Target,
        roles: [Role; 2],
        parts: &mut Parts,
    ) -> Option<(Tensor, Tensor)> {
        let [present, missing] = match roles.map(|role| parts.remove(&role)) {
            [Some(first), Some(second)] => return Some((first, second)),
            [None, None] => return None,
            [Some(_), None] => roles,
            [None, Some(_)] => [roles[1], roles[0]],
        };
        let [present, missing] = [present, missing].map(|role| role.name(target));
        self.problems.push(AdapterProblem::MissingFactor { present, missing });
        None
    }

    fn push(&mut self, target: &Target, form: Form) {
        self.components.push(Component { target: target.clone(), form });
    }

    fn unused(&mut self, tensor: Tensor) {
        self.problems.push(AdapterProblem::UnusedTensor { tensor: tensor.name });
    }
}

/// A low-rank change with its magnitudes, of which it may have one.
fn decomposed(
    mut low_rank: LowRank,
    magnitude: Option<Tensor>,
    in_magnitude: Option<Tensor>,
) -> Option<Form> {
    match (magnitude, in_magnitude) {
        (Some(_), Some(_)) => None,
        (None, Some(magnitude)) => {
            let change = Box::new(Form::LowRank(low_rank));
            Some(Form::Decomposed(Decomposed { change, magnitude, axis: GainAxis::In }))
        }
        (magnitude, None) => {
            low_rank.magnitude = magnitude;
            Some(Form::LowRank(low_rank))
        }
    }
}

/// What the configuration says of forms (F32).
fn facts(path: &Path, config: &Config) -> Result<BTreeMap<Label, FormFacts>> {
    let wrong = |expected, found: &str| Error::config(path, "forms", expected, &found.into());
    let mut all: BTreeMap<Label, FormFacts> = BTreeMap::new();
    for group in &config.forms {
        let label = Label::of(&group.form).filter(|label| forms::has_facts(label.form));
        let label = label.ok_or_else(|| wrong("groups of forms that have facts", &group.form))?;
        let facts = Facts::of(path, label, &group.facts)?;
        let known = all.entry(label).or_default();
        let Some(modules) = &group.modules else {
            if known.default.replace(facts).is_some() {
                return Err(wrong("one group without modules for each form", &group.form));
            }
            continue;
        };
        for module in modules {
            if known.named.insert(module.clone(), facts.clone()).is_some() {
                return Err(wrong("one group per form for each module", module));
            }
        }
    }
    match all.iter().find(|known| known.1.default.is_none()) {
        Some((label, _)) => Err(wrong("one group without modules for each form", &label.text())),
        None => Ok(all),
    }
}

/// The format whose spelling modules have (F53).
fn naming(path: &Path, name: &str) -> Result<AdapterFormat> {
    let known = AdapterFormat::from_name(name).filter(|format| format.has_naming());
    let expected = "a format that spells modules in its own way, such as `kohya`";
    known.ok_or_else(|| Error::config(path, "names", expected, &name.into()))
}

/// The format that the adapter first came from (F15).
fn configured(path: &Path, name: &str) -> Result<AdapterFormat> {
    let known = AdapterFormat::from_name(name).filter(|format| format.has_configuration());
    let expected = "a format that has a configuration, such as `peft`";
    known.ok_or_else(|| Error::config(path, "source.format", expected, &name.into()))
}

/// The file must require exactly what it uses (F20).
fn check_used(path: &Path, config: &Config, components: &[&Component]) -> Result<()> {
    let used = components::features(components);
    if config.requires.iter().eq(used.iter()) {
        return Ok(());
    }
    let found = Value::from(config.requires.as_slice());
    Err(Error::config(path, "requires", "the features that the file uses, sorted", &found))
}

/// The default scaling, which is there if anything is scaled (F12).
fn default_scaling(path: &Path, config: &Config, scaled: bool) -> Result<Scaling> {
    match &config.scaling {
        Some(default) if scaled => scaling(path, "scaling", default),
        Some(needless) => {
            let found = Value::from(needless.rule.as_str());
            Err(Error::config(path, "scaling", "absent where no component has factors", &found))
        }
        None if scaled => {
            let expected = "there, as a component has factors";
            Err(Error::config(path, "scaling", expected, &Value::Null))
        }
        // Of no component.
        None => Ok(Scaling { alpha: 1.0, rule: ScalingRule::Direct }),
    }
}

/// Whether this is `1.<minor>`, with a tag behind it or without.
fn is_known(version: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let plain = version.split_once('-').map_or(version, |(plain, _)| plain);
    plain.split_once('.').is_some_and(|(major, minor)| major == "1" && number(minor))
}

/// The configuration, checked for version and required features before anything is made of it.
fn read_config(path: &Path, header: &Header) -> Result<Config> {
    let text = header.metadata_value(CONFIG_KEY).unwrap_or_default();
    let malformed = |source| Error::Configuration { path: path.to_owned(), source };
    if text.len() as u64 > limits::CONFIG_BYTES {
        let (bytes, limit) = (text.len(), limits::CONFIG_BYTES);
        let problem = format_args!("{bytes} bytes, the limit is {limit}");
        return Err(malformed(serde::de::Error::custom(problem)));
    }
    let mut value = json::parse(path, text.as_bytes()).map_err(|error| match error {
        Error::Json { source, .. } => malformed(source),
        other => other,
    })?;
    let Some(members) = value.as_object_mut() else {
        return Err(malformed(serde::de::Error::custom("it must be an object")));
    };
    // As if it were absent.
    members.retain(|_, member| !member.is_null());
    let version = value.get("version").and_then(Value::as_str).unwrap_or("none");
    let known = is_known(version);
    if !known {
        return Err(Error::Version { path: path.to_owned(), found: version.to_owned() });
    }
    let config: Config = serde_json::from_value(value).map_err(malformed)?;
    let features: Vec<Unsupported> = config
        .requires
        .iter()
        .filter(|feature| !FEATURES.contains(&feature.as_str()))
        .map(|feature| Unsupported {
            feature: format!("`{feature}`"),
            reason: "the file requires this feature of its reader; a newer version may know it"
                .to_owned(),
        })
        .collect();
    if !features.is_empty() {
        return Err(Error::Unsupported { path: path.to_owned(), features });
    }
    check_members(path, header, &config)?;
    Ok(config)
}

/// What the types of the members leave open.
fn check_members(path: &Path, header: &Header, config: &Config) -> Result<()> {
    let found = header.metadata_value("format").map_or(Value::Null, Value::from);
    if found != "pt" {
        return Err(Error::config(path, "format", "`pt` in `__metadata__`", &found));
    }
    let digits = config.digest.strip_prefix("sha256:").unwrap_or_default();
    if digits.len() != 64 || !digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        let expected = "`sha256:` and 64 lower-case hexadecimal digits";
        return Err(Error::config(path, "digest", expected, &config.digest.as_str().into()));
    }
    for (name, extension) in &config.extensions {
        let field = format!("extensions.{name}");
        let (vendor, rest) = name.split_once('.').unwrap_or_default();
        if vendor.is_empty() || rest.is_empty() {
            let expected = "named after its owner, `vendor.name`";
            return Err(Error::config(path, &field, expected, &name.as_str().into()));
        }
        let copy = extension.get("copy").and_then(Value::as_str);
        let known = matches!(copy, Some("safe" | "unsafe")) && extension.get("value").is_some();
        if !known || extension.as_object().is_none_or(|members| members.len() != 2) {
            let expected = "an object of `copy` (`safe` or `unsafe`) and `value`";
            return Err(Error::config(path, &field, expected, extension));
        }
    }
    Ok(())
}

fn scaling(path: &Path, field: &str, config: &ScalingConfig) -> Result<Scaling> {
    let Some(rule) = ScalingRule::from_name(&config.rule) else {
        let expected = "`alpha/rank`, `alpha/sqrt-rank` or `direct`";
        let found = Value::from(config.rule.as_str());
        return Err(Error::config(path, &format!("{field}.rule"), expected, &found));
    };
    Ok(Scaling { alpha: config.alpha, rule })
}

/// The `.alpha` tensor must be there, an f32 scalar, and say what the configuration says: a
/// loader that reads only the tensors must not compute another scale.
fn check_alpha(
    target: &Target,
    tensor: Option<Tensor>,
    factors: &LowRank,
    problems: &mut Vec<AdapterProblem>,
) {
    let (name, module) = (Role::Alpha.name(target), &target.module);
    let Some(tensor) = tensor else {
        problems.push(AdapterProblem::MissingTensor { tensor: name });
        return;
    };
    let expected = naive_alpha(factors.scaling, factors.rank());
    if !expected.is_finite() {
        let value = factors.scale() * factors.rank() as f64;
        problems.push(AdapterProblem::AlphaRange { module: module.clone(), value });
        return;
    }
    let stored = match tensor.to_f32().as_deref() {
        Some(&[value]) if tensor.dtype == Dtype::F32 && tensor.shape.is_empty() => value,
        _ => {
            let (dtype, shape) = (tensor.dtype, Shape(tensor.shape));
            problems.push(AdapterProblem::AlphaTensor { tensor: name, dtype, shape });
            return;
        }
    };
    if stored.to_bits() != expected.to_bits() {
        let module = module.clone();
        problems.push(AdapterProblem::AlphaMismatch { module, tensor: name, stored, expected });
    }
}

/// An unknown algorithm is no error: the identity is then unknown.
fn read_fingerprint(path: &Path, config: Value) -> Result<Option<Fingerprint>> {
    match config.get("algorithm").and_then(Value::as_str) {
        Some(fingerprint::ALGORITHM) => {}
        Some(_) => return Ok(None),
        None => {
            let expected = "an object with an algorithm";
            return Err(Error::config(path, "base.fingerprint", expected, &config));
        }
    }
    let config: FingerprintConfig = serde_json::from_value(config)
        .map_err(|source| Error::Configuration { path: path.to_owned(), source })?;
    if config.targets.len() > fingerprint::TARGETS {
        let found = Value::from(config.targets.len());
        let expected = "at most 64 targets";
        return Err(Error::config(path, "base.fingerprint.targets", expected, &found));
    }
    let mut targets = Vec::with_capacity(config.targets.len());
    for target in config.targets {
        let field = format!("base.fingerprint.{}", target.target);
        let invalid = |expected, found: &str| Error::config(path, &field, expected, &found.into());
        let dtype = target.dtype.parse().ok().filter(|dtype: &Dtype| dtype.is_merge_float());
        let dtype = dtype.ok_or_else(|| invalid("of dtype F32, F16 or BF16", &target.dtype))?;
        let samples = if target.shape.contains(&0) { 0 } else { fingerprint::SAMPLES };
        let bytes = BASE64
            .decode(&target.values)
            .ok()
            .filter(|bytes| bytes.len() == samples * 4)
            .ok_or_else(|| invalid("base64 of 16 f32 values", &target.values))?;
        let words = bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
        targets.push(TargetSamples {
            target: target.target,
            dtype,
            shape: target.shape,
            values: words.map(f32::from_le_bytes).collect(),
        });
    }
    Ok(Some(Fingerprint { targets }))
}

/// What a check of the recorded digest found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DigestVerdict {
    /// The data is what was written.
    Intact {
        /// The digest, with its algorithm: `sha256:…`.
        digest: String,
    },
    /// The data changed since it was written.
    Damaged {
        /// The digest the file records.
        recorded: String,
        /// The digest of its data.
        actual: String,
    },
}

/// Compares the recorded digest with that of the data: all bytes after the header.
///
/// # Errors
/// [`Error::Io`], or what [`read`] finds wrong with the configuration.
pub fn verify_digest(file: &SafetensorsFile) -> Result<DigestVerdict> {
    let recorded = read_config(file.path(), file.header())?.digest;
    let mapping = file.map()?;
    let data = &mapping[file.header().data_start as usize..];
    let actual = format!("sha256:{}", hexadecimal(&Sha256::digest(data)));
    Ok(if recorded == actual {
        DigestVerdict::Intact { digest: recorded }
    } else {
        DigestVerdict::Damaged { recorded, actual }
    })
}
