//! The modules of an architecture, looked up by any format's names.

use std::collections::{BTreeMap, HashMap};

use super::module::{Module, Part};
use super::spelling::{Naming, Side, Style, styles};
use super::{NamingProblem, text, transformer, unet};

/// A family of models with the same modules and shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// Stable Diffusion 1.x.
    Sd1,
    /// Stable Diffusion 2.x.
    Sd2,
    /// Stable Diffusion XL base.
    Sdxl,
    /// Stable Diffusion 3 medium.
    Sd3Medium,
    /// Stable Diffusion 3.5 medium.
    Sd35Medium,
    /// Stable Diffusion 3.5 large.
    Sd35Large,
    /// Flux.1 dev and schnell.
    Flux1,
    /// Flux.2 dev.
    Flux2,
    /// Wan 2.1 with 1.3 billion parameters.
    Wan1b,
    /// Wan 2.1 with 14 billion parameters; each of Wan 2.2's two has the same modules.
    Wan14b,
    /// Qwen-Image.
    QwenImage,
    /// Z-Image.
    ZImage,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Architecture; 12] = [
        Architecture::Sd1,
        Architecture::Sd2,
        Architecture::Sdxl,
        Architecture::Sd3Medium,
        Architecture::Sd35Medium,
        Architecture::Sd35Large,
        Architecture::Flux1,
        Architecture::Flux2,
        Architecture::Wan1b,
        Architecture::Wan14b,
        Architecture::QwenImage,
        Architecture::ZImage,
    ];

    /// Whether its denoiser is a UNet.
    pub(super) fn has_unet(self) -> bool {
        matches!(self, Architecture::Sd1 | Architecture::Sd2 | Architecture::Sdxl)
    }

    /// Its name in the fixtures and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Sd1 => "sd1",
            Architecture::Sd2 => "sd2",
            Architecture::Sdxl => "sdxl",
            Architecture::Sd3Medium => "sd3-medium",
            Architecture::Sd35Medium => "sd3.5-medium",
            Architecture::Sd35Large => "sd3.5-large",
            Architecture::Flux1 => "flux1",
            Architecture::Flux2 => "flux2",
            Architecture::Wan1b => "wan-1.3b",
            Architecture::Wan14b => "wan-14b",
            Architecture::QwenImage => "qwen-image",
            Architecture::ZImage => "z-image",
        }
    }

    fn denoiser(self) -> Vec<Module> {
        const SD: unet::Unet = unet::Unet {
            channels: &[320, 640, 1280, 1280],
            depths: &[1, 1, 1, 0],
            middle: 1,
            context: 768,
            linear: false,
            label: None,
        };
        let sd3 = |depth, normalised, dual| {
            transformer::sd3(&transformer::Sd3 { depth, normalised, dual })
        };
        let wan = |width, wide, layers| transformer::wan(&transformer::Wan { width, wide, layers });
        match self {
            Architecture::Sd1 => unet::modules(&SD),
            Architecture::Sd2 => unet::modules(&unet::Unet { context: 1024, linear: true, ..SD }),
            Architecture::Sdxl => unet::modules(&unet::Unet {
                channels: &[320, 640, 1280],
                depths: &[0, 2, 10],
                middle: 10,
                context: 2048,
                linear: true,
                label: Some(2816),
            }),
            Architecture::Sd3Medium => sd3(24, false, 0),
            Architecture::Sd35Medium => sd3(24, true, 13),
            Architecture::Sd35Large => sd3(38, true, 0),
            Architecture::Flux1 => transformer::flux1(),
            Architecture::Flux2 => transformer::flux2(),
            Architecture::Wan1b => wan(1536, 8960, 30),
            Architecture::Wan14b => wan(5120, 13_824, 40),
            Architecture::QwenImage => transformer::qwen_image(),
            Architecture::ZImage => transformer::z_image(),
        }
    }

    fn text_encoders(self) -> Vec<Module> {
        let small = |part| text::clip(part, &text::Clip { width: 768, layers: 12, open: false });
        let large = |open| text::clip(Part::ClipG, &text::Clip { width: 1280, layers: 32, open });
        match self {
            Architecture::Sd1 => small(Part::ClipL),
            // The file has 24 layers; the last is never used, and transformers does not have it.
            Architecture::Sd2 => {
                text::clip(Part::ClipH, &text::Clip { width: 1024, layers: 23, open: true })
            }
            Architecture::Sdxl => [small(Part::ClipL), large(true)].concat(),
            Architecture::Sd3Medium | Architecture::Sd35Medium | Architecture::Sd35Large => {
                [small(Part::ClipL), large(false), text::t5()].concat()
            }
            Architecture::Flux1 => [small(Part::ClipL), text::t5()].concat(),
            _ => Vec::new(),
        }
    }
}

