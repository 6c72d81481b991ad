//! The components of an adapter, by the parameter that they change.

use std::collections::BTreeMap;

use lora_format::model::{Adapter, Component};

use super::product::Product;
use super::weights;
use crate::error::Result;
use crate::pair::{Mapped, Pair};

/// All that an adapter does to one parameter.
pub(super) struct Changed<'a> {
    /// The parameter: as the base calls it, if there is one and it has it; as the adapter does,
    /// otherwise.
    pub(super) name: String,
    /// The base's index among its pairs.
    pub(super) base: Option<usize>,
    /// What is done, in order.
    pub(super) components: Vec<&'a Component>,
}

/// The changes of an adapter, sorted by name; and what of it the base does not have.
pub(super) fn changes<'a>(
    adapter: &'a Adapter,
    base: Option<&Mapped<'_>>,
) -> Result<(Vec<Changed<'a>>, Vec<String>)> {
    let pairing = base.map(Mapped::pairing);
    let (names, problems) =
        pairing.map(|pairing| weights::names(adapter, pairing)).transpose()?.unzip();
    let mut all: BTreeMap<String, Changed<'a>> = BTreeMap::new();
    for (index, component) in adapter.components.iter().enumerate() {
        let own_name = component.target.name();
        let found = names.as_ref().and_then(|names| names[index].clone());
        let at = match (&found, pairing) {
            (Some(name), Some(pairing)) => weights::find(pairing, name),
            _ => None,
        };
        let name = found.unwrap_or(own_name);
        let components = Vec::new();
        let entry = all.entry(name.clone());
        let changed = entry.or_insert(Changed { name, base: at, components });
        changed.components.push(component);
    }
    let unknown = problems.into_iter().flatten();
    let path = adapter.path.display();
    let notes = unknown.map(|problem| format!("{path}: not measured against the base: {problem}"));
    Ok((all.into_values().collect(), notes.collect()))
}

impl Changed<'_> {
    /// The product that it adds, if that is what it does.
    ///
    /// # Errors
    /// Why it is not.
    pub(super) fn product(
        &self,
        base: Option<&Mapped<'_>>,
    ) -> std::result::Result<Product, String> {
        let pair = self.pair(base);
        let inputs = pair.map(|pair| {
            let (rows, cols) = pair.matrix();
            if weights::is_transposed(pair) { rows } else { cols }
        });
        let mut sum: Option<Product> = None;
        for component in &self.components {
            let product = Product::of(&component.form, inputs)?;
            sum = Some(match sum {
                Some(sum) => sum.plus(&product)?,
                None => product,
            });
        }
        sum.ok_or_else(|| "nothing changes it".to_owned())
    }

    /// The base's parameter.
    pub(super) fn pair<'a>(&self, base: Option<&Mapped<'a>>) -> Option<&'a Pair> {
        base?.pairing().pairs.get(self.base?)
    }

    /// Whether the base stores its out × in matrix as (in, out); `None` if it stores none of this
    /// shape.
    pub(super) fn stored_transposed(
        &self,
        base: Option<&Mapped<'_>>,
        (outputs, inputs): (usize, usize),
    ) -> Option<bool> {
        let pair = self.pair(base)?;
        let matrix = pair.matrix();
        if outputs == inputs && matrix == (outputs, inputs) {
            let form =
                self.components.first().is_some_and(|one| weights::wants_transposed(&one.form));
            return Some(form || weights::is_transposed(pair));
        }
        if matrix == (outputs, inputs) {
            Some(false)
        } else {
            (matrix == (inputs, outputs)).then_some(true)
        }
    }
}
