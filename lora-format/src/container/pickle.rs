//! Pickles as data: a virtual machine that builds values and calls nothing.
//!
//! A pickle is a program for a stack machine. This one runs the instructions that Python's picklers
//! write in protocols 2 to 5 and keeps what they build in an arena; where Python would import a
//! global or call it, the name is kept, and the call with its arguments as a value
//! ([`Node::Call`]). Whoever starts the machine says which globals may be called so; a call of any
//! other ends the reading, because such a pickle is a program and not a file of data. A global
//! that is only named is a value like another.
//!
//! Strings are slices of the pickle, and every instruction makes at most one node and pushes at most
//! one value, so that what is held is a constant times the pickle's bytes. What the memo gives back
//! is the node itself: a value that is used twice is held once, and may even hold itself. Readers of
//! the arena bound how they walk it.

use std::collections::HashMap;

use crate::limits;

/// What the arena's readers and the stack hold: scalars, slices of the pickle, or a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer beyond 64 bits: two's complement, little-endian.
    Long(&'a [u8]),
    Float(f64),
    Text(&'a str),
    Bytes(&'a [u8]),
    Node(usize),
}

/// What is held once, however often it is used.
#[derive(Debug)]
pub(super) enum Node<'a> {
    Tuple(Vec<Value<'a>>),
    /// A list, or a set.
    List(Vec<Value<'a>>),
    /// The pairs as they were set; equal keys are all kept.
    Dict(Vec<(Value<'a>, Value<'a>)>),
    Global(Global<'a>),
    /// A call that was not made. The arguments are `None` where they were more than a tuple.
    Call {
        function: Global<'a>,
        arguments: Value<'a>,
    },
    /// What the pickle leaves to its reader to find.
    Persistent(Value<'a>),
}

/// The name of a class or a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Global<'a> {
    pub(super) module: &'a str,
    pub(super) name: &'a str,
}

impl Global<'_> {
    /// `module.name`, in Python 3's spelling.
    pub(super) fn path(&self) -> String {
        let module = match self.module {
            "__builtin__" => "builtins",
            "copy_reg" => "copyreg",
            module => module,
        };
        format!("{module}.{}", self.name)
    }
}

/// A pickle that was read.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    pub(super) nodes: Vec<Node<'a>>,
    pub(super) root: Value<'a>,
    /// Its length in bytes.
    pub(super) bytes: usize,
}

impl<'a> Pickle<'a> {
    /// The node that a value stands for, if it stands for one.
    pub(super) fn node(&self, value: Value<'a>) -> Option<&Node<'a>> {
        match value {
            Value::Node(number) => self.nodes.get(number),
            _ => None,
        }
    }

    /// The elements of a tuple.
    pub(super) fn tuple(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match self.node(value)? {
            Node::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// The pairs of a dict.
    pub(super) fn dict(&self, value: Value<'a>) -> Option<&[(Value<'a>, Value<'a>)]> {
        match self.node(value)? {
            Node::Dict(pairs) => Some(pairs),
            _ => None,
        }
    }
}

/// Why a pickle is not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum PickleProblem {
    #[error("the pickle is cut off after {bytes} bytes (truncated?)")]
    Truncated { bytes: usize },
    #[error("the pickle calls `{name}`; a file of tensors has no need to, and nothing was called")]
    Call { name: String },
    #[error("the pickle calls, at byte {at}, what is no global")]
    CallOfValue { at: usize },
    #[error("the pickle has protocol {found}; protocols 2 to 5 are read")]
    Protocol { found: u8 },
    #[error(
        "the pickle's byte {at} is {code:#04x}, no instruction that is read \
         (those of protocols 2 to 5, without extensions and buffers outside the pickle)"
    )]
    Instruction { code: u8, at: usize },
    #[error("the pickle takes, at byte {at}, from an empty stack")]
    EmptyStack { at: usize },
    #[error("the pickle needs, at byte {at}, another kind of value: {expected}")]
    Kind { at: usize, expected: &'static str },
    #[error("the pickle uses, at byte {at}, what it has not stored: memo {key}")]
    NotInMemo { at: usize, key: u64 },
    #[error("the pickle has a string at byte {at} that is not UTF-8")]
    NotUtf8 { at: usize },
    #[error("the pickle leaves {values} values behind")]
    LeftOver { values: usize },
    #[error("the pickle has more than {limit} {what}")]
    OverLimit { what: &'static str, limit: usize },
}

/// Reads the pickle that `bytes` begins with. `permit` says which globals it may call.
///
/// # Errors
/// The first rule that is broken.
pub(super) fn read<'a>(
    bytes: &'a [u8],
    permit: fn(Global<'a>) -> bool,
) -> Result<Pickle<'a>, PickleProblem> {
    let mut machine = Machine {
        bytes,
        position: 0,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        nodes: Vec::new(),
        copied: 0,
        permit,
    };
    for _ in 0..limits::PICKLE_INSTRUCTIONS {
        machine.at = machine.position;
        let code = machine.byte()?;
        if code == b'.' {
            let root = machine.pop()?;
            if !machine.stack.is_empty() || !machine.marks.is_empty() {
                let values = machine.stack.len() + machine.marks.len();
                return Err(PickleProblem::LeftOver { values });
            }
            return Ok(Pickle { nodes: machine.nodes, root, bytes: machine.position });
        }
        machine.step(code)?;
    }
    Err(PickleProblem::OverLimit { what: "instructions", limit: limits::PICKLE_INSTRUCTIONS })
}

struct Machine<'a> {
    bytes: &'a [u8],
    position: usize,
    /// Where the current instruction begins.
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u64, Value<'a>>,
    nodes: Vec<Node<'a>>,
    /// Pairs that calls of dict classes have copied out of lists.
    copied: usize,
    permit: fn(Global<'a>) -> bool,
}

type Step<T = ()> = Result<T, PickleProblem>;

impl<'a> Machine<'a> {
    fn step(&mut self, code: u8) -> Step {
        match code {
            0x80 => self.protocol(),
            // A frame only tells how far one may read ahead.
            0x95 => self.take(8).map(drop),
            b'(' => self.mark(),
            b'0' => self.discard(),
            b'1' => self.pop_mark().map(drop),
            b'2' => {
                let top = self.top()?;
                self.push(top)
            }
            b'q' | b'r' | 0x94 => self.store(code),
            b'h' | b'j' => self.recall(code),
            b'N' | 0x88 | 0x89 | b'J' | b'K' | b'M' | 0x8a | 0x8b | b'G' => self.scalar(code),
            b'X' | 0x8c | 0x8d | b'U' | b'T' | b'C' | b'B' | 0x8e | 0x96 => self.string(code),
            b')' | b't' | 0x85..=0x87 | 0x91 => self.tuple(code),
            b']' | 0x8f => self.make(Node::List(Vec::new())),
            b'}' => self.make(Node::Dict(Vec::new())),
            b'a' | b'e' | 0x90 => self.append(code),
            b's' | b'u' => self.set_items(code),
            b'c' | 0x93 => {
                let global = if code == b'c' { self.global_lines()? } else { self.global_stack()? };
                self.make(Node::Global(global))
            }
            b'R' | 0x81 | 0x92 | b'o' | b'i' => self.call(code),
            b'b' => self.build(),
            b'Q' => {
                let id = self.pop()?;
                self.make(Node::Persistent(id))
            }
            _ => Err(PickleProblem::Instruction { code, at: self.at }),
        }
    }

    // ------------------------------------------------------------------- bytes

    fn take(&mut self, count: usize) -> Step<&'a [u8]> {
        let end = self.position.saturating_add(count);
        if end > limits::PICKLE_BYTES && end <= self.bytes.len() {
            let limit = limits::PICKLE_BYTES;
            return Err(PickleProblem::OverLimit { what: "bytes", limit });
        }
        let Some(taken) = self.bytes.get(self.position..end) else {
            return Err(PickleProblem::Truncated { bytes: self.bytes.len() });
        };
        self.position = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let taken = self.take(N)?;
        // Of the length that was asked for.
        taken.try_into().map_err(|_| PickleProblem::Truncated { bytes: self.bytes.len() })
    }

    fn byte(&mut self) -> Step<u8> {
        self.array().map(|[byte]| byte)
    }

    /// An unsigned number of `width` bytes.
    fn number(&mut self, width: usize) -> Step<u64> {
        let bytes = self.take(width)?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = self.bytes.get(self.position..).unwrap_or_default();
        let window = rest.get(..=limits::GLOBAL_BYTES).unwrap_or(rest);
        let Some(length) = window.iter().position(|&byte| byte == b'\n') else {
            return Err(if window.len() < rest.len() {
                long_name()
            } else {
                PickleProblem::Truncated { bytes: self.bytes.len() }
            });
        };
        let line = self.take(length)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| PickleProblem::NotUtf8 { at: self.at })
    }

    // ------------------------------------------------------------------- stack

    fn push(&mut self, value: Value<'a>) -> Step {
        self.stack.push(value);
        Ok(())
    }

    fn make(&mut self, node: Node<'a>) -> Step {
        self.nodes.push(node);
        self.push(Value::Node(self.nodes.len() - 1))
    }

    /// The stack above the last mark; what is below it is out of reach.
    fn reachable(&self) -> usize {
        self.stack.len() - self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Step<Value<'a>> {
        if self.reachable() == 0 {
            return Err(PickleProblem::EmptyStack { at: self.at });
        }
        self.stack.pop().ok_or(PickleProblem::EmptyStack { at: self.at })
    }

    fn top(&mut self) -> Step<Value<'a>> {
        let value = self.pop()?;
        self.push(value)?;
        Ok(value)
    }

    fn mark(&mut self) -> Step {
        if self.marks.len() >= limits::PICKLE_DEPTH {
            let limit = limits::PICKLE_DEPTH;
            return Err(PickleProblem::OverLimit { what: "values inside one another", limit });
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    /// What was pushed since the last mark.
    fn pop_mark(&mut self) -> Step<Vec<Value<'a>>> {
        let mark = self.marks.pop().ok_or(PickleProblem::EmptyStack { at: self.at })?;
        Ok(self.stack.split_off(mark))
    }

    /// `POP` takes a mark too, where there is nothing above it.
    fn discard(&mut self) -> Step {
        if self.reachable() == 0 && self.marks.pop().is_some() {
            return Ok(());
        }
        self.pop().map(drop)
    }

    fn store(&mut self, code: u8) -> Step {
        let key = match code {
            b'q' => self.number(1)?,
            b'r' => self.number(4)?,
            _ => self.memo.len() as u64,
        };
        let value = self.top()?;
        self.memo.insert(key, value);
        Ok(())
    }

    fn recall(&mut self, code: u8) -> Step {
        let key = self.number(if code == b'h' { 1 } else { 4 })?;
        match self.memo.get(&key) {
            Some(&value) => self.push(value),
            None => Err(PickleProblem::NotInMemo { at: self.at, key }),
        }
    }

    // ------------------------------------------------------------------ values

    fn protocol(&mut self) -> Step {
        match self.byte()? {
            2..=5 => Ok(()),
            found => Err(PickleProblem::Protocol { found }),
        }
    }

    fn scalar(&mut self, code: u8) -> Step {
        let value = match code {
            b'N' => Value::None,
            0x88 | 0x89 => Value::Bool(code == 0x88),
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            b'K' => Value::Int(self.byte()?.into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'G' => Value::Float(f64::from_be_bytes(self.array()?)),
            _ => {
                let length = self.number(if code == 0x8a { 1 } else { 4 })?;
                long(self.take(length as usize)?)
            }
        };
        self.push(value)
    }

    fn string(&mut self, code: u8) -> Step {
        let width = match code {
            0x8c | b'U' | b'C' => 1,
            b'X' | b'T' | b'B' => 4,
            _ => 8,
        };
        let length = usize::try_from(self.number(width)?).unwrap_or(usize::MAX);
        let bytes = self.take(length)?;
        let value = match (code, std::str::from_utf8(bytes)) {
            (b'C' | b'B' | 0x8e | 0x96, _) => Value::Bytes(bytes),
            (_, Ok(text)) => Value::Text(text),
            // Python 2 wrote bytes and text alike.
            (b'U' | b'T', Err(_)) => Value::Bytes(bytes),
            (_, Err(_)) => return Err(PickleProblem::NotUtf8 { at: self.at }),
        };
        self.push(value)
    }

    fn tuple(&mut self, code: u8) -> Step {
        let items = match code {
            b')' => Vec::new(),
            0x85..=0x87 => {
                let count = usize::from(code - 0x84);
                if self.reachable() < count {
                    return Err(PickleProblem::EmptyStack { at: self.at });
                }
                self.stack.split_off(self.stack.len() - count)
            }
            // A frozen set is kept as a tuple.
            _ => self.pop_mark()?,
        };
        self.make(Node::Tuple(items))
    }

    /// The node on top of the stack, to be changed.
    fn top_node(&mut self, expected: &'static str) -> Step<&mut Node<'a>> {
        let at = self.at;
        match self.top()? {
            Value::Node(number) => self.nodes.get_mut(number),
            _ => None,
        }
        .ok_or(PickleProblem::Kind { at, expected })
    }

    fn append(&mut self, code: u8) -> Step {
        let mut items = if code == b'a' { vec![self.pop()?] } else { self.pop_mark()? };
        let (at, expected) = (self.at, "a list");
        match self.top_node(expected)? {
            Node::List(list) => list.append(&mut items),
            // An instance that stands for a class which is not read holds nothing.
            Node::Call { .. } => {}
            _ => return Err(PickleProblem::Kind { at, expected }),
        }
        Ok(())
    }

    fn set_items(&mut self, code: u8) -> Step {
        let (at, expected) = (self.at, "a dict");
        let items = if code == b's' {
            let value = self.pop()?;
            vec![self.pop()?, value]
        } else {
            self.pop_mark()?
        };
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err(PickleProblem::Kind { at, expected: "a value for every key" });
        };
        match self.top_node(expected)? {
            Node::Dict(dict) => dict.extend(pairs.iter().map(|&[key, value]| (key, value))),
            Node::Call { .. } => {}
            _ => return Err(PickleProblem::Kind { at, expected }),
        }
        Ok(())
    }

    // ------------------------------------------------------------ names, calls

    fn global_lines(&mut self) -> Step<Global<'a>> {
        Ok(Global { module: self.line()?, name: self.line()? })
    }

    fn global_stack(&mut self) -> Step<Global<'a>> {
        let name = self.pop()?;
        match (self.pop()?, name) {
            (Value::Text(module), Value::Text(name)) => {
                if module.len().max(name.len()) > limits::GLOBAL_BYTES {
                    return Err(long_name());
                }
                Ok(Global { module, name })
            }
            _ => Err(PickleProblem::Kind { at: self.at, expected: "the name of a global" }),
        }
    }

    fn call(&mut self, code: u8) -> Step {
        let (function, arguments) = match code {
            b'i' => {
                let function = self.global_lines()?;
                self.pop_mark()?;
                return self.permitted(function, Value::None);
            }
            b'o' => {
                let values = self.pop_mark()?;
                let class = values.first().copied();
                (class.ok_or(PickleProblem::EmptyStack { at: self.at })?, Value::None)
            }
            0x92 => {
                self.pop()?;
                self.pop()?;
                (self.pop()?, Value::None)
            }
            _ => {
                let arguments = self.pop()?;
                (self.pop()?, arguments)
            }
        };
        let Value::Node(number) = function else {
            return Err(PickleProblem::CallOfValue { at: self.at });
        };
        match self.nodes.get(number) {
            Some(&Node::Global(function)) => self.permitted(function, arguments),
            _ => Err(PickleProblem::CallOfValue { at: self.at }),
        }
    }

    fn permitted(&mut self, function: Global<'a>, arguments: Value<'a>) -> Step {
        if let ("collections", "OrderedDict" | "defaultdict") = (function.module, function.name) {
            let pairs = self.initial_pairs(arguments)?;
            return self.make(Node::Dict(pairs));
        }
        if !(self.permit)(function) {
            return Err(PickleProblem::Call { name: function.path() });
        }
        self.make(Node::Call { function, arguments })
    }

    /// What a dict class is called with: nothing, the maker of defaults, or (Python 2's
    /// `OrderedDict`) a list of pairs.
    fn initial_pairs(&mut self, arguments: Value<'a>) -> Step<Vec<(Value<'a>, Value<'a>)>> {
        let node = |value| match value {
            Value::Node(number) => self.nodes.get(number),
            _ => None,
        };
        let wrong = PickleProblem::Kind { at: self.at, expected: "a list of pairs" };
        let list = match node(arguments) {
            Some(Node::Tuple(items)) => match items.as_slice() {
                [] => return Ok(Vec::new()),
                [Value::Node(only)] => match self.nodes.get(*only) {
                    Some(Node::Global(_)) => return Ok(Vec::new()),
                    Some(Node::List(list)) => list,
                    _ => return Err(wrong),
                },
                _ => return Err(wrong),
            },
            _ => return Err(wrong),
        };
        // A list may be used many times; each pair has taken bytes of the pickle once.
        self.copied = self.copied.saturating_add(list.len());
        if self.copied > self.bytes.len() {
            let limit = self.bytes.len();
            return Err(PickleProblem::OverLimit { what: "pairs that are copied", limit });
        }
        let pair = |&item: &Value<'a>| match node(item) {
            Some(Node::Tuple(pair) | Node::List(pair)) => match pair.as_slice() {
                &[key, value] => Some((key, value)),
                _ => None,
            },
            _ => None,
        };
        list.iter().map(pair).collect::<Option<Vec<_>>>().ok_or(wrong)
    }

    /// The attributes of an instance. A dict's own (`_metadata`, the versions of the modules that
    /// torch keeps beside a state dict) change none of its items; of a class that is not read
    /// nothing is kept.
    fn build(&mut self) -> Step {
        self.pop()?;
        let (at, expected) = (self.at, "an instance");
        match self.top_node(expected)? {
            Node::Dict(_) | Node::Call { .. } => Ok(()),
            _ => Err(PickleProblem::Kind { at, expected }),
        }
    }
}

