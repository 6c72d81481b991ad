//! Writing a file of these formats. Modules are written as the adapter spells them.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::{ADAPTER_METADATA, component};
use crate::codec::{WriteOptions, Written, folding};
use crate::container::safetensors::{header_of, storage_order};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::io::atomic::{AtomicFile, Durability, Overwrite};
use crate::metadata;
use crate::model::{
    Adapter, AdapterFormat, Component, Cores, Decomposed, Form, GainAxis, GainStored, Hadamard,
    Kronecker, KroneckerSide, Layer, LowRank, Scaling, Tucker,
};
use crate::tensor::Tensor;

/// What a format calls the parts of a low-rank change.
struct Suffixes {
    a: &'static str,
    b: &'static str,
    magnitude: &'static str,
    /// Whether alpha is a tensor beside them.
    alpha: bool,
}

const KOHYA: Suffixes = Suffixes {
    a: ".lora_down.weight",
    b: ".lora_up.weight",
    magnitude: ".dora_scale",
    alpha: true,
};

const DIFFUSERS: Suffixes = Suffixes {
    a: ".lora_A.weight",
    b: ".lora_B.weight",
    magnitude: ".lora_magnitude_vector",
    alpha: false,
};

/// Writes an adapter as one file of `format`, complete or not at all. Its modules must be spelled
/// as the format spells them already.
///
/// The scale is exact: it is the quotient of an `.alpha` tensor and the rank, or in diffusers' files
/// what the recorded configuration gives. `written` says what was multiplied into factors.
///
/// # Errors
/// [`Error::Inexpressible`] for what the format has no place for, or for a scale that it cannot
/// give exactly unless that is allowed; [`Error::OutputExists`], [`Error::Io`].
pub fn write(
    adapter: &Adapter,
    format: AdapterFormat,
    destination: &Path,
    options: &WriteOptions,
    overwrite: Overwrite,
    durability: Durability,
) -> Result<Written> {
    let suffixes = match format {
        AdapterFormat::Diffusers => &DIFFUSERS,
        _ => &KOHYA,
    };
    let norms = adapter.components.iter().filter(|one| is_norm(one));
    let norms = norms.map(|one| one.target.module.as_str()).collect();
    let (tensors, written) = (Vec::new(), Written::default());
    let mut output = Output { format, suffixes, options, norms, tensors, written };
    for component in &adapter.components {
        output.component(component).map_err(|what| Error::Inexpressible {
            path: adapter.path.clone(),
            format: format.name(),
            what,
        })?;
    }
    let Output { mut tensors, written, .. } = output;
    tensors.sort_by(|x, y| storage_order((x.dtype, &x.name), (y.dtype, &y.name)));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        let what = format!("two tensors called `{}`", pair[0].name);
        return Err(Error::Inexpressible {
            path: adapter.path.clone(),
            format: format.name(),
            what,
        });
    }
    let mut metadata = adapter.metadata.clone();
    if format == AdapterFormat::Diffusers {
        let config = recorded(adapter)?;
        let text = serde_json::to_string(&config)
            .map_err(|source| Error::Json { path: adapter.path.clone(), source })?;
        metadata.push((ADAPTER_METADATA.to_owned(), text));
    }
    metadata::refresh(&mut metadata, &tensors);
    metadata.push(("format".to_owned(), "pt".to_owned()));
    metadata.sort();
    let header = header_of(&metadata, &tensors);
    let mut parts: Vec<&[u8]> = vec![&header];
    parts.extend(tensors.iter().map(Tensor::bytes));
    let file = AtomicFile::create(destination, overwrite)?;
    file.write_parts(&parts)?;
    adapter.ensure_unchanged()?;
    file.commit(durability)?;
    Ok(written)
}

/// Whether it changes the weight of a norm: a vector, unless the file that it is from calls it
/// otherwise.
fn is_norm(component: &Component) -> bool {
    match &component.form {
        Form::Added { tensor, .. } if component.target.parameter == "weight" => {
            tensor.shape.len() == 1 && !tensor.name.ends_with(".diff")
        }
        _ => false,
    }
}

