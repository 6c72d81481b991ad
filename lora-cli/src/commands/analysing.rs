//! What `spectrum` and `compare` have in common: what they read, what they write, and tables of text.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use lora_format::checkpoint::Checkpoint;
use lora_format::io::atomic;
use lora_format::{Adapter, DetectProblem, Error};
use lora_merge::analysis::AnalysisError;
use lora_merge::spectrum::Reached;

use super::{AdapterArguments, WriteArguments, check_file, is_same, refuse_damaged};
use crate::failure::Failure;
use crate::picture::{self, Figure, Page, Theme, number};
use crate::{printer, progress};

/// How many pixels of a PNG one of the SVG takes.
const PNG_SCALE: f32 = 2.0;

/// What analyses write besides what they print.
#[derive(Debug, Args)]
pub(crate) struct OutputArguments {
    /// Write the numbers of every tensor as a table
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Draw one figure, of the tensor that --tensor names or of all of them: FILE.svg or FILE.png
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Write a page with all figures and tables, which loads nothing
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// The tensor that --plot shows: its name, or an end of it that no other has
    #[arg(long, value_name = "NAME", requires = "plot")]
    tensor: Option<String>,
    /// Print everything as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    write: WriteArguments,
    /// Say nothing but errors and warnings
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Worker threads [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub(crate) threads: usize,
}

/// What there is to write, made when it is asked for.
pub(crate) struct Outputs<'a> {
    /// A table.
    pub(crate) csv: &'a dyn Fn() -> String,
    /// A figure of the tensor of this index, or of all.
    pub(crate) plot: &'a dyn Fn(Option<usize>) -> Figure,
    /// The page.
    pub(crate) page: &'a dyn Fn() -> Page,
    /// The tensors.
    pub(crate) names: Vec<&'a str>,
}

impl OutputArguments {
    /// Refuses what could not be written in the end.
    pub(crate) fn check(&self, inputs: &[&Path]) -> Result<(), Failure> {
        let outputs = [("--csv", &self.csv), ("--plot", &self.plot), ("--report", &self.report)];
        let outputs = outputs.map(|(option, path)| Some((option, path.as_deref()?)));
        let outputs: Vec<(&str, &Path)> = outputs.into_iter().flatten().collect();
        for (index, &(option, path)) in outputs.iter().enumerate() {
            check_file(option, path, &self.write, inputs)?;
            if let Some((other, _)) = outputs[..index].iter().find(|one| is_same(one.1, path)) {
                let message = format!("{other} and {option} name one file: {}", path.display());
                return Err(Failure::new(message, Some("give each a path of its own")));
            }
        }
        if let Some(report) = &self.report
            && !has_extension(report, &["html", "htm"])
        {
            let message =
                format!("{}: a report is a page, and this is not .html", report.display());
            return Err(Failure::new(message, Some("name it so: --report FILE.html")));
        }
        if let Some(plot) = &self.plot {
            Picture::of(plot)?;
        }
        Ok(())
    }

    /// Refuses a `--tensor` that is none of these, before they are analysed.
    pub(crate) fn check_tensor(&self, names: &[&str]) -> Result<(), Failure> {
        match &self.tensor {
            Some(wanted) if !names.iter().any(|name| is_meant(wanted, name)) => {
                pick(wanted, names).map(|_| ())
            }
            _ => Ok(()),
        }
    }

    /// Writes what was asked for.
    pub(crate) fn write(&self, outputs: &Outputs<'_>) -> Result<(), Failure> {
        let mut written = Vec::new();
        let mut put = |path: &Path, bytes: &[u8]| -> Result<(), Failure> {
            let (overwrite, durability) = (self.write.overwrite(), self.write.durability());
            atomic::write(path, &[bytes], overwrite, durability)?;
            written.push(path.display().to_string());
            Ok(())
        };
        // What can fail without writing comes first.
        if let Some(path) = &self.plot {
            let index =
                self.tensor.as_deref().map(|name| pick(name, &outputs.names)).transpose()?;
            let figure = (outputs.plot)(index);
            match Picture::of(path)? {
                Picture::Svg => put(path, picture::svg(&figure, Theme::Auto).as_bytes())?,
                Picture::Png => {
                    let bytes =
                        picture::png(&figure, Theme::Light, PNG_SCALE).map_err(|error| {
                            let message = format!("{}: {error}", path.display());
                            Failure::new(message, Some("--plot FILE.svg has no such limits"))
                        })?;
                    put(path, &bytes)?;
                }
            }
        }
        if let Some(path) = &self.csv {
            put(path, (outputs.csv)().as_bytes())?;
        }
        if let Some(path) = &self.report {
            put(path, picture::html(&(outputs.page)()).as_bytes())?;
        }
        if !written.is_empty() && !self.quiet {
            printer::talk(&format!("wrote {}", written.join(", ")));
        }
        Ok(())
    }
}

