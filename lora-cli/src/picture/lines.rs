//! Curves: a legend, a plot with ticks, marks across it, and the curves, thinner and paler the more
//! there are.

use std::fmt::Write;

use super::axis::{Ruler, Tick, plain};
use super::canvas::{Anchor, Canvas, Drawing, Frame};
use super::figure::{Axis, Emphasis, Lines, Mark, Scale, Series};
use super::heading::{Key, heading, keys, legend, nothing};
use super::text::{SIZE, SMALL, TIP, coordinate, escape, fit, shorten, text_width, told_apart};
use super::theme::HUES;
use super::thin::thin;

/// The most points that a curve is drawn with.
const POINTS: usize = 300;

/// The most points that all curves of a figure are drawn with: about 300 kB.
const ALL_POINTS: usize = 28_000;

/// The most curves that are labelled at their ends.
const ENDS: usize = 6;

/// The height that a tick of the vertical axis takes.
const TICK_HEIGHT: f64 = 44.0;

/// How high a row of labels of vertical marks is.
const MARK_ROW: f64 = 17.0;

pub(super) fn draw(lines: &Lines, frame: &Frame) -> Drawing {
    let mut canvas = Canvas::default();
    let mut y = heading(&mut canvas, frame, &lines.title, &lines.note);
    let (hues, keys) = colours(&lines.series);
    let ends = end_labels(&lines.series);
    let Some(mut plot) = Plot::new(lines, frame, &ends) else {
        let height = nothing(&mut canvas, frame, y);
        return canvas.finish(frame.width, height, format!("{}: nothing to show", lines.title));
    };
    if lines.series.len() > 1 {
        y = legend(&mut canvas, frame, y, &keys, true);
    }
    let verticals = plot.vertical_labels(lines, frame);
    plot.move_down(label_above(&mut canvas, frame, &lines.y.label, &verticals, y));
    plot.vertical_axis(&mut canvas);
    plot.horizontal_axis(&mut canvas);
    let mut y = plot.bottom + 22.0;
    if !lines.x.label.is_empty() {
        let label = fit(&lines.x.label, SIZE, frame.width - 2.0 * frame.inset());
        let middle = (plot.left + plot.right) / 2.0;
        canvas.text("m", (middle, y + 13.0), Anchor::Middle, &label);
        y += 19.0;
    }

    let missing = plot.curves(&mut canvas, lines, &hues, frame);
    for label in &verticals {
        let baseline = plot.top - 8.0 - MARK_ROW * label.row as f64;
        canvas.line("k", (label.at, baseline + 4.0), (label.at, plot.bottom));
        canvas.text("t", (label.start, baseline), Anchor::Start, &label.text);
    }
    plot.horizontal_marks(&mut canvas, lines);
    plot.end_labels(&mut canvas, lines, &ends);

    if missing > 0 {
        let logarithmic = lines.x.scale == Scale::Log || lines.y.scale == Scale::Log;
        let why = if logarithmic { "not finite, not positive or too small" } else { "not finite" };
        let note = match missing {
            1 => format!("1 value that is {why} is not drawn"),
            _ => format!("{missing} values that are {why} are not drawn"),
        };
        canvas.text("m n", (plot.left, y + 13.0), Anchor::Start, &note);
        y += 18.0;
    }
    if !frame.alone {
        let edges = [plot.left, plot.top, plot.right, plot.bottom].map(coordinate).join(" ");
        canvas.data("plot", &edges);
        canvas.data("x", &plot.x.data());
        canvas.data("y", &plot.y.data());
        canvas.data("across", &lines.x.label);
        canvas.data("up", &lines.y.label);
    }
    let count = lines.series.len();
    let curves = if count == 1 { "curve" } else { "curves" };
    let label =
        format!("{}: {count} {curves} of {} over {}", lines.title, lines.y.label, lines.x.label);
    canvas.finish(frame.width, y + frame.inset(), label)
}

/// Writes what the vertical axis measures above the plot, beside the labels of vertical marks if
/// there is room. Gives where the plot begins.
fn label_above(
    canvas: &mut Canvas,
    frame: &Frame,
    label: &str,
    verticals: &[Above],
    y: f64,
) -> f64 {
    let rows = verticals.iter().map(|label| label.row + 1).max().unwrap_or(0);
    let top = y + MARK_ROW * rows as f64 + 4.0;
    if label.is_empty() {
        return top;
    }
    let label = fit(label, SIZE, frame.width - 2.0 * frame.inset());
    let end = frame.inset() + text_width(&label, SIZE) + 12.0;
    let free = verticals.iter().all(|mark| mark.row > 0 || mark.start > end);
    let top = if free && rows > 0 { top } else { top + 24.0 };
    let baseline = if free { top - 12.0 } else { y + 11.0 };
    canvas.text("m", (frame.inset(), baseline), Anchor::Start, &label);
    top
}

