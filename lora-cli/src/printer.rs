//! The only place that prints: data to stdout, talk to stderr.

use std::io::{self, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Prints data.
pub(crate) fn data(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::from_stdout)
}

/// Prints a report as JSON.
pub(crate) fn json<T: Serialize>(report: &T) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(report)
        .map_err(|error| Failure::from_stdout(io::Error::other(error)))?;
    text.push('\n');
    data(&text)
}

/// Says something. A closed stderr is no reason to stop.
pub(crate) fn talk(text: &str) {
    let _closed = writeln!(io::stderr().lock(), "{text}");
}
