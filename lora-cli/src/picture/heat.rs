//! Heat maps: a scale of shades, names at the top and on the left, and a cell per value.
//!
//! Shades are steps (`theme.rs`), and all cells of a step are one path: a matrix of 128 × 128 stays
//! small. A matrix of more rows or columns than can be seen is drawn with groups of them, each cell
//! the mean of its group, and the note below says so.

use std::fmt::Write;

use super::canvas::{Anchor, Canvas, Drawing, Frame};
use super::figure::{Heat, Shades};
use super::heading::{heading, nothing};
use super::text::{
    SIZE, SMALL, TIP, coordinate, escape, fit, number, rounded, shorten, text_width, told_apart,
};
use super::theme::{DEEP, SHADES, SIDE};

/// The most rows, and the most columns, that are drawn.
const MOST: usize = 256;

/// The most cells that carry a tooltip each in a picture that stands for itself.
const TIPS: usize = 1024;

/// The longest row name, in pixels.
const ROW_NAME: f64 = 170.0;

/// The longest name of a column that stands at an angle.
const COLUMN_NAME: f64 = 110.0;

pub(super) fn draw(heat: &Heat, frame: &Frame) -> Drawing {
    let mut canvas = Canvas::default();
    let mut y = heading(&mut canvas, frame, &heat.title, &heat.note);
    let grid = Grid::new(heat);
    let Some(range) = Range::new(heat.shades, &grid.values) else {
        let height = nothing(&mut canvas, frame, y);
        return canvas.finish(frame.width, height, format!("{}: nothing to show", heat.title));
    };
    let inset = frame.inset();
    let empty = grid.values.iter().any(Option::is_none);
    y = scale(&mut canvas, &range, heat, empty, (inset, y));

    let (rows, columns) = (grid.rows.len(), grid.columns.len());
    let corner = match grid.rows.label.as_str() {
        "" => String::new(),
        label => format!("{} ↓", fit(label, SIZE, ROW_NAME)),
    };
    let name_width = grid.rows.widest(ROW_NAME).max(text_width(&corner, SIZE));
    let left = (inset + name_width + 8.0).round();
    let available = frame.width - inset - left;
    let (wide, high) = cell_size(rows, columns, available, is_square(heat), frame);
    let gap = if wide.min(high) >= 14.0 { 1.0 } else { 0.0 };

    let heads = Heads::new(&grid.columns, wide);
    let mut right = left + wide * columns as f64;
    if !grid.columns.label.is_empty() {
        let label = format!("{} →", fit(&grid.columns.label, SIZE, available));
        canvas.text("m", (left, y + 11.0), Anchor::Start, &label);
        right = right.max(left + text_width(&label, SIZE));
        y += 20.0;
    }
    let top = (y + heads.height + 6.0).round();
    canvas.text("m", (left - 8.0, top - 7.0), Anchor::End, &corner);
    right = right.max(column_names(&mut canvas, &grid.columns, &heads, (left, top), wide));
    row_names(&mut canvas, &grid.rows, (left, top), high);

    cells(&mut canvas, &grid, &range, (left, top), (wide, high), gap, frame);
    if heat.numbers {
        numbers(&mut canvas, &grid, &range, (left, top), (wide, high));
    }
    let mut bottom = top + high * rows as f64;
    if let Some(note) = &grid.note {
        canvas.text("m n", (left, bottom + 17.0), Anchor::Start, note);
        bottom += 20.0;
        right = right.max(left + text_width(note, SMALL));
    }
    if !frame.alone {
        tell_script(&mut canvas, &grid, (left, top), (wide, high));
        canvas.data("legend", &heat.legend);
    }
    let label = format!(
        "{}: {} for {} rows and {} columns, from {} to {}",
        heat.title,
        heat.legend,
        heat.rows.len(),
        heat.columns.len(),
        number(range.least),
        number(range.most)
    );
    let width = right.max(canvas.right()) + inset;
    canvas.finish(width, bottom + inset, label)
}

