//! What all pictures have in common: well-formed whatever they are made from, no way out of the text,
//! nothing loaded, and pixels on the paper.

use base64::Engine;
use resvg::usvg::roxmltree::{Document, ParsingOptions};
use sha2::{Digest, Sha256};

use super::canvas::Frame;
use super::png::pixels;
use super::*;

/// Names that a stranger might choose.
fn hostile() -> Vec<String> {
    let mut names: Vec<String> = [
        "<script>alert(1)</script>",
        "</title></svg><img src=x onerror=alert(1)>",
        "\"onload=\"alert(1)\" x=\"",
        "' onmouseover='alert(1)",
        "a & b &amp; c &#60;script&#62;",
        "]]><!-- --><?xml?>",
        "</style></script><!--",
        "\u{0}\u{1b}[31m\r\n\t\u{7f}\u{9b}",
        "\u{202e}drowssap\u{2066}\u{200b}\u{feff}\u{fffe}\u{ffff}",
        "`code` and ``more``` `",
        "模型.层.0 ‖ΔW‖² 🦀",
        "",
    ]
    .map(str::to_owned)
    .to_vec();
    names.push("<&\"'>".repeat(2_000));
    names
}

const ODD: [f64; 14] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::MAX,
    f64::MIN,
    f64::MIN_POSITIVE,
    5e-324,
    -5e-324,
    1e-300,
    0.1,
];

fn lines(points: Vec<(f64, f64)>, x: Axis, y: Axis) -> Figure {
    let series = vec![Series { name: "a".to_owned(), points, ..Series::default() }];
    Figure::Lines(Lines { x, y, series, ..Lines::default() })
}

fn heat(rows: usize, columns: usize, values: Vec<Option<f64>>, shades: Shades) -> Figure {
    let names = |count: usize| (0..count).map(|index| index.to_string()).collect();
    Figure::Heat(Heat {
        rows: names(rows),
        columns: names(columns),
        values,
        shades,
        numbers: true,
        ..Heat::default()
    })
}

/// Figures with too little, too much or the wrong things in them.
fn odd_figures() -> Vec<Figure> {
    let mut figures = vec![
        Figure::Lines(Lines::default()),
        Figure::Heat(Heat::default()),
        Figure::Bars(Bars::default()),
        heat(3, 0, vec![], Shades::Fitted),
        heat(0, 3, vec![Some(1.0)], Shades::Fitted),
        heat(1, 1, vec![Some(1.0)], Shades::Log),
        // Too few values, and too many.
        heat(3, 3, vec![Some(1.0), None], Shades::Fitted),
        heat(2, 2, vec![Some(1.0); 9], Shades::Fitted),
        heat(3000, 700, vec![Some(1.0); 3000 * 700], Shades::Fitted),
        heat(1, 5000, (0..5000).map(|value| Some(f64::from(value))).collect(), Shades::Fitted),
        Figure::Bars(Bars { items: vec![Bar::default(); 3], ..Bars::default() }),
    ];
    let axes = || [Axis::linear("x"), Axis::log("x"), Axis::linear("x").within(2.0, 1.0)];
    for x in axes() {
        for y in axes().into_iter().chain([Axis::log("y").within(1e-3, 1e3)]) {
            figures.push(lines(vec![], x.clone(), y.clone()));
            figures.push(lines(vec![(1.0, 1.0)], x.clone(), y.clone()));
            figures.push(lines(vec![(2.0, 5.0); 700], x.clone(), y.clone()));
            for value in ODD {
                figures.push(lines(vec![(1.0, value)], x.clone(), y.clone()));
                figures.push(lines(vec![(value, 3.0), (2.0, value)], x.clone(), y.clone()));
            }
            let points = ODD.iter().flat_map(|&a| ODD.map(|b| (a, b))).collect();
            figures.push(lines(points, x.clone(), y));
        }
    }
    let shades = [
        Shades::Fitted,
        Shades::Log,
        Shades::Sequential { low: 0.0, high: 1.0 },
        Shades::Sequential { low: f64::NAN, high: f64::INFINITY },
        Shades::Sequential { low: f64::NEG_INFINITY, high: f64::INFINITY },
        Shades::Diverging { middle: 0.0 },
        Shades::Diverging { middle: f64::NAN },
        Shades::Diverging { middle: f64::MAX },
    ];
    for shades in shades {
        figures.push(heat(2, 7, ODD.map(Some).to_vec(), shades));
        for value in ODD {
            figures.push(heat(2, 2, vec![Some(value); 4], shades));
        }
    }
    for value in ODD {
        let items =
            vec![Bar::new("a", value), Bar { name: "b".to_owned(), values: vec![value; 12] }];
        let parts = vec!["p".to_owned(), "q".to_owned()];
        figures.push(Figure::Bars(Bars { items: items.clone(), parts, ..Bars::default() }));
        figures.push(Figure::Bars(Bars { items, ..Bars::default() }));
    }
    let items = (0..5000).map(|index| Bar::new(index.to_string(), f64::from(index % 97) - 40.0));
    figures.push(Figure::Bars(Bars { items: items.collect(), ..Bars::default() }));
    figures
}

