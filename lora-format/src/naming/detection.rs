//! Which architectures and namings fit an adapter's own module names.

use super::catalogue::{Architecture, Catalogue, Names, Resolved};
use super::spelling::Naming;

/// A module of an adapter as its file spells it, and what its factors say of the weight.
#[derive(Clone, Copy, Debug)]
pub struct Observed<'a> {
    /// The spelled name, without what follows the module.
    pub name: &'a str,
    /// Rows and columns of the weight that it changes, a kernel counted among the columns; `None`
    /// where not known.
    pub shape: Option<(usize, usize)>,
}

/// What fits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detection {
    /// Under which all names resolve, to weights of their shapes. Of several namings that give one
    /// architecture the same meanings only the first is listed.
    pub fitting: Vec<(Architecture, Naming)>,
}

impl Detection {
    /// The only one that fits.
    pub fn unique(&self) -> Option<(Architecture, Naming)> {
        match self.fitting.as_slice() {
            [one] => Some(*one),
            _ => None,
        }
    }
}

/// All architectures and namings under which every name resolves and every shape fits. Several
/// may: the attention layers of SD1 and SD2, whose widths alone differ, cannot be told apart
/// without shapes. None if a single name is unknown to all; [`super::Names::resolve`] then says
/// which.
pub fn detect(observed: &[Observed<'_>]) -> Detection {
    let mut detection = Detection::default();
    if observed.is_empty() {
        return detection;
    }
    for architecture in Architecture::ALL {
        let catalogue = Catalogue::of(architecture);
        let mut known: Vec<Vec<Resolved>> = Vec::new();
        for naming in Naming::ALL {
            let names = catalogue.names(naming);
            let meanings: Option<Vec<Resolved>> =
                observed.iter().map(|each| meaning(&catalogue, &names, each)).collect();
            let Some(meanings) = meanings else { continue };
            if !known.contains(&meanings) {
                detection.fitting.push((architecture, naming));
                known.push(meanings);
            }
        }
    }
    detection
}

fn meaning(catalogue: &Catalogue, names: &Names, observed: &Observed<'_>) -> Option<Resolved> {
    let resolved = names.resolve(observed.name).ok()?;
    if let Some((rows, columns)) = observed.shape {
        let module = catalogue.modules().get(resolved.pieces.first()?.module)?;
        let width =
            module.shape.iter().skip(1).try_fold(1, |all: usize, each| all.checked_mul(*each))?;
        if resolved.rows != rows || width != columns {
            return None;
        }
    }
    Some(resolved.clone())
}
