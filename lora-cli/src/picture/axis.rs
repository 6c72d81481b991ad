//! An axis: values to pixels, and where its ticks are.

use super::figure::{Axis, Scale};
use super::text::{escape, trimmed};

/// What is smaller counts as zero, and what is larger as not finite: the arithmetic of scales stays
/// finite.
const TINY: f64 = 1e-290;
const HUGE: f64 = 1e290;

/// How many decades a logarithmic axis spans at most; what is smaller is not drawn.
const DECADES: f64 = 16.0;

/// A value that a scale can place.
fn usable(value: f64, scale: Scale) -> bool {
    value.abs() <= HUGE && (scale == Scale::Linear || value >= TINY)
}

/// Values to pixels.
#[derive(Clone, Debug)]
pub(super) struct Ruler {
    scale: Scale,
    /// The values at the ends; their logarithms on a logarithmic scale.
    low: f64,
    high: f64,
    /// The pixels of `low` and `high`.
    from: f64,
    to: f64,
    /// Whether all values are whole numbers, so that ticks are too.
    pub(super) whole: bool,
}

/// A place on an axis.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tick {
    /// The pixel.
    pub(super) at: f64,
    /// The number there, escaped; empty for a place between numbers.
    pub(super) label: String,
}

impl Ruler {
    /// A ruler that shows all of the values that it can, or what the axis asks for. `None` if there
    /// is no value.
    pub(super) fn new(
        axis: &Axis,
        values: impl Iterator<Item = f64>,
        from: f64,
        to: f64,
    ) -> Option<Ruler> {
        let scale = axis.scale;
        let (mut low, mut high, mut whole) = (f64::INFINITY, f64::NEG_INFINITY, true);
        for value in values.filter(|&value| usable(value, scale)) {
            (low, high) = (low.min(value), high.max(value));
            whole &= value.fract() == 0.0 && value.abs() < 1e9;
        }
        let asked = axis.range.filter(|(low, high)| {
            usable(*low, scale) && usable(*high, scale) && low.total_cmp(high).is_lt()
        });
        if low > high {
            return None;
        }
        (low, high) = asked.unwrap_or((low, high));
        if scale == Scale::Log {
            (low, high) = (low.log10(), high.log10());
            if asked.is_none() {
                low = low.max(high - DECADES);
            }
            if high - low < 1e-9 {
                (low, high) = (low - 0.5, high + 0.5);
            }
        } else if high - low <= f64::EPSILON * high.abs().max(low.abs()) * 8.0 {
            // All values are equal: they are in the middle.
            let reach = if low == 0.0 { 1.0 } else { low.abs() / 2.0 };
            (low, high) = (low - reach, high + reach);
        }
        Some(Ruler { scale, low, high, from, to, whole })
    }

    /// The same ruler, its ends moved outward to round numbers.
    pub(super) fn rounded(mut self, most: usize) -> Ruler {
        match self.scale {
            Scale::Linear => {
                let step = self.step(most);
                self.low = (self.low / step - 1e-9).floor() * step;
                self.high = (self.high / step + 1e-9).ceil() * step;
            }
            Scale::Log => {
                // A whole decade is too much to add to a few.
                let margin = 0.03 * (self.high - self.low);
                (self.low, self.high) = (self.low - margin, self.high + margin);
            }
        }
        self
    }

    /// Moves the ruler.
    pub(super) fn shift(&mut self, pixels: f64) {
        (self.from, self.to) = (self.from + pixels, self.to + pixels);
    }

    /// The pixel of a value; `None` if the scale has no place for it.
    pub(super) fn pixel(&self, value: f64) -> Option<f64> {
        if !usable(value, self.scale) {
            return None;
        }
        let value = if self.scale == Scale::Log { value.log10() } else { value };
        let share = (value - self.low) / (self.high - self.low);
        if self.scale == Scale::Log && share < -1.0 {
            return None;
        }
        Some(self.from + share.clamp(-1e3, 1e3) * (self.to - self.from))
    }

    /// The pixel of a value that lies between the ends.
    pub(super) fn inside(&self, value: f64) -> Option<f64> {
        let (least, most) = (self.from.min(self.to), self.from.max(self.to));
        self.pixel(value).filter(|pixel| (least - 0.01..=most + 0.01).contains(pixel))
    }

    /// Scale, ends and whether values are whole, for the page's script.
    pub(super) fn data(&self) -> String {
        let scale = if self.scale == Scale::Log { "log" } else { "linear" };
        format!("{scale} {} {} {}", self.low, self.high, u8::from(self.whole))
    }

