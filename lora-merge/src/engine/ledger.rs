//! The account of what was used: every element of every adapter's tensors, exactly once.
//!
//! The planner promises that nothing is left over; the ledger holds it to that. What is prepared
//! to be applied (terms when they are packed, operators when they are made) and what replaces (rows
//! and tensors, as they are written) is entered, and a merge whose account does not balance fails
//! before its output gets its name. That every tile was then made is counted by the engine.

use std::sync::atomic::{AtomicU64, Ordering};

use lora_format::model::Form;

use crate::error::{Error, Result};
use crate::plan::MergePlan;

/// Elements used of every tensor of every component.
#[derive(Debug)]
pub(super) struct Ledger {
    /// By adapter, component and position in [`Form::tensors`].
    used: Vec<Vec<Vec<AtomicU64>>>,
}

impl Ledger {
    pub(super) fn new(plan: &MergePlan) -> Ledger {
        let tensors = |form: &Form| form.tensors().iter().map(|_| AtomicU64::new(0)).collect();
        let components = plan.adapters.iter().map(|one| {
            one.adapter.components.iter().map(|component| tensors(&component.form)).collect()
        });
        Ledger { used: components.collect() }
    }

    /// Enters elements of one tensor of a component.
    pub(super) fn enter(&self, adapter: usize, component: usize, tensor: usize, elements: usize) {
        self.used[adapter][component][tensor].fetch_add(elements as u64, Ordering::Relaxed);
    }

    /// Enters a component as a whole.
    pub(super) fn enter_all(&self, plan: &MergePlan, adapter: usize, component: usize) {
        let form = &plan.component(adapter, component).form;
        for (index, tensor) in form.tensors().iter().enumerate() {
            self.enter(adapter, component, index, tensor.elements());
        }
    }

    /// Refuses an account that does not balance.
    pub(super) fn balance(&self, plan: &MergePlan) -> Result<()> {
        for (adapter, one) in plan.adapters.iter().enumerate() {
            for (index, component) in one.adapter.components.iter().enumerate() {
                let uses = plan.uses[adapter][index];
                for (position, tensor) in component.form.tensors().iter().enumerate() {
                    let used = self.used[adapter][index][position].load(Ordering::Relaxed);
                    let elements = tensor.elements() as u64;
                    let fair = match &component.form {
                        // Factors that all layers share: each layer takes the part it needs.
                        Form::Shared(_) if position < 2 => used > 0,
                        _ => used == elements * uses,
                    };
                    if !fair {
                        return Err(Error::Unconsumed {
                            adapter: one.adapter.path.clone(),
                            tensor: tensor.name.clone(),
                            used,
                            elements,
                        });
                    }
                }
            }
        }
        Ok(())
    }
}