/// The kinds of files that a figure is written as.
enum Picture {
    Svg,
    Png,
}

impl Picture {
    fn of(path: &Path) -> Result<Picture, Failure> {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        match extension.as_str() {
            "svg" => Ok(Picture::Svg),
            "png" => Ok(Picture::Png),
            _ => {
                let message = format!("{}: neither .svg nor .png", path.display());
                Err(Failure::new(message, Some("the name says what is drawn: --plot FILE.svg")))
            }
        }
    }
}

/// Whether a path ends in one of these.
fn has_extension(path: &Path, all: &[&str]) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    all.contains(&extension.as_str())
}

/// Whether a text is a tensor's name or an end of it, with `.weight` or without.
fn is_meant(wanted: &str, name: &str) -> bool {
    let ends = |name: &str| name == wanted || name.ends_with(&format!(".{wanted}"));
    ends(name) || name.strip_suffix(".weight").is_some_and(ends)
}

/// The tensor that a name, or an end of one, means.
fn pick(wanted: &str, names: &[&str]) -> Result<usize, Failure> {
    if let Some(index) = names.iter().position(|name| *name == wanted) {
        return Ok(index);
    }
    let mut found = names.iter().enumerate().filter(|(_, name)| is_meant(wanted, name));
    match (found.next(), found.next()) {
        (Some((index, _)), None) => Ok(index),
        (Some((_, first)), Some((_, second))) => {
            let message = format!("--tensor {wanted}: several, such as `{first}` and `{second}`");
            Err(Failure::new(message, Some("give more of the name")))
        }
        (None, _) => {
            let examples: Vec<String> =
                names.iter().take(3).map(|name| format!("`{name}`")).collect();
            let message = format!("--tensor {wanted}: no such tensor was analysed");
            let hint = format!("there are {}: {}", names.len(), examples.join(", "));
            Err(Failure::new(message, Some(&hint)))
        }
    }
}

/// An adapter, or `None` if the path is a model.
pub(crate) fn adapter(path: &Path, options: &AdapterArguments) -> Result<Option<Adapter>, Failure> {
    match lora_format::read(path, &options.read_options(None)?) {
        Ok(adapter) => {
            refuse_damaged(&adapter)?;
            Ok(Some(adapter))
        }
        Err(Error::Unrecognised {
            problem: DetectProblem::NotAnAdapter { .. } | DetectProblem::NoAdapter,
            ..
        }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A model; of an adapter, a failure with this hint.
pub(crate) fn model(path: &Path, hint: &str) -> Result<Checkpoint, Failure> {
    let is_adapter = || lora_format::read(path, &lora_format::ReadOptions::default()).is_ok();
    match Checkpoint::open(path) {
        Err(Error::Unrecognised { problem: DetectProblem::NoModel, .. }) if is_adapter() => {
            let message = format!("{}: an adapter, and a model is needed here", path.display());
            Err(Failure::new(message, Some(hint)))
        }
        Ok(_) if is_adapter() => {
            let message = format!("{}: an adapter, and a model is needed here", path.display());
            Err(Failure::new(message, Some(hint)))
        }
        other => Ok(other?),
    }
}

impl From<AnalysisError> for Failure {
    fn from(error: AnalysisError) -> Failure {
        match error {
            AnalysisError::Merge(error) => error.into(),
            error => Failure::new(error.to_string(), None),
        }
    }
}

/// Does an analysis that Ctrl-C stops, with a bar if the bytes of the work are known.
pub(crate) fn watch<T: Send>(
    arguments: &OutputArguments,
    total: Option<u64>,
    work: impl FnOnce(&lora_merge::engine::Progress) -> T + Send,
) -> T {
    let progress = std::sync::Arc::new(lora_merge::engine::Progress::default());
    let quiet = arguments.quiet || total.is_none();
    progress::watch(total.unwrap_or(0), quiet, &progress, || {
        lora_merge::analysis::on_threads(arguments.threads, || work(&progress))
    })
}

/// A rank as text: `> 256` where it is not among the values that are known.
pub(crate) fn rank(reached: Reached) -> String {
    match reached {
        Reached::At(rank) => rank.to_string(),
        Reached::Beyond(known) => format!("> {known}"),
    }
}

/// A share as text.
pub(crate) fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    if !percent.is_finite() {
        return "∞".to_owned();
    }
    let decimals = match percent.abs() {
        0.0 => 0,
        size if size < 0.01 => return format!("{} %", number(percent)),
        size if size < 1.0 => 3,
        size if size < 10.0 => 2,
        _ => 1,
    };
    format!("{percent:.decimals$} %")
}

/// A number, or a dash.
pub(crate) fn dash<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "–".to_owned(), text)
}

