//! A page with every kind of figure, of the size of a model of 32 layers with 224 matrices.
//!
//! Tests look at its text; `scripts/look_at_report.sh` looks at it in a browser:
//!
//! ```text
//! PICTURES_TO=/some/directory cargo test -p lora-cli picture::demo
//! scripts/look_at_report.sh /some/directory/demo.html /some/directory
//! ```

use std::fs;
use std::path::Path;

use super::{
    Axis, Bar, Bars, Cell, Column, Emphasis, Figure, Heat, Lines, Mark, Page, Section, Series,
    Shades, Table, Theme, Tile, html, number, png, svg,
};

pub(super) const KINDS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const LAYERS: usize = 32;

/// The same numbers every time, from 0 to 1.
fn noise(seed: usize) -> f64 {
    let mixed = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 40) as f64 / (1u64 << 24) as f64
}

fn tensor(layer: usize, kind: usize) -> String {
    let part = if kind < 4 { "self_attn" } else { "mlp" };
    format!("model.layers.{layer}.{part}.{}.weight", KINDS[kind])
}

/// A spectrum that falls by a power law onto a floor of noise.
fn spectrum(layer: usize, kind: usize, count: usize) -> Vec<f64> {
    let seed = layer * 7 + kind;
    let strength = (0.6 + 0.5 * noise(seed))
        * [1.0, 0.8, 1.6, 1.4, 0.7, 0.9, 1.2][kind]
        * (0.5 + layer as f64 / LAYERS as f64);
    let fall = 0.55 + 0.35 * noise(seed + 1000);
    let floor = 0.012 * (1.0 + 0.4 * noise(seed + 2000));
    (1..=count)
        .map(|index| {
            let edge = (1.0 - index as f64 / (count as f64 * 1.02)).max(1e-4).sqrt();
            let signal = strength * (index as f64).powf(-fall) * (-(index as f64) / 300.0).exp();
            signal.hypot(floor * edge)
        })
        .collect()
}

fn energy(values: &[f64]) -> Vec<(f64, f64)> {
    let total: f64 = values.iter().map(|value| value * value).sum();
    let mut sum = 0.0;
    let share = |(index, value): (usize, &f64)| {
        sum += value * value;
        ((index + 1) as f64, sum / total)
    };
    values.iter().enumerate().map(share).collect()
}

pub(super) fn spectra(count: usize) -> Lines {
    let mut series = Vec::new();
    for layer in 0..LAYERS {
        for (kind, name) in KINDS.iter().enumerate() {
            let values = spectrum(layer, kind, count);
            series.push(Series {
                name: tensor(layer, kind),
                group: Some((*name).to_owned()),
                points: values.iter().zip(1..).map(|(&value, i)| (f64::from(i), value)).collect(),
                emphasis: if layer == 31 && (kind == 2 || kind == 4) {
                    Emphasis::Strong
                } else {
                    Emphasis::Normal
                },
            });
        }
    }
    Lines {
        title: "Singular values of ΔW".to_owned(),
        note:
            "One curve per tensor. Where a curve bends into its plateau, signal ends and the noise \
               of bf16 storage begins."
                .to_owned(),
        x: Axis::log("index i"),
        y: Axis::log("σᵢ"),
        series,
        marks: vec![
            Mark::Vertical { at: 64.0, label: "chosen rank 64".to_owned() },
            Mark::Vertical { at: 118.0, label: "median r95".to_owned() },
            Mark::Horizontal { at: 0.0125, label: "noise threshold".to_owned() },
        ],
    }
}

pub(super) fn energies(count: usize) -> Lines {
    let medians = KINDS.iter().enumerate().map(|(kind, name)| Series {
        name: (*name).to_owned(),
        points: energy(&spectrum(15, kind, count)),
        ..Series::default()
    });
    Lines {
        title: "Energy captured by the first r directions".to_owned(),
        note: "Median over layers, by kind of projection.".to_owned(),
        x: Axis::linear("rank r"),
        y: Axis::linear("share of ‖ΔW‖²").within(0.0, 1.0),
        series: medians.collect(),
        marks: vec![
            Mark::Horizontal { at: 0.95, label: "95 %".to_owned() },
            Mark::Horizontal { at: 0.9, label: "90 %".to_owned() },
        ],
    }
}