/// The modules of one architecture.
#[derive(Clone, Debug)]
pub struct Catalogue {
    architecture: Architecture,
    modules: Vec<Module>,
    /// Rows of every original parameter, and its modules.
    originals: BTreeMap<(Part, String), Original>,
}

/// A parameter of the original checkpoint.
#[derive(Clone, Debug, Default)]
struct Original {
    rows: usize,
    modules: Vec<usize>,
}

/// Rows of a module that a spelled name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The module, as an index of [`Catalogue::modules`].
    pub module: usize,
    /// The first of its rows.
    pub module_row: usize,
    /// The first row of what was spelled that they are.
    pub from: usize,
    /// How many.
    pub rows: usize,
}

/// What a spelled name means: rows of modules, in the order of what was spelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The component.
    pub part: Part,
    /// Rows of the weight that was spelled.
    pub rows: usize,
    /// Which rows of which modules they are. They cover all of `rows`, none twice.
    pub pieces: Vec<Piece>,
}

/// Rows of a module of another naming (or of a parameter) that are rows of what was resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpelledPiece {
    /// The module as that naming spells it.
    pub name: String,
    /// The first of its rows.
    pub row: usize,
    /// The first row of what was resolved that they are.
    pub from: usize,
    /// How many.
    pub rows: usize,
    /// Rows of that module's weight in all.
    pub total: usize,
}

impl Catalogue {
    /// The modules of an architecture.
    pub fn of(architecture: Architecture) -> Catalogue {
        let mut modules = architecture.denoiser();
        modules.extend(architecture.text_encoders());
        let mut originals: BTreeMap<(Part, String), Original> = BTreeMap::new();
        for (index, module) in modules.iter().enumerate() {
            let original = originals.entry((module.part, module.original.clone())).or_default();
            original.rows = original.rows.saturating_add(module.rows());
            original.modules.push(index);
        }
        Catalogue { architecture, modules, originals }
    }

    /// Which architecture it is of.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// All modules.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// The components that it lists.
    pub fn parts(&self) -> Vec<Part> {
        let mut parts: Vec<Part> = self.modules.iter().map(|module| module.part).collect();
        parts.dedup();
        parts
    }

    /// The whole of one module, as if it had been spelled. `None` if there is none of this index.
    pub fn whole(&self, module: usize) -> Option<Resolved> {
        let found = self.modules.get(module)?;
        let rows = found.rows();
        let pieces = vec![Piece { module, module_row: 0, from: 0, rows }];
        Some(Resolved { part: found.part, rows, pieces })
    }

    /// The dictionary of a naming: every name that it has for a module, and what it means.
    pub fn names(&self, naming: Naming) -> Names {
        let mut meanings: HashMap<String, Vec<Resolved>> = HashMap::new();
        for part in self.parts() {
            for style in styles(self.architecture, part, naming) {
                for (name, meaning) in self.spelled(part, &style) {
                    let known = meanings.entry(name).or_default();
                    if !known.contains(&meaning) {
                        known.push(meaning);
                    }
                }
            }
        }
        Names { meanings, paths: self.modules.iter().map(|each| each.diffusers.clone()).collect() }
    }