/// A table of text: the first column from the left, the others from the right.
pub(crate) struct Grid {
    rows: Vec<Vec<String>>,
}

impl Grid {
    pub(crate) fn new(header: &[&str]) -> Grid {
        Grid { rows: vec![header.iter().map(|&text| text.to_owned()).collect()] }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table, its rows indented below its header, with a line that says what was left out.
    pub(crate) fn text(&self, left_out: usize) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().enumerate().filter_map(|(index, row)| {
                let indent = if column == 0 && index > 0 { 2 } else { 0 };
                row.get(column).map(|cell| cell.chars().count() + indent)
            });
            cells.max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let indent = if column == 0 && index > 0 { "  " } else { "" };
                let blank = widths[column] - cell.chars().count() - indent.len();
                let blanks = " ".repeat(blank);
                let _infallible = match column {
                    0 => write!(line, "{indent}{cell}{blanks}"),
                    _ => write!(line, "  {blanks}{cell}"),
                };
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        if left_out > 0 {
            let _infallible = writeln!(out, "  and {left_out} more (--json and --csv list them)");
        }
        out
    }
}

/// Lines of comma-separated values, as RFC 4180 quotes them.
pub(crate) fn csv(rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().map(|cell| quoted(cell)).collect();
        out.push_str(&cells.join(","));
        out.push_str("\r\n");
    }
    out
}

fn quoted(cell: &str) -> String {
    if cell.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.to_owned()
    }
}

/// A number for machines; nothing where there is none.
pub(crate) fn plain(value: Option<f64>) -> String {
    value.filter(|value| value.is_finite()).map_or_else(String::new, |value| value.to_string())
}

/// A number that JSON has.
pub(crate) fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_a_few_digits() {
        for (share, text) in
            [(0.0, "0 %"), (0.5, "50.0 %"), (0.0123, "1.23 %"), (0.00123, "0.123 %")]
        {
            assert_eq!(percent(share), text);
        }
        assert_eq!(percent(f64::INFINITY), "∞");
    }

    #[test]
    fn a_table_is_aligned_and_says_what_it_leaves_out() {
        let mut grid = Grid::new(&["name", "n"]);
        grid.row(vec!["ab".to_owned(), "1".to_owned()]);
        grid.row(vec!["é".to_owned(), "100".to_owned()]);
        assert_eq!(
            grid.text(7),
            "name    n\n  ab    1\n  é   100\n  and 7 more (--json and --csv list them)\n"
        );
    }

    #[test]
    fn cells_are_quoted_where_they_must_be() {
        let row = vec!["a,b".to_owned(), "x".to_owned(), "say \"y\"".to_owned()];
        assert_eq!(csv([row]), "\"a,b\",x,\"say \"\"y\"\"\"\r\n");
    }

    #[test]
    fn a_tensor_is_picked_by_an_end_that_is_its_own() {
        let names = ["m.0.q_proj.weight", "m.1.q_proj.weight", "m.1.k_proj.weight"];
        for (wanted, index) in
            [("m.0.q_proj.weight", 0), ("1.q_proj", 1), ("k_proj", 2), ("k_proj.weight", 2)]
        {
            assert_eq!(pick(wanted, &names).unwrap(), index, "{wanted}");
        }
        for wanted in ["q_proj", "proj", "v_proj", ""] {
            assert!(pick(wanted, &names).is_err(), "{wanted}");
        }
    }
}
