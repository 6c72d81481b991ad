//! The figures, as plain data.
//!
//! Every text is shown as it is: names from files need no escaping here. Every number may be
//! anything; what cannot be drawn is left out and counted.

/// One picture.
#[derive(Clone, Debug)]
pub(crate) enum Figure {
    /// Curves over a common pair of axes: spectra, captured energy.
    Lines(Lines),
    /// A matrix of shaded cells: layers × projections, similarities.
    Heat(Heat),
    /// Bars from zero: shares, counts.
    Bars(Bars),
}

impl Figure {
    /// What the figure is called.
    pub(crate) fn title(&self) -> &str {
        match self {
            Figure::Lines(lines) => &lines.title,
            Figure::Heat(heat) => &heat.title,
            Figure::Bars(bars) => &bars.title,
        }
    }

    /// The sentence below it.
    pub(crate) fn note(&self) -> &str {
        match self {
            Figure::Lines(lines) => &lines.note,
            Figure::Heat(heat) => &heat.note,
            Figure::Bars(bars) => &bars.note,
        }
    }
}

/// Curves over a common pair of axes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lines {
    /// What is shown, in a few words.
    pub(crate) title: String,
    /// What it means or how to read it, in a sentence; may be empty.
    pub(crate) note: String,
    /// The horizontal axis.
    pub(crate) x: Axis,
    /// The vertical axis.
    pub(crate) y: Axis,
    /// The curves, the last on top. Up to seven of them, or seven groups, have colours of their own.
    pub(crate) series: Vec<Series>,
    /// Lines across the whole plot, with labels.
    pub(crate) marks: Vec<Mark>,
}

/// One axis.
#[derive(Clone, Debug, Default)]
pub(crate) struct Axis {
    /// What is measured, with its unit.
    pub(crate) label: String,
    /// How values are spaced.
    pub(crate) scale: Scale,
    /// The values at its ends; what the points need if there are none.
    pub(crate) range: Option<(f64, f64)>,
}

impl Axis {
    /// An axis on which equal differences are equal lengths.
    pub(crate) fn linear(label: impl Into<String>) -> Axis {
        Axis { label: label.into(), scale: Scale::Linear, range: None }
    }

    /// An axis on which equal ratios are equal lengths.
    pub(crate) fn log(label: impl Into<String>) -> Axis {
        Axis { label: label.into(), scale: Scale::Log, range: None }
    }

    /// The same axis from `low` to `high`, whatever the points are.
    pub(crate) fn within(self, low: f64, high: f64) -> Axis {
        Axis { range: Some((low, high)), ..self }
    }
}

/// How an axis spaces its values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Scale {
    /// Equal differences, equal lengths.
    #[default]
    Linear,
    /// Equal ratios, equal lengths; zero and less cannot be shown.
    Log,
}

/// One curve.
#[derive(Clone, Debug, Default)]
pub(crate) struct Series {
    /// What it belongs to, such as a tensor's name.
    pub(crate) name: String,
    /// The kind it is one of; curves of a group share a colour and an entry of the legend.
    pub(crate) group: Option<String>,
    /// (x, y), in drawing order. A point that is not finite interrupts the curve.
    pub(crate) points: Vec<(f64, f64)>,
    /// How much it should be seen.
    pub(crate) emphasis: Emphasis,
}

/// How much one curve among many should be seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Emphasis {
    /// As one of all.
    #[default]
    Normal,
    /// On top of the others, and labelled at its end.
    Strong,
}

/// A dashed line across the plot: a threshold, a chosen rank.
#[derive(Clone, Debug)]
pub(crate) enum Mark {
    /// At a value of x.
    Vertical {
        /// Where.
        at: f64,
        /// What it is.
        label: String,
    },
    /// At a value of y.
    Horizontal {
        /// Where.
        at: f64,
        /// What it is.
        label: String,
    },
}

/// A matrix of shaded cells.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heat {
    /// What is shown, in a few words.
    pub(crate) title: String,
    /// What it means or how to read it, in a sentence; may be empty.
    pub(crate) note: String,
    /// What the rows are, such as `layer`; may be empty.
    pub(crate) row_label: String,
    /// What the columns are; may be empty.
    pub(crate) column_label: String,
    /// One name per row, from the top.
    pub(crate) rows: Vec<String>,
    /// One name per column, from the left.
    pub(crate) columns: Vec<String>,
    /// `rows × columns` values, row by row; `None` where there is none. Values that are missing at
    /// the end count as `None`.
    pub(crate) values: Vec<Option<f64>>,
    /// What the values are.
    pub(crate) legend: String,
    /// Which value has which shade.
    pub(crate) shades: Shades,
    /// Whether the value is written into each cell, where there is room.
    pub(crate) numbers: bool,
}

/// Which value has which shade.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Shades {
    /// From the smallest value to the largest.
    #[default]
    Fitted,
    /// Between two values; what is beyond has the shade of the end.
    Sequential {
        /// The value with the weakest shade.
        low: f64,
        /// The value with the strongest.
        high: f64,
    },
    /// By ratio, from the smallest positive value to the largest.
    Log,
    /// Two colours, away from a value that has none.
    #[cfg_attr(not(test), allow(dead_code, reason = "for signed numbers; tests draw one"))]
    Diverging {
        /// The value without a colour.
        middle: f64,
    },
}

/// Bars from zero, one below the other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bars {
    /// What is shown, in a few words.
    pub(crate) title: String,
    /// What it means or how to read it, in a sentence; may be empty.
    pub(crate) note: String,
    /// What the lengths are, with the unit.
    pub(crate) label: String,
    /// The names of the parts that each bar is stacked from; empty for plain bars.
    pub(crate) parts: Vec<String>,
    /// The bars, from the top.
    pub(crate) items: Vec<Bar>,
}

/// One bar.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bar {
    /// What it belongs to.
    pub(crate) name: String,
    /// Its length, or the lengths of its parts in the order of [`Bars::parts`].
    pub(crate) values: Vec<f64>,
}

impl Bar {
    /// A bar of one part.
    pub(crate) fn new(name: impl Into<String>, value: f64) -> Bar {
        Bar { name: name.into(), values: vec![value] }
    }
}
