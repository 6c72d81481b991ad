//! Does an adapter load where it is to be used, and will every tensor be used there?
//!
//! Loaders ignore what they do not know, and say nothing. What an adapter holds by itself is looked
//! at in `content`, what the programs that load adapters make of it in `consumers`. Nothing is
//! changed.

mod consumers;
mod content;

use std::fmt;

use crate::model::Adapter;

pub use consumers::Consumer;

/// Something that a user should know before the adapter is used.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// What kind it is.
    pub kind: Kind,
    /// The modules or tensors that it is about; empty if it is about all.
    pub names: Vec<String>,
    /// What is the matter, a sentence without its end.
    pub what: String,
    /// What mends it, if something does.
    pub fix: Option<Fix>,
}

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The program refuses the adapter.
    Refused,
    /// The program ignores a part of it, and says nothing.
    Ignored,
    /// The program computes something else than the adapter means.
    Misread,
    /// It is no adapter that training would leave.
    Damaged,
    /// It may be meant, and seldom is.
    Suspicious,
}

impl Kind {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Refused => "refused",
            Kind::Ignored => "ignored",
            Kind::Misread => "misread",
            Kind::Damaged => "damaged",
            Kind::Suspicious => "suspicious",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What mends a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fix {
    /// Converting it to this format.
    Convert(crate::model::AdapterFormat),
    /// Merging it into its base, and using that.
    Merge,
}

/// What is wrong with an adapter whatever loads it.
pub fn content(adapter: &Adapter) -> Vec<Finding> {
    content::findings(adapter)
}

/// What a program would make of an adapter.
pub fn consumer(adapter: &Adapter, consumer: Consumer) -> Vec<Finding> {
    consumers::findings(adapter, consumer)
}
