//! From a base model's own parameters: which architecture it is, and where each module is.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::catalogue::{Architecture, Catalogue, Resolved};
use super::module::{Module, Part};
use super::spelling::Side;
use super::{NamingProblem, SpelledPiece};

/// Rows of a parameter of the base, in the terms of [`SpelledPiece`]: `name` is the parameter.
pub type BasePiece = SpelledPiece;

/// How a file names the parameters of one component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// What comes before each parameter.
    pub prefix: &'static str,
    /// Whose names follow.
    pub side: Side,
}

impl Layout {
    fn parameter(&self, module: &Module) -> String {
        match self.side {
            Side::Diffusers => format!("{}{}.weight", self.prefix, module.diffusers),
            Side::Original => format!("{}{}", self.prefix, module.original),
        }
    }
}

/// A catalogue and where its components are in a base.
#[derive(Clone, Debug)]
pub struct Linked {
    catalogue: Catalogue,
    layouts: Vec<(Part, Layout)>,
    /// Optional modules that the base does without.
    absent: BTreeSet<usize>,
}

/// The layouts that a component is stored in: single files of the original kind, ComfyUI's, a
/// pipeline saved as one dictionary, and a component's own file.
fn layouts(part: Part) -> Vec<Layout> {
    let (original, diffusers): (&[&'static str], &[&'static str]) = match part {
        Part::Denoiser => {
            (&["model.diffusion_model.", "diffusion_model.", ""], &["", "unet.", "transformer."])
        }
        Part::ClipL => (
            &[],
            &[
                "cond_stage_model.transformer.",
                "conditioner.embedders.0.transformer.",
                "text_encoders.clip_l.transformer.",
                "text_encoder.",
                "",
            ],
        ),
        Part::ClipG => (
            &["conditioner.embedders.1.model."],
            &["text_encoders.clip_g.transformer.", "text_encoder_2.", ""],
        ),
        Part::ClipH => {
            (&["cond_stage_model.model.", "conditioner.embedders.0.model."], &["text_encoder.", ""])
        }
        Part::T5 => {
            (&[], &["text_encoders.t5xxl.transformer.", "text_encoder_2.", "text_encoder_3.", ""])
        }
    };
    let of = |side| move |prefix: &&'static str| Layout { prefix, side };
    let original = original.iter().map(of(Side::Original));
    original.chain(diffusers.iter().map(of(Side::Diffusers))).collect()
}

/// The layers that read the latent. Inpainting and control models differ in its channels alone.
const INPUTS: [&str; 6] =
    ["conv_in", "x_embedder", "img_in", "patch_embedding", "pos_embed.proj", "all_x_embedder.2-1"];

impl Catalogue {
    /// The architecture whose denoiser a base has, and where it has each component. `base` is the
    /// base's parameters with their shapes (what a quantised weight decodes to, not what it is
    /// stored as). `None` if it has no denoiser listed here; for a text encoder by itself use
    /// [`Catalogue::link`], as several architectures have the same.
    ///
    /// # Errors
    /// [`NamingProblem::SeveralArchitectures`], [`NamingProblem::SeveralLayouts`].
    pub fn of_base(base: &BTreeMap<String, Vec<usize>>) -> Result<Option<Linked>, NamingProblem> {
        let mut found = Vec::new();
        for architecture in Architecture::ALL {
            let linked = Catalogue::of(architecture).link(base)?;
            if linked.layout(Part::Denoiser).is_some() {
                found.push(linked);
            }
        }
        if found.len() > 1 {
            let name = |linked: &Linked| linked.catalogue.architecture().name().to_owned();
            let candidates = found.iter().map(name).collect();
            return Err(NamingProblem::SeveralArchitectures { candidates });
        }
        Ok(found.pop())
    }

    /// Finds the components of a base that is known to be of this architecture. A component counts
    /// as there when all its modules are, in the catalogue's shapes.
    ///
    /// # Errors
    /// [`NamingProblem::SeveralLayouts`] if one is there twice.
    pub fn link(self, base: &BTreeMap<String, Vec<usize>>) -> Result<Linked, NamingProblem> {
        let mut found = Vec::new();
        for part in self.parts() {
            let mut fitting: Vec<Layout> = Vec::new();
            for layout in layouts(part).into_iter().filter(|each| self.fits(part, each, base)) {
                // Where both sides have the same names, two layouts are one.
                if !fitting.iter().any(|known| self.same(part, known, &layout)) {
                    fitting.push(layout);
                }
            }
            match fitting.as_slice() {
                [] => {}
                [layout] => found.push((part, *layout)),
                several => {
                    return Err(NamingProblem::SeveralLayouts { part, found: several.len() });
                }
            }
        }
        let missing = |(index, module): (usize, &Module)| {
            let layout = found.iter().find(|(part, _)| *part == module.part)?.1;
            (!base.contains_key(&layout.parameter(module))).then_some(index)
        };
        let absent = self.modules().iter().enumerate().filter_map(missing).collect();
        Ok(Linked { catalogue: self, layouts: found, absent })
    }

    fn fits(&self, part: Part, layout: &Layout, base: &BTreeMap<String, Vec<usize>>) -> bool {
        let mut of_part =
            self.modules().iter().enumerate().filter(|(_, module)| module.part == part);
        of_part.all(|(index, module)| match base.get(&layout.parameter(module)) {
            None => module.optional,
            Some(stored) => self.shape_fits(index, module, layout.side, stored),
        })
    }