    /// All names of one style for a component.
    fn spelled(&self, part: Part, style: &Style) -> Vec<(String, Resolved)> {
        match style.side {
            Side::Diffusers => {
                let of_part = self.modules.iter().enumerate().filter(|(_, each)| each.part == part);
                let name = |(index, each): (usize, &Module)| {
                    Some((style.spell(&each.diffusers)?, self.whole(index)?))
                };
                of_part.filter_map(name).collect()
            }
            Side::Original => {
                let of_part = self.originals.iter().filter(|((of, _), _)| *of == part);
                let name = |(_, original): (_, &Original)| {
                    let first = self.modules.get(*original.modules.first()?)?;
                    let rows = style.rows(first, original.rows);
                    let meaning = self.original(part, original, rows);
                    Some((style.spell(first.original_module())?, meaning))
                };
                of_part.filter_map(name).collect()
            }
        }
    }

    /// The first `rows` rows of an original parameter.
    fn original(&self, part: Part, original: &Original, rows: usize) -> Resolved {
        let mut pieces = Vec::new();
        for &module in &original.modules {
            for run in self.modules.get(module).map(|each| each.runs.as_slice()).unwrap_or_default()
            {
                if run.original_row < rows {
                    let (module_row, from) = (run.module_row, run.original_row);
                    pieces.push(Piece { module, module_row, from, rows: run.rows });
                }
            }
        }
        pieces.sort_by_key(|piece| piece.from);
        Resolved { part, rows, pieces }
    }

    /// The naming that knows most of these names, of equal ones the first, with its dictionary: an
    /// adapter follows one naming throughout.
    pub fn naming_of<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> (Naming, Names) {
        let known = |naming: Naming| {
            let dictionary = self.names(naming);
            let known = names.clone().filter(|name| dictionary.resolve(name).is_ok()).count();
            (known, naming, dictionary)
        };
        let (first, rest) = (Naming::ALL[0], &Naming::ALL[1..]);
        let best = rest.iter().fold(known(first), |best, naming| {
            let found = known(*naming);
            if found.0 > best.0 { found } else { best }
        });
        (best.1, best.2)
    }

    /// How a naming spells what was resolved, if it has one name for exactly these rows.
    pub fn spell(&self, resolved: &Resolved, naming: Naming) -> Option<String> {
        let pieces = self.pieces(resolved, naming)?;
        match pieces.as_slice() {
            [piece] if piece.rows == piece.total && piece.rows == resolved.rows => {
                Some(piece.name.clone())
            }
            _ => None,
        }
    }

    /// What was resolved, as rows of the modules that a naming has: several where it splits what is
    /// fused, a part of one where it fuses. In the order of the rows resolved. `None` if the naming
    /// has no name for some of it.
    pub fn pieces(&self, resolved: &Resolved, naming: Naming) -> Option<Vec<SpelledPiece>> {
        let style = *styles(self.architecture, resolved.part, naming).first()?;
        self.rows(resolved, style.side, |module, total| match style.side {
            Side::Diffusers => Some((style.spell(&module.diffusers)?, total)),
            Side::Original => {
                Some((style.spell(module.original_module())?, style.rows(module, total)))
            }
        })
    }

