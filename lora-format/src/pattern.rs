//! PEFT's `rank_pattern` and `alpha_pattern`: ordered tables keyed by patterns on module names.
//!
//! PEFT takes the first key, in file order, for which `re.match(rf"(.*\.)?({key})$", module)`
//! succeeds (`peft.utils.other.get_pattern_key`). So `q_proj` matches every module whose last
//! dotted part is `q_proj`, `proj` matches none of them, and a `.` is any character.
//!
//! The keys come from an untrusted file. A key without metacharacters other than `.` (all that
//! trainers write by themselves) is compared directly. Others must lie in the part of Python's
//! syntax that means the same here, and run in an engine with linear time. Look-around needs
//! backtracking: few keys may use it, a match gets a bounded number of steps, and all matches of a
//! table together do. What does not fit is refused by name.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use fancy_regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::limits;

/// One pattern table.
#[derive(Debug)]
pub struct PatternTable {
    path: PathBuf,
    field: &'static str,
    entries: Vec<Entry>,
    /// Indices of literal keys, by length in bytes.
    literals: HashMap<usize, Vec<usize>>,
    /// Indices of keys that match one name alone, by that name.
    exact: HashMap<String, Vec<usize>>,
    /// Indices of keys that are regular expressions.
    regexes: Vec<(usize, Pattern)>,
    /// Regex matches still allowed.
    matches: u64,
    /// Backtracking steps still allowed.
    steps: u64,
}

/// A compiled key.
#[derive(Debug)]
enum Pattern {
    Linear(Regex),
    /// The same expression with each of the limits in [`LADDER`]. The engine does not say how many
    /// steps a match took, so it is tried with few at first, and charged with what it was allowed.
    Backtracking(Box<[Regex; 3]>),
}

/// Steps that a match may take at its first, second and last try.
const LADDER: [usize; 3] =
    [limits::PATTERN_STEPS / 100, limits::PATTERN_STEPS / 10, limits::PATTERN_STEPS];

/// What a table says of a module.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PatternMatch {
    /// The value of the first key that matches.
    pub value: f64,
    /// Whether another matching key has another value.
    pub contested: bool,
}

#[derive(Debug)]
struct Entry {
    key: String,
    value: f64,
    used: bool,
}

impl PatternTable {
    /// Compiles the table `field` of the configuration at `path`; absent and null mean empty.
    ///
    /// # Errors
    /// [`Error::Config`] if it is not an object of numbers or has too many keys,
    /// [`Error::Pattern`] for a key that cannot be evaluated safely.
    pub fn compile(
        path: &Path,
        field: &'static str,
        value: Option<&Value>,
    ) -> Result<PatternTable> {
        let mut table = PatternTable {
            path: path.to_owned(),
            field,
            entries: Vec::new(),
            literals: HashMap::new(),
            exact: HashMap::new(),
            regexes: Vec::new(),
            matches: limits::PATTERN_MATCHES,
            steps: limits::PATTERN_TOTAL_STEPS,
        };
        let empty = Map::new();
        let map = match value {
            None | Some(Value::Null) => &empty,
            Some(Value::Object(map)) => map,
            Some(other) => return Err(Error::config(path, field, "an object of numbers", other)),
        };
        if map.len() > limits::PATTERN_KEYS {
            let found = Value::from(map.len());
            return Err(Error::config(path, field, "at most 100,000 keys", &found));
        }
        for (key, value) in map {
            let Some(number) = value.as_f64() else {
                let name = format!("{field}.{key}");
                return Err(Error::config(path, &name, "a number", value));
            };
            table.insert(key, number)?;
        }
        Ok(table)
    }

