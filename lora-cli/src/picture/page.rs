//! One HTML page that stands for itself: prose, headline numbers, figures and tables.
//!
//! The page loads nothing. Its policy (`Content-Security-Policy`) forbids all requests and all
//! scripts but `page.js`, which is named by its digest: a name in a file cannot become a script even
//! if escaping it failed. Without scripts everything is there to read; they add what a pointer shows
//! and the sorting and filtering of tables.

use std::fmt::Write;

use super::canvas::Frame;
use super::figure::Figure;
use super::text::{TIP, escape, number, shorten};
use super::theme::{Theme, style};
use super::{draw, heat};

const CSS: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// SHA-256 of the script, as the policy names it. A test computes it afresh.
const SCRIPT_DIGEST: &str = "sha256-4/WyUAK/FrJdGEgejZ9pm9LITpbzx/cxKwulwOrHNt0=";

/// How wide a figure is, in pixels.
const FIGURE: f64 = 808.0;

/// How wide each of two figures side by side is.
const HALF: f64 = 374.0;

/// The most rows that are open to the eye; longer tables are folded.
const OPEN_ROWS: usize = 20;

/// The most rows of a table.
const MOST_ROWS: usize = 5000;

/// The longest name in a cell, in characters.
const CELL: usize = 96;

/// A page.
#[derive(Clone, Debug, Default)]
pub(crate) struct Page {
    /// What the page is about.
    pub(crate) title: String,
    /// From what it was made, in a line.
    pub(crate) subtitle: String,
    /// Its parts, from the top.
    pub(crate) sections: Vec<Section>,
    /// What made it and how, in a line.
    pub(crate) footer: String,
}

/// A part of a page. What is empty is not shown.
#[derive(Clone, Debug, Default)]
pub(crate) struct Section {
    /// What it is about.
    pub(crate) heading: String,
    /// Paragraphs. What stands between two backticks is set as code.
    pub(crate) prose: Vec<String>,
    /// Headline numbers.
    pub(crate) tiles: Vec<Tile>,
    /// Figures, below each other; square matrices that follow each other stand side by side.
    pub(crate) figures: Vec<Figure>,
    /// A table below the figures.
    pub(crate) table: Option<Table>,
}

/// A headline number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tile {
    /// What it is.
    pub(crate) label: String,
    /// The number, with its unit.
    pub(crate) value: String,
    /// What it means, in a few words; may be empty.
    pub(crate) note: String,
}

impl Tile {
    /// A number that needs no explanation.
    pub(crate) fn new(label: impl Into<String>, value: impl Into<String>) -> Tile {
        Tile { label: label.into(), value: value.into(), note: String::new() }
    }
}

/// A table, which a reader can sort and, if it is long, filter.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    /// What the rows are, such as `tensors`.
    pub(crate) label: String,
    /// The columns, from the left.
    pub(crate) columns: Vec<Column>,
    /// The rows, from the top, with a cell per column.
    pub(crate) rows: Vec<Vec<Cell>>,
}

/// A column of a table.
#[derive(Clone, Debug, Default)]
pub(crate) struct Column {
    /// What it holds.
    pub(crate) label: String,
    /// How its cells are set.
    pub(crate) kind: ColumnKind,
}

impl Column {
    /// A column of words.
    pub(crate) fn text(label: impl Into<String>) -> Column {
        Column { label: label.into(), kind: ColumnKind::Text }
    }

    /// A column of names of tensors or files.
    pub(crate) fn name(label: impl Into<String>) -> Column {
        Column { label: label.into(), kind: ColumnKind::Name }
    }

    /// A column of numbers.
    pub(crate) fn number(label: impl Into<String>) -> Column {
        Column { label: label.into(), kind: ColumnKind::Number }
    }

    /// A column of numbers that are not negative, each with a bar as long as it is large.
    pub(crate) fn bar(label: impl Into<String>) -> Column {
        Column { label: label.into(), kind: ColumnKind::Bar }
    }
}

/// How the cells of a column are set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ColumnKind {
    /// From the left.
    #[default]
    Text,
    /// From the left, in a font of equal widths, shortened in the middle.
    Name,
    /// From the right.
    Number,
    /// From the right, over a bar.
    Bar,
}