    /// What was resolved, as rows of one side's weights. `name` is given a module and the rows of
    /// that side's weight it is in, and says what to call that weight and how many of its leading
    /// rows are meant; `None` from it, or rows beyond those, make the whole `None`.
    pub(super) fn rows(
        &self,
        resolved: &Resolved,
        side: Side,
        name: impl Fn(&Module, usize) -> Option<(String, usize)>,
    ) -> Option<Vec<SpelledPiece>> {
        let mut found: Vec<SpelledPiece> = Vec::new();
        for piece in &resolved.pieces {
            let module = self.modules.get(piece.module)?;
            let total = match side {
                Side::Diffusers => module.rows(),
                Side::Original => self.originals.get(&(module.part, module.original.clone()))?.rows,
            };
            let (name, total) = name(module, total)?;
            let whole = [super::Run { module_row: 0, original_row: 0, rows: module.rows() }];
            let runs = if side == Side::Diffusers { &whole } else { module.runs.as_slice() };
            for run in runs {
                let start = piece.module_row.max(run.module_row);
                let piece_end = piece.module_row.checked_add(piece.rows)?;
                let end = piece_end.min(run.module_row.checked_add(run.rows)?);
                if start >= end {
                    continue;
                }
                let next = SpelledPiece {
                    name: name.clone(),
                    row: run.original_row.checked_add(start.checked_sub(run.module_row)?)?,
                    from: piece.from.checked_add(start.checked_sub(piece.module_row)?)?,
                    rows: end.checked_sub(start)?,
                    total,
                };
                if next.row.checked_add(next.rows)? > total {
                    return None;
                }
                join(&mut found, next);
            }
        }
        found.sort_by_key(|piece| piece.from);
        Some(found)
    }
}

/// Adds a piece, as the continuation of the last one if it is.
fn join(pieces: &mut Vec<SpelledPiece>, next: SpelledPiece) {
    if let Some(last) = pieces.last_mut() {
        let follows = last.name == next.name
            && last.row.checked_add(last.rows) == Some(next.row)
            && last.from.checked_add(last.rows) == Some(next.from);
        if follows {
            last.rows = last.rows.saturating_add(next.rows);
            return;
        }
    }
    pieces.push(next);
}

/// The dictionary of one naming for one architecture.
#[derive(Clone, Debug)]
pub struct Names {
    meanings: HashMap<String, Vec<Resolved>>,
    /// diffusers' paths of the catalogue's modules, for messages.
    paths: Vec<String>,
}

impl Names {
    /// What a name means.
    ///
    /// # Errors
    /// [`NamingProblem::Unknown`], or [`NamingProblem::Ambiguous`] with the meanings as diffusers
    /// has them.
    pub fn resolve(&self, name: &str) -> Result<&Resolved, NamingProblem> {
        match self.meanings.get(name).map(Vec::as_slice) {
            Some([one]) => Ok(one),
            Some(several) if !several.is_empty() => Err(NamingProblem::Ambiguous {
                name: name.to_owned(),
                candidates: several.iter().map(|each| self.describe(each)).collect(),
            }),
            _ => Err(NamingProblem::Unknown { name: name.to_owned() }),
        }
    }

    fn describe(&self, resolved: &Resolved) -> String {
        let path = |piece: &Piece| self.paths.get(piece.module).map_or("?", String::as_str);
        resolved.pieces.iter().map(path).collect::<Vec<_>>().join(" + ")
    }

    /// Every name, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.meanings.keys().map(String::as_str)
    }

    /// Up to three names that are like an unknown one, for a message: those that agree in most
    /// characters from both ends.
    pub fn nearest(&self, name: &str) -> Vec<&str> {
        const SHOWN: usize = 3;
        let likeness = |other: &str| {
            let same = |pairs: &mut dyn Iterator<Item = (u8, u8)>| {
                pairs.take_while(|(one, two)| one == two).count()
            };
            same(&mut name.bytes().zip(other.bytes()))
                + same(&mut name.bytes().rev().zip(other.bytes().rev()))
        };
        let mut all: Vec<(usize, &str)> =
            self.meanings.keys().map(|other| (likeness(other), other.as_str())).collect();
        all.sort_by(|one, two| two.0.cmp(&one.0).then(one.1.cmp(two.1)));
        all.into_iter().take(SHOWN).filter(|each| each.0 > 0).map(|each| each.1).collect()
    }
}
