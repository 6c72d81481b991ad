//! Dotted names of modules and parameters, and the numbers in them: of layers, of experts.

use std::collections::BTreeSet;

/// Whether a dotted part is a number.
pub(crate) fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())
}

/// A name, or a text with names in it, with its numbered parts replaced by `*`: what names that
/// differ only in their layer have in common.
pub fn numberless(name: &str) -> String {
    let parts = name.split('.').map(|part| if is_number(part) { "*" } else { part });
    parts.collect::<Vec<_>>().join(".")
}

/// How many parts of names are suggested.
const NEAREST: usize = 3;

/// The longest pattern and the longest part that are compared.
const LONGEST: usize = 64;

/// Parts of names that a pattern that matches none may have meant: those that differ from its last
/// part by a third of its letters at most, the nearest first.
pub(crate) fn nearest<'a>(pattern: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let wanted = pattern.rsplit('.').next().unwrap_or(pattern);
    let wanted = wanted.trim_matches(|letter: char| !letter.is_alphanumeric() && letter != '_');
    let most = wanted.chars().count().div_ceil(3);
    if wanted.is_empty() || wanted.len() > LONGEST {
        return Vec::new();
    }
    let parts: BTreeSet<&str> = names.into_iter().flat_map(|name| name.split('.')).collect();
    let parts = parts.into_iter().filter(|part| part.len() <= LONGEST && !is_number(part));
    let mut near: Vec<(usize, &str)> = parts.map(|part| (edits(wanted, part), part)).collect();
    near.retain(|&(edits, _)| edits <= most);
    near.sort_unstable();
    near.into_iter().take(NEAREST).map(|(_, part)| part).collect()
}

/// How many letters have to be put in, taken out, replaced or swapped with the next to make one text of
/// another (the restricted Damerau–Levenshtein distance).
fn edits(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let first: Vec<usize> = (0..=other.len()).collect();
    let mut rows = vec![first];
    for (i, a) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in other.iter().enumerate() {
            let replaced = rows[i][j] + usize::from(a != b);
            let mut least = replaced.min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *a == other[j - 1] && one[i - 1] == *b {
                least = least.min(rows[i - 1][j - 1] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[one.len()][other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistyped_parts_are_found() {
        let names = ["model.layers.0.q_proj.weight", "model.layers.1.k_proj.weight", "norms"];
        for (pattern, near) in [
            ("k_prj", &["k_proj", "q_proj"][..]),
            (r".*\.q_porj", &["q_proj", "k_proj"]),
            ("nroms", &["norms"]),
            ("embed_tokens", &[]),
            (".*", &[]),
        ] {
            assert_eq!(nearest(pattern, names), near, "{pattern}");
        }
        assert_eq!((edits("abc", "acb"), edits("", "ab"), edits("kitten", "sitting")), (1, 2, 3));
    }
}