/// Writes the names of the columns above them. Gives how far to the right they reach.
fn column_names(
    canvas: &mut Canvas,
    columns: &Names,
    heads: &Heads,
    (left, top): (f64, f64),
    wide: f64,
) -> f64 {
    let mut right = left;
    let baseline = top - 7.0;
    for column in columns.written(heads.least) {
        let name = &columns.shown[column];
        let middle = left + wide * (column as f64 + 0.5);
        if heads.angle {
            let (x, shown) = (middle + 2.0, fit(name, SIZE, COLUMN_NAME));
            let (px, py) = (coordinate(x), coordinate(baseline));
            let turn = format!(" transform=\"rotate(-40 {px} {py})\"");
            canvas.text_markup("t", (x, baseline), Anchor::Start, &turn, &escape(&shown));
            right = right.max(x + 0.78 * text_width(&shown, SIZE));
        } else {
            canvas.text("t", (middle, baseline), Anchor::Middle, name);
        }
    }
    right
}

/// The least height of a row, in pixels, beside which every name has room.
const LINE: f64 = 15.0;

fn row_names(canvas: &mut Canvas, rows: &Names, (left, top): (f64, f64), high: f64) {
    for row in rows.written((LINE / high).ceil().max(1.0) as usize) {
        let shown = fit(&rows.shown[row], SIZE, ROW_NAME);
        let baseline = top + high * (row as f64 + 0.5) + 4.5;
        canvas.text("t", (left - 8.0, baseline), Anchor::End, &shown);
    }
}

/// Tells the page's script where the cells are and what is in them.
fn tell_script(
    canvas: &mut Canvas,
    grid: &Grid,
    (left, top): (f64, f64),
    (wide, high): (f64, f64),
) {
    let (columns, rows) = (grid.columns.len(), grid.rows.len());
    let place = [left, top, wide, high].map(|value| value.to_string()).join(" ");
    canvas.data("grid", &format!("{place} {columns} {rows}"));
    for (what, names) in [("rows", &grid.rows), ("columns", &grid.columns)] {
        let names: Vec<_> = names.full.iter().map(|name| shorten(name, TIP)).collect();
        canvas.data_lines(what, &names);
    }
    let values = grid.values.iter().map(|value| value.map_or("·".to_owned(), number));
    canvas.data("values", &values.collect::<Vec<_>>().join(" "));
}

/// Whether rows and columns are of one kind, as in a similarity matrix, so that cells are square.
pub(super) fn is_square(heat: &Heat) -> bool {
    let (rows, columns) = (heat.rows.len(), heat.columns.len());
    rows.max(columns) <= 2 * rows.min(columns) && rows.max(columns) >= 8
}

fn cell_size(
    rows: usize,
    columns: usize,
    available: f64,
    square: bool,
    frame: &Frame,
) -> (f64, f64) {
    // Whole pixels: all cells are of one size, and no light comes through between them.
    let whole = |size: f64| size.floor().max(1.0);
    let across = available / columns as f64;
    if square {
        let tallest = if frame.alone { 640.0 } else { 544.0 };
        let side = whole(across.min(tallest / rows as f64).clamp(1.0, 40.0));
        return (side, side);
    }
    (whole(across.min(88.0)), whole((640.0 / rows as f64).clamp(3.0, 24.0)))
}

/// What is drawn: the matrix, or its groups of rows and columns.
struct Grid {
    rows: Names,
    columns: Names,
    values: Vec<Option<f64>>,
    note: Option<String>,
}

impl Grid {
    fn new(heat: &Heat) -> Grid {
        let (rows, columns) = (heat.rows.len(), heat.columns.len());
        let (down, across) = (rows.div_ceil(MOST).max(1), columns.div_ceil(MOST).max(1));
        let value = |row: usize, column: usize| {
            let value = heat.values.get(row * columns + column).copied().flatten();
            value.filter(|value| !value.is_nan())
        };
        let starts = |count: usize, step: usize| (0..count).step_by(step);
        let mut values = Vec::with_capacity(rows.div_ceil(down) * columns.div_ceil(across));
        for row in starts(rows, down) {
            for column in starts(columns, across) {
                let (mut sum, mut count) = (0.0, 0usize);
                for row in row..(row + down).min(rows) {
                    for column in column..(column + across).min(columns) {
                        if let Some(value) = value(row, column) {
                            (sum, count) = (sum + value, count + 1);
                        }
                    }
                }
                values.push((count > 0).then(|| sum / count as f64).filter(|mean| !mean.is_nan()));
            }
        }
        let note = (down * across > 1)
            .then(|| format!("each cell is the mean of {down} × {across} values"));
        let rows = Names::new(&heat.rows, &heat.row_label, down);
        let columns = Names::new(&heat.columns, &heat.column_label, across);
        Grid { rows, columns, values, note }
    }
}