    /// About `most` ticks, at round numbers.
    pub(super) fn ticks(&self, most: usize) -> Vec<Tick> {
        let most = most.max(2);
        match self.scale {
            Scale::Linear => self.linear_ticks(most),
            Scale::Log => self.log_ticks(most),
        }
    }

    fn step(&self, most: usize) -> f64 {
        let step = round_step((self.high - self.low) / most.max(1) as f64);
        if self.whole { step.max(1.0) } else { step }
    }

    fn linear_ticks(&self, most: usize) -> Vec<Tick> {
        let step = self.step(most);
        let first = (self.low / step - 1e-9).ceil();
        let last = (self.high / step + 1e-9).floor();
        let count = (last - first).clamp(0.0, 4.0 * most as f64) as usize + 1;
        let largest = self.low.abs().max(self.high.abs());
        (0..count)
            .map(|index| {
                let value = (first + index as f64) * step;
                Tick { at: self.place(value), label: linear_label(value, step, largest) }
            })
            .collect()
    }

    fn log_ticks(&self, most: usize) -> Vec<Tick> {
        let first = (self.low - 1e-9).ceil() as i32;
        let last = (self.high + 1e-9).floor() as i32;
        let decades = (last - first + 1).max(0) as usize;
        let stride = decades.div_ceil(most).max(1);
        let plain = first >= -4 && last <= 5;
        let mut ticks = Vec::new();
        // With few decades in sight some numbers between them have labels too.
        let between: &[i32] = match decades {
            0 | 1 => &[2, 3, 5],
            2 if most >= 6 => &[2, 5],
            3 if most >= 9 => &[2, 5],
            _ => &[],
        };
        for decade in first - 1..=last {
            for digit in 1..10 {
                let value = f64::from(decade) + f64::from(digit).log10();
                if value < self.low - 1e-9 || value > self.high + 1e-9 {
                    continue;
                }
                let labelled = if digit == 1 {
                    (decade - first).rem_euclid(stride as i32) == 0
                } else {
                    between.contains(&digit)
                };
                if !labelled && (stride > 1 || decades > 6) {
                    continue;
                }
                let label = if labelled { log_label(digit, decade, plain) } else { String::new() };
                ticks.push(Tick { at: self.place(value), label });
            }
        }
        if ticks.iter().filter(|tick| !tick.label.is_empty()).count() >= 2 {
            return ticks;
        }
        // Less than a decade: round numbers of a linear axis, at their places on this one.
        let (low, high) = (10f64.powf(self.low), 10f64.powf(self.high));
        let step = round_step((high - low) / most as f64);
        let (first, last) = ((low / step - 1e-9).ceil(), (high / step + 1e-9).floor());
        let count = (last - first).clamp(0.0, 4.0 * most as f64) as usize + 1;
        (0..count)
            .map(|index| (first + index as f64) * step)
            .filter(|value| *value > 0.0)
            .map(|value| Tick {
                at: self.place(value.log10()),
                label: linear_label(value, step, high),
            })
            .collect()
    }

    /// The pixel of a value of the scale: of a logarithm on a logarithmic one.
    fn place(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }
}

/// The smallest of 1, 2, 5 times a power of ten that is not below `step`.
fn round_step(step: f64) -> f64 {
    let step = step.max(TINY);
    let power = 10f64.powf(step.log10().floor());
    let times = step / power;
    let round = [1.0, 2.0, 5.0].into_iter().find(|round| times <= round * 1.000_001);
    round.unwrap_or(10.0) * power
}

fn linear_label(value: f64, step: f64, largest: f64) -> String {
    if value.abs() < step * 1e-6 {
        return "0".to_owned();
    }
    let exponent = largest.log10().floor() as i32;
    let text = if (-4..=6).contains(&exponent) {
        let decimals = (-(step.log10() + 1e-9).floor()).clamp(0.0, 12.0) as usize;
        format!("{value:.decimals$}")
    } else {
        let digits = (f64::from(exponent) - step.log10().floor()).clamp(0.0, 6.0) as usize;
        let mantissa = trimmed(format!("{:.digits$}", value / 10f64.powi(exponent)));
        return format!("{}·{}", escape(&mantissa.replace('-', "−")), power(exponent));
    };
    escape(&text.replace('-', "−"))
}

fn log_label(digit: i32, decade: i32, plain: bool) -> String {
    if plain {
        let decimals = (-decade).max(0) as usize;
        return format!("{:.decimals$}", f64::from(digit) * 10f64.powi(decade));
    }
    match digit {
        1 => power(decade),
        _ => format!("{digit}·{}", power(decade)),
    }
}