pub(super) fn ranks() -> Heat {
    let value = |kind: usize, layer: usize| {
        let rank = 4.0 + 60.0 * noise(layer * 7 + kind) * (0.3 + layer as f64 / 40.0);
        (layer != 17 || kind != 4).then(|| rank.round())
    };
    Heat {
        title: "Rank that holds 95 % of the energy".to_owned(),
        row_label: "projection".to_owned(),
        column_label: "layer".to_owned(),
        rows: KINDS.map(str::to_owned).to_vec(),
        columns: (0..LAYERS).map(|layer| layer.to_string()).collect(),
        values: (0..7).flat_map(|kind| (0..LAYERS).map(move |layer| value(kind, layer))).collect(),
        legend: "rank".to_owned(),
        numbers: true,
        ..Heat::default()
    }
}

fn change() -> Heat {
    let value = |layer: usize, kind: usize| {
        let size = 0.002 + 0.03 * noise(layer * 7 + kind + 400) * (layer as f64 / 31.0).powi(2);
        Some(size * [1.0, 0.7, 1.8, 1.5, 0.8, 0.9, 1.2][kind])
    };
    Heat {
        title: "Relative change ‖ΔW‖ / ‖W₀‖".to_owned(),
        note: "The deeper the layer, the more fine-tuning moved it.".to_owned(),
        row_label: "layer".to_owned(),
        column_label: "projection".to_owned(),
        rows: (0..LAYERS).map(|layer| layer.to_string()).collect(),
        columns: KINDS.map(str::to_owned).to_vec(),
        values: (0..LAYERS).flat_map(|layer| (0..7).map(move |kind| value(layer, kind))).collect(),
        legend: "‖ΔW‖ / ‖W₀‖".to_owned(),
        shades: Shades::Log,
        numbers: true,
    }
}

pub(super) fn similarity(size: usize, seed: usize) -> Heat {
    let value = |i: usize, j: usize| {
        let common = 1.0 / (1.0 + 0.25 * i.min(j) as f64);
        let floor = 0.12 + 0.5 * j as f64 / (4.0 * size as f64);
        Some((common * 0.75 + floor + 0.05 * noise(seed + i * size + j)).min(1.0))
    };
    let names = || (1..=size).map(|index| index.to_string()).collect::<Vec<_>>();
    Heat {
        title: format!(
            "Subspace similarity φ(A, B, i, j){}",
            if seed > 0 { ", v_proj" } else { ", q_proj" }
        ),
        row_label: "i".to_owned(),
        column_label: "j".to_owned(),
        rows: names(),
        columns: names(),
        values: (0..size).flat_map(|i| (0..size).map(move |j| value(i, j))).collect(),
        legend: "φ".to_owned(),
        shades: Shades::Sequential { low: 0.0, high: 1.0 },
        ..Heat::default()
    }
}

fn amplification() -> Heat {
    let kinds = ["q_proj", "k_proj", "v_proj", "o_proj"];
    let value = |row: usize, column: usize| Some(noise(row * 12 + column + 77) * 6.0 - 2.4);
    Heat {
        title: "Amplification against a random direction".to_owned(),
        rows: kinds.map(str::to_owned).to_vec(),
        columns: (0..12).map(|layer| format!("encoder.layer.{layer}.attention.self")).collect(),
        values: (0..4).flat_map(|row| (0..12).map(move |column| value(row, column))).collect(),
        legend: "log₂ of the factor".to_owned(),
        shades: Shades::Diverging { middle: 0.0 },
        numbers: true,
        ..Heat::default()
    }
}

pub(super) fn shares() -> Bars {
    let items = KINDS.iter().zip([12.4, 8.1, 21.7, 18.3, 11.2, 13.9, 14.4]);
    Bars {
        title: "Where the energy of the change lies".to_owned(),
        label: "share of ‖ΔW‖², %".to_owned(),
        items: items.map(|(name, value)| Bar::new(*name, value)).collect(),
        ..Bars::default()
    }
}

fn held() -> Bars {
    let bar = |name: &str, parts: [f64; 3]| Bar { name: name.to_owned(), values: parts.to_vec() };
    Bars {
        title: "What the adapter holds and what it leaves behind".to_owned(),
        note: "Norms cannot be low rank; `--full norms` stores them exactly.".to_owned(),
        label: "‖change‖², relative to the whole".to_owned(),
        parts: vec!["captured".to_owned(), "residual".to_owned(), "not stored".to_owned()],
        items: vec![
            bar("attention", [0.412, 0.021, 0.0]),
            bar("mlp", [0.337, 0.064, 0.0]),
            bar("model.embed_tokens.weight and lm_head.weight, tied", [0.0, 0.0, 0.058]),
            bar("norms", [0.0, 0.0, 0.108]),
        ],
    }
}