/// The rectangle that the curves are in, and its scales.
struct Plot {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x: Ruler,
    y: Ruler,
    /// About how many ticks the vertical axis has.
    ticks: usize,
}

impl Plot {
    /// A plot at the top of the drawing, as wide as the labels beside it allow; `None` if there is
    /// nothing to draw.
    fn new(lines: &Lines, frame: &Frame, ends: &[(usize, String)]) -> Option<Plot> {
        let height = (0.42 * frame.width).clamp(180.0, 340.0);
        let ticks = (height / TICK_HEIGHT) as usize;
        let fits = |value: f64, axis: &Axis| {
            value.is_finite() && (axis.scale == Scale::Linear || value > 0.0)
        };
        let sound = |&&(x, y): &&(f64, f64)| fits(x, &lines.x) && fits(y, &lines.y);
        let points = || lines.series.iter().flat_map(|series| &series.points).filter(sound);
        points().next()?;
        // Marks count as values: a threshold that lies above all points should be in sight.
        let (mut across, mut up) = (Vec::new(), Vec::new());
        for mark in &lines.marks {
            match mark {
                Mark::Vertical { at, .. } => across.push(*at),
                Mark::Horizontal { at, .. } => up.push(*at),
            }
        }
        let y = Ruler::new(&lines.y, points().map(|point| point.1).chain(up), height, 0.0)?;
        // An axis whose ends nobody has chosen ends at round numbers.
        let y = if lines.y.range.is_some() { y } else { y.rounded(ticks) };
        let widest = y.ticks(ticks).iter().map(tick_width).fold(0.0, f64::max);
        let left = frame.inset() + widest + 10.0;
        let end_width = ends.iter().map(|(_, name)| text_width(name, SMALL)).reduce(f64::max);
        let right = frame.width - frame.inset() - end_width.map_or(8.0, |width| width + 16.0);
        let x = Ruler::new(&lines.x, points().map(|point| point.0).chain(across), left, right)?;
        Some(Plot { left, right, top: 0.0, bottom: height, x, y, ticks })
    }

    /// Moves the plot to where it begins.
    fn move_down(&mut self, top: f64) {
        (self.top, self.bottom) = (self.top + top, self.bottom + top);
        self.y.shift(top);
    }

    fn vertical_axis(&self, canvas: &mut Canvas) {
        for tick in self.y.ticks(self.ticks).iter().filter(|tick| !tick.label.is_empty()) {
            canvas.line("g c", (self.left, tick.at.round()), (self.right, tick.at.round()));
            let at = (self.left - 8.0, tick.at + 4.0);
            canvas.text_markup("m", at, Anchor::End, "", &tick.label);
        }
    }

    fn horizontal_axis(&self, canvas: &mut Canvas) {
        let (top, bottom) = (self.top, self.bottom);
        // As many ticks as there is room for.
        let mut most = ((self.right - self.left) / 60.0) as usize;
        let ticks = loop {
            let ticks = self.x.ticks(most);
            let labelled: Vec<&Tick> = ticks.iter().filter(|tick| !tick.label.is_empty()).collect();
            let half = |tick: &Tick| tick_width(tick) / 2.0 + 5.0;
            let crowded = labelled
                .windows(2)
                .any(|pair| pair[1].at - pair[0].at < half(pair[0]) + half(pair[1]));
            if !crowded || most <= 2 {
                break ticks;
            }
            most -= 1;
        };
        for tick in &ticks {
            let x = tick.at.round();
            if tick.label.is_empty() {
                canvas.line("a c", (x, bottom), (x, bottom + 3.0));
                continue;
            }
            canvas.line("g c", (x, top), (x, bottom));
            canvas.line("a c", (x, bottom), (x, bottom + 5.0));
            canvas.text_markup("m", (tick.at, bottom + 19.0), Anchor::Middle, "", &tick.label);
        }
        canvas.line("a c", (self.left, bottom.round()), (self.right, bottom.round()));
    }