/// A cell of a table.
#[derive(Clone, Debug, Default)]
pub(crate) enum Cell {
    /// Nothing.
    #[default]
    Empty,
    /// A word or a name.
    Text(String),
    /// A number.
    Number {
        /// What rows are sorted by.
        value: f64,
        /// How it is written.
        text: String,
    },
}

impl Cell {
    /// A number that is written in its own way, such as a size in bytes.
    pub(crate) fn number(value: f64, text: impl Into<String>) -> Cell {
        Cell::Number { value, text: text.into() }
    }
}

impl From<f64> for Cell {
    fn from(value: f64) -> Cell {
        Cell::Number { value, text: number(value) }
    }
}

impl From<usize> for Cell {
    fn from(value: usize) -> Cell {
        Cell::Number { value: value as f64, text: value.to_string() }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Cell {
        Cell::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Cell {
        Cell::Text(text)
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Cell {
        value.map_or(Cell::Empty, Into::into)
    }
}

/// The page as one file.
pub(crate) fn html(page: &Page) -> String {
    let title = escape(&page.title);
    let figures = style(Theme::Auto);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
         style-src 'unsafe-inline'; script-src '{SCRIPT_DIGEST}'; base-uri 'none'; \
         form-action 'none'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title}</title>\n<style>\n{CSS}{figures}\n</style>\n</head>\n<body>\n\
         <header>\n<h1>{title}</h1>\n"
    );
    if !page.subtitle.is_empty() {
        let _infallible = writeln!(out, "<p class=\"subtitle\">{}</p>", prose(&page.subtitle));
    }
    out.push_str("</header>\n<main>\n");
    for section in &page.sections {
        write_section(&mut out, section);
    }
    out.push_str("</main>\n");
    if !page.footer.is_empty() {
        let _infallible = writeln!(out, "<footer>{}</footer>", prose(&page.footer));
    }
    let _infallible = write!(
        out,
        "<div id=\"tip\" role=\"tooltip\" hidden></div>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    );
    out
}

/// Text with its code set as code.
fn prose(text: &str) -> String {
    let mut out = String::new();
    let pieces: Vec<&str> = text.split('`').collect();
    // A backtick without a partner is itself.
    let paired = pieces.len() - 1 + pieces.len() % 2;
    for (index, piece) in pieces.iter().enumerate() {
        match index {
            _ if index % 2 == 1 && index < paired => {
                let _infallible = write!(out, "<code>{}</code>", escape(piece));
            }
            _ if index % 2 == 1 => {
                let _infallible = write!(out, "`{}", escape(piece));
            }
            _ => out.push_str(&escape(piece)),
        }
    }
    out
}

fn write_section(out: &mut String, section: &Section) {
    out.push_str("<section>\n<div class=\"rail\">\n");
    if !section.heading.is_empty() {
        let _infallible = writeln!(out, "<h2>{}</h2>", escape(&section.heading));
    }
    for paragraph in &section.prose {
        let _infallible = writeln!(out, "<p>{}</p>", prose(paragraph));
    }
    out.push_str("</div>\n<div class=\"content\">\n");
    if !section.tiles.is_empty() {
        out.push_str("<dl class=\"tiles\">\n");
        for tile in &section.tiles {
            let _infallible =
                write!(out, "<div><dt>{}</dt><dd>{}", escape(&tile.label), escape(&tile.value));
            if !tile.note.is_empty() {
                let _infallible = write!(out, "<small>{}</small>", escape(&tile.note));
            }
            out.push_str("</dd></div>\n");
        }
        out.push_str("</dl>\n");
    }
    write_figures(out, &section.figures);
    if let Some(table) = &section.table {
        write_table(out, table);
    }
    out.push_str("</div>\n</section>\n");
}

fn write_figures(out: &mut String, figures: &[Figure]) {
    if figures.is_empty() {
        return;
    }
    let square = |figure: &&Figure| matches!(figure, Figure::Heat(heat) if heat::is_square(heat));
    out.push_str("<div class=\"figures\">\n");
    for (index, figure) in figures.iter().enumerate() {
        let before = index.checked_sub(1).and_then(|index| figures.get(index));
        let half =
            square(&figure) && before.into_iter().chain(figures.get(index + 1)).any(|f| square(&f));
        let frame = Frame { width: if half { HALF } else { FIGURE }, alone: false };
        let class = if half { " class=\"half\"" } else { "" };
        let _infallible = write!(out, "<figure{class}>\n<figcaption>");
        if !figure.title().is_empty() {
            let _infallible = write!(out, "<b>{}</b>", escape(figure.title()));
        }
        if !figure.note().is_empty() {
            let _infallible = write!(out, "<span>{}</span>", prose(figure.note()));
        }
        let _infallible =
            write!(out, "</figcaption>\n{}\n</figure>\n", draw(figure, &frame).element());
    }
    out.push_str("</div>\n");
}

fn write_table(out: &mut String, table: &Table) {
    let rows = table.rows.len();
    let label = if table.label.is_empty() { "rows" } else { &table.label };
    let folded = rows > OPEN_ROWS;
    if folded {
        let _infallible = writeln!(
            out,
            "<details class=\"table\">\n<summary>All {rows} {}</summary>\n\
             <label class=\"filter\"><input type=\"search\" placeholder=\"filter\" \
             aria-label=\"show only rows that contain this\"><span></span></label>",
            escape(label)
        );
    }
    out.push_str("<div class=\"scroll\"><table>\n<thead><tr>");
    for column in &table.columns {
        let class = class(column.kind);
        let _infallible = write!(
            out,
            "<th scope=\"col\"{class}><button type=\"button\">{}</button></th>",
            escape(&column.label)
        );
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    let longest: Vec<f64> = (0..table.columns.len())
        .map(|column| {
            let values = table.rows.iter().filter_map(|row| match row.get(column) {
                Some(Cell::Number { value, .. }) if value.is_finite() => Some(*value),
                _ => None,
            });
            values.fold(0.0, f64::max)
        })
        .collect();
    for row in table.rows.iter().take(MOST_ROWS) {
        out.push_str("<tr>");
        for ((column, longest), index) in table.columns.iter().zip(&longest).zip(0..) {
            write_cell(out, column.kind, row.get(index).unwrap_or(&Cell::Empty), *longest);
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table></div>\n");
    if rows > MOST_ROWS {
        let _infallible = writeln!(
            out,
            "<p class=\"more\">The first {MOST_ROWS} of {rows} {}.</p>",
            escape(label)
        );
    }
    if folded {
        out.push_str("</details>\n");
    }
}

fn class(kind: ColumnKind) -> &'static str {
    match kind {
        ColumnKind::Text => "",
        ColumnKind::Name => " class=\"name\"",
        ColumnKind::Number => " class=\"number\"",
        ColumnKind::Bar => " class=\"number bar\"",
    }
}

fn write_cell(out: &mut String, kind: ColumnKind, cell: &Cell, longest: f64) {
    let class = class(kind);
    let _infallible = match cell {
        Cell::Empty => write!(out, "<td{class}></td>"),
        Cell::Text(text) => {
            let shown = shorten(text, CELL);
            // Lines may break between the parts of a long name.
            let shown = escape(&shown).replace('.', ".<wbr>");
            if text.chars().nth(CELL).is_some() {
                let hidden = escape(&shorten(text, TIP));
                write!(out, "<td{class} title=\"{hidden}\">{shown}</td>")
            } else {
                write!(out, "<td{class}>{shown}</td>")
            }
        }
        Cell::Number { value, text } => {
            let text = escape(&shorten(text, CELL));
            // The script reads the number from the text unless it is told.
            let told = if text.parse() == Ok(*value) {
                String::new()
            } else {
                format!(" data-v=\"{value}\"")
            };
            let share = if longest > 0.0 { (value / longest).clamp(0.0, 1.0) } else { 0.0 };
            if kind == ColumnKind::Bar && value.is_finite() {
                write!(out, "<td{class}{told} style=\"--b:{share:.2}\">{text}</td>")
            } else {
                write!(out, "<td{class}{told}>{text}</td>")
            }
        }
    };
}
