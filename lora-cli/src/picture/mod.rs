//! Pictures of what was measured: figures as plain data, drawn as SVG, as PNG, or together in one
//! HTML page.
//!
//! A command fills in a [`Figure`] or a [`Page`] and knows nothing of pixels. This module owns
//! scales, ticks, colours, text that fits, thinning of long lines, and the escaping of all that comes
//! from files. What it draws depends on the figure alone: no clock, no font of the machine, no
//! network. Each file stands for itself, and a page carries a policy that lets a browser load
//! nothing.
//!
//! Nothing in a figure is an error. Values that are not finite are left out and counted, an empty
//! figure says so, and a figure of more cells or bars than can be seen shows groups of them or the
//! largest and says which.
//!
//! | file | what it holds |
//! |---|---|
//! | `figure.rs` | the figures: lines, heat maps, bars |
//! | `page.rs`, `page.css`, `page.js` | the page: sections, headline numbers, tables |
//! | `lines.rs`, `heat.rs`, `bars.rs` | how each kind of figure is laid out |
//! | `axis.rs` | values to pixels, and where the ticks are |
//! | `thin.rs` | long curves with fewer points that look the same |
//! | `heading.rs` | title, note and legend of a figure |
//! | `canvas.rs` | SVG elements |
//! | `text.rs` | escaping, shortening, the width of text, numbers as text |
//! | `theme.rs` | colours of light and dark |
//! | `png.rs` | pixels |

mod axis;
mod bars;
mod canvas;
mod figure;
mod heading;
mod heat;
mod lines;
mod page;
mod png;
mod text;
mod theme;
mod thin;

#[cfg(test)]
mod demo;
#[cfg(test)]
mod tests;

pub(crate) use figure::{Axis, Bar, Bars, Emphasis, Figure, Heat, Lines, Mark, Series, Shades};
pub(crate) use page::{Cell, Column, Page, Section, Table, Tile, html};
pub(crate) use png::png;
pub(crate) use text::number;
pub(crate) use theme::Theme;

use canvas::{Drawing, Frame};

/// How wide a figure is that stands for itself, in pixels of the SVG.
const WIDTH: f64 = 800.0;

/// A figure as an SVG file that stands for itself.
pub(crate) fn svg(figure: &Figure, theme: Theme) -> String {
    standalone(figure, &theme::style(theme))
}

/// A figure with its title on a background, coloured by `style`.
fn standalone(figure: &Figure, style: &str) -> String {
    let drawing = draw(figure, &Frame { width: WIDTH, alone: true });
    drawing.document(style)
}

fn draw(figure: &Figure, frame: &Frame) -> Drawing {
    match figure {
        Figure::Lines(lines) => lines::draw(lines, frame),
        Figure::Heat(heat) => heat::draw(heat, frame),
        Figure::Bars(bars) => bars::draw(bars, frame),
    }
}