    /// Draws the curves, the emphasised ones last. Gives how many points have no place.
    fn curves(&self, canvas: &mut Canvas, lines: &Lines, hues: &[usize], frame: &Frame) -> usize {
        let series = &lines.series;
        let most = (ALL_POINTS / series.len().max(1)).clamp(12, POINTS);
        let weight = match series.len() {
            0..=7 => "w0",
            8..=40 => "w1",
            41..=120 => "w2",
            121..=500 => "w3",
            _ => "w4",
        };
        // A nested SVG clips what an axis with ends of its own leaves out; half a stroke may stick
        // out.
        let [x, y] = [self.left - 2.0, self.top - 2.0].map(coordinate);
        let [width, height] =
            [self.right - self.left + 4.0, self.bottom - self.top + 4.0].map(coordinate);
        canvas.markup(&format!(
            "<svg x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"{x} {y} {width} {height}\">\n"
        ));
        let mut missing = 0;
        for (emphasis, weight) in [(Emphasis::Normal, weight), (Emphasis::Strong, "w9")] {
            for (series, hue) in series.iter().zip(hues) {
                if series.emphasis == emphasis {
                    let classes = format!("l s{hue} {weight}");
                    missing += self.curve(canvas, series, &classes, most, frame);
                }
            }
        }
        canvas.markup("</svg>\n");
        missing
    }

    /// Draws one curve. Gives how many of its points have no place.
    fn curve(
        &self,
        canvas: &mut Canvas,
        series: &Series,
        classes: &str,
        most: usize,
        frame: &Frame,
    ) -> usize {
        let places: Vec<Option<(f64, f64)>> =
            series.points.iter().map(|&(x, y)| self.x.pixel(x).zip(self.y.pixel(y))).collect();
        let total = places.iter().flatten().count();
        let (mut path, mut dots) = (String::new(), String::new());
        let runs = places.split(Option::is_none).filter(|run| !run.is_empty());
        for run in runs.take(most) {
            let run: Vec<(f64, f64)> = run.iter().copied().flatten().collect();
            if let [(x, y)] = run[..] {
                // A line this short is a dot, for its ends are round.
                let (x, y, end) = (coordinate(x), coordinate(y), coordinate(x + 0.1));
                let _infallible = write!(dots, "M{x} {y} {end} {y}");
                continue;
            }
            // A curve that is interrupted shares its points among its pieces.
            let share = (most * run.len()).div_ceil(total);
            for (index, (x, y)) in thin(&run, share).into_iter().enumerate() {
                let letter = if index == 0 { "M" } else { " " };
                let _infallible = write!(path, "{letter}{} {}", coordinate(x), coordinate(y));
            }
        }
        let name = escape(&shorten(&series.name, TIP));
        for (data, dot) in [(path, ""), (dots, " p")] {
            if data.is_empty() {
                continue;
            }
            let element = if frame.alone {
                format!(
                    "<path class=\"{classes}{dot}\" d=\"{data}\"><title>{name}</title></path>\n"
                )
            } else {
                format!("<path class=\"{classes}{dot}\" d=\"{data}\" data-name=\"{name}\"/>\n")
            };
            canvas.markup(&element);
        }
        series.points.len() - total
    }

    /// Labels of vertical marks, in as many rows as it takes for none to cover another.
    fn vertical_labels(&self, lines: &Lines, frame: &Frame) -> Vec<Above> {
        let (least, most) = (frame.inset(), frame.width - frame.inset());
        let mut labels: Vec<Above> = lines
            .marks
            .iter()
            .filter_map(|mark| match mark {
                Mark::Vertical { at, label } => Some((self.x.inside(*at)?, label)),
                Mark::Horizontal { .. } => None,
            })
            .map(|(at, label)| {
                let text = fit(label, SIZE, (most - least) / 2.0).into_owned();
                let width = text_width(&text, SIZE);
                let start = (at - width / 2.0).min(most - width).max(least);
                Above { at, start, text, row: 0 }
            })
            .collect();
        labels.sort_by(|one, other| one.at.total_cmp(&other.at));
        let mut row_ends: Vec<f64> = Vec::new();
        for label in &mut labels {
            let end = label.start + text_width(&label.text, SIZE) + 10.0;
            let free = row_ends.iter().position(|&row_end| row_end <= label.start);
            label.row = free.unwrap_or(row_ends.len());
            match row_ends.get_mut(label.row) {
                Some(row_end) => *row_end = end,
                None => row_ends.push(end),
            }
        }
        labels
    }

    fn horizontal_marks(&self, canvas: &mut Canvas, lines: &Lines) {
        let mut marks: Vec<(f64, &str)> = lines
            .marks
            .iter()
            .filter_map(|mark| match mark {
                Mark::Horizontal { at, label } => Some((self.y.inside(*at)?, label.as_str())),
                Mark::Vertical { .. } => None,
            })
            .collect();
        marks.sort_by(|one, other| one.0.total_cmp(&other.0));
        let mut least = self.top + 11.0;
        for (at, label) in marks {
            canvas.line("k", (self.left, at), (self.right, at));
            // Above the line, below the label before.
            let baseline = (at - 5.0).max(least);
            let label = fit(label, SIZE, (self.right - self.left) * 0.7);
            canvas.text("t halo", (self.right - 6.0, baseline), Anchor::End, &label);
            least = baseline + 15.0;
        }
    }

