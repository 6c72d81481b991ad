//! Text: escaping, shortening, how wide it is, and numbers as text.

use std::borrow::Cow;
use std::fmt::Write;

/// The font size of a figure, in pixels.
pub(super) const SIZE: f64 = 12.5;

/// The font size of a title, which is bold.
pub(super) const TITLE: f64 = 16.0;

/// The font size of what is less important, or has less room.
pub(super) const SMALL: f64 = 11.0;

/// The longest name that a tooltip shows in full, in characters.
pub(super) const TIP: usize = 400;

/// Text as it may stand in an element or in a quoted attribute, in SVG and HTML alike.
///
/// Names in files are chosen by strangers. Besides the five characters that mean something to a
/// parser, all that XML forbids and all that reorders or hides text is spelt out, as in
/// `\u{202e}`.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            character if unseen(character) => escaped.extend(character.escape_unicode()),
            character => escaped.push(character),
        }
    }
    escaped
}

/// Characters that command a display instead of being shown, and those that XML does not allow.
fn unseen(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fffe}'
                | '\u{ffff}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// Text of at most `limit` characters: names differ at both ends, so the middle goes.
pub(super) fn shorten(text: &str, limit: usize) -> Cow<'_, str> {
    let limit = limit.max(3);
    // Counting stops where the answer is known: a name may be very long.
    if text.chars().nth(limit).is_none() {
        return Cow::Borrowed(text);
    }
    let tail = (limit - 1) / 2;
    let head = limit - 1 - tail;
    let start: String = text.chars().take(head).collect();
    let mut end: Vec<char> = text.chars().rev().take(tail).collect();
    end.reverse();
    Cow::Owned(format!("{start}…{}", end.into_iter().collect::<String>()))
}

/// Text that is at most `width` pixels wide at a font size.
pub(super) fn fit(text: &str, size: f64, width: f64) -> Cow<'_, str> {
    // No character is narrower than a quarter of the font size.
    let most = (width / (0.25 * size)).max(3.0) as usize;
    let mut limit = most.min(400);
    loop {
        let shortened = shorten(text, limit);
        let wide = text_width(&shortened, size);
        if wide <= width || limit <= 3 {
            return shortened;
        }
        let shown = shortened.chars().count();
        limit = ((shown as f64 * width / wide) as usize).min(shown - 1).max(3);
    }
}

/// Names without the parts that all of them begin and end with, and what was left out, with a `*` in
/// their place: of `h.0.attn`, `h.1.attn` these are `0`, `1` and `h.*.attn`. Parts end with a dot.
pub(super) fn told_apart<'a>(names: &[&'a str]) -> (Vec<&'a str>, Option<String>) {
    let whole = || (names.to_vec(), None);
    let Some((first, rest)) = names.split_first() else { return whole() };
    if rest.iter().all(|name| name == first) {
        return whole();
    }
    let (mut head, mut tail) = (first.len(), first.len());
    for name in rest {
        let same = |one: &[u8], other: &[u8]| {
            one.iter().zip(other).take_while(|(one, other)| one == other).count()
        };
        head = head.min(same(first.as_bytes(), name.as_bytes()));
        let backwards = |name: &str| name.bytes().rev().collect::<Vec<u8>>();
        tail = tail.min(same(&backwards(first), &backwards(name)));
    }
    // Whole parts only: back to the dot before and on to the dot behind.
    let head =
        first.as_bytes()[..head].iter().rposition(|&byte| byte == b'.').map_or(0, |dot| dot + 1);
    let tail_start = first.len() - tail;
    let dot = first.as_bytes()[tail_start..].iter().position(|&byte| byte == b'.');
    let tail = dot.map_or(0, |dot| tail - dot);
    // A name that is nothing else would have no name left.
    if head + tail == 0 || names.iter().any(|name| name.len() <= head + tail) {
        return whole();
    }
    let short = names.iter().map(|name| name.get(head..name.len() - tail).unwrap_or(name));
    let (before, after) = (&first[..head], &first[first.len() - tail..]);
    (short.collect(), Some(format!("{before}*{after}")))
}

/// About how wide text is in a sans-serif font, in pixels; rather too wide than too narrow, since the
/// font is the reader's.
pub(super) fn text_width(text: &str, size: f64) -> f64 {
    let ems: f64 = text
        .chars()
        .map(|character| match character {
            'i' | 'j' | 'l' | 'I' | '.' | ',' | ':' | ';' | '\'' | '|' | '!' => 0.31,
            'f' | 'r' | 't' | '(' | ')' | '[' | ']' | '/' | '-' | ' ' => 0.41,
            'm' | 'w' | 'M' | 'W' | '@' | '%' | '…' => 0.92,
            'A'..='Z' => 0.72,
            '_' | '0'..='9' | ' '..='~' => 0.6,
            '\u{1100}'..='\u{11ff}' | '\u{2e80}'..='\u{ffff}' | '\u{1f000}'.. => 1.1,
            _ => 0.68,
        })
        .sum();
    ems * size
}

/// Breaks text into lines that are at most `width` pixels wide, between words where it can.
pub(super) fn wrap(text: &str, size: f64, width: f64, most: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        let word = fit(word, size, width);
        let longer = if line.is_empty() { word.to_string() } else { format!("{line} {word}") };
        if line.is_empty() || text_width(&longer, size) <= width {
            line = longer;
            continue;
        }
        if lines.len() + 1 == most {
            line.push_str(" …");
            break;
        }
        lines.push(std::mem::replace(&mut line, word.into_owned()));
    }
    if !line.is_empty() {
        lines.push(line);
    }
    lines
}

