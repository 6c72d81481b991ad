//! A figure as pixels.
//!
//! Drawn from its SVG, with the fonts that come with the program, so that the same figure is the same
//! picture on every machine, also on those without fonts.

use std::fmt;
use std::sync::Arc;

use resvg::tiny_skia::{Color, Pixmap, Transform};
use resvg::usvg::{self, fontdb};

use super::figure::Figure;
use super::standalone;
use super::theme::{Theme, background, style};

/// The most pixels of a picture: 400 MB while it is made.
const MOST_PIXELS: f64 = 1e8;

/// Why there is no picture.
#[derive(Debug)]
pub(crate) enum PngError {
    /// It would be too large, or of no size at all.
    Size {
        /// The width asked for, in pixels.
        width: f64,
        /// The height.
        height: f64,
    },
    /// The drawing could not be read back.
    Drawing(usvg::Error),
    /// The pixels could not be packed.
    Packing(String),
}

impl fmt::Display for PngError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PngError::Size { width, height } => {
                write!(f, "a picture of {width:.0} × {height:.0} pixels cannot be made")
            }
            PngError::Drawing(error) => write!(f, "the figure cannot be drawn: {error}"),
            PngError::Packing(message) => write!(f, "the picture cannot be packed: {message}"),
        }
    }
}

impl std::error::Error for PngError {}

/// A figure as a PNG file, `scale` pixels for each pixel of the SVG; 2 suits a document.
pub(crate) fn png(figure: &Figure, theme: Theme, scale: f32) -> Result<Vec<u8>, PngError> {
    let pixmap = pixels(figure, theme, scale)?;
    pixmap.encode_png().map_err(|error| PngError::Packing(error.to_string()))
}

pub(super) fn pixels(figure: &Figure, theme: Theme, scale: f32) -> Result<Pixmap, PngError> {
    // The renderer knows no reader's preference.
    let theme = if theme == Theme::Auto { Theme::Light } else { theme };
    let svg = standalone(figure, &style(theme));
    let options = usvg::Options { fontdb: Arc::new(fonts()), ..usvg::Options::default() };
    let tree = usvg::Tree::from_str(&svg, &options).map_err(PngError::Drawing)?;
    let size = |length: f32| (f64::from(length) * f64::from(scale)).ceil();
    let (width, height) = (size(tree.size().width()), size(tree.size().height()));
    let sound = width >= 1.0 && height >= 1.0 && width * height <= MOST_PIXELS;
    let mut pixmap = if sound { Pixmap::new(width as u32, height as u32) } else { None }
        .ok_or(PngError::Size { width, height })?;
    // Where the scale leaves a part of a pixel at the edge, the background is there all the same.
    let [red, green, blue] = background(theme);
    pixmap.fill(Color::from_rgba8(red, green, blue, 255));
    resvg::render(&tree, Transform::from_scale(scale, scale), &mut pixmap.as_mut());
    Ok(pixmap)
}

/// DejaVu Sans, regular and bold: it has the signs of mathematics that labels are made of.
fn fonts() -> fontdb::Database {
    let mut fonts = fontdb::Database::new();
    for font in [dejavu::sans::regular(), dejavu::sans::bold()] {
        fonts.load_font_source(fontdb::Source::Binary(Arc::new(font)));
    }
    fonts.set_sans_serif_family("DejaVu Sans");
    fonts.set_serif_family("DejaVu Sans");
    fonts
}