    /// Writes the names of curves beside their ends.
    fn end_labels(&self, canvas: &mut Canvas, lines: &Lines, ends: &[(usize, String)]) {
        let mut labels: Vec<(f64, &str)> = ends
            .iter()
            .filter_map(|(index, name)| {
                let last = lines.series.get(*index)?.points.iter().rev();
                let place = |&(x, y): &(f64, f64)| self.x.inside(x).zip(self.y.inside(y));
                Some((last.filter_map(place).next()?.1, name.as_str()))
            })
            .collect();
        labels.sort_by(|one, other| one.0.total_cmp(&other.0));
        // Down from the top without covering each other, then up again from the bottom.
        let mut least = self.top + 4.0;
        for label in &mut labels {
            label.0 = label.0.max(least);
            least = label.0 + 14.0;
        }
        let mut most = self.bottom;
        for label in labels.iter_mut().rev() {
            label.0 = label.0.min(most);
            most = label.0 - 14.0;
        }
        for (y, name) in labels {
            canvas.text("t n", (self.right + 8.0, y + 4.0), Anchor::Start, name);
        }
    }
}

/// A label above the plot.
struct Above {
    /// Where the mark is.
    at: f64,
    /// Where the text starts.
    start: f64,
    text: String,
    /// How many rows above the plot.
    row: usize,
}

fn tick_width(tick: &Tick) -> f64 {
    text_width(&plain(&tick.label), SIZE)
}

/// The hue of every curve, and the legend.
fn colours(series: &[Series]) -> (Vec<usize>, Vec<Key>) {
    if series.iter().any(|series| series.group.is_some()) {
        let mut groups: Vec<&str> = Vec::new();
        let mut members = Vec::with_capacity(series.len());
        for series in series {
            let group = series.group.as_deref().unwrap_or("no group");
            let index = groups.iter().position(|&known| known == group);
            members.push(index.unwrap_or(groups.len()));
            if index.is_none() {
                groups.push(group);
            }
        }
        let keys = keys(&groups);
        let hues = members.into_iter().map(|member| hue(member, &keys)).collect();
        return (hues, keys);
    }
    if series.len() < HUES {
        let names: Vec<&str> = series.iter().map(|series| series.name.as_str()).collect();
        return ((0..series.len()).collect(), keys(&names));
    }
    // Too many for a colour each: those that matter have one, the others are the background.
    let strong = |series: &Series| series.emphasis == Emphasis::Strong;
    let names: Vec<&str> = series.iter().filter(|s| strong(s)).map(|s| s.name.as_str()).collect();
    let rest = series.len() - names.len();
    let mut keys = keys(&names);
    if rest > 0 {
        keys.retain(|key| key.hue < HUES - 1);
        let others = rest + names.len() - keys.len();
        let name =
            if keys.is_empty() { format!("{others} curves") } else { format!("{others} others") };
        // Nothing competes for the first hue where nothing is emphasised.
        let hue = if keys.is_empty() { 0 } else { HUES - 1 };
        keys.push(Key { hue, name });
    }
    let mut next = 0;
    let rest_hue = if names.is_empty() { 0 } else { HUES - 1 };
    let hues = series.iter().map(|series| {
        if strong(series) {
            next += 1;
            hue(next - 1, &keys)
        } else {
            rest_hue
        }
    });
    (hues.collect(), keys)
}

/// The hue of a name of the legend: those that have no entry of their own have the last one's.
fn hue(index: usize, keys: &[Key]) -> usize {
    keys.get(index).or(keys.last()).map_or(0, |key| key.hue)
}

/// The curves that are labelled at their ends, those emphasised among many of their group, and what
/// tells them from all others.
fn end_labels(series: &[Series]) -> Vec<(usize, String)> {
    if series.iter().all(|series| series.group.is_none()) {
        return Vec::new();
    }
    let names: Vec<&str> = series.iter().map(|series| series.name.as_str()).collect();
    let (names, _) = told_apart(&names);
    let strong = |index: &usize| series[*index].emphasis == Emphasis::Strong;
    let named = |index: usize| (index, fit(names[index], SMALL, 150.0).into_owned());
    (0..series.len()).filter(strong).take(ENDS).map(named).collect()
}