fn long_name() -> PickleProblem {
    PickleProblem::OverLimit { what: "bytes in a global's name", limit: limits::GLOBAL_BYTES }
}

/// A two's complement number of any length.
fn long(bytes: &[u8]) -> Value<'_> {
    let mut number = match bytes.last() {
        Some(&last) if last >= 0x80 => [0xff; 8],
        _ => [0; 8],
    };
    match number.get_mut(..bytes.len()) {
        Some(low) => {
            low.copy_from_slice(bytes);
            Value::Int(i64::from_le_bytes(number))
        }
        None => Value::Long(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only_argparse(global: Global<'_>) -> bool {
        global.module == "argparse"
    }

    fn fails(bytes: &[u8]) -> PickleProblem {
        read(bytes, only_argparse).unwrap_err()
    }

    #[test]
    fn numbers_of_every_length() {
        let root = |bytes: &[u8]| match read(bytes, only_argparse).unwrap().root {
            Value::Int(number) => Some(number),
            _ => None,
        };
        assert_eq!(root(b"\x8a\x00."), Some(0));
        assert_eq!(root(b"\x8a\x01\xff."), Some(-1));
        assert_eq!(root(b"\x8a\x02\x00\x80."), Some(-32768));
        assert_eq!(root(b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f."), Some(i64::MAX));
        assert_eq!(root(b"\x8b\x01\x00\x00\x00\x07."), Some(7));
        assert_eq!(root(b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01."), None);
        assert_eq!(root(b"J\xfe\xff\xff\xff."), Some(-2));
        let float = read(b"G\x3f\xf8\x00\x00\x00\x00\x00\x00.", only_argparse).unwrap().root;
        assert_eq!(float, Value::Float(1.5));
    }

    /// A value that is used twice is held once: the bomb costs what it is long.
    #[test]
    fn doubling_does_not_expand() {
        let mut bytes = b")".to_vec();
        for _ in 0..100_000 {
            bytes.extend(b"2\x86");
        }
        bytes.push(b'.');
        assert_eq!(read(&bytes, only_argparse).unwrap().nodes.len(), 100_001);
    }

    /// Python 2's `OrderedDict` copies a list, which may be used again and again.
    #[test]
    fn lists_are_not_copied_without_end() {
        let mut bytes = b"ccollections\nOrderedDict\nq\x00](".to_vec();
        for _ in 0..100 {
            bytes.extend(b"NN\x86");
        }
        bytes.extend(b"e\x85q\x01R");
        let once = [&bytes[..], b"."].concat();
        let pickle = read(&once, only_argparse).unwrap();
        assert_eq!(pickle.dict(pickle.root).unwrap().len(), 100);
        for _ in 0..100 {
            bytes.extend(b"0h\x00h\x01R");
        }
        bytes.push(b'.');
        let limit = bytes.len();
        assert_eq!(
            fails(&bytes),
            PickleProblem::OverLimit { what: "pairs that are copied", limit }
        );
    }

    /// Every way to call: by reduction, as a new object, by the text instructions; and from the
    /// stack's names.
    #[test]
    fn every_call_is_asked_for() {
        let call = |name: &str| PickleProblem::Call { name: name.to_owned() };
        for bytes in [
            &b"cos\nsystem\n)R."[..],
            b"cos\nsystem\n)\x81.",
            b"cos\nsystem\n)}\x92.",
            b"\x8c\x02os\x8c\x06system\x93)R.",
            b"(ios\nsystem\n.",
            b"(cos\nsystem\no.",
        ] {
            assert_eq!(fails(bytes), call("os.system"), "{bytes:?}");
        }
        assert_eq!(fails(b"c__builtin__\neval\n)R."), call("builtins.eval"));
        // What is only named, or may be called, is a value.
        assert!(read(b"cos\nsystem\n.", only_argparse).is_ok());
        assert!(read(b"cargparse\nNamespace\n)\x81}b.", only_argparse).is_ok());
        // What a call made is no function.
        assert_eq!(fails(b"cargparse\nx\n)R)R."), PickleProblem::CallOfValue { at: 15 });
    }

    #[test]
    fn names_and_marks_are_bounded() {
        let long = [b"c".to_vec(), vec![b'a'; 5000], b"\nb\n.".to_vec()].concat();
        assert_eq!(fails(&long), long_name());
        let limit = limits::GLOBAL_BYTES;
        assert_eq!(
            fails(&long).to_string(),
            format!("the pickle has more than {limit} bytes in a global's name")
        );
        // A mark keeps what is below it out of reach.
        assert_eq!(fails(b"N(\x85."), PickleProblem::EmptyStack { at: 2 });
        assert!(read(b"N(0.", only_argparse).is_ok());
    }
}
