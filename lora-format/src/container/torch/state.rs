//! From what was saved to names: the tensors of a state dict, and what lies beside them.
//!
//! The dicts that hold tensors are flattened, with dots between their keys. A trainer's checkpoint
//! is a dict that has its state dict under one of a few keys ([`WRAPPERS`]) and no tensors of its
//! own; the names are then those of that state dict alone, and of the rest (the optimiser's state,
//! counters, hyperparameters) what is plain is kept as values and what is not is kept as what it is
//! called. Where tensors are to be named nothing is passed over: a key that is no string, a list of
//! tensors, two things with one name are errors.

use std::collections::{HashMap, HashSet};

use super::globals::Rebuild;
use super::problem::TorchProblem;
use crate::container::pickle::{Node, Pickle, Value};
use crate::limits;

/// The keys that trainers keep a state dict under, in the order in which they are looked for.
const WRAPPERS: [&str; 9] = [
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "params_ema",
    "params",
    "network",
    "net",
    "weights",
];

/// What a file holds beside its tensors.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum PlainValue {
    /// Python's `None`.
    None,
    /// A truth value.
    Bool(bool),
    /// An integer of up to 64 bits.
    Int(i64),
    /// A floating-point number.
    Float(f64),
    /// A string.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A list, a tuple or a set.
    List(Vec<PlainValue>),
    /// A dict with strings for keys.
    Dict(Vec<(String, PlainValue)>),
    /// What is not read, by name: the class of an instance, or a phrase in words.
    Opaque(String),
}

/// The tensors of a state dict and what lies beside them, named.
#[derive(Debug)]
pub(super) struct State<'a> {
    /// Calls that make tensors, in the order of the file.
    pub(super) tensors: Vec<(String, Value<'a>)>,
    /// What lies beside the state dict, then what is no tensor in it.
    pub(super) values: Vec<(String, PlainValue)>,
}

/// Names what a pickle holds.
pub(super) fn read<'a>(pickle: &Pickle<'a>) -> Result<State<'a>, TorchProblem> {
    let reader = Reader { pickle, holds: holders(pickle) };
    let Some(pairs) = pickle.dict(pickle.root) else {
        return Err(TorchProblem::NotADict { found: reader.describe(pickle.root) });
    };
    let mut naming = Naming::new();
    let inner = reader.wrapped(pairs);
    if let Some(inner) = inner {
        naming.beside = true;
        for &(key, value) in pairs.iter().filter(|pair| pair.1 != inner) {
            let Value::Text(name) = key else {
                let (at, key) = (String::new(), reader.describe(key));
                return Err(TorchProblem::Key { at, key });
            };
            naming.value(&reader, name, value)?;
        }
        naming.beside = false;
    }
    reader.flatten(inner.unwrap_or(pickle.root), "", 0, &mut naming)?;
    Ok(State { tensors: naming.tensors, values: naming.values })
}

/// The nodes that are tensors or from which a tensor can be reached, walked from the tensors
/// backwards, each once: the nodes may share and even contain one another.
fn holders(pickle: &Pickle<'_>) -> Vec<bool> {
    let mut parents: Vec<(usize, usize)> = Vec::new();
    let mut reached: Vec<usize> = Vec::new();
    for (number, node) in pickle.nodes.iter().enumerate() {
        let mut child = |value: &Value<'_>| {
            if let Value::Node(child) = value {
                parents.push((*child, number));
            }
        };
        match node {
            Node::Tuple(items) | Node::List(items) => items.iter().for_each(child),
            Node::Dict(pairs) => pairs.iter().for_each(|(_, value)| child(value)),
            Node::Call { function, .. } if Rebuild::of(*function).is_some() => reached.push(number),
            Node::Call { .. } | Node::Global(_) | Node::Persistent(_) => {}
        }
    }
    parents.sort_unstable();
    let mut holds = vec![false; pickle.nodes.len()];
    while let Some(number) = reached.pop() {
        let Some(seen) = holds.get_mut(number).filter(|seen| !**seen) else {
            continue;
        };
        *seen = true;
        let first = parents.partition_point(|edge| edge.0 < number);
        let edges = parents.get(first..).unwrap_or_default();
        reached.extend(edges.iter().take_while(|edge| edge.0 == number).map(|edge| edge.1));
    }
    holds
}

