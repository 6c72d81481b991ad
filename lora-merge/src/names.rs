//! Dotted names of modules and parameters, and the numbers in them: of layers, of experts.

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