/// Figures that have a hostile name wherever there is a name.
fn hostile_figures() -> Vec<Figure> {
    let names = hostile();
    let mut figures = Vec::new();
    for name in &names {
        let text = || name.clone();
        let series = |emphasis, group: Option<String>| Series {
            name: text(),
            group,
            points: vec![(1.0, 1.0), (2.0, 3.0)],
            emphasis,
        };
        for group in [None, Some(text())] {
            figures.push(Figure::Lines(Lines {
                title: text(),
                note: text(),
                x: Axis::linear(text()),
                y: Axis::log(text()),
                series: vec![
                    series(Emphasis::Normal, group.clone()),
                    series(Emphasis::Strong, group.clone()),
                ],
                marks: vec![
                    Mark::Vertical { at: 1.0, label: text() },
                    Mark::Vertical { at: 1.01, label: text() },
                    Mark::Horizontal { at: 2.0, label: text() },
                ],
            }));
        }
        figures.push(Figure::Bars(Bars {
            title: text(),
            note: text(),
            label: text(),
            parts: vec![text(), text()],
            items: vec![Bar { name: text(), values: vec![1.0, 2.0] }],
        }));
    }
    figures.push(Figure::Heat(Heat {
        title: names.concat(),
        note: names.concat(),
        row_label: names.concat(),
        column_label: names.concat(),
        values: vec![Some(1.0); names.len() * names.len()],
        legend: names.concat(),
        rows: names.clone(),
        columns: names,
        ..Heat::default()
    }));
    figures
}

fn parse(svg: &str) -> Document<'_> {
    let options = ParsingOptions { nodes_limit: 4_000_000, ..ParsingOptions::default() };
    Document::parse_with_options(svg, options)
        .unwrap_or_else(|error| panic!("{error}: {svg:.2000}"))
}

/// Nothing but drawing, and nothing that runs or loads.
fn check_harmless(svg: &str) {
    let document = parse(svg);
    let known = ["svg", "style", "rect", "line", "path", "text", "tspan", "g", "title"];
    for node in document.descendants().filter(|node| node.is_element()) {
        let name = node.tag_name().name();
        assert!(known.contains(&name), "{name}");
        for attribute in node.attributes() {
            let name = attribute.name();
            assert!(!name.starts_with("on") && name != "href" && name != "style", "{name}");
            let value = attribute.value();
            let geometry = ["x", "y", "x1", "y1", "x2", "y2", "width", "height", "d", "viewBox"];
            if geometry.contains(&name) {
                assert!(!value.contains("NaN") && !value.contains("inf"), "{name}={value}");
            }
        }
    }
    let root = document.root_element();
    assert_eq!(root.tag_name().name(), "svg");
    assert_eq!(root.attribute("role"), Some("img"));
    assert!(root.has_attribute("aria-label"));
    let width: f64 = root.attribute("width").unwrap().parse().unwrap();
    let height: f64 = root.attribute("height").unwrap().parse().unwrap();
    assert!((1.0..2000.0).contains(&width) && (1.0..4000.0).contains(&height), "{width} {height}");
}

#[test]
fn odd_figures_are_pictures_too() {
    for figure in odd_figures() {
        check_harmless(&svg(&figure, Theme::Auto));
        let frame = Frame { width: 374.0, alone: false };
        check_harmless(&draw(&figure, &frame).element());
    }
    for figure in [Figure::Lines(Lines::default()), Figure::Heat(Heat::default())] {
        assert!(svg(&figure, Theme::Light).contains("nothing to show"));
    }
}

#[test]
fn names_stay_names() {
    for figure in hostile_figures() {
        let alone = svg(&figure, Theme::Auto);
        check_harmless(&alone);
        // However long a name is, the picture is not.
        assert!(alone.len() < 200_000, "{}", alone.len());
        let frame = Frame { width: 800.0, alone: false };
        check_harmless(&draw(&figure, &frame).element());
    }
}