/// The names given so far.
struct Naming<'a> {
    tensors: Vec<(String, Value<'a>)>,
    values: Vec<(String, PlainValue)>,
    /// Whether what is named now lies beside the state dict, and its name.
    names: HashSet<(bool, String)>,
    beside: bool,
    name_bytes: u64,
    /// What the values may still hold.
    plain_left: usize,
    /// The dicts that were flattened, and their names.
    dicts: HashMap<usize, String>,
}

impl<'a> Naming<'a> {
    fn new() -> Naming<'a> {
        Naming {
            tensors: Vec::new(),
            values: Vec::new(),
            names: HashSet::new(),
            beside: false,
            name_bytes: 0,
            plain_left: limits::PLAIN_VALUES,
            dicts: HashMap::new(),
        }
    }

    fn claim(&mut self, name: &str) -> Result<(), TorchProblem> {
        let over = |what, found: usize, limit: usize| TorchProblem::OverLimit {
            what,
            found: found as u64,
            limit: limit as u64,
        };
        if name.len() > limits::NAME_BYTES {
            return Err(over("bytes in a name", name.len(), limits::NAME_BYTES));
        }
        if self.names.len() >= limits::TENSORS {
            return Err(over("names", self.names.len() + 1, limits::TENSORS));
        }
        self.name_bytes += name.len() as u64;
        if self.name_bytes > limits::HEADER_BYTES {
            let (found, limit) = (self.name_bytes, limits::HEADER_BYTES);
            return Err(TorchProblem::OverLimit { what: "bytes of names", found, limit });
        }
        if !self.names.insert((self.beside, name.to_owned())) {
            return Err(TorchProblem::DuplicateName { name: name.to_owned() });
        }
        Ok(())
    }

    fn tensor(&mut self, name: &str, tensor: Value<'a>) -> Result<(), TorchProblem> {
        self.claim(name)?;
        self.tensors.push((name.to_owned(), tensor));
        Ok(())
    }

    fn value(
        &mut self,
        reader: &Reader<'_, 'a>,
        name: &str,
        value: Value<'a>,
    ) -> Result<(), TorchProblem> {
        self.claim(name)?;
        let value = reader.plain(value, &mut self.plain_left);
        self.values.push((name.to_owned(), value));
        Ok(())
    }
}

struct Reader<'p, 'a> {
    pickle: &'p Pickle<'a>,
    /// Whether each node is a tensor or holds one.
    holds: Vec<bool>,
}