/// Ten to a power. The exponent is raised by hand: no font needs to have raised digits.
fn power(exponent: i32) -> String {
    let exponent = exponent.to_string().replace('-', "−");
    format!("10<tspan class=\"x\" dy=\"-4\">{exponent}</tspan>")
}

/// The text of a label without its markup, to know its width.
pub(super) fn plain(label: &str) -> String {
    let mut text = String::new();
    let mut inside = false;
    for character in label.chars() {
        match character {
            '<' => inside = true,
            '>' => inside = false,
            character if !inside => text.push(character),
            _ => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ruler(axis: &Axis, values: &[f64]) -> Option<Ruler> {
        Ruler::new(axis, values.iter().copied(), 0.0, 100.0)
    }

    fn labels(axis: &Axis, values: &[f64], most: usize) -> Vec<String> {
        let ticks = ruler(axis, values).unwrap().ticks(most);
        ticks.iter().map(|tick| plain(&tick.label)).filter(|label| !label.is_empty()).collect()
    }

    #[test]
    fn ticks_are_round_numbers() {
        let linear = Axis::linear("");
        assert_eq!(labels(&linear, &[0.0, 1.0], 5), ["0", "1"]);
        assert_eq!(
            labels(&linear, &[0.0, 0.97], 5),
            ["0.0", "0.2", "0.4", "0.6", "0.8"].map(|s| if s == "0.0" { "0" } else { s })
        );
        assert_eq!(labels(&linear, &[-3.0, 64.0], 5), ["0", "20", "40", "60"]);
        assert_eq!(labels(&linear, &[-0.02, 0.01], 3), ["−0.02", "−0.01", "0", "0.01"]);
        assert_eq!(labels(&linear, &[0.0, 3e9], 3), ["0", "1·109", "2·109", "3·109"]);
        assert_eq!(labels(&linear, &[1.0, 2.0, 3.0], 8), ["1", "2", "3"]);
    }

    #[test]
    fn logarithmic_ticks_are_decades() {
        let log = Axis::log("");
        assert_eq!(labels(&log, &[1.0, 4096.0], 8), ["1", "10", "100", "1000"]);
        assert_eq!(labels(&log, &[1e-9, 1.0], 6), ["10−9", "10−7", "10−5", "10−3", "10−1"]);
        assert_eq!(labels(&log, &[3.0, 30.0], 6), ["3", "5", "10", "20", "30"]);
        assert_eq!(labels(&log, &[0.51, 0.54], 3), ["0.51", "0.52", "0.53", "0.54"]);
    }

    #[test]
    fn equal_values_are_in_the_middle() {
        for axis in [Axis::linear(""), Axis::log("")] {
            let ruler = ruler(&axis, &[3.0, 3.0]).unwrap();
            assert!((ruler.pixel(3.0).unwrap() - 50.0).abs() < 1e-6);
            assert!(ruler.ticks(5).len() >= 2);
        }
        assert_eq!(ruler(&Axis::linear(""), &[0.0]).unwrap().pixel(0.0), Some(50.0));
    }

    #[test]
    fn what_has_no_place_is_left_out() {
        assert!(ruler(&Axis::linear(""), &[f64::NAN, f64::INFINITY]).is_none());
        assert!(ruler(&Axis::log(""), &[0.0, -1.0, f64::NAN]).is_none());
        let log = ruler(&Axis::log(""), &[1e-300, 0.0, 1.0, 1e-40]).unwrap();
        assert_eq!(log.pixel(0.0), None);
        assert_eq!(log.pixel(1e-40), None);
        // Sixteen decades at most.
        assert_eq!(log.inside(1e-17), None);
        assert!(log.inside(1e-15).is_some());
        let ruler = ruler(&Axis::linear(""), &[-f64::MAX, f64::MAX, 1e290, -1e290]).unwrap();
        assert!(ruler.ticks(6).iter().all(|tick| tick.at.is_finite()));
    }

    #[test]
    fn an_axis_can_be_told_its_ends() {
        let axis = Axis::linear("").within(0.0, 2.0);
        let ruler = ruler(&axis, &[0.5, 1.0]).unwrap();
        assert_eq!(ruler.pixel(1.0), Some(50.0));
        assert_eq!(ruler.inside(3.0), None);
        // Ends that are none are passed over.
        let axis = Axis::log("").within(0.0, f64::NAN);
        assert!(self::ruler(&axis, &[1.0, 10.0]).is_some());
    }
}