#[test]
fn a_short_name_is_all_there() {
    let name = "a<b>&\"c'";
    let points = vec![(1.0, 1.0), (2.0, 2.0)];
    let series = vec![Series { name: name.to_owned(), points, ..Series::default() }];
    let figure = Figure::Lines(Lines { title: name.to_owned(), series, ..Lines::default() });
    let svg = svg(&figure, Theme::Light);
    let document = parse(&svg);
    let texts: Vec<&str> = document
        .descendants()
        .filter(|node| node.is_text())
        .filter_map(|node| node.text())
        .collect();
    assert_eq!(texts.iter().filter(|&&text| text == name).count(), 2);
}

#[test]
fn a_page_of_strangers_names_runs_only_our_script() {
    let names = hostile();
    let text = names.concat();
    let cells = |name: &String| vec![Cell::from(name.clone()), Cell::from(f64::NAN), Cell::Empty];
    let section = Section {
        heading: text.clone(),
        prose: names.clone(),
        tiles: vec![Tile { label: text.clone(), value: text.clone(), note: text.clone() }],
        figures: hostile_figures(),
        table: Some(Table {
            label: text.clone(),
            columns: vec![Column::name(&text), Column::bar(&text), Column::number(&text)],
            rows: names.iter().cycle().take(30).map(cells).collect(),
        }),
    };
    let page = Page {
        title: text.clone(),
        subtitle: text.clone(),
        sections: vec![section, Section::default()],
        footer: text,
    };
    let page = html(&page);
    let start = page.find("<script>").unwrap();
    assert_eq!(page.matches("<script").count(), 1);
    assert_eq!(page.matches("</script").count(), 1);
    assert_eq!(page.matches("</style").count(), 1);
    assert_eq!(page.matches("<img").count(), 0);
    assert!(!page[..start].contains(" onload=\"") && !page[..start].contains("' onmouseover='"));
    assert!(!page.chars().any(|c| c.is_control() && c != '\n'), "a control character");
    assert!(!page.contains('\u{202e}'));
}

#[test]
fn a_page_loads_nothing() {
    let page = html(&demo::page());
    for word in
        ["http:", "https:", "src=", "href=", "url(", "@import", "<link", "fetch(", "import("]
    {
        assert!(!page.contains(word), "{word}");
    }
    // The policy names the script by its digest, so it must be the digest.
    let script = page.split("<script>").nth(1).unwrap().split("</script>").next().unwrap();
    let digest = base64::engine::general_purpose::STANDARD.encode(Sha256::digest(script));
    assert!(page.contains(&format!("script-src 'sha256-{digest}'")), "the script has {digest}");
    assert!(page.contains("default-src 'none'"));
}

#[test]
fn a_page_of_300_tensors_is_small() {
    let mut lines = demo::spectra(4096);
    let more = lines.series[..76].to_vec();
    lines.series.extend(more);
    assert_eq!(lines.series.len(), 300);
    let figures = vec![
        Figure::Lines(lines.clone()),
        Figure::Lines(lines),
        Figure::Lines(demo::energies(4096)),
        Figure::Heat(demo::similarity(128, 0)),
        Figure::Heat(demo::similarity(128, 1)),
    ];
    let section = Section { figures, ..Section::default() };
    let page = html(&Page { sections: vec![section], ..Page::default() });
    assert!(page.len() < 2_000_000, "{}", page.len());
}

#[test]
fn two_thousand_noisy_curves_are_one_picture() {
    let series = (0..2000).map(|index| Series {
        name: format!("layer.{index}"),
        points: (1..400u32)
            .map(|x| (f64::from(x), f64::from((x * 7919 + index * 104_729) % 1000)))
            .collect(),
        ..Series::default()
    });
    let lines = Lines { series: series.collect(), ..Lines::default() };
    let svg = svg(&Figure::Lines(lines), Theme::Auto);
    assert!(svg.len() < 800_000, "{}", svg.len());
    let paths = parse(&svg).descendants().filter(|node| node.tag_name().name() == "path").count();
    assert_eq!(paths, 2000);
}

#[test]
fn the_same_figure_is_the_same_bytes() {
    assert_eq!(html(&demo::page()), html(&demo::page()));
    let figure = Figure::Heat(demo::ranks());
    let once = png(&figure, Theme::Dark, 1.0).unwrap();
    assert_eq!(once, png(&figure, Theme::Dark, 1.0).unwrap());
}

#[test]
fn a_theme_is_that_theme() {
    let figure = Figure::Bars(demo::shares());
    assert!(svg(&figure, Theme::Auto).contains("prefers-color-scheme:dark"));
    for theme in [Theme::Light, Theme::Dark] {
        assert!(!svg(&figure, theme).contains("@media"));
    }
    let corner = |theme| {
        let pixel = pixels(&figure, theme, 1.0).unwrap().pixel(0, 0).unwrap();
        (u16::from(pixel.red()) + u16::from(pixel.green()) + u16::from(pixel.blue())) / 3
    };
    assert_eq!((corner(Theme::Auto), corner(Theme::Light)), (255, 255));
    assert!(corner(Theme::Dark) < 40);
}

