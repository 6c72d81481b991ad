//! The only place that prints: data to stdout, talk to stderr.

use std::io::{self, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Prints text that is data.
pub(crate) fn data(text: &str) -> Result<(), Failure> {
    print(&harmless(text))
}

fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::from_stdout)
}

/// Prints a report as JSON.
pub(crate) fn json<T: Serialize>(report: &T) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(report)
        .map_err(|error| Failure::from_stdout(io::Error::other(error)))?;
    text.push('\n');
    print(&text)
}

/// Names in files are chosen by strangers: what would command the terminal is shown instead.
fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() && character != '\n' {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// How many notes are said; `--json` has them all.
const NOTES: usize = 20;

/// Says notes, of a long list the first.
pub(crate) fn notes<T: std::fmt::Display>(notes: impl IntoIterator<Item = T>) {
    let mut rest = 0;
    for (index, note) in notes.into_iter().enumerate() {
        if index < NOTES {
            talk(&format!("note: {note}"));
        } else {
            rest += 1;
        }
    }
    if rest > 0 {
        talk(&format!("note: and {rest} more notes (--json lists them)"));
    }
}

/// Says something. A closed stderr is no reason to stop.
pub(crate) fn talk(text: &str) {
    let _closed = writeln!(io::stderr().lock(), "{}", harmless(text));
}