fn table() -> Table {
    let columns = vec![
        Column::name("tensor"),
        Column::text("shape"),
        Column::number("rank"),
        Column::bar("energy"),
        Column::number("residual"),
        Column::number("gap ≤"),
        Column::number("bytes"),
    ];
    let mut rows = Vec::new();
    for layer in 0..LAYERS {
        for kind in 0..7 {
            let seed = layer * 7 + kind;
            let rank = (4.0 + 60.0 * noise(seed)).round();
            let bytes = rank * 2.0 * 8192.0;
            rows.push(vec![
                Cell::from(tensor(layer, kind)),
                Cell::from("4096 × 4096"),
                Cell::from(rank as usize),
                Cell::from(0.8 + 0.199 * noise(seed + 5)),
                Cell::from(noise(seed + 9) * 0.2),
                Cell::number(noise(seed + 6) * 0.01, format!("{:.2} %", noise(seed + 6))),
                Cell::number(bytes, format!("{:.1} KiB", bytes / 1024.0)),
            ]);
        }
    }
    Table { label: "tensors".to_owned(), columns, rows }
}

pub(super) fn page() -> Page {
    Page {
        title: "What fine-tuning changed".to_owned(),
        subtitle: "`Llama-3-8B` → `Llama-3-8B-Instruct-tuned-on-something`, 224 matrices, bf16".to_owned(),
        sections: vec![
            Section {
                heading: "Result".to_owned(),
                prose: vec![
                    "Rank 64 holds 93.1 % of the change of the matrices.".to_owned(),
                    "What no adapter of low rank can hold, norms and embeddings, is 16.6 % of all that \
                     changed. `--full norms` stores two thirds of it in 1.1 MiB."
                        .to_owned(),
                ],
                tiles: vec![
                    Tile { note: "of ‖ΔW‖²".to_owned(), ..Tile::new("captured", "93.1 %") },
                    Tile { note: "bound, measured".to_owned(), ..Tile::new("above the optimum", "≤ 0.08 %") },
                    Tile { note: "of 16.1 GB".to_owned(), ..Tile::new("adapter", "168 MB") },
                    Tile { note: "16 threads".to_owned(), ..Tile::new("time", "8.4 s") },
                ],
                figures: vec![Figure::Bars(held())],
                table: None,
            },
            Section {
                heading: "Spectra".to_owned(),
                prose: vec!["The singular values of each change tell how much rank it needs.".to_owned()],
                figures: vec![Figure::Lines(spectra(1024)), Figure::Lines(energies(1024))],
                ..Section::default()
            },
            Section {
                heading: "Layers and projections".to_owned(),
                prose: vec!["Where in the model the change lies, and how much rank it takes there.".to_owned()],
                figures: vec![
                    Figure::Heat(ranks()),
                    Figure::Heat(change()),
                    Figure::Heat(amplification()),
                    Figure::Bars(shares()),
                ],
                ..Section::default()
            },
            Section {
                heading: "Similarity".to_owned(),
                prose: vec!["How much of the first i directions of A lies in the first j of B.".to_owned()],
                figures: vec![
                    Figure::Heat(similarity(64, 0)),
                    Figure::Heat(similarity(64, 9999)),
                ],
                ..Section::default()
            },
            Section { heading: "Tensors".to_owned(), table: Some(table()), ..Section::default() },
        ],
        footer: format!("lora-cli extract, randomised block Krylov, {} steps", number(3.0)),
    }
}

#[test]
fn the_page_is_small_enough_to_send() {
    let text = html(&page());
    assert!(text.len() < 1_000_000, "{} bytes", text.len());
    let Some(directory) = std::env::var_os("PICTURES_TO") else { return };
    let directory = Path::new(&directory);
    fs::write(directory.join("demo.html"), text).unwrap();
    let figures = [
        ("spectra", Figure::Lines(spectra(1024))),
        ("energies", Figure::Lines(energies(1024))),
        ("ranks", Figure::Heat(ranks())),
        ("change", Figure::Heat(change())),
        ("amplification", Figure::Heat(amplification())),
        ("similarity", Figure::Heat(similarity(64, 0))),
        ("shares", Figure::Bars(shares())),
        ("held", Figure::Bars(held())),
    ];
    for (name, figure) in figures {
        fs::write(directory.join(format!("{name}.svg")), svg(&figure, Theme::Auto)).unwrap();
        for (theme, suffix) in [(Theme::Light, "light"), (Theme::Dark, "dark")] {
            let path = directory.join(format!("{name}-{suffix}.png"));
            fs::write(path, png(&figure, theme, 1.5).unwrap()).unwrap();
        }
    }
}
