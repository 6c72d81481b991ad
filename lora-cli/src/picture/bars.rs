//! Bars: a name, a bar from zero, and its length in numbers.

use super::canvas::{Anchor, Canvas, Drawing, Frame};
use super::figure::{Bar, Bars};
use super::heading::{heading, keys, legend, nothing};
use super::text::{SIZE, TIP, escape, fit, number, shorten, text_width, told_apart};
use super::theme::HUES;

/// The most bars that are drawn.
const MOST: usize = 120;

/// The longest name, in pixels.
const NAME: f64 = 220.0;

pub(super) fn draw(bars: &Bars, frame: &Frame) -> Drawing {
    let mut canvas = Canvas::default();
    let mut y = heading(&mut canvas, frame, &bars.title, &bars.note);
    let inset = frame.inset();
    let shown = largest(&bars.items);
    let reach = |pick: fn(f64) -> f64| {
        let sums = shown.iter().map(|bar| tame(bar).map(pick).sum::<f64>());
        sums.fold(0.0, f64::max)
    };
    let (below, above) = (reach(|value| (-value).max(0.0)), reach(|value| value.max(0.0)));
    if below + above <= 0.0 && shown.iter().all(|bar| tame(bar).next().is_none()) {
        let height = nothing(&mut canvas, frame, y);
        return canvas.finish(frame.width, height, format!("{}: nothing to show", bars.title));
    }
    if bars.parts.len() > 1 {
        let names: Vec<&str> = bars.parts.iter().map(String::as_str).collect();
        y = legend(&mut canvas, frame, y, &keys(&names), false);
    }
    let full: Vec<&str> = shown.iter().map(|bar| bar.name.as_str()).collect();
    let (short, common) = told_apart(&full);
    let label = match &common {
        Some(common) if bars.label.is_empty() => common.clone(),
        Some(common) => format!("{} · {common}", bars.label),
        None => bars.label.clone(),
    };
    if !label.is_empty() {
        let label = fit(&label, SIZE, frame.width - 2.0 * inset);
        canvas.text("m", (inset, y + 11.0), Anchor::Start, &label);
        y += 22.0;
    }

    let high = if shown.len() <= 30 { 26.0 } else { 16.0 };
    let names = short.iter().map(|name| text_width(&fit(name, SIZE, NAME), SIZE));
    let left = inset + names.fold(0.0, f64::max) + 10.0;
    let totals: Vec<String> = shown.iter().map(|bar| number(total(bar))).collect();
    let widest = totals.iter().map(|text| text_width(text, SIZE)).fold(0.0, f64::max) + 10.0;
    let right = frame.width - inset - widest;
    // Lengths on both sides of zero share the width; numbers stand outside on both sides.
    let from = if below > 0.0 { left + widest } else { left };
    let unit = (right - from) / (below + above).max(f64::MIN_POSITIVE);
    let zero = from + below * unit;
    let top = y;
    for ((bar, name), total) in shown.iter().zip(&short).zip(&totals) {
        let baseline = y + high / 2.0 + 4.0;
        let tip = tip(bars, bar);
        canvas.markup(&match frame.alone {
            true => format!("<g><title>{tip}</title>\n"),
            false => format!("<g class=\"bar\" data-tip=\"{tip}\">\n"),
        });
        // What the pointer can hit is the whole row.
        canvas.rect("hit", (inset, y), (frame.width - 2.0 * inset, high), 0.0);
        let name = fit(name, SIZE, NAME);
        canvas.text("t", (left - 10.0, baseline), Anchor::End, &name);
        let (mut forth, mut back) = (zero, zero);
        let thick = if high > 20.0 { high - 8.0 } else { high - 5.0 };
        for (part, value) in bar.values.iter().enumerate() {
            let length = value.clamp(-1e300, 1e300) * unit;
            if !length.is_finite() || length == 0.0 {
                continue;
            }
            let start = if length > 0.0 { forth } else { back + length };
            if length > 0.0 {
                forth += length;
            } else {
                back += length;
            }
            // Parts are a hair apart, unless they are thinner than that.
            let width = length.abs();
            let apart = if bars.parts.len() > 1 && width > 3.0 { 1.0 } else { 0.0 };
            let class = format!("f{}", part.min(HUES - 1));
            let size = ((width - apart).max(0.5), thick);
            canvas.rect(&class, (start, y + (high - thick) / 2.0), size, 2.0);
        }
        let negative = forth == zero && back < zero;
        let (x, anchor) =
            if negative { (back - 7.0, Anchor::End) } else { (forth + 7.0, Anchor::Start) };
        canvas.text("m", (x, baseline), anchor, total);
        canvas.markup("</g>\n");
        y += high;
    }
    canvas.line("a c", (zero.round(), top), (zero.round(), y));
    if shown.len() < bars.items.len() {
        let note = format!("the {} largest of {}", shown.len(), bars.items.len());
        canvas.text("m n", (left, y + 17.0), Anchor::Start, &note);
        y += 20.0;
    }
    let count = bars.items.len();
    let label = format!("{}: {} for {count} items", bars.title, bars.label);
    canvas.finish(frame.width, y + inset, label)
}

/// The lengths that can be drawn.
fn tame(bar: &Bar) -> impl Iterator<Item = f64> {
    bar.values.iter().copied().filter(|value| value.is_finite()).map(|v| v.clamp(-1e300, 1e300))
}

fn total(bar: &Bar) -> f64 {
    bar.values.iter().sum()
}

/// The bars, in their order; of too many the largest.
fn largest(items: &[Bar]) -> Vec<&Bar> {
    if items.len() <= MOST {
        return items.iter().collect();
    }
    let size = |bar: &Bar| tame(bar).map(f64::abs).sum::<f64>();
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by(|&one, &other| size(&items[other]).total_cmp(&size(&items[one])));
    order.truncate(MOST);
    order.sort_unstable();
    order.into_iter().map(|index| &items[index]).collect()
}

/// What the tooltip of a bar says, escaped.
fn tip(bars: &Bars, bar: &Bar) -> String {
    let mut text = format!("{}: {}", shorten(&bar.name, TIP), number(total(bar)));
    if bars.parts.len() > 1 {
        let parts = bars.parts.iter().zip(&bar.values).take(24);
        for (name, value) in parts {
            text.push_str(&format!(" · {} {}", shorten(name, 60), number(*value)));
        }
    }
    escape(&text)
}