/// A number to read: four significant digits, no trailing zeros, an exponent where plain digits
/// would be long.
pub(crate) fn number(value: f64) -> String {
    rounded(value, 4)
}

/// A number of so many significant digits.
pub(super) fn rounded(value: f64, digits: usize) -> String {
    if value.is_nan() {
        return "not a number".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "∞".to_owned() } else { "−∞".to_owned() };
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    // Rounding may carry into a digit more, so the exponent is that of the rounded number.
    let rounded = format!("{value:.*e}", digits - 1);
    let (mantissa, exponent) = rounded.split_once('e').unwrap_or((&rounded, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let digits = if (-4..=6).contains(&exponent) {
        trimmed(format!("{value:.*}", (digits as i32 - 1 - exponent).max(0) as usize))
    } else {
        format!("{}e{exponent}", trimmed(mantissa.to_owned()))
    };
    digits.replace('-', "−")
}

/// Digits without the zeros that end a fraction.
pub(super) fn trimmed(digits: String) -> String {
    if !digits.contains('.') {
        return digits;
    }
    digits.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A coordinate: a tenth of a pixel is finer than what is seen.
pub(super) fn coordinate(value: f64) -> String {
    let tenths = if value.is_finite() { (value.clamp(-1e6, 1e6) * 10.0).round() as i64 } else { 0 };
    let (whole, part) = (tenths.abs() / 10, tenths.abs() % 10);
    let mut text = String::new();
    if tenths < 0 {
        text.push('-');
    }
    let _infallible = match part {
        0 => write!(text, "{whole}"),
        _ => write!(text, "{whole}.{part}"),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_means_something_to_a_parser_or_a_display_is_spelt_out() {
        assert_eq!(escape("a<b>&\"c'"), "a&lt;b&gt;&amp;&quot;c&#39;");
        assert_eq!(escape("x\u{1b}[2J\u{0}\n"), "x\\u{1b}[2J\\u{0}\\u{a}");
        assert_eq!(escape("\u{202e}gpj.exe\u{2066}\u{feff}"), "\\u{202e}gpj.exe\\u{2066}\\u{feff}");
        assert_eq!(escape("‖ΔW‖² 模型"), "‖ΔW‖² 模型");
    }

    #[test]
    fn the_middle_of_a_long_name_goes() {
        assert_eq!(shorten("abcdefghij", 10), "abcdefghij");
        assert_eq!(shorten("abcdefghijk", 10), "abcde…hijk");
        assert_eq!(shorten("äöüäöüäöüäöü", 5), "äö…öü");
        assert_eq!(shorten("abcdef", 0), "a…f");
        let long = "x".repeat(10_000);
        for width in [0.0, 1.0, 30.0, 200.0, 1e9] {
            let shown = fit(&long, 12.0, width);
            assert!(text_width(&shown, 12.0) <= width.max(30.0), "{width}");
        }
        assert_eq!(fit("short", 12.0, 100.0), "short");
    }

    #[test]
    fn names_are_told_apart_by_what_differs() {
        let apart = |names: &[&'static str]| {
            let (names, common) = told_apart(names);
            (names.join(" "), common.unwrap_or_default())
        };
        let layers = ["h.0.attn.w", "h.1.attn.w", "h.11.attn.w"];
        assert_eq!(apart(&layers), ("0 1 11".to_owned(), "h.*.attn.w".to_owned()));
        assert_eq!(
            apart(&["a.q_proj", "a.k_proj"]),
            ("q_proj k_proj".to_owned(), "a.*".to_owned())
        );
        assert_eq!(apart(&["q_proj", "k_proj"]), ("q_proj k_proj".to_owned(), String::new()));
        // What would be left without a name keeps all of it.
        assert_eq!(apart(&["a.b", "a.b.b"]), ("a.b a.b.b".to_owned(), String::new()));
        assert_eq!(apart(&["a.", "a.b"]), ("a. a.b".to_owned(), String::new()));
        assert_eq!(apart(&["a.b", "a.b"]), ("a.b a.b".to_owned(), String::new()));
        assert_eq!(apart(&["ä.ö.x", "ä.ü.x"]), ("ö ü".to_owned(), "ä.*.x".to_owned()));
        assert_eq!(apart(&["", "a"]), (" a".to_owned(), String::new()));
        assert_eq!(told_apart(&[]).0.len(), 0);
    }

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (-0.0, "0"),
            (64.0, "64"),
            (0.95, "0.95"),
            (-0.123_456, "−0.1235"),
            (12_345.678, "12346"),
            (9_999_999.0, "1e7"),
            (1.5e-9, "1.5e−9"),
            (f64::NAN, "not a number"),
            (f64::NEG_INFINITY, "−∞"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn text_is_wrapped_between_words() {
        assert_eq!(wrap("one two three", 12.0, 1000.0, 3), ["one two three"]);
        let lines = wrap("one two three four five six", 12.0, 60.0, 2);
        assert_eq!(lines.len(), 2);
        assert!(lines[1].ends_with('…'), "{lines:?}");
        assert!(wrap(&"x".repeat(10_000), 12.0, 100.0, 3)[0].chars().count() < 40);
        assert!(wrap("  ", 12.0, 100.0, 3).is_empty());
    }

    #[test]
    fn coordinates_have_a_decimal_at_most() {
        let cases =
            [(0.04, "0"), (-0.26, "-0.3"), (12.0, "12"), (f64::NAN, "0"), (1e99, "1000000")];
        for (value, text) in cases {
            assert_eq!(coordinate(value), text);
        }
    }
}