/// The names of the rows or of the columns.
struct Names {
    /// In full.
    full: Vec<String>,
    /// As far as they differ.
    shown: Vec<String>,
    /// What they are names of; what they have in common if nothing else is known.
    label: String,
}

impl Names {
    /// The names of groups of `step` rows or columns.
    fn new(names: &[String], label: &str, step: usize) -> Names {
        let group = |group: &[&str]| match group {
            [first, .., last] => format!("{first} – {last}"),
            group => group.concat(),
        };
        let groups = |names: &[&str]| names.chunks(step).map(group).collect();
        let full: Vec<&str> = names.iter().map(String::as_str).collect();
        let (shown, common) = told_apart(&full);
        let label = if label.is_empty() { common.unwrap_or_default() } else { label.to_owned() };
        Names { full: groups(&full), shown: groups(&shown), label }
    }

    fn len(&self) -> usize {
        self.full.len()
    }

    /// The widest name as it is shown, in pixels.
    fn widest(&self, limit: f64) -> f64 {
        let widths = self.shown.iter().map(|name| text_width(&fit(name, SIZE, limit), SIZE));
        widths.fold(0.0, f64::max)
    }

    /// Which of them are written where every `least`-th has room: round numbers if they are
    /// numbers.
    fn written(&self, least: usize) -> Vec<usize> {
        let numbers: Option<Vec<usize>> = self.shown.iter().map(|name| name.parse().ok()).collect();
        let counted = numbers.filter(|numbers| {
            numbers.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1]))
        });
        let Some(numbers) = counted.filter(|_| least > 1) else {
            return (0..self.len()).step_by(least.max(1).next_power_of_two()).collect();
        };
        let stride = [5, 10, 20, 50, 100, 200].into_iter().find(|&stride| stride >= least);
        let stride = stride.unwrap_or(least);
        let mut written: Vec<usize> =
            (0..numbers.len()).filter(|&index| numbers[index] % stride == 0).collect();
        // The first one too, where it does not touch the next.
        if written.first().is_none_or(|&first| first >= least.max(stride - 1)) {
            written.insert(0, 0);
        }
        written
    }
}

/// Values to shades.
struct Range {
    shades: Shades,
    /// The values of the weakest and the strongest shade.
    low: f64,
    high: f64,
    /// The values there are.
    least: f64,
    most: f64,
}

impl Range {
    fn new(shades: Shades, values: &[Option<f64>]) -> Option<Range> {
        let finite = || values.iter().flatten().copied().filter(|value| value.is_finite());
        let least = finite().reduce(f64::min)?;
        let most = finite().reduce(f64::max)?;
        // Differences of values must stay finite.
        let tame = |value: f64| value.clamp(-1e300, 1e300);
        let (low, high) = match shades {
            Shades::Fitted => (least, most),
            Shades::Sequential { low, high } if low < high => (low, high),
            Shades::Sequential { .. } => (least, most),
            Shades::Log => {
                (finite().filter(|value| *value > 0.0).reduce(f64::min).unwrap_or(1.0), most)
            }
            Shades::Diverging { middle } if middle.is_finite() => {
                let reach = (most - middle).abs().max((least - middle).abs());
                (middle - reach, middle + reach)
            }
            Shades::Diverging { .. } => (least, most),
        };
        Some(Range { shades, low: tame(low), high: tame(high), least, most })
    }

    /// Where a value is between low and high, from 0 to 1.
    fn share(&self, value: f64) -> f64 {
        let (low, high, value) = match self.shades {
            Shades::Log => (self.low.ln(), self.high.max(self.low).ln(), value.max(self.low).ln()),
            _ => (self.low, self.high, value),
        };
        let reach = high - low;
        if reach <= 0.0 { 0.5 } else { ((value - low) / reach).clamp(0.0, 1.0) }
    }

    fn diverging(&self) -> bool {
        matches!(self.shades, Shades::Diverging { .. })
    }