struct Output<'a> {
    format: AdapterFormat,
    suffixes: &'static Suffixes,
    options: &'a WriteOptions,
    /// Modules whose weight is a vector.
    norms: BTreeSet<&'a str>,
    tensors: Vec<Tensor>,
    written: Written,
}

impl Output<'_> {
    /// # Errors
    /// What the format cannot hold.
    fn component(&mut self, component: &Component) -> Result<(), String> {
        let Component { target, form } = component;
        let module = target.module.as_str();
        let refuse = || Err(format!("a change of `{}` by {}", target.name(), form.method()));
        if module.is_empty() {
            return refuse();
        }
        match (target.parameter.as_str(), form) {
            ("weight", Form::LowRank(form)) => self.low_rank(module, form),
            ("weight", Form::Added { tensor, scale }) => {
                let suffix = if self.norms.contains(module) { ".w_norm" } else { ".diff" };
                self.added(module, suffix, tensor, *scale)
            }
            ("bias", Form::Added { tensor, scale }) => {
                if self.format == AdapterFormat::Diffusers {
                    return self.added(module, ".lora_B.bias", tensor, *scale);
                }
                let norm = self.norms.contains(module) || tensor.name.ends_with(".b_norm");
                let suffix = if norm { ".b_norm" } else { ".diff_b" };
                self.added(module, suffix, tensor, *scale)
            }
            // ComfyUI alone replaces weights.
            ("weight", Form::Replaced(tensor)) if self.format == AdapterFormat::Comfy => {
                self.put(module, ".set_weight", tensor.clone());
                Ok(())
            }
            ("weight", form) if self.format != AdapterFormat::Diffusers => {
                self.lycoris(module, form)?.map_or_else(refuse, Ok)
            }
            _ => refuse(),
        }
    }

    /// LyCORIS' other forms; `None` of one that it has no names for.
    fn lycoris(&mut self, module: &str, form: &Form) -> Result<Option<()>, String> {
        match form {
            Form::Tucker(Tucker { a, b, core, scaling }) => {
                self.put(module, ".lora_down.weight", a.clone());
                self.put(module, ".lora_up.weight", b.clone());
                self.put(module, ".lora_mid.weight", core.clone());
                let rank = a.shape.first().copied().unwrap_or(0);
                self.alpha(module, *scaling, rank, a.dtype)?;
            }
            Form::Hadamard(Hadamard { first, second, scaling, rank }) => {
                self.cores(module, first, [".hada_w1_a", ".hada_w1_b", ".hada_t1"]);
                self.cores(module, second, [".hada_w2_a", ".hada_w2_b", ".hada_t2"]);
                if first.a.shape.first() != Some(rank) {
                    return Err(format!("a scale of `{module}` by another rank than the stored"));
                }
                self.alpha(module, *scaling, *rank, first.a.dtype)?;
            }
            Form::Kronecker(form) => self.kronecker(module, form)?,
            Form::Decomposed(Decomposed { change, magnitude, axis }) => {
                let dimensions = match &**change {
                    Form::LowRank(form) if form.magnitude.is_none() => {
                        self.low_rank(module, form)?;
                        form.a.shape.len()
                    }
                    Form::Tucker(tucker) => {
                        self.lycoris(module, change)?;
                        tucker.core.shape.len()
                    }
                    Form::Hadamard(_) | Form::Kronecker(_) => {
                        self.lycoris(module, change)?;
                        // Whether they are those of a convolution, its factors do not show.
                        magnitude.shape.len()
                    }
                    _ => return Ok(None),
                };
                self.magnitude(module, magnitude, *axis, dimensions);
            }
            Form::Gain(gain) => {
                if gain.stored != GainStored::LessOne {
                    return Err(format!(
                        "the gains of `{module}`: they are stored less one there, which would \
                         round them"
                    ));
                }
                self.put(module, ".weight", gain.gain.clone());
                let flag = i64::from(gain.axis == GainAxis::In).to_le_bytes().to_vec();
                if let Some(flag) = Tensor::new(String::new(), Dtype::I64, Vec::new(), flag) {
                    self.put(module, ".on_input", flag);
                }
            }
            _ => return Ok(None),
        }
        Ok(Some(()))
    }

    fn low_rank(&mut self, module: &str, form: &LowRank) -> Result<(), String> {
        if form.rank_gain.is_some() || !matches!(form.layer, Layer::Linear | Layer::Convolution) {
            let what = match form.layer {
                Layer::Embedding => "of an embedding",
                Layer::Merged => "of a fused projection of loralib",
                _ => "with gains of its ranks (AdaLoRA)",
            };
            return Err(format!("a low-rank change {what}: `{module}`"));
        }
        let (a, b, magnitude) = (self.suffixes.a, self.suffixes.b, self.suffixes.magnitude);
        self.put(module, a, form.a.clone());
        self.put(module, b, form.b.clone());
        if let Some(values) = &form.magnitude {
            if self.suffixes.alpha {
                self.magnitude(module, values, GainAxis::Out, form.a.shape.len());
            } else {
                self.put(module, magnitude, values.clone());
            }
        }
        if self.suffixes.alpha {
            self.alpha(module, form.scaling, form.rank(), form.a.dtype)?;
        }
        Ok(())
    }

    fn kronecker(&mut self, module: &str, form: &Kronecker) -> Result<(), String> {
        let Kronecker { left, right, scaling, rank } = form;
        let mut divides = None;
        for (side, [full, b, a, core]) in [
            (left, [".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_t1"]),
            (right, [".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"]),
        ] {
            match side {
                KroneckerSide::Full(tensor) => self.put(module, full, tensor.clone()),
                KroneckerSide::Product(cores) => {
                    divides = divides.or(cores.a.shape.first().copied());
                    self.cores(module, cores, [b, a, core]);
                }
            }
        }
        let scale = scaling.scale(*rank);
        match (divides, left) {
            (Some(stored), _) => {
                let alpha = Scaling { alpha: scale * stored as f64, ..Scaling::of_rank(stored) };
                let exact = if stored == *rank { *scaling } else { alpha };
                self.alpha(module, exact, stored, Dtype::F32)
            }
            // Loaders take the scale for 1 where both sides are full.
            (None, KroneckerSide::Full(tensor)) => {
                let pair = (scale, 1.0);
                let folded = folding::fold(module, tensor, pair, self.options, &mut self.written)?;
                self.tensors.retain(|it| it.name != format!("{module}.lokr_w1"));
                self.put(module, ".lokr_w1", folded);
                let rank = *rank;
                self.alpha(module, Scaling::of_rank(rank), rank, Dtype::F32)
            }
            (None, KroneckerSide::Product(_)) => Ok(()),
        }
    }

    fn cores(&mut self, module: &str, cores: &Cores, [b, a, core]: [&'static str; 3]) {
        self.put(module, b, cores.b.clone());
        self.put(module, a, cores.a.clone());
        if let Some(tensor) = &cores.core {
            self.put(module, core, tensor.clone());
        }
    }

    /// Magnitudes as LyCORIS shapes them: one dimension for each of the weight's.
    fn magnitude(&mut self, module: &str, values: &Tensor, axis: GainAxis, dimensions: usize) {
        let mut values = values.clone();
        let count = values.elements();
        let ones = std::iter::repeat_n(1, dimensions.saturating_sub(2));
        values.shape = match axis {
            GainAxis::Out => [count, 1].into_iter().chain(ones).collect(),
            GainAxis::In => [1, count].into_iter().chain(ones).collect(),
        };
        self.put(module, ".dora_scale", values);
    }

    fn added(
        &mut self,
        module: &str,
        suffix: &'static str,
        tensor: &Tensor,
        scale: f64,
    ) -> Result<(), String> {
        if self.format == AdapterFormat::Diffusers && suffix != ".lora_B.bias" {
            return Err(format!("a change of `{module}` in full"));
        }
        let folded = folding::fold(module, tensor, (scale, 1.0), self.options, &mut self.written)?;
        self.put(module, suffix, folded);
        Ok(())
    }

    /// The alpha whose quotient by the rank is the scale: in the factors' dtype if that holds it,
    /// as trainers write it, else in f32.
    fn alpha(
        &mut self,
        module: &str,
        scaling: Scaling,
        rank: usize,
        dtype: Dtype,
    ) -> Result<(), String> {
        let scale = scaling.scale(rank);
        let gives = |alpha: f64| alpha / rank as f64 == scale;
        let product = scale * rank as f64;
        let exact = [scaling.alpha, product].into_iter().find(|&alpha| gives(alpha));
        let alpha = exact.unwrap_or(product);
        let held = |dtype: Dtype| -> Option<(Vec<u8>, f64)> {
            Some(match dtype {
                Dtype::F16 => {
                    let value = half::f16::from_f64(alpha);
                    (value.to_le_bytes().to_vec(), f64::from(value))
                }
                Dtype::Bf16 => {
                    let value = half::bf16::from_f64(alpha);
                    (value.to_le_bytes().to_vec(), f64::from(value))
                }
                Dtype::F32 => ((alpha as f32).to_le_bytes().to_vec(), f64::from(alpha as f32)),
                _ => return None,
            })
        };
        let choices = [dtype, Dtype::F32].map(|dtype| held(dtype).map(|held| (dtype, held)));
        let mut choices = choices.into_iter().flatten();
        let fits = |choice: &(Dtype, (Vec<u8>, f64))| gives(choice.1.1);
        let found = choices.clone().find(fits);
        let (dtype, (bytes, value)) = match found.or_else(|| choices.next_back()) {
            Some(choice) => choice,
            None => return Err(format!("the scale {scale} of `{module}`")),
        };
        if !gives(value) {
            if !self.options.allow_lossy {
                return Err(format!(
                    "the scale {scale} of `{module}` exactly: no f32 divided by the rank {rank} is \
                     it"
                ));
            }
            let nearest = value / rank as f64;
            self.written.changes.push(format!(
                "the scale {scale} of `{module}` is rounded to {nearest}, the nearest that an \
                 alpha in f32 gives"
            ));
        }
        if let Some(tensor) = Tensor::new(String::new(), dtype, Vec::new(), bytes) {
            self.put(module, ".alpha", tensor);
        }
        Ok(())
    }

    fn put(&mut self, module: &str, suffix: &str, mut tensor: Tensor) {
        tensor.name = format!("{module}{suffix}");
        self.tensors.push(tensor);
    }
}

/// The configuration of PEFT that diffusers records, with the component before every field: a
/// model gets its layers from it.
fn recorded(adapter: &Adapter) -> Result<Map<String, Value>> {
    let mut parts: std::collections::BTreeMap<String, Vec<Component>> = Default::default();
    for one in &adapter.components {
        let (part, inner) = match component(&one.target.module) {
            Some(_) => one.target.module.split_once('.').unwrap_or(("", &one.target.module)),
            None => ("", one.target.module.as_str()),
        };
        let mut inside = one.clone();
        inside.target.module = inner.to_owned();
        parts.entry(part.to_owned()).or_default().push(inside);
    }
    let mut fields = Map::new();
    for (part, components) in parts {
        let mut alone = Adapter::new(adapter.path.clone(), components, adapter.base.clone());
        alone.fan_in_fan_out = adapter.fan_in_fan_out;
        for (field, value) in crate::codec::peft::described(&alone)? {
            let key = if part.is_empty() { field } else { format!("{part}.{field}") };
            fields.insert(key, value);
        }
    }
    Ok(fields)
}