    fn shape_fits(&self, index: usize, module: &Module, side: Side, stored: &[usize]) -> bool {
        let whole = self.whole(index).and_then(|resolved| {
            self.rows(&resolved, side, |_, total| Some((String::new(), total)))
        });
        let Some(rows) = whole.and_then(|pieces| pieces.first().map(|piece| piece.total)) else {
            return false;
        };
        let input = INPUTS.contains(&module.diffusers.as_str());
        stored.len() == module.shape.len()
            && stored.first() == Some(&rows)
            && stored
                .iter()
                .zip(&module.shape)
                .enumerate()
                .skip(1)
                .all(|(dimension, (stored, known))| stored == known || (input && dimension == 1))
    }

    fn same(&self, part: Part, one: &Layout, two: &Layout) -> bool {
        let mut of_part = self.modules().iter().filter(|module| module.part == part);
        of_part.all(|module| one.parameter(module) == two.parameter(module))
    }
}

impl Linked {
    /// The modules.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// How the base names the parameters of a component; `None` if it does not have it.
    pub fn layout(&self, part: Part) -> Option<Layout> {
        self.layouts.iter().find(|(of, _)| *of == part).map(|(_, layout)| *layout)
    }

    /// The rows of the base's parameters that are what was resolved, in its order. They cover it,
    /// none twice.
    ///
    /// # Errors
    /// [`NamingProblem::NoPart`], [`NamingProblem::NoParameter`].
    pub fn pieces(&self, resolved: &Resolved) -> Result<Vec<BasePiece>, NamingProblem> {
        let part = resolved.part;
        let layout = self.layout(part).ok_or(NamingProblem::NoPart { part })?;
        for piece in &resolved.pieces {
            if self.absent.contains(&piece.module) {
                let module = self.catalogue.modules().get(piece.module);
                let parameter = module.map_or_else(String::new, |each| layout.parameter(each));
                return Err(NamingProblem::NoParameter { parameter });
            }
        }
        self.catalogue
            .rows(resolved, layout.side, |module, total| Some((layout.parameter(module), total)))
            .ok_or(NamingProblem::NoPart { part })
    }

    /// The bias beside a weight that [`Linked::pieces`] named: `….weight` → `….bias`,
    /// `….in_proj_weight` → `….in_proj_bias`. Rows are the same. `None` of a parameter that has no
    /// such name; whether the base has the bias is for the caller to see.
    pub fn bias_of(parameter: &str) -> Option<String> {
        let stem = parameter.strip_suffix("weight")?;
        let joined = stem.ends_with('.') || stem.ends_with("in_proj_");
        joined.then(|| format!("{stem}bias"))
    }
}

/// The names that any base's own parameters give its modules, whatever its architecture.
///
/// ComfyUI and LyCORIS spell a module by its path in the model, flattened or not, behind a prefix;
/// so does PEFT for language models.
#[derive(Clone, Debug, Default)]
pub struct BaseNames {
    /// Path of a module (or parameter that is not a weight) → its parameters.
    paths: HashMap<String, Vec<String>>,
    /// The same with underscores for dots.
    flat: HashMap<String, Vec<String>>,
}

/// What a base may have before its own paths, and an adapter not.
const CONTAINERS: [&str; 2] = ["model.diffusion_model.", "diffusion_model."];
/// Parameters remembered of those that share a spelling: any two make it ambiguous.
const CANDIDATES: usize = 8;
/// Prefixes before a path.
const DOTTED: [&str; 6] =
    ["base_model.model.", "diffusion_model.", "transformer.", "unet.", "text_encoders.", ""];
/// Prefixes before a flattened path.
const FLATTENED: [&str; 4] = ["lora_unet_", "lora_transformer_", "lycoris_", "lora_te_"];

impl BaseNames {
    /// The names of a base's parameters, which differ from each other.
    pub fn new<'a>(parameters: impl IntoIterator<Item = &'a str>) -> BaseNames {
        let mut names = BaseNames::default();
        for parameter in parameters {
            let path = parameter.strip_suffix(".weight").unwrap_or(parameter);
            names.insert(path, parameter);
            for container in CONTAINERS {
                if let Some(inner) = path.strip_prefix(container) {
                    names.insert(inner, parameter);
                }
            }
        }
        names
    }

    fn insert(&mut self, path: &str, parameter: &str) {
        let add = |table: &mut HashMap<String, Vec<String>>, path: String| {
            let known = table.entry(path).or_default();
            if known.len() < CANDIDATES {
                known.push(parameter.to_owned());
            }
        };
        add(&mut self.paths, path.to_owned());
        add(&mut self.flat, path.replace('.', "_"));
    }

    /// The parameter that a name means.
    ///
    /// # Errors
    /// [`NamingProblem::Unknown`]; [`NamingProblem::Ambiguous`] with the parameters.
    pub fn resolve(&self, name: &str) -> Result<&str, NamingProblem> {
        let dotted = DOTTED.iter().map(|prefix| (prefix, &self.paths));
        let flattened = FLATTENED.iter().map(|prefix| (prefix, &self.flat));
        let mut found: Vec<&str> = Vec::new();
        for (prefix, table) in dotted.chain(flattened) {
            let path = name.strip_prefix(prefix);
            for parameter in path.and_then(|path| table.get(path)).into_iter().flatten() {
                if !found.contains(&parameter.as_str()) {
                    found.push(parameter);
                }
            }
        }
        match found.as_slice() {
            [one] => Ok(one),
            [] => Err(NamingProblem::Unknown { name: name.to_owned() }),
            several => Err(NamingProblem::Ambiguous {
                name: name.to_owned(),
                candidates: several.iter().map(|each| (*each).to_owned()).collect(),
            }),
        }
    }
}