    fn insert(&mut self, key: &str, value: f64) -> Result<()> {
        let index = self.entries.len();
        self.entries.push(Entry { key: key.to_owned(), value, used: false });
        if key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
            self.literals.entry(key.len()).or_default().push(index);
            return Ok(());
        }
        if let Some(name) = exact_name(key) {
            self.exact.entry(name).or_default().push(index);
            return Ok(());
        }
        if key.len() > limits::PATTERN_BYTES {
            return Err(self.refuse(index, "it is too long"));
        }
        if self.regexes.len() == limits::PATTERN_REGEXES {
            return Err(self.refuse(index, "there are more than 256 regular expressions"));
        }
        if let Err(problem) = check_syntax(key) {
            return Err(self.refuse(index, problem));
        }
        let compiled = if uses_look_around(key) {
            let others = self.regexes.iter().filter(|(_, other)| other.backtracks()).count();
            if others == limits::PATTERN_LOOK_AROUNDS {
                return Err(self.refuse(index, "there are more than 16 keys with look-around"));
            }
            let [few, more, most] = LADDER.map(|steps| compile(key, steps));
            few.and_then(|few| Ok(Pattern::Backtracking(Box::new([few, more?, most?]))))
        } else {
            compile(key, limits::PATTERN_STEPS).map(Pattern::Linear)
        };
        match compiled {
            Ok(pattern) => self.regexes.push((index, pattern)),
            // The engine's own words speak of positions in the wrapped pattern.
            Err(fancy_regex::Error::ParseError(..)) => {
                return Err(self.refuse(index, "it is not a valid regular expression"));
            }
            Err(_) => return Err(self.refuse(index, "it is not valid, or too large")),
        }
        Ok(())
    }

    fn refuse(&self, index: usize, problem: &str) -> Error {
        Error::Pattern {
            path: self.path.clone(),
            field: self.field,
            key: self.entries[index].key.clone(),
            problem: problem.to_owned(),
        }
    }

    /// The value of the first key that matches `module`, as PEFT takes it, and whether a later
    /// key that matches has another value. PEFT sorts the keys when it saves an adapter, so of
    /// several that match, the first in the file need not be the first in training.
    ///
    /// # Errors
    /// [`Error::Pattern`] if a key needs more steps than it may take.
    pub fn lookup(&mut self, module: &str) -> Result<Option<PatternMatch>> {
        let mut matching = self.matching_literals(module);
        matching.extend(self.exact.get(module).into_iter().flatten());
        let (mut matches, mut steps) = (self.matches, self.steps);
        // What one step costs grows with the name, which look-around may read again and again.
        let weight = 1 + module.len() as u64 / 64;
        for (index, pattern) in &self.regexes {
            let exhausted = || self.refuse(*index, "the patterns take too many steps");
            let found = match pattern {
                Pattern::Linear(regex) => {
                    matches = matches.checked_sub(weight).ok_or_else(exhausted)?;
                    regex.is_match(module).ok()
                }
                Pattern::Backtracking(regexes) => {
                    let mut found = None;
                    for (regex, limit) in regexes.iter().zip(LADDER) {
                        let cost = limit as u64 * weight;
                        steps = steps.checked_sub(cost).ok_or_else(exhausted)?;
                        found = regex.is_match(module).ok();
                        if found.is_some() {
                            break;
                        }
                    }
                    found
                }
            };
            match found {
                Some(true) => matching.push(*index),
                Some(false) => {}
                None => return Err(self.refuse(*index, "it backtracks too far")),
            }
        }
        (self.matches, self.steps) = (matches, steps);
        let Some(&first) = matching.iter().min() else {
            return Ok(None);
        };
        let value = self.entries[first].value;
        let contested = matching.iter().any(|&index| self.entries[index].value != value);
        for index in matching {
            self.entries[index].used = true;
        }
        Ok(Some(PatternMatch { value, contested }))
    }

    /// The literal keys that equal `module` or a dotted suffix of it, `.` being a wildcard.
    fn matching_literals(&self, module: &str) -> Vec<usize> {
        let name = module.as_bytes();
        let starts = (0..name.len()).filter(|&at| at == 0 || name[at - 1] == b'.');
        starts
            .flat_map(|at| {
                let suffix = &name[at..];
                let keys = self.literals.get(&suffix.len()).map_or(&[][..], Vec::as_slice);
                keys.iter().copied().filter(move |&index| {
                    let key = self.entries[index].key.bytes();
                    key.zip(suffix).all(|(key, &byte)| key == b'.' || key == byte)
                })
            })
            .collect()
    }

    /// The keys that have matched nothing so far.
    pub fn dead_keys(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().filter(|entry| !entry.used).map(|entry| entry.key.as_str())
    }
}

