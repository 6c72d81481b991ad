//! Colours: a palette for light and one for dark, and the style sheet made from them.
//!
//! The hues of curves and bars are seven that stay apart for people with protanopia, deuteranopia and
//! tritanopia too (they follow Okabe and Ito, "Color Universal Design", 2008), and a grey for all
//! further ones. The shades of a heat map are made in Oklab (B. Ottosson, 2020), whose lightness is
//! even to the eye: equal steps of the value are equal steps of lightness, and more is always further
//! from the background.

use std::fmt::Write;

use super::text::{SIZE, SMALL, TITLE};

/// Which colours a file has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Theme {
    /// Those that the reader prefers; light where that is not known, as in a PNG.
    #[default]
    Auto,
    /// Dark on light.
    Light,
    /// Light on dark.
    Dark,
}

/// How many hues there are; the last is the grey that all further groups share.
pub(super) const HUES: usize = 8;

/// How many shades a heat map has on the way from low to high.
pub(super) const SHADES: usize = 48;

/// The first shade that text stands on in the background's colour.
pub(super) const DEEP: usize = SHADES / 2;

/// How many shades a diverging heat map has on each side of the middle.
pub(super) const SIDE: usize = 20;

/// A palette.
struct Palette {
    background: &'static str,
    ink: &'static str,
    muted: &'static str,
    grid: &'static str,
    axis: &'static str,
    /// A cell that has no value.
    void: &'static str,
    hues: [&'static str; HUES],
    /// Lightness, chroma and hue of shades, evenly spaced from low to high.
    ramp: [Lch; 5],
    /// The shade of the middle of a diverging scale, and of its two ends.
    middle: Lch,
    below: Lch,
    above: Lch,
}

const LIGHT: Palette = Palette {
    background: "#ffffff",
    ink: "#1b1e24",
    muted: "#5f6673",
    grid: "#e9ebef",
    axis: "#b4bac4",
    void: "#f1f2f4",
    hues: ["#0b6bb5", "#d6541a", "#0a9270", "#cc72aa", "#dd9c00", "#56b4e9", "#5b2a86", "#7a818c"],
    ramp: [
        Lch(0.965, 0.025, 130.0),
        Lch(0.790, 0.095, 165.0),
        Lch(0.615, 0.105, 205.0),
        Lch(0.440, 0.110, 250.0),
        Lch(0.265, 0.105, 278.0),
    ],
    middle: Lch(0.965, 0.004, 250.0),
    below: Lch(0.520, 0.170, 40.0),
    above: Lch(0.430, 0.140, 258.0),
};

const DARK: Palette = Palette {
    background: "#14171c",
    ink: "#e7e9ee",
    muted: "#9ba3b1",
    grid: "#272c35",
    axis: "#535b69",
    void: "#1d2128",
    hues: ["#3f8ee8", "#ee7040", "#22b188", "#eaa0d0", "#f5cf4f", "#9adcfb", "#8a4fd0", "#8b93a0"],
    ramp: [
        Lch(0.230, 0.050, 278.0),
        Lch(0.405, 0.105, 255.0),
        Lch(0.580, 0.105, 215.0),
        Lch(0.755, 0.110, 170.0),
        Lch(0.930, 0.095, 120.0),
    ],
    middle: Lch(0.270, 0.008, 260.0),
    below: Lch(0.760, 0.150, 50.0),
    above: Lch(0.770, 0.120, 245.0),
};

/// The style sheet of figures. Every rule is for what is inside of `.pic`.
pub(super) fn style(theme: Theme) -> String {
    let mut css = format!(
        ".pic{{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans','Helvetica Neue',\
         Arial,sans-serif;font-size:{SIZE}px;font-variant-numeric:tabular-nums}}\
         .pic .h{{font-size:{TITLE}px;font-weight:600}}\
         .pic .n{{font-size:{SMALL}px}}.pic .x{{font-size:9px}}\
         .pic .l{{fill:none;stroke-linejoin:round;stroke-linecap:round}}\
         .pic .k{{stroke-width:1.25px;stroke-dasharray:5 4}}\
         .pic .c{{shape-rendering:crispEdges}}.pic .hit{{fill:none;pointer-events:all}}\
         .pic .w0{{stroke-width:2px}}.pic .w1{{stroke-width:1.5px;stroke-opacity:.75}}\
         .pic .w2{{stroke-width:1.2px;stroke-opacity:.5}}\
         .pic .w3{{stroke-width:1px;stroke-opacity:.32}}\
         .pic .w4{{stroke-width:1px;stroke-opacity:.15}}\
         .pic .w9{{stroke-width:2.5px}}.pic .p{{stroke-width:6px;stroke-opacity:.8}}"
    );
    match theme {
        Theme::Auto => {
            css.push_str(&colours(&LIGHT));
            css.push_str("@media (prefers-color-scheme:dark){");
            css.push_str(&colours(&DARK));
            css.push('}');
        }
        Theme::Light => css.push_str(&colours(&LIGHT)),
        Theme::Dark => css.push_str(&colours(&DARK)),
    }
    css
}

/// The background, as red, green and blue; light if the theme leaves it to the reader.
pub(super) fn background(theme: Theme) -> [u8; 3] {
    let palette = if theme == Theme::Dark { &DARK } else { &LIGHT };
    let part = |at: usize| {
        let digits = palette.background.get(at..at + 2).unwrap_or_default();
        u8::from_str_radix(digits, 16).unwrap_or_default()
    };
    [part(1), part(3), part(5)]
}

fn colours(palette: &Palette) -> String {
    let Palette { background, ink, muted, grid, axis, void, .. } = palette;
    let mut css = format!(
        ".pic .bg{{fill:{background}}}.pic .t,.pic .h{{fill:{ink}}}.pic .m{{fill:{muted}}}\
         .pic .g{{stroke:{grid}}}.pic .a{{stroke:{axis}}}.pic .k{{stroke:{muted}}}\
         .pic .v{{fill:{void}}}.pic .u{{stroke:{axis};stroke-width:3px}}.pic .i{{fill:{ink}}}.pic .o{{fill:{background}}}\
         .pic .halo{{paint-order:stroke;stroke:{background};stroke-width:3px;\
         stroke-linejoin:round}}"
    );
    for (index, hue) in palette.hues.iter().enumerate() {
        let _infallible = write!(css, ".pic .s{index}{{stroke:{hue}}}.pic .f{index}{{fill:{hue}}}");
    }
    for step in 0..SHADES {
        let shade = along(&palette.ramp, step as f64 / (SHADES - 1) as f64);
        let _infallible = write!(css, ".pic .r{step}{{fill:{}}}", shade.hexadecimal());
    }
    for step in 0..=2 * SIDE {
        let away = step as f64 / SIDE as f64 - 1.0;
        let end = if away < 0.0 { palette.below } else { palette.above };
        // The hue is that of its side all the way, only weaker.
        let start = Lch(palette.middle.0, palette.middle.1, end.2);
        let shade = start.towards(end, away.abs());
        let _infallible = write!(css, ".pic .d{step}{{fill:{}}}", shade.hexadecimal());
    }
    css
}

/// A colour in Oklab's polar coordinates: lightness, chroma, hue in degrees.
#[derive(Clone, Copy, Debug)]
struct Lch(f64, f64, f64);

fn along(ramp: &[Lch; 5], share: f64) -> Lch {
    let place = share.clamp(0.0, 1.0) * 4.0;
    let index = (place as usize).min(3);
    ramp[index].towards(ramp[index + 1], place - index as f64)
}

impl Lch {
    fn towards(self, other: Lch, share: f64) -> Lch {
        let between = |from: f64, to: f64| from + (to - from) * share;
        Lch(between(self.0, other.0), between(self.1, other.1), between(self.2, other.2))
    }

