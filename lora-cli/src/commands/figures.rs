//! Figures and pages of `spectrum` and `compare`, from what they found.

use std::collections::BTreeMap;

use lora_merge::analysis::{Comparison, Group, Place, Side, Spectra, TargetComparison};
use lora_merge::spectrum::{Reached, Spectrum};
use ndarray::Array2;

use super::analysing::{percent, rank};
use crate::picture::{
    Axis, Bar, Bars, Cell, Column, Emphasis, Figure, Heat, Lines, Mark, Page, Section, Series,
    Shades, Table, Tile, number,
};

/// Projections whose similarity has a figure of its own on a page.
const MATRICES: usize = 8;

/// Singular values of one tensor with what is read off them, or of all tensors.
pub(super) fn spectrum(spectra: &Spectra, tensor: Option<usize>) -> Figure {
    let Some(one) = tensor.and_then(|index| spectra.tensors.get(index)) else {
        return Figure::Lines(all_spectra(spectra));
    };
    let mut marks = Vec::new();
    for (name, reached) in ["r50", "r90", "r95", "r99"].into_iter().zip(one.ranks()) {
        if let Reached::At(rank) = reached
            && rank > 0
            && name != "r95"
        {
            marks.push(Mark::Vertical { at: rank as f64, label: format!("{name} = {rank}") });
        }
    }
    if let Some(noise) = one.noise.as_ref().filter(|noise| noise.threshold > 0.0) {
        marks.push(Mark::Horizontal { at: noise.threshold, label: "noise (heuristic)".to_owned() });
    }
    let relative =
        one.relative().map_or_else(String::new, |share| format!(", {} of ‖W₀‖", percent(share)));
    Figure::Lines(Lines {
        title: format!("Singular values of ΔW, {}", one.name),
        note: format!("‖ΔW‖ = {}{relative}", number(one.spectrum.norm())),
        x: Axis::log("index i"),
        y: Axis::log("σᵢ"),
        series: vec![Series {
            name: one.name.clone(),
            group: None,
            points: values(&one.spectrum),
            emphasis: Emphasis::Normal,
        }],
        marks,
    })
}

fn values(spectrum: &Spectrum) -> Vec<(f64, f64)> {
    let positive = spectrum.values.iter().enumerate().filter(|(_, value)| **value > 0.0);
    positive.map(|(index, &value)| ((index + 1) as f64, value)).collect()
}

fn all_spectra(spectra: &Spectra) -> Lines {
    Lines {
        title: "Singular values of ΔW".to_owned(),
        note: "One curve per tensor. The faster a curve falls, the less rank its change needs."
            .to_owned(),
        x: Axis::log("index i"),
        y: Axis::log("σᵢ"),
        series: series(spectra, values),
        marks: Vec::new(),
    }
}

fn energies(spectra: &Spectra) -> Lines {
    let captured = |spectrum: &Spectrum| {
        let mut sum = 0.0;
        let share = |(index, gain): (usize, f64)| {
            sum += gain;
            ((index + 1) as f64, (sum / spectrum.energy).min(1.0))
        };
        let points = spectrum.gains().into_iter().enumerate().map(share);
        let mut all: Vec<(f64, f64)> = points.collect();
        // An adapter's zeros say nothing more.
        let end = spectrum.values.partition_point(|&value| value > 0.0).max(1);
        all.truncate(end + 1);
        all
    };
    Lines {
        title: "Energy that the first r directions hold".to_owned(),
        note: "One curve per tensor.".to_owned(),
        x: Axis::log("rank r"),
        y: Axis::linear("share of ‖ΔW‖²").within(0.0, 1.0),
        series: series(spectra, captured),
        marks: vec![
            Mark::Horizontal { at: 0.5, label: "50 %".to_owned() },
            Mark::Horizontal { at: 0.9, label: "90 %".to_owned() },
        ],
    }
}

fn series(spectra: &Spectra, points: impl Fn(&Spectrum) -> Vec<(f64, f64)>) -> Vec<Series> {
    // The legend lists projections in the order of their energy.
    let order = spectra.by_projection();
    let position = |place: &Place| order.iter().position(|group| group.name == place.projection);
    let mut tensors: Vec<_> = spectra.tensors.iter().collect();
    tensors.sort_by_key(|one| (position(&one.place), one.place.depth));
    tensors
        .into_iter()
        .map(|one| Series {
            name: one.name.clone(),
            group: Some(one.place.projection.clone()),
            points: points(&one.spectrum),
            emphasis: Emphasis::Normal,
        })
        .collect()
}

