//! SVG elements, and the drawing they add up to.
//!
//! Elements have classes and no colours; the colours are in the style sheet (`theme.rs`), so that
//! the same drawing is light in one place and dark in another.

use std::borrow::Cow;
use std::fmt::Write;

use super::text::{SIZE, TITLE, coordinate, escape, text_width};

/// What a drawing is made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    /// How wide it is, in pixels.
    pub(super) width: f64,
    /// Whether it stands for itself: then title and note are in the picture, and tooltips are
    /// elements; in a page, the page has both.
    pub(super) alone: bool,
}

impl Frame {
    /// The margin around the drawing; in a page, the page has one.
    pub(super) fn inset(&self) -> f64 {
        if self.alone { 24.0 } else { 2.0 }
    }
}

/// A figure that has been laid out.
#[derive(Debug)]
pub(super) struct Drawing {
    width: f64,
    height: f64,
    /// What is seen, for those who do not see it.
    label: String,
    /// What the page's script needs to know, as attributes.
    data: String,
    body: String,
}

impl Drawing {
    /// The drawing as a file of its own.
    pub(super) fn document(&self, style: &str) -> String {
        let (width, height) = (coordinate(self.width), coordinate(self.height));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"pic\" width=\"{width}\" \
             height=\"{height}\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
             aria-label=\"{}\">\n<style>{style}</style>\n<rect class=\"bg\" width=\"{width}\" \
             height=\"{height}\"/>\n{}</svg>\n",
            escape(&self.label),
            self.body
        )
    }

    /// The drawing as an element of a page, which has the style sheet.
    pub(super) fn element(&self) -> String {
        let (width, height) = (coordinate(self.width), coordinate(self.height));
        format!(
            "<svg class=\"pic\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\"{}>\n{}</svg>",
            escape(&self.label),
            self.data,
            self.body
        )
    }
}

/// Where the text starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A drawing in the making.
#[derive(Debug, Default)]
pub(super) struct Canvas {
    body: String,
    data: String,
    right: f64,
}

impl Canvas {
    /// Ends the drawing.
    pub(super) fn finish(self, width: f64, height: f64, label: String) -> Drawing {
        // Whole pixels, at one and a half of them too.
        let even = |length: f64| (length / 2.0).ceil() * 2.0;
        let (width, height) = (even(width), even(height));
        Drawing { width, height, label, data: self.data, body: self.body }
    }

    /// How far to the right text reaches so far.
    pub(super) fn right(&self) -> f64 {
        self.right
    }

    /// Tells the page's script something about the drawing.
    pub(super) fn data(&mut self, name: &str, value: &str) {
        let _infallible = write!(self.data, " data-{name}=\"{}\"", escape(value));
    }

    /// Tells the script several texts, a line for each; an end of a line within one is spelt out.
    pub(super) fn data_lines(&mut self, name: &str, lines: &[Cow<'_, str>]) {
        let lines: Vec<String> = lines.iter().map(|line| escape(line)).collect();
        let _infallible = write!(self.data, " data-{name}=\"{}\"", lines.join("&#10;"));
    }

    /// Adds markup that is already escaped.
    pub(super) fn markup(&mut self, markup: &str) {
        self.body.push_str(markup);
    }

    pub(super) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let _infallible = writeln!(
            self.body,
            "<line class=\"{class}\" x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\"/>",
            coordinate(from.0),
            coordinate(from.1),
            coordinate(to.0),
            coordinate(to.1)
        );
    }

    /// A rectangle: position, size, and how round its corners are.
    pub(super) fn rect(&mut self, class: &str, at: (f64, f64), size: (f64, f64), round: f64) {
        self.rect_with(class, at, size, round, "");
    }

    /// A rectangle with something inside or with attributes, which are already escaped.
    pub(super) fn rect_with(
        &mut self,
        class: &str,
        at: (f64, f64),
        size: (f64, f64),
        round: f64,
        inside: &str,
    ) {
        let _infallible = write!(
            self.body,
            "<rect class=\"{class}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"",
            coordinate(at.0),
            coordinate(at.1),
            coordinate(size.0.max(0.0)),
            coordinate(size.1.max(0.0))
        );
        if round > 0.0 {
            let _infallible = write!(self.body, " rx=\"{}\"", coordinate(round));
        }
        if inside.is_empty() {
            self.body.push_str("/>\n");
        } else {
            let _infallible = writeln!(self.body, ">{inside}</rect>");
        }
    }

    /// Text with its baseline at a point.
    pub(super) fn text(&mut self, class: &str, at: (f64, f64), anchor: Anchor, text: &str) {
        let width = text_width(text, if class == "h" { TITLE } else { SIZE });
        let right = match anchor {
            Anchor::Start => at.0 + width,
            Anchor::Middle => at.0 + width / 2.0,
            Anchor::End => at.0,
        };
        self.right = self.right.max(right);
        self.text_markup(class, at, anchor, "", &escape(text));
    }

    /// Text that is already escaped, with attributes.
    pub(super) fn text_markup(
        &mut self,
        class: &str,
        at: (f64, f64),
        anchor: Anchor,
        attributes: &str,
        markup: &str,
    ) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let _infallible = writeln!(
            self.body,
            "<text class=\"{class}\" x=\"{}\" y=\"{}\"{anchor}{attributes}>{markup}</text>",
            coordinate(at.0),
            coordinate(at.1)
        );
    }
}