impl<'a> Reader<'_, 'a> {
    fn holds(&self, value: Value<'a>) -> bool {
        matches!(value, Value::Node(number) if self.holds.get(number) == Some(&true))
    }

    fn is_tensor(&self, value: Value<'a>) -> bool {
        self.holds(value) && matches!(self.pickle.node(value), Some(Node::Call { .. }))
    }

    /// The state dict of a trainer's checkpoint.
    fn wrapped(&self, pairs: &[(Value<'a>, Value<'a>)]) -> Option<Value<'a>> {
        if pairs.iter().any(|pair| self.is_tensor(pair.1)) {
            return None;
        }
        let dict = |wrapper: &str| {
            let found = pairs.iter().find(|pair| pair.0 == Value::Text(wrapper))?.1;
            (self.holds(found) && self.pickle.dict(found).is_some()).then_some(found)
        };
        WRAPPERS.iter().find_map(|wrapper| dict(wrapper))
    }

    /// Names what a dict that holds tensors holds.
    fn flatten(
        &self,
        dict: Value<'a>,
        at: &str,
        depth: usize,
        naming: &mut Naming<'a>,
    ) -> Result<(), TorchProblem> {
        if depth > limits::NESTING {
            let (found, limit) = (depth as u64, limits::NESTING as u64);
            return Err(TorchProblem::OverLimit { what: "dicts inside one another", found, limit });
        }
        // A dict in two places would make two names of each of its tensors, and one that is in
        // itself an endless number.
        if let Value::Node(number) = dict
            && let Some(first) = naming.dicts.insert(number, at.to_owned())
        {
            return Err(TorchProblem::SharedDict { first, second: at.to_owned() });
        }
        for &(key, value) in self.pickle.dict(dict).unwrap_or_default() {
            let Value::Text(key) = key else {
                return Err(TorchProblem::Key { at: at.to_owned(), key: self.describe(key) });
            };
            let name = if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
            if self.is_tensor(value) {
                naming.tensor(&name, value)?;
            } else if !self.holds(value) {
                naming.value(self, &name, value)?;
            } else if self.pickle.dict(value).is_some() {
                self.flatten(value, &name, depth + 1, naming)?;
            } else {
                return Err(TorchProblem::Unnamed { at: name });
            }
        }
        Ok(())
    }

    /// A value that lies beside the tensors. What is too large for the rest of what all values of
    /// the file may take, or holds tensors, is kept by name.
    fn plain(&self, value: Value<'a>, all_left: &mut usize) -> PlainValue {
        let allowed = limits::PLAIN_VALUE.min(*all_left);
        let mut left = allowed;
        let plain = if self.holds(value) {
            self.opaque(value, &mut left)
        } else {
            self.plain_within(value, limits::NESTING, &mut left)
        };
        // What could not be held took time.
        *all_left -= allowed - left;
        plain.unwrap_or_else(|| PlainValue::Opaque("a value too large or too deep".to_owned()))
    }

    fn opaque(&self, value: Value<'a>, left: &mut usize) -> Option<PlainValue> {
        let name = self.describe(value);
        *left = left.checked_sub(name.len())?;
        Some(PlainValue::Opaque(name))
    }

    /// `None` if it has more parts or levels than are left: what the pickle holds once may be
    /// used many times.
    fn plain_within(&self, value: Value<'a>, depth: usize, left: &mut usize) -> Option<PlainValue> {
        *left = left.checked_sub(1)?;
        let depth = depth.checked_sub(1)?;
        Some(match value {
            Value::None => PlainValue::None,
            Value::Bool(value) => PlainValue::Bool(value),
            Value::Int(value) => PlainValue::Int(value),
            Value::Float(value) => PlainValue::Float(value),
            Value::Text(text) => {
                *left = left.checked_sub(text.len())?;
                PlainValue::Text(text.to_owned())
            }
            Value::Bytes(bytes) => {
                *left = left.checked_sub(bytes.len())?;
                PlainValue::Bytes(bytes.to_vec())
            }
            Value::Long(_) => self.opaque(value, left)?,
            Value::Node(number) => match self.pickle.nodes.get(number) {
                Some(Node::Tuple(items) | Node::List(items)) => {
                    let items = items.iter().map(|&item| self.plain_within(item, depth, left));
                    PlainValue::List(items.collect::<Option<_>>()?)
                }
                Some(Node::Dict(pairs)) => self.plain_dict(value, pairs, depth, left)?,
                _ => self.opaque(value, left)?,
            },
        })
    }

    fn plain_dict(
        &self,
        dict: Value<'a>,
        pairs: &[(Value<'a>, Value<'a>)],
        depth: usize,
        left: &mut usize,
    ) -> Option<PlainValue> {
        let mut plain = Vec::new();
        for &(key, value) in pairs {
            let Value::Text(key) = key else {
                return self.opaque(dict, left);
            };
            *left = left.checked_sub(key.len())?;
            plain.push((key.to_owned(), self.plain_within(value, depth, left)?));
        }
        Some(PlainValue::Dict(plain))
    }

    /// What a value is, in words.
    fn describe(&self, value: Value<'a>) -> String {
        let holds = self.holds(value);
        match value {
            Value::None => "None".to_owned(),
            Value::Bool(true) => "True".to_owned(),
            Value::Bool(false) => "False".to_owned(),
            Value::Int(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::Long(_) => "an integer of more than 64 bits".to_owned(),
            Value::Text(_) => "a string".to_owned(),
            Value::Bytes(_) => "bytes".to_owned(),
            Value::Node(number) => match self.pickle.nodes.get(number) {
                Some(Node::Tuple(_)) if holds => "a tuple with tensors".to_owned(),
                Some(Node::Tuple(_)) => "a tuple".to_owned(),
                Some(Node::List(_)) if holds => "a list with tensors".to_owned(),
                Some(Node::List(_)) => "a list".to_owned(),
                Some(Node::Dict(_)) if holds => "a dict with tensors".to_owned(),
                Some(Node::Dict(_)) => "a dict".to_owned(),
                Some(Node::Call { .. }) if holds => "a tensor".to_owned(),
                Some(Node::Call { function: global, .. } | Node::Global(global)) => global.path(),
                Some(Node::Persistent(_)) | None => "a storage".to_owned(),
            },
        }
    }
}