impl Pattern {
    fn backtracks(&self) -> bool {
        matches!(self, Pattern::Backtracking(_))
    }
}

/// The key as PEFT wraps it.
/// A pattern that all of a name must match, as Python's `re.fullmatch` has it.
pub(crate) struct Whole(Regex);

impl Whole {
    /// `None` of a pattern that is malformed or too long to be tried.
    pub(crate) fn compile(pattern: &str) -> Option<Whole> {
        if pattern.len() > limits::PATTERN_BYTES {
            return None;
        }
        build(&format!(r"\A(?:{pattern})\z"), limits::PATTERN_STEPS).ok().map(Whole)
    }

    /// Whether it matches; a name on which that takes too long counts as matched.
    pub(crate) fn matches(&self, name: &str) -> bool {
        self.0.is_match(name).unwrap_or(true)
    }
}

fn compile(key: &str, steps: usize) -> Result<Regex, fancy_regex::Error> {
    build(&format!(r"^(?:.*\.)?(?:{key})$"), steps)
}

fn build(pattern: &str, steps: usize) -> Result<Regex, fancy_regex::Error> {
    RegexBuilder::new(pattern)
        .backtrack_limit(steps)
        .delegate_size_limit(1 << 20)
        .delegate_dfa_size_limit(1 << 20)
        .build()
}

/// Whether a key may need backtracking. Nothing else that needs it passes [`check_syntax`]; a
/// look-around that is only spelled so, as in `[(?=]`, costs no more than the look of it.
fn uses_look_around(key: &str) -> bool {
    ["(?=", "(?!", "(?<"].iter().any(|form| key.contains(form))
}

/// Whether a name, taken for a pattern, means itself (a dot means any character besides).
pub(crate) fn is_plain(name: &str) -> bool {
    !name.contains(|character| character != '.' && METACHARACTERS.contains(character))
}

/// The key that matches the module called `name` and no other. Anchored: the name of one module
/// may be a dotted suffix of another's.
pub(crate) fn exactly(name: &str) -> String {
    let mut key = "^".to_owned();
    for character in name.chars() {
        if METACHARACTERS.contains(character) {
            key.push('\\');
        }
        key.push(character);
    }
    key
}

/// The only name that `key` matches, if it is a key as [`exactly`] makes them.
fn exact_name(key: &str) -> Option<String> {
    let mut rest = key.strip_prefix('^')?.chars();
    let mut name = String::new();
    while let Some(character) = rest.next() {
        name.push(match character {
            '\\' => rest.next().filter(|&escaped| METACHARACTERS.contains(escaped))?,
            _ if METACHARACTERS.contains(character) => return None,
            _ => character,
        });
    }
    Some(name)
}

/// What Python's patterns give a meaning to outside character classes.
const METACHARACTERS: &str = r".^$*+?{}[]\|()";