    /// As sRGB; a colour that a screen cannot show loses chroma and keeps its lightness.
    fn hexadecimal(self) -> String {
        let shown = |chroma: f64| {
            let linear = Lch(self.0, chroma, self.2).linear();
            linear.iter().all(|part| (-1e-4..=1.0001).contains(part)).then_some(linear)
        };
        // The most chroma that can be shown, found by halving: neighbours stay alike.
        let (mut least, mut most) = (0.0, self.1);
        let mut best = shown(most);
        if best.is_none() {
            for _ in 0..24 {
                let middle = (least + most) / 2.0;
                match shown(middle) {
                    Some(linear) => (least, best) = (middle, Some(linear)),
                    None => most = middle,
                }
            }
        }
        let grey = Lch(self.0, 0.0, 0.0).linear();
        let [red, green, blue] = best.unwrap_or(grey).map(encode);
        format!("#{red:02x}{green:02x}{blue:02x}")
    }

    /// Linear red, green and blue (the matrices of Oklab's definition).
    fn linear(self) -> [f64; 3] {
        let (a, b) = (self.1 * self.2.to_radians().cos(), self.1 * self.2.to_radians().sin());
        let long = (self.0 + 0.396_337_777_4 * a + 0.215_803_757_3 * b).powi(3);
        let medium = (self.0 - 0.105_561_345_8 * a - 0.063_854_172_8 * b).powi(3);
        let short = (self.0 - 0.089_484_177_5 * a - 1.291_485_548_0 * b).powi(3);
        [
            4.076_741_662_1 * long - 3.307_711_591_3 * medium + 0.230_969_929_2 * short,
            -1.268_438_004_6 * long + 2.609_757_401_1 * medium - 0.341_319_396_5 * short,
            -0.004_196_086_3 * long - 0.703_418_614_7 * medium + 1.707_614_701_0 * short,
        ]
    }
}

/// The transfer function of sRGB.
fn encode(linear: f64) -> u8 {
    let linear = linear.clamp(0.0, 1.0);
    let encoded =
        if linear <= 0.003_130_8 { 12.92 * linear } else { 1.055 * linear.powf(1.0 / 2.4) - 0.055 };
    (encoded * 255.0).round() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative luminance and contrast as WCAG 2.1 defines them.
    fn luminance(colour: &str) -> f64 {
        let part = |at: usize| {
            let value = f64::from(u8::from_str_radix(&colour[at..at + 2], 16).unwrap()) / 255.0;
            if value <= 0.040_45 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5)
    }

    fn contrast(one: &str, other: &str) -> f64 {
        let (one, other) = (luminance(one) + 0.05, luminance(other) + 0.05);
        one.max(other) / one.min(other)
    }

    #[test]
    fn text_and_curves_stand_out() {
        for palette in [&LIGHT, &DARK] {
            assert!(contrast(palette.ink, palette.background) > 12.0);
            assert!(contrast(palette.muted, palette.background) > 4.5);
            for hue in palette.hues {
                assert!(contrast(hue, palette.background) > 2.2, "{hue}");
            }
        }
    }

    #[test]
    fn shades_are_even_and_lead_away_from_the_background() {
        for palette in [&LIGHT, &DARK] {
            let shades: Vec<String> = (0..SHADES)
                .map(|step| along(&palette.ramp, step as f64 / (SHADES - 1) as f64).hexadecimal())
                .collect();
            let away: Vec<f64> =
                shades.iter().map(|shade| contrast(shade, palette.background)).collect();
            assert!(away.windows(2).all(|pair| pair[0] < pair[1]), "{shades:?}");
            assert!(away[0] < 1.6 && away[SHADES - 1] > 10.0, "{away:?}");
            for (step, shade) in shades.iter().enumerate() {
                let text = if step < DEEP { palette.ink } else { palette.background };
                assert!(contrast(shade, text) > 3.3, "{step} {shade}");
            }
        }
    }

    #[test]
    fn white_and_black_are_themselves() {
        assert_eq!(Lch(1.0, 0.0, 0.0).hexadecimal(), "#ffffff");
        assert_eq!(Lch(0.0, 0.0, 0.0).hexadecimal(), "#000000");
        // Out of gamut: the lightness stays.
        assert_eq!(Lch(0.5, 0.4, 200.0).hexadecimal().len(), 7);
    }
}