    /// How many shades there are.
    fn steps(&self) -> usize {
        if self.diverging() { 2 * SIDE + 1 } else { SHADES }
    }

    fn step(&self, value: f64) -> usize {
        let last = self.steps() - 1;
        ((self.share(value) * last as f64).round() as usize).min(last)
    }

    fn class(&self, step: usize) -> String {
        format!("{}{step}", if self.diverging() { 'd' } else { 'r' })
    }

    /// Whether text on a shade is in the background's colour.
    fn deep(&self, step: usize) -> bool {
        if self.diverging() { step.abs_diff(SIDE) > SIDE * 3 / 4 } else { step >= DEEP }
    }
}

/// Draws which value has which shade. Gives the height below it.
fn scale(
    canvas: &mut Canvas,
    range: &Range,
    heat: &Heat,
    empty: bool,
    (left, y): (f64, f64),
) -> f64 {
    let mut x = left;
    let baseline = y + 11.0;
    if !heat.legend.is_empty() {
        let label = fit(&heat.legend, SIZE, 240.0);
        canvas.text("m", (x, baseline), Anchor::Start, &label);
        x += text_width(&label, SIZE) + 14.0;
    }
    let say = |canvas: &mut Canvas, x: &mut f64, text: &str| {
        canvas.text("t", (*x, baseline), Anchor::Start, text);
        *x += text_width(text, SIZE);
    };
    if range.low < range.high {
        say(canvas, &mut x, &rounded(range.low, 3));
        let (bar, x0) = (144.0, (x + 8.0).round());
        let steps = range.steps();
        for step in 0..steps {
            let (from, to) =
                (bar * step as f64 / steps as f64, bar * (step + 1) as f64 / steps as f64);
            let class = format!("{} c", range.class(step));
            // Each reaches below the next: no background between them.
            let reach = if step + 1 < steps { to + 1.0 } else { to };
            canvas.rect(&class, (x0 + from, y + 2.0), (reach - from, 10.0), 0.0);
        }
        x = x0 + bar + 8.0;
        say(canvas, &mut x, &rounded(range.high, 3));
        if matches!(range.shades, Shades::Log) {
            x += 6.0;
            canvas.text("m", (x, baseline), Anchor::Start, "by ratio");
            x += text_width("by ratio", SIZE);
        }
    } else {
        let class = range.class(range.step(range.low));
        canvas.rect(&class, (x, y + 1.0), (12.0, 12.0), 2.0);
        x += 18.0;
        say(canvas, &mut x, &format!("all {}", number(range.low)));
    }
    if empty {
        x += 20.0;
        canvas.rect("v", (x, y + 1.0), (12.0, 12.0), 2.0);
        x += 18.0;
        say(canvas, &mut x, "none");
    }
    y + 28.0
}

/// How the names of columns stand: upright if they fit or if they are so short that it is enough to
/// write some of them, else at an angle.
struct Heads {
    angle: bool,
    /// Every how many columns there is room for a name.
    least: usize,
    /// How high the names are.
    height: f64,
}

impl Heads {
    fn new(columns: &Names, wide: f64) -> Heads {
        let widest = columns.widest(f64::INFINITY);
        let short = columns.shown.iter().all(|name| name.chars().nth(4).is_none());
        let room = |each: f64| (each / wide).ceil().max(1.0) as usize;
        if widest + 4.0 <= wide || short {
            return Heads {
                angle: false,
                least: room(widest + if widest + 4.0 <= wide { 4.0 } else { 12.0 }),
                height: 16.0,
            };
        }
        let height = 0.65 * columns.widest(COLUMN_NAME) + 12.0;
        Heads { angle: true, least: room(20.0), height }
    }
}

