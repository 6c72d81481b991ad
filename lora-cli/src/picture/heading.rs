//! What stands above a figure: title, note and legend.

use super::canvas::{Anchor, Canvas, Frame};
use super::text::{SIZE, TIP, TITLE, escape, fit, shorten, text_width, wrap};
use super::theme::HUES;

/// What is said where there is nothing to draw.
const NOTHING: &str = "nothing to show";

/// Writes title and note of a figure that stands for itself. Gives the height that is taken.
pub(super) fn heading(canvas: &mut Canvas, frame: &Frame, title: &str, note: &str) -> f64 {
    if !frame.alone {
        return frame.inset();
    }
    let (left, width) = (frame.inset(), frame.width - 2.0 * frame.inset());
    let mut y = frame.inset() + 2.0;
    for line in wrap(title, TITLE, width, 2) {
        y += 14.0;
        canvas.text("h", (left, y), Anchor::Start, &line);
        y += 7.0;
    }
    for line in wrap(note, SIZE, width, 3) {
        y += 12.0;
        canvas.text("m", (left, y), Anchor::Start, &line);
        y += 5.0;
    }
    y + 10.0
}

/// An entry of a legend.
#[derive(Clone, Debug)]
pub(super) struct Key {
    /// Its colour.
    pub(super) hue: usize,
    /// What has the colour.
    pub(super) name: String,
}

/// Names with a hue each; those beyond the last hue share the grey, under a name of their own.
pub(super) fn keys(names: &[&str]) -> Vec<Key> {
    let own = if names.len() < HUES { names.len() } else { HUES - 1 };
    let mut keys: Vec<Key> = names[..own]
        .iter()
        .enumerate()
        .map(|(hue, name)| Key { hue, name: (*name).to_owned() })
        .collect();
    if names.len() > own {
        keys.push(Key { hue: HUES - 1, name: format!("{} others", names.len() - own) });
    }
    keys
}

/// Draws a legend from the height `y` on. Gives the height below it.
pub(super) fn legend(canvas: &mut Canvas, frame: &Frame, y: f64, keys: &[Key], line: bool) -> f64 {
    if keys.is_empty() {
        return y;
    }
    let swatch = if line { 20.0 } else { 12.0 };
    let (left, right) = (frame.inset(), frame.width - frame.inset());
    let (mut x, mut y) = (left, y);
    for key in keys {
        let name = fit(&key.name, SIZE, 260.0);
        let width = swatch + 6.0 + text_width(&name, SIZE);
        if x > left && x + width > right {
            (x, y) = (left, y + 19.0);
        }
        let hidden = escape(&shorten(&key.name, TIP));
        if frame.alone || !line {
            canvas.markup("<g>");
            if name != key.name {
                canvas.markup(&format!("<title>{hidden}</title>"));
            }
        } else {
            let hue = key.hue;
            canvas.markup(&format!("<g class=\"key\" data-hue=\"{hue}\" tabindex=\"0\""));
            if name != key.name {
                canvas.markup(&format!(" data-tip=\"{hidden}\""));
            }
            canvas.markup(">");
        }
        if line {
            let class = format!("l s{} w9", key.hue);
            canvas.line(&class, (x + 1.0, y + 8.0), (x + swatch - 1.0, y + 8.0));
        } else {
            canvas.rect(&format!("f{}", key.hue), (x, y + 2.0), (swatch, swatch), 2.0);
        }
        canvas.text("t", (x + swatch + 6.0, y + 12.0), Anchor::Start, &name);
        canvas.markup("</g>\n");
        x += width + 20.0;
    }
    y + 26.0
}

/// Says that there is nothing, from the height `y` on. Gives the height below it.
pub(super) fn nothing(canvas: &mut Canvas, frame: &Frame, y: f64) -> f64 {
    let inset = frame.inset();
    canvas.rect("v", (inset, y), (frame.width - 2.0 * inset, 96.0), 6.0);
    canvas.text("m", (frame.width / 2.0, y + 52.0), Anchor::Middle, NOTHING);
    y + 96.0 + inset
}