/// A number for every projection and layer. If there are no layers, there is nothing to show.
fn by_place<'a>(
    title: &str,
    legend: &str,
    cells: impl Iterator<Item = (&'a Place, Option<f64>)>,
) -> Option<Heat> {
    let mut found: BTreeMap<&str, BTreeMap<usize, (f64, usize)>> = BTreeMap::new();
    let mut deepest = None;
    for (place, value) in cells {
        let (Some(depth), Some(value)) = (place.depth, value) else { continue };
        deepest = deepest.max(Some(depth));
        let cell = found.entry(&place.projection).or_default().entry(depth).or_default();
        // Experts share a place: their mean.
        *cell = (cell.0 + value, cell.1 + 1);
    }
    let layers: Vec<usize> = {
        let mut all: Vec<usize> = found.values().flat_map(|row| row.keys().copied()).collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    deepest?;
    let mut values = Vec::new();
    for row in found.values() {
        values.extend(
            layers.iter().map(|layer| row.get(layer).map(|(sum, count)| sum / *count as f64)),
        );
    }
    Some(Heat {
        title: title.to_owned(),
        row_label: "projection".to_owned(),
        column_label: "layer".to_owned(),
        rows: found.keys().map(|name| (*name).to_owned()).collect(),
        columns: layers.iter().map(ToString::to_string).collect(),
        values,
        legend: legend.to_owned(),
        numbers: true,
        ..Heat::default()
    })
}

fn shares(groups: &[Group]) -> Figure {
    Figure::Bars(Bars {
        title: "Where the energy of the change lies".to_owned(),
        label: "share of ‖ΔW‖², %".to_owned(),
        items: groups.iter().map(|one| Bar::new(one.name.clone(), 100.0 * one.share)).collect(),
        ..Bars::default()
    })
}

fn relatives(groups: &[Group]) -> Option<Figure> {
    let mut items: Vec<Bar> = groups
        .iter()
        .filter_map(|one| {
            let relative = one.relative().filter(|share| share.is_finite())?;
            Some(Bar::new(one.name.clone(), 100.0 * relative))
        })
        .collect();
    items.sort_by(|a, b| b.values[0].total_cmp(&a.values[0]));
    (!items.is_empty()).then(|| {
        Figure::Bars(Bars {
            title: "How much each kind of weight changed".to_owned(),
            label: "‖ΔW‖/‖W₀‖, %".to_owned(),
            items,
            ..Bars::default()
        })
    })
}

/// All of `spectrum`.
pub(super) fn spectrum_page(spectra: &Spectra, subject: &str) -> Page {
    let total = spectra.total();
    let groups = spectra.by_projection();
    let mut tiles = vec![
        Tile {
            note: format!("{} did not change", spectra.unchanged.len()),
            ..Tile::new("changed", format!("{} tensors", total.matrices + total.others))
        },
        Tile {
            note: "Frobenius norm".to_owned(),
            ..Tile::new("‖ΔW‖", number(total.energy.sqrt()))
        },
    ];
    if let Some(relative) = total.relative() {
        tiles
            .push(Tile {
                note: "of ‖W₀‖".to_owned(), ..Tile::new("‖ΔW‖/‖W₀‖", percent(relative))
            });
    }
    if let Some(ranks) = total.ranks {
        let note = "median of the matrices".to_owned();
        tiles.push(Tile { note, ..Tile::new("rank for 90 % of the energy", rank(ranks[1])) });
    }
    let mut result = vec![shares(&groups)];
    result.extend(relatives(&groups));
    let mut sections = vec![
        Section {
            heading: "Result".to_owned(),
            prose: vec![
                "A low-rank adapter pays off where much energy lies in few directions.".to_owned(),
            ],
            tiles,
            figures: result,
            table: None,
        },
        Section {
            heading: "Spectra".to_owned(),
            prose: vec!["The singular values of a change tell how much rank it needs.".to_owned()],
            figures: vec![Figure::Lines(all_spectra(spectra)), Figure::Lines(energies(spectra))],
            table: None,
            tiles: Vec::new(),
        },
    ];
    let figures = places(spectra);
    if !figures.is_empty() {
        sections.push(Section {
            heading: "Layers and projections".to_owned(),
            prose: vec![
                "Where in the model the change lies, and how much rank it takes there.".to_owned(),
            ],
            figures,
            ..Section::default()
        });
    }
    sections.push(Section {
        heading: "Tensors".to_owned(),
        table: Some(spectrum_table(spectra)),
        ..Section::default()
    });
    if !spectra.passed.is_empty() {
        sections.push(passed_over(&spectra.passed));
    }
    Page {
        title: "What a change is made of".to_owned(),
        subtitle: format!("`{subject}`, {} matrices", total.matrices),
        sections,
        footer: "lora-cli spectrum".to_owned(),
    }
}

fn places(spectra: &Spectra) -> Vec<Figure> {
    let of = |value: &dyn Fn(&lora_merge::analysis::TensorSpectrum) -> Option<f64>| {
        spectra.tensors.iter().map(|one| (&one.place, value(one))).collect::<Vec<_>>()
    };
    let whole = spectra.energy();
    let beyond = spectra.tensors.iter().any(|one| matches!(one.spectrum.r90(), Reached::Beyond(_)));
    let ranks = by_place(
        "Rank that holds 90 % of the energy",
        "rank",
        of(&|one| Some(one.spectrum.r90().known() as f64)).into_iter(),
    )
    .map(|heat| Heat {
        note: match beyond {
            true => "Where not enough values are known, their number: the rank is larger.",
            false => "",
        }
        .to_owned(),
        ..heat
    });
    let energy = by_place(
        "Share of the energy",
        "% of ‖ΔW‖²",
        of(&|one| Some(100.0 * one.spectrum.energy / whole)).into_iter(),
    );
    let relative = by_place(
        "Relative change",
        "‖ΔW‖/‖W₀‖, %",
        of(&|one| one.relative().filter(|x| x.is_finite()).map(|x| 100.0 * x)).into_iter(),
    );
    // Relative changes differ by orders of magnitude, and so do ranks.
    let by_ratio = |heat: Heat| Heat { shades: Shades::Log, ..heat };
    let (ranks, relative) = (ranks.map(by_ratio), relative.map(by_ratio));
    [ranks, energy, relative].into_iter().flatten().map(Figure::Heat).collect()
}

fn reached(reached: Reached) -> Cell {
    // What is only known to be larger sorts behind.
    let beyond = if matches!(reached, Reached::Beyond(_)) { 0.5 } else { 0.0 };
    Cell::number(reached.known() as f64 + beyond, rank(reached))
}

fn spectrum_table(spectra: &Spectra) -> Table {
    let noisy = spectra.tensors.iter().any(|one| one.noise.is_some());
    let mut columns = vec![
        Column::name("tensor"),
        Column::text("shape"),
        Column::bar("% of ‖ΔW‖²"),
        Column::number("‖ΔW‖/‖W₀‖"),
        Column::number("r50"),
        Column::number("r90"),
        Column::number("r99"),
        Column::number("stable rank"),
        Column::number("entropy rank"),
    ];
    if noisy {
        columns.push(Column::number("signal"));
    }
    let whole = spectra.energy();
    let shape = |shape: &[usize]| {
        Cell::from(shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(" × "))
    };
    let relative =
        |share: Option<f64>| Cell::from(share).text(|| share.map(percent).unwrap_or_default());
    let mut rows = Vec::new();
    for one in &spectra.tensors {
        let spectrum = &one.spectrum;
        let mut row = vec![
            Cell::from(one.name.clone()),
            shape(&one.shape),
            Cell::from(100.0 * spectrum.energy / whole),
            relative(one.relative()),
            reached(spectrum.r50()),
            reached(spectrum.r90()),
            reached(spectrum.r99()),
            Cell::from(spectrum.stable_rank()),
            Cell::from(spectrum.entropy_rank()),
        ];
        if noisy {
            row.push(one.noise.as_ref().map_or(Cell::Empty, |noise| reached(noise.reached())));
        }
        rows.push(row);
    }
    for one in &spectra.others {
        let mut row = vec![
            Cell::from(one.name.clone()),
            shape(&one.shape),
            Cell::from(100.0 * one.energy / whole),
            relative(one.relative()),
        ];
        row.resize_with(columns.len(), || Cell::Empty);
        rows.push(row);
    }
    Table { label: "tensors".to_owned(), columns, rows }
}

/// A cell that is written in another way.
trait Written {
    fn text(self, text: impl Fn() -> String) -> Cell;
}

impl Written for Cell {
    fn text(self, text: impl Fn() -> String) -> Cell {
        match self {
            Cell::Number { value, .. } => Cell::number(value, text()),
            other => other,
        }
    }
}

fn passed_over(passed: &[lora_merge::analysis::PassedOver]) -> Section {
    Section {
        heading: "Passed over".to_owned(),
        prose: vec!["What was not analysed, and why.".to_owned()],
        table: Some(Table {
            label: "tensors".to_owned(),
            columns: vec![Column::name("tensor"), Column::text("reason")],
            rows: passed
                .iter()
                .map(|one| vec![Cell::from(one.name.clone()), Cell::from(one.reason.clone())])
                .collect(),
        }),
        ..Section::default()
    }
}

/// φ of the input directions of one target, or its mean over all.
pub(super) fn similarity(comparison: &Comparison, tensor: Option<usize>) -> Figure {
    if let Some(one) = tensor.and_then(|index| comparison.targets.get(index)) {
        let note = similarity_note(&one.input);
        return phi(&format!("φ(A, B, i, j), {}", one.name), note, &one.input.phi);
    }
    match comparison.mean() {
        Some(mean) => phi(
            "φ(A, B, i, j) of input directions",
            format!(
                "The mean over {} tensors; unrelated directions have {:.3} in the corner.",
                mean.targets, mean.random[0]
            ),
            &mean.input,
        ),
        None => phi("φ(A, B, i, j)", String::new(), &Array2::zeros((0, 0))),
    }
}

fn similarity_note(side: &Side) -> String {
    format!(
        "Grassmann distance {:.3} (geodesic), {:.3} (projection); unrelated directions have \
         φ = {:.3} in the corner.",
        side.geodesic_distance(),
        side.projection_distance(),
        side.random()
    )
}

fn phi(title: &str, note: String, values: &Array2<f64>) -> Figure {
    let names = |count: usize| (1..=count).map(|index| index.to_string()).collect();
    Figure::Heat(Heat {
        title: title.to_owned(),
        note,
        row_label: "first i of A".to_owned(),
        column_label: "first j of B".to_owned(),
        rows: names(values.nrows()),
        columns: names(values.ncols()),
        values: values.iter().map(|&value| Some(value)).collect(),
        legend: "φ".to_owned(),
        shades: Shades::Sequential { low: 0.0, high: 1.0 },
        numbers: values.ncols() <= 8,
    })
}

/// All of `compare`.
pub(super) fn comparison_page(comparison: &Comparison, subject: &str) -> Page {
    let mut sections = Vec::new();
    if let Some(mean) = comparison.mean() {
        let last = |matrix: &Array2<f64>| matrix.last().copied().unwrap_or(0.0);
        let (i, j) = mean.input.dim();
        let tile = |label: String, value: f64, note: String| Tile {
            note,
            ..Tile::new(label, format!("{value:.3}"))
        };
        let first = mean.input.first().copied().unwrap_or(0.0);
        let unrelated = |random: f64| format!("{random:.3} if unrelated");
        sections.push(Section {
            heading: "Result".to_owned(),
            prose: vec![
                "φ(i, j) is how much of the first i directions of A lies in the first j of B: 1 if \
                 one holds the other, 0 if they are orthogonal."
                    .to_owned(),
                "Input directions are right singular vectors, the span of the rows of A in B·A; \
                 output directions are left ones."
                    .to_owned(),
            ],
            tiles: vec![
                tile("φ(1, 1), input".to_owned(), first, "the first directions".to_owned()),
                tile(format!("φ({i}, {j}), input"), last(&mean.input), unrelated(mean.random[0])),
                tile(format!("φ({i}, {j}), output"), last(&mean.output), unrelated(mean.random[1])),
                tile("cosine".to_owned(), mean.cosine, "of the changes themselves".to_owned()),
            ],
            figures: vec![
                phi("Input directions, mean of all tensors", String::new(), &mean.input),
                phi("Output directions, mean of all tensors", String::new(), &mean.output),
            ],
            table: None,
        });
    }
    let means = comparison.by_projection();
    if means.len() > 1 {
        let mut figures: Vec<Figure> = means
            .iter()
            .take(MATRICES)
            .map(|mean| phi(&format!("{}, input", mean.name), String::new(), &mean.input))
            .collect();
        let cells = |side: &dyn Fn(&TargetComparison) -> f64| {
            comparison.targets.iter().map(|one| (&one.place, Some(side(one)))).collect::<Vec<_>>()
        };
        let shaded = |heat: Heat| {
            Figure::Heat(Heat { shades: Shades::Sequential { low: 0.0, high: 1.0 }, ..heat })
        };
        let input =
            by_place("φ of all input directions", "φ", cells(&|one| one.input.whole()).into_iter());
        let output = by_place(
            "φ of all output directions",
            "φ",
            cells(&|one| one.output.whole()).into_iter(),
        );
        figures.extend([input, output].into_iter().flatten().map(shaded));
        sections.push(Section {
            heading: "Layers and projections".to_owned(),
            prose: vec!["Means over the layers, and each layer by itself.".to_owned()],
            figures,
            ..Section::default()
        });
    }
    if let Some(section) = amplification(comparison) {
        sections.push(section);
    }
    sections.push(Section {
        heading: "Tensors".to_owned(),
        table: Some(comparison_table(comparison)),
        ..Section::default()
    });
    if !comparison.passed.is_empty() {
        sections.push(passed_over(&comparison.passed));
    }
    Page {
        title: "How alike two changes are".to_owned(),
        subtitle: format!("`{subject}`, {} common targets", comparison.targets.len()),
        sections,
        footer: "lora-cli compare".to_owned(),
    }
}

/// Table 7 of the paper.
fn amplification(comparison: &Comparison) -> Option<Section> {
    let mut rows = Vec::new();
    for target in &comparison.targets {
        let Some(amplified) = &target.amplified else { continue };
        for (which, all) in [amplified.a.as_slice(), amplified.b.as_slice()].into_iter().enumerate()
        {
            for one in all {
                rows.push(vec![
                    Cell::from(target.name.clone()),
                    Cell::from(["A", "B"][which]),
                    Cell::from(one.rank),
                    Cell::from(target.norms[which]),
                    Cell::from(one.through_change),
                    Cell::from(one.through_itself),
                    Cell::from(one.through_random),
                    Cell::from(one.factor),
                ]);
            }
        }
    }
    (!rows.is_empty()).then(|| Section {
        heading: "Amplification".to_owned(),
        prose: vec![
            "What W₀ has in the first r directions of the change (‖UᵀW₀V‖), in its own first r and \
             in random ones. The factor is ‖ΔW‖ over the first of these: how much the change \
             amplifies what is there."
                .to_owned(),
        ],
        table: Some(Table {
            label: "amplifications".to_owned(),
            columns: vec![
                Column::name("tensor"),
                Column::text("of"),
                Column::number("r"),
                Column::number("‖ΔW‖"),
                Column::number("‖UᵀW₀V‖"),
                Column::number("W₀'s own"),
                Column::number("random"),
                Column::number("factor"),
            ],
            rows,
        }),
        ..Section::default()
    })
}

fn comparison_table(comparison: &Comparison) -> Table {
    let columns = vec![
        Column::name("tensor"),
        Column::text("directions"),
        Column::number("φ(1, 1) in"),
        Column::bar("φ in"),
        Column::number("unrelated"),
        Column::bar("φ out"),
        Column::number("Grassmann in"),
        Column::number("Grassmann out"),
        Column::number("cosine"),
    ];
    let rows = comparison.targets.iter().map(|one| {
        vec![
            Cell::from(one.name.clone()),
            Cell::from(format!("{}, {}", one.ranks[0], one.ranks[1])),
            Cell::from(one.input.first()),
            Cell::from(one.input.whole()),
            Cell::from(one.input.random()),
            Cell::from(one.output.whole()),
            Cell::from(one.input.geodesic_distance()),
            Cell::from(one.output.geodesic_distance()),
            Cell::from(one.cosine),
        ]
    });
    Table { label: "tensors".to_owned(), columns, rows: rows.collect() }
}