/// Accepts the part of Python's pattern syntax that means the same in the engine used here.
fn check_syntax(key: &str) -> Result<(), &'static str> {
    let mut rest = key;
    let mut in_class = false;
    while let Some(first) = rest.chars().next() {
        let tail = &rest[first.len_utf8()..];
        let next = tail.chars().next();
        match first {
            '\\' => {
                let Some(escaped) = next else {
                    return Err("it ends in a backslash");
                };
                let known = "dDwWsSbBAnrtfv".contains(escaped);
                let literal = !escaped.is_alphanumeric() && !"<>".contains(escaped);
                if !known && !literal {
                    return Err("it uses an escape that is not supported (a back-reference?)");
                }
                rest = &tail[escaped.len_utf8()..];
                continue;
            }
            '[' if in_class => return Err("it nests `[` in a character class"),
            '[' => {
                in_class = true;
                let body = tail.strip_prefix('^').unwrap_or(tail);
                if body.starts_with(']') {
                    return Err("a character class begins with `]`");
                }
            }
            ']' => in_class = false,
            '&' | '-' | '~' | '|' if in_class && next == Some(first) => {
                return Err("a character class holds a doubled operator character");
            }
            _ if in_class => {}
            '(' if next == Some('?') => {
                let supported = ["?:", "?=", "?!", "?<=", "?<!", "?P<"];
                if !supported.iter().any(|form| tail.starts_with(form)) {
                    return Err("it uses a group extension that is not supported");
                }
            }
            '*' | '+' | '?' | '}' if next == Some('+') => {
                return Err("it uses a possessive quantifier");
            }
            '{' => {
                let Some((counts, _)) = tail.split_once('}') else {
                    return Err("`{` is not a repetition count");
                };
                let (least, most) = counts.split_once(',').unwrap_or((counts, ""));
                let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
                if least.is_empty() || !number(least) || !number(most) {
                    return Err("`{` is not a repetition count");
                }
            }
            _ => {}
        }
        rest = tail;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn table(value: Value) -> Result<PatternTable> {
        PatternTable::compile(Path::new("adapter_config.json"), "rank_pattern", Some(&value))
    }

    const MODULE: &str = "model.layers.1.self_attn.q_proj";

    #[test]
    fn keys_match_as_in_peft() {
        // Each verdict was read off `re.match(rf"(.*\.)?({key})$", module)`.
        for (key, expected) in [
            ("q_proj", true),
            ("self_attn.q_proj", true),
            ("self_attn_q_proj", false),
            ("model.layers.1.self_attn.q_proj", true),
            ("model.layers.1.self.attn.q.proj", true), // `.` is any character
            ("^model.layers.1.self_attn.q_proj", true),
            ("^q_proj", false),
            ("proj", false),
            (".*proj", true),
            ("base_model.model.model.layers.1.self_attn.q_proj", false),
            (r".*\.1\..*q_proj", true),
            (r"layers\.[0-9]+\.self_attn\.(q|k)_proj", true),
            ("q_proj|k_proj", true),
            ("(?!k)._proj", true),
            ("(?!q)._proj", false),
            ("[qk]_proj", true),
            ("q_pro.", true),
            ("q_proj$", true),
        ] {
            let found = table(json!({ key: 4 })).unwrap().lookup(MODULE).unwrap();
            assert_eq!(found.is_some(), expected, "{key}");
        }
    }

    #[test]
    fn the_first_key_wins_whatever_its_kind() {
        let contested = |value| Some(PatternMatch { value, contested: true });
        let mut patterns = table(json!({".*q_proj": 1, "q_proj": 2, "k_proj": 3})).unwrap();
        assert_eq!(patterns.lookup(MODULE).unwrap(), contested(1.0));
        assert_eq!(patterns.dead_keys().collect::<Vec<_>>(), ["k_proj"]);
        let mut patterns = table(json!({"q_proj": 2, ".*q_proj": 1})).unwrap();
        assert_eq!(patterns.lookup(MODULE).unwrap(), contested(2.0));
        let mut patterns = table(json!({"q_proj": 2, ".*q_proj": 2})).unwrap();
        assert!(!patterns.lookup(MODULE).unwrap().unwrap().contested);
    }

    #[test]
    fn hostile_keys_end_quickly_or_are_refused() {
        let long = format!("{}b", "a".repeat(5000));
        let mut linear = table(json!({"(a+)+$": 1, "(a|a)*c": 2, "(.*)(.*)(.*)(.*)d": 3})).unwrap();
        assert_eq!(linear.lookup(&long).unwrap(), None);

        let mut backtracking = table(json!({"(?=b)(a+)+c|(?=a)(a+)+(a+)+(a+)+$": 1})).unwrap();
        let error = backtracking.lookup(&long).unwrap_err();
        assert!(matches!(error, Error::Pattern { .. }), "{error}");
        assert!(table(json!({"(?:(?:a{1000}){1000}){1000}": 1})).is_err());
    }

    #[test]
    fn many_look_arounds_end_quickly_or_are_refused() {
        let started = std::time::Instant::now();
        let keys = |count: usize| {
            let key = |index| (format!("(?:(?=a)a)*(?:(?=a)a)*b{{{index}}}"), json!(index));
            Value::Object((1..=count).map(key).collect())
        };
        let error = table(keys(256)).unwrap_err().to_string();
        assert!(error.contains("more than 16 keys with look-around"), "{error}");
        for length in [20, 60, 100, 300, 5000, 16 * 1024] {
            let mut patterns = table(keys(16)).unwrap();
            let name = "a".repeat(length);
            let ended = (0..100_000).find_map(|_| patterns.lookup(&name).err());
            let error = ended.unwrap().to_string();
            assert!(error.contains("backtrack") || error.contains("too many steps"), "{error}");
        }
        for key in [
            "(?:(?:(?=a)(?!b)){1000}){1000}",
            "(?:(?:(?=a)|b){1000}){1000}",
            "(?:(?:(?:(?=a)b?){1000}){1000}){1000}",
            "(?:(?:(?:(?=a)(?:b|)){1000}){1000}){1000}",
        ] {
            let error = table(json!({ key: 1 })).unwrap().lookup(&"a".repeat(1000)).unwrap_err();
            assert!(error.to_string().contains("backtracks too far"), "{key}: {error}");
        }
        let seconds = started.elapsed().as_secs_f64();
        println!("{seconds:.2} s");
        assert!(seconds < 60.0, "{seconds} s");
    }

    #[test]
    fn look_arounds_as_people_write_them_serve_a_large_model() {
        let mut patterns = table(json!({
            r"model\.layers\.(?!1\b)\d+\.mlp\.experts\.\d+\.(?!gate)\w+": 1,
            r".*(?<!k)_proj": 2,
        }))
        .unwrap();
        let found = (0..36_096).filter(|index| {
            let (layer, expert) = (index / 384, index % 384);
            let module = format!("base.model.layers.{layer}.mlp.experts.{expert}.up_proj");
            patterns.lookup(&module).unwrap().unwrap().contested
        });
        assert_eq!(found.count(), 36_096 - 384);
    }

    #[test]
    fn exact_keys_match_one_name_each() {
        for name in ["a.b", "a+b", r"a\b", "(a|b)", "a{2}", "[a]", "^a$", "<a>"] {
            let key = exactly(name);
            assert_eq!(exact_name(&key).as_deref(), Some(name), "{key}");
            let regex = compile(&key, 100).unwrap();
            assert!(regex.is_match(name).unwrap(), "{key}");
            assert!(!regex.is_match(&format!("x.{name}")).unwrap(), "{key}");
        }
        assert_eq!(exact_name("^a.b"), None);
        assert_eq!(exact_name(r"a\.b"), None);
        assert_eq!(exact_name(r"^a\d"), None);
    }

    #[test]
    fn what_means_something_else_here_is_refused_by_name() {
        for key in [
            r"(a)\1", r"\Z", r"\<q", "(?i)Q", "(?P=x)", "(?>a)", "[[a]", "[a&&b]", "a++", "a{,3}",
            "x{y", "(", r"q\", "[a--b]",
        ] {
            let error = table(json!({ key: 4 })).unwrap_err();
            assert!(error.to_string().contains("rank_pattern"), "{key}: {error}");
        }
        assert!(table(json!([1])).is_err());
        assert!(table(json!({"q_proj": "4"})).is_err());
    }
}