#[test]
fn a_png_has_its_size_and_is_not_blank() {
    let figures = [
        Figure::Lines(demo::spectra(256)),
        Figure::Heat(demo::ranks()),
        Figure::Bars(demo::shares()),
        Figure::Lines(Lines::default()),
    ];
    for figure in figures {
        let svg = svg(&figure, Theme::Light);
        let document = parse(&svg);
        let length =
            |name| document.root_element().attribute(name).unwrap().parse::<u32>().unwrap();
        for (theme, scale) in [(Theme::Light, 1), (Theme::Dark, 2)] {
            let png = png(&figure, theme, scale as f32).unwrap();
            let pixmap = resvg::tiny_skia::Pixmap::decode_png(&png).unwrap();
            let size = (pixmap.width(), pixmap.height());
            assert_eq!(size, (length("width") * scale, length("height") * scale));
            let paper = pixmap.pixel(0, 0).unwrap();
            let ink = pixmap.pixels().iter().filter(|&&pixel| pixel != paper).count();
            assert!(ink > 300, "{ink} pixels");
            assert!(pixmap.pixels().iter().all(|pixel| pixel.alpha() == 255));
        }
    }
}

#[test]
fn odd_figures_are_pixels_too() {
    // A sample: each takes a while.
    for figure in odd_figures().iter().step_by(11).chain(hostile_figures().iter().step_by(5)) {
        png(figure, Theme::Light, 0.5).unwrap();
    }
}

#[test]
fn a_png_of_no_size_or_of_any_size_is_refused() {
    let figure = Figure::Bars(demo::shares());
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e4] {
        let error = png(&figure, Theme::Light, scale).unwrap_err();
        assert!(matches!(error, crate::picture::png::PngError::Size { .. }), "{error}");
    }
}

#[test]
fn the_font_has_the_signs_that_labels_are_made_of() {
    let drawn = |sign: char| {
        let figure = Figure::Bars(Bars { title: sign.to_string(), ..Bars::default() });
        pixels(&figure, Theme::Light, 1.0).unwrap().data().to_vec()
    };
    // What no font has is drawn as a box.
    let missing = drawn('\u{e123}');
    for sign in "σᵢφ‖ΔΣ²³₀₁≤≥≈→↓↑∞−×·…–ÅЖ√∈".chars() {
        assert!(drawn(sign) != missing, "{sign}");
    }
}

#[test]
fn long_tables_are_folded_and_longer_ones_end() {
    let table = |rows: usize| {
        let row = |index: usize| vec![Cell::from(format!("t.{index}")), Cell::from(index)];
        let columns = vec![Column::name("tensor"), Column::number("rank")];
        let table =
            Table { label: "tensors".to_owned(), columns, rows: (0..rows).map(row).collect() };
        html(&Page {
            sections: vec![Section { table: Some(table), ..Section::default() }],
            ..Page::default()
        })
    };
    let (short, long, endless) = (table(20), table(21), table(6000));
    assert!(!short.contains("<details") && short.matches("<tr>").count() == 21);
    assert!(long.contains("<summary>All 21 tensors</summary>"));
    assert_eq!(endless.matches("<tr>").count(), 5001);
    assert!(endless.contains("The first 5000 of 6000 tensors."));
    // A number that is written as it is needs no second telling.
    assert!(!long.contains("data-v"));
    let cell = Cell::number(2048.0, "2 KiB");
    let table =
        Table { columns: vec![Column::number("n")], rows: vec![vec![cell]], ..Table::default() };
    let section = Section { table: Some(table), ..Section::default() };
    let page = html(&Page { sections: vec![section], ..Page::default() });
    assert!(page.contains("data-v=\"2048\">2 KiB</td>"), "{page}");
}

#[test]
fn what_is_not_drawn_is_said() {
    let values = [(1.0, 1.0), (2.0, 0.0), (3.0, f64::NAN), (4.0, 1e-3)];
    let figure = lines(values.to_vec(), Axis::linear("i"), Axis::log("σ"));
    assert!(svg(&figure, Theme::Light).contains("2 values that are not finite, not positive"));
    let items = (0..500).map(|index| Bar::new(index.to_string(), f64::from(index))).collect();
    let figure = Figure::Bars(Bars { items, ..Bars::default() });
    assert!(svg(&figure, Theme::Light).contains("the 120 largest of 500"));
    let figure = heat(600, 3, vec![Some(1.0); 1800], Shades::Fitted);
    assert!(svg(&figure, Theme::Light).contains("each cell is the mean of 3 × 1 values"));
}