fn cells(
    canvas: &mut Canvas,
    grid: &Grid,
    range: &Range,
    (left, top): (f64, f64),
    (wide, high): (f64, f64),
    gap: f64,
    frame: &Frame,
) {
    let columns = grid.columns.len();
    let step = |value: &Option<f64>| value.map(|value| range.step(value));
    // The void is one rectangle behind all cells if cells touch.
    let mut paths: Vec<String> = vec![String::new(); range.steps() + 1];
    let tips = frame.alone && grid.values.len() <= TIPS;
    for (row, values) in grid.values.chunks(columns.max(1)).enumerate() {
        let y = top + high * row as f64;
        let mut column = 0;
        while let Some(value) = values.get(column) {
            let same = step(value);
            // Cells that touch and look alike are one piece.
            let run = if gap > 0.0 {
                1
            } else {
                values[column..].iter().take_while(|other| step(other) == same).count()
            };
            let (x, width) = (left + wide * column as f64, wide * run as f64 - gap);
            let path = &mut paths[same.map_or(0, |step| step + 1)];
            let _infallible = write!(
                path,
                "M{} {}h{}v{}H{}z",
                coordinate(x),
                coordinate(y),
                coordinate(width),
                coordinate(high - gap),
                coordinate(x)
            );
            column += run;
        }
    }
    for (index, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
        let class = index.checked_sub(1).map_or("v".to_owned(), |step| range.class(step));
        canvas.markup(&format!("<path class=\"{class} c\" d=\"{path}\"/>\n"));
    }
    // A dot says that there is no value: low values are pale as well.
    if wide.min(high) >= 7.0 {
        let mut dots = String::new();
        for (index, _) in grid.values.iter().enumerate().filter(|(_, value)| value.is_none()) {
            let x = left + wide * ((index % columns) as f64 + 0.5) - 0.5;
            let y = top + high * ((index / columns) as f64 + 0.5) - 0.5;
            let _infallible = write!(dots, "M{} {}h.1", coordinate(x), coordinate(y));
        }
        if !dots.is_empty() {
            canvas.markup(&format!("<path class=\"l u\" d=\"{dots}\"/>\n"));
        }
    }
    if tips {
        for (index, value) in grid.values.iter().enumerate() {
            let (row, column) = (index / columns.max(1), index % columns.max(1));
            let value = value.map_or("none".to_owned(), number);
            let name = |names: &[String], index: usize| {
                names.get(index).map_or(String::new(), |name| shorten(name, TIP).into_owned())
            };
            let tip = format!(
                "{} · {}: {value}",
                name(&grid.rows.full, row),
                name(&grid.columns.full, column)
            );
            let at = (left + wide * column as f64, top + high * row as f64);
            let inside = format!("<title>{}</title>", escape(&tip));
            canvas.rect_with("hit", at, (wide, high), 0.0, &inside);
        }
    }
}

/// Writes values into their cells, if all of them fit.
fn numbers(
    canvas: &mut Canvas,
    grid: &Grid,
    range: &Range,
    (left, top): (f64, f64),
    (wide, high): (f64, f64),
) {
    let largest = grid.values.iter().flatten().map(|value| value.abs()).fold(0.0, f64::max);
    let whole = grid.values.iter().flatten().all(|value| value.fract() == 0.0);
    let decimals = match largest {
        _ if whole => Some(0),
        1e6.. => None,
        100.0.. => Some(0),
        10.0.. => Some(1),
        0.1.. => Some(2),
        0.01.. => Some(4),
        0.001.. => Some(5),
        _ => None,
    };
    let texts: Vec<Option<String>> =
        grid.values.iter().map(|value| value.map(|value| written(value, decimals))).collect();
    let widest = texts.iter().flatten().map(|text| text_width(text, SMALL)).fold(0.0, f64::max);
    if widest + 3.0 > wide || high < 13.0 {
        return;
    }
    let columns = grid.columns.len().max(1);
    for (index, (text, value)) in texts.iter().zip(&grid.values).enumerate() {
        let (Some(text), Some(value)) = (text, value) else { continue };
        let class = if range.deep(range.step(*value)) { "o n" } else { "i n" };
        let x = left + wide * ((index % columns) as f64 + 0.5);
        let y = top + high * ((index / columns) as f64 + 0.5) + 3.5;
        canvas.text(class, (x, y), Anchor::Middle, text);
    }
}

/// A value with so many decimals, or with two digits and an exponent.
fn written(value: f64, decimals: Option<usize>) -> String {
    match decimals {
        _ if !value.is_finite() || value == 0.0 => number(value),
        Some(decimals) => format!("{value:.decimals$}").replace('-', "−"),
        None => format!("{value:.1e}").replace('-', "−"),
    }
}
