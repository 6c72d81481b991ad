//! Mixtures of experts: every layout of an adapter on every way to store a base, against the
//! definitions written out in loops; and what must be refused.

use std::collections::BTreeMap;

use lora_format::Dtype;
use lora_merge::MergeOptions;
use lora_merge::engine::RunOptions;
use lora_merge::experts::Layout;
use serde_json::{Value, json};

use crate::support::{
    Factors, Prng, Tensor, copy_directory, fixtures, least, read_json, read_model, read_tensors,
    unit_roundoff, write_adapter, write_json,
};
use crate::{Case, merge, plan};

/// The matrices of one layer's experts, out × in, by expert: gate, up and down.
type Layer = [Vec<Matrix>; 3];

const GATE: usize = 0;
const UP: usize = 1;
const DOWN: usize = 2;

#[derive(Clone, Debug)]
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn zeros(rows: usize, cols: usize) -> Matrix {
        Matrix { rows, cols, values: vec![0.0; rows * cols] }
    }

    fn random(prng: &mut Prng, rows: usize, cols: usize) -> Matrix {
        let tensor = Tensor::random(prng, "", Dtype::F32, &[rows, cols], 1.0);
        Matrix { rows, cols, values: tensor.values() }
    }

    fn get(&self, row: usize, col: usize) -> f64 {
        self.values[row * self.cols + col]
    }

    fn set(&mut self, row: usize, col: usize, value: f64) {
        self.values[row * self.cols + col] = value;
    }

    fn transposed(&self) -> Matrix {
        let mut result = Matrix::zeros(self.cols, self.rows);
        for row in 0..self.rows {
            (0..self.cols).for_each(|col| result.set(col, row, self.get(row, col)));
        }
        result
    }
}

/// How gate and up share the outputs of one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sharing {
    Halves,
    Interleaved,
}

fn row_of(sharing: Sharing, which: usize, row: usize, half: usize) -> usize {
    match sharing {
        Sharing::Halves => which * half + row,
        Sharing::Interleaved => 2 * row + which,
    }
}

fn share(sharing: Sharing, gate: &Matrix, up: &Matrix) -> Matrix {
    let mut both = Matrix::zeros(2 * gate.rows, gate.cols);
    for (which, matrix) in [gate, up].into_iter().enumerate() {
        for row in 0..gate.rows {
            let at = row_of(sharing, which, row, gate.rows);
            (0..gate.cols).for_each(|col| both.set(at, col, matrix.get(row, col)));
        }
    }
    both
}

fn unshare(sharing: Sharing, both: &Matrix) -> [Matrix; 2] {
    let half = both.rows / 2;
    [GATE, UP].map(|which| {
        let mut matrix = Matrix::zeros(half, both.cols);
        for row in 0..half {
            let at = row_of(sharing, which, row, half);
            (0..both.cols).for_each(|col| matrix.set(row, col, both.get(at, col)));
        }
        matrix
    })
}

/// How a base stores the experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Storage {
    /// gate, up, down of experts.3, with the module before `experts`.
    Each { parent: &'static str, names: [&'static str; 3] },
    /// `gate_up_proj` and `down_proj` of one expert, named by number behind: out × in.
    Plural,
    /// Names of the stack of gate and up, and of down.
    Stacks { names: [&'static str; 2], sharing: Sharing, in_out: bool },
    /// Three stacks, out × in.
    Three { names: [&'static str; 3] },
}

const QWEN: Storage = Storage::Each { parent: "mlp", names: ["gate_proj", "up_proj", "down_proj"] };
const MIXTRAL: Storage = Storage::Each { parent: "block_sparse_moe", names: ["w1", "w3", "w2"] };
const FUSED: [&str; 2] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"];

/// Bases with their model types, and how transformers 5 has them in memory: whether in × out, and
/// how gate and up share their matrix.
fn bases() -> Vec<(Storage, &'static str, bool, Sharing)> {
    let stacks = |names, sharing, in_out| Storage::Stacks { names, sharing, in_out };
    let halves = Sharing::Halves;
    vec![
        (stacks(FUSED, halves, false), "qwen3_moe", false, halves),
        (QWEN, "qwen3_moe", false, halves),
        (MIXTRAL, "mixtral", false, halves),
        (stacks(FUSED, Sharing::Interleaved, true), "gpt_oss", true, Sharing::Interleaved),
        (Storage::Plural, "gpt_oss", true, Sharing::Interleaved),
        (stacks(FUSED, halves, true), "llama4_text", true, halves),
        (
            stacks(["mlp.experts.fc1.weight", "mlp.experts.fc2.weight"], halves, true),
            "aria_text",
            true,
            halves,
        ),
        (
            stacks(
                ["block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"],
                halves,
                false,
            ),
            "granitemoe",
            false,
            halves,
        ),
        (
            stacks(
                ["mlp.experts.w13_weight", "mlp.experts.w2_weight"],
                Sharing::Interleaved,
                false,
            ),
            "inkling",
            false,
            halves,
        ),
        (
            Storage::Three {
                names: ["moe.gate_proj.weight", "moe.up_proj.weight", "moe.down_proj.weight"],
            },
            "step3p7",
            false,
            halves,
        ),
    ]
}

fn stack(name: &str, matrices: &[Matrix]) -> Tensor {
    let values: Vec<f64> = matrices.iter().flat_map(|matrix| matrix.values.clone()).collect();
    Tensor::new(name, Dtype::F32, &[matrices.len(), matrices[0].rows, matrices[0].cols], &values)
}

fn unstack(tensor: &Tensor) -> Vec<Matrix> {
    let [_, rows, cols] = *tensor.shape else { panic!("{:?}", tensor.shape) };
    let values = tensor.values();
    let matrices = values.chunks_exact(rows * cols);
    matrices.map(|values| Matrix { rows, cols, values: values.to_vec() }).collect()
}

impl Storage {
    fn write(self, layer: usize, experts: &Layer) -> Vec<Tensor> {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        let one = |name: String, matrix: &Matrix| {
            Tensor::new(&name, Dtype::F32, &[matrix.rows, matrix.cols], &matrix.values)
        };
        let both = |sharing| -> Vec<Matrix> {
            let pairs = experts[GATE].iter().zip(&experts[UP]);
            pairs.map(|(gate, up)| share(sharing, gate, up)).collect()
        };
        match self {
            Storage::Each { parent, names } => (0..experts[GATE].len())
                .flat_map(|expert| {
                    (0..3).map(move |part| {
                        let name = at(&format!("{parent}.experts.{expert}.{}.weight", names[part]));
                        one(name, &experts[part][expert])
                    })
                })
                .collect(),
            Storage::Plural => {
                let gate_up = both(Sharing::Interleaved);
                let parts = [("gate_up_projs", &gate_up), ("down_projs", &experts[DOWN])];
                let each = parts.into_iter().flat_map(|(name, matrices)| {
                    matrices.iter().enumerate().map(move |(expert, matrix)| {
                        one(at(&format!("mlp.experts.{name}.{expert}.weight")), matrix)
                    })
                });
                each.collect()
            }
            Storage::Stacks { names, sharing, in_out } => {
                let (mut gate_up, mut down) = (both(sharing), experts[DOWN].clone());
                if in_out {
                    gate_up = gate_up.iter().map(Matrix::transposed).collect();
                    down = down.iter().map(Matrix::transposed).collect();
                }
                vec![stack(&at(names[0]), &gate_up), stack(&at(names[1]), &down)]
            }
            Storage::Three { names } => {
                (0..3).map(|part| stack(&at(names[part]), &experts[part])).collect()
            }
        }
    }

    fn read(self, layer: usize, tensors: &BTreeMap<String, Tensor>) -> Layer {
        let at = |name: &str| &tensors[&format!("model.layers.{layer}.{name}")];
        let one = |tensor: &Tensor| Matrix {
            rows: tensor.shape[0],
            cols: tensor.shape[1],
            values: tensor.values(),
        };
        let numbered = |name: &dyn Fn(usize) -> String| -> Vec<Matrix> {
            (0..)
                .map(|expert| format!("model.layers.{layer}.{}", name(expert)))
                .map_while(|name| tensors.get(&name).map(one))
                .collect()
        };
        let split = |sharing, both: Vec<Matrix>| -> [Vec<Matrix>; 2] {
            let (gates, ups) =
                both.iter().map(|both| unshare(sharing, both)).map(|[gate, up]| (gate, up)).unzip();
            [gates, ups]
        };
        match self {
            Storage::Each { parent, names } => {
                names.map(|name| numbered(&|e| format!("{parent}.experts.{e}.{name}.weight")))
            }
            Storage::Plural => {
                let of = |name: &str| numbered(&|e| format!("mlp.experts.{name}.{e}.weight"));
                let [gate, up] = split(Sharing::Interleaved, of("gate_up_projs"));
                [gate, up, of("down_projs")]
            }
            Storage::Stacks { names, sharing, in_out } => {
                let [gate_up, down] = names.map(|name| {
                    let matrices = unstack(at(name));
                    match in_out {
                        true => matrices.iter().map(Matrix::transposed).collect(),
                        false => matrices,
                    }
                });
                let [gate, up] = split(sharing, gate_up);
                [gate, up, down]
            }
            Storage::Three { names } => names.map(|name| unstack(at(name))),
        }
    }
}

/// A change with the sum of its products' sizes.
#[derive(Clone, Debug)]
struct Delta {
    layer: Layer,
    sizes: Layer,
}

/// Whether A has the inputs, by what the releases do.
fn has_inputs(layout: Layout, in_out: bool) -> bool {
    match layout {
        Layout::Peft | Layout::BlockWise => true,
        Layout::Peft0190 | Layout::BlockWise0190 => false,
        Layout::Peft018 | Layout::BlockWise018 => in_out,
    }
}

fn column(layout: Layout, (expert, experts): (usize, usize), (k, rank): (usize, usize)) -> usize {
    match layout {
        Layout::Peft | Layout::Peft0190 | Layout::Peft018 => k * experts + expert,
        _ => expert * rank + k,
    }
}

/// One parameter's factors, and what they mean: `s·Σ B[m, column(k, e)]·A[e·r + k, n]`, with n the
/// input if A has the inputs.
fn stacked_factors(
    prng: &mut Prng,
    module: &str,
    layout: Layout,
    in_out: bool,
    (experts, out, input): (usize, usize, usize),
    (rank, scale): (usize, f64),
) -> (Factors, Vec<[Matrix; 2]>) {
    let inputs = has_inputs(layout, in_out);
    let (a_cols, b_rows) = if inputs { (input, out) } else { (out, input) };
    let factors = Factors {
        module: module.to_owned(),
        a: Tensor::random(prng, "", Dtype::F32, &[experts * rank, a_cols], 1.0),
        b: Tensor::random(prng, "", Dtype::F32, &[b_rows, experts * rank], 1.0),
    };
    let (a, b) = (factors.a.values(), factors.b.values());
    let deltas = (0..experts).map(|expert| {
        let (mut delta, mut size) = (Matrix::zeros(out, input), Matrix::zeros(out, input));
        for m in 0..b_rows {
            for n in 0..a_cols {
                let (row, col) = if inputs { (m, n) } else { (n, m) };
                for k in 0..rank {
                    let at = column(layout, (expert, experts), (k, rank));
                    let product =
                        scale * b[m * experts * rank + at] * a[(expert * rank + k) * a_cols + n];
                    delta.set(row, col, delta.get(row, col) + product);
                    size.set(row, col, size.get(row, col) + product.abs());
                }
            }
        }
        [delta, size]
    });
    let deltas = deltas.collect();
    (factors, deltas)
}

fn random_layer(prng: &mut Prng, experts: usize, inner: usize, hidden: usize) -> Layer {
    [(inner, hidden), (inner, hidden), (hidden, inner)]
        .map(|(rows, cols)| (0..experts).map(|_| Matrix::random(prng, rows, cols)).collect())
}

fn zero_layer(experts: usize, inner: usize, hidden: usize) -> Layer {
    [(inner, hidden), (inner, hidden), (hidden, inner)]
        .map(|(rows, cols)| vec![Matrix::zeros(rows, cols); experts])
}

/// The merged layer must be what it was plus the change, within what rounding explains.
fn check(at: &str, rank: usize, before: &Layer, delta: &Delta, after: &Layer) {
    let rank = 2.0 * rank as f64;
    let unit = unit_roundoff(Dtype::F32);
    let gamma = rank * unit / (1.0 - rank * unit);
    for part in 0..3 {
        assert_eq!(after[part].len(), before[part].len(), "{at}");
        for expert in 0..before[part].len() {
            let of = |layer: &Layer| layer[part][expert].values.clone();
            let (old, change, size) = (of(before), of(&delta.layer), of(&delta.sizes));
            for (index, &got) in after[part][expert].values.iter().enumerate() {
                let wanted = old[index] + change[index];
                let bound = unit * wanted.abs() + gamma * size[index] + least(Dtype::F32);
                assert!(
                    (got - wanted).abs() <= bound,
                    "{at}: part {part} of expert {expert}, {index}: {got} for {wanted}"
                );
            }
        }
    }
}

fn base_case(storage: Storage, model: &str, layers: &[Layer]) -> Case {
    let tensors: Vec<Tensor> =
        layers.iter().enumerate().flat_map(|(index, layer)| storage.write(index, layer)).collect();
    Case::directory(&json!({"model_type": model}), &tensors, &[])
}

/// Adapters of stacks, in every layout, on every base.
#[test]
fn stacks_on_every_base() {
    let mut prng = Prng::new(0x57AC);
    for round in 0..4 {
        for (storage, model, in_out, sharing) in bases() {
            for layout in Layout::ALL {
                let (experts, rank) = (prng.between(1, 4), prng.between(1, 3));
                let (inner, hidden) = (prng.between(2, 6), prng.between(2, 8));
                let nested = [true, true, false, false][round];
                let only_down = round == 3;
                let dims = (experts, inner, hidden);
                // PEFT takes a stack of one for a matrix, and fails if that does not fit.
                if experts == 1 && !matches!(layout, Layout::Peft | Layout::BlockWise) {
                    continue;
                }
                if experts == 1 && in_out {
                    continue;
                }
                let at = format!("{storage:?} {layout} {dims:?} rank {rank}, {round}");
                let layers = [0, 1].map(|_| random_layer(&mut prng, experts, inner, hidden));
                let case = base_case(storage, model, &layers);
                let scale = 1.5;
                let mut factors = Vec::new();
                let mut deltas = Vec::new();
                for index in 0..layers.len() {
                    let module = format!("model.layers.{index}.mlp.experts");
                    let mut delta = Delta {
                        layer: zero_layer(experts, inner, hidden),
                        sizes: zero_layer(experts, inner, hidden),
                    };
                    if !only_down {
                        let name =
                            if nested { format!("{module}.base_layer") } else { module.clone() };
                        let shape = (experts, 2 * inner, hidden);
                        let (pair, both) =
                            stacked_factors(&mut prng, &name, layout, in_out, shape, (rank, scale));
                        factors.push(pair);
                        for (expert, [value, size]) in both.iter().enumerate() {
                            let (value, size) = (unshare(sharing, value), unshare(sharing, size));
                            for part in [GATE, UP] {
                                delta.layer[part][expert] = value[part].clone();
                                delta.sizes[part][expert] = size[part].clone();
                            }
                        }
                    }
                    if nested || only_down {
                        let shape = (experts, hidden, inner);
                        let (pair, down) = stacked_factors(
                            &mut prng,
                            &module,
                            layout,
                            in_out,
                            shape,
                            (rank, scale),
                        );
                        factors.push(pair);
                        for (expert, [value, size]) in down.into_iter().enumerate() {
                            delta.layer[DOWN][expert] = value;
                            delta.sizes[DOWN][expert] = size;
                        }
                    }
                    deltas.push(delta);
                }
                let named: &[&str] = match (nested, only_down) {
                    (true, _) => &["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
                    (_, true) => &["mlp.experts.down_proj"],
                    _ => &["mlp.experts.gate_up_proj"],
                };
                let config = json!({
                    "r": rank, "lora_alpha": 1.5 * rank as f64, "target_parameters": named,
                });
                write_adapter(&case.adapter, &factors, &config);
                let options = MergeOptions { moe_layout: Some(layout), ..MergeOptions::default() };
                let merged = case
                    .merge(&options, &RunOptions::default())
                    .unwrap_or_else(|error| panic!("{at}: {error}"));
                for (index, delta) in deltas.iter().enumerate() {
                    let after = storage.read(index, &merged.tensors);
                    check(&format!("{at}, layer {index}"), rank, &layers[index], delta, &after);
                }
            }
        }
    }
}

/// Adapters of single experts, under both sets of names, on every base; some experts and some
/// projections have none.
#[test]
fn single_experts_on_every_base() {
    let mut prng = Prng::new(0x51E6);
    for round in 0..6 {
        for (storage, model, ..) in bases() {
            let (experts, rank) = (prng.between(1, 4), prng.between(1, 3));
            // Of these sizes no matrix is square: a base of three stacks does not show how its
            // square ones lie.
            let (inner, hidden) = (prng.between(2, 4), prng.between(9, 11));
            let at = format!("{storage:?} {experts} {inner} {hidden}, {round}");
            let layers = [random_layer(&mut prng, experts, inner, hidden)];
            let case = base_case(storage, model, &layers);
            let mut delta = Delta {
                layer: zero_layer(experts, inner, hidden),
                sizes: zero_layer(experts, inner, hidden),
            };
            let (parent, names) = match round % 2 {
                0 => ("block_sparse_moe", ["w1", "w3", "w2"]),
                _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
            };
            let mut factors = Vec::new();
            for expert in 0..experts {
                for (part, name) in names.iter().enumerate() {
                    if round > 1 && prng.below(3) == 0 && !factors.is_empty() {
                        continue;
                    }
                    let module = format!("model.layers.0.{parent}.experts.{expert}.{name}");
                    let out = layers[0][part][0].rows;
                    let input = layers[0][part][0].cols;
                    let shape = (1, out, input);
                    let (pair, mut change) = stacked_factors(
                        &mut prng,
                        &module,
                        Layout::Peft,
                        false,
                        shape,
                        (rank, 1.0),
                    );
                    factors.push(pair);
                    let [value, size] = change.remove(0);
                    delta.layer[part][expert] = value;
                    delta.sizes[part][expert] = size;
                }
            }
            write_adapter(&case.adapter, &factors, &json!({"r": rank, "lora_alpha": rank}));
            let merged = case
                .merge(&MergeOptions::default(), &RunOptions::default())
                .unwrap_or_else(|error| panic!("{at}: {error}"));
            check(&at, rank, &layers[0], &delta, &storage.read(0, &merged.tensors));
        }
    }
}

/// A case of the fixtures with another adapter configuration.
fn reconfigured(
    name: &str,
    change: &dyn Fn(&mut Value),
) -> (tempfile::TempDir, std::path::PathBuf) {
    let case = fixtures().join("features").join(name);
    let scratch = tempfile::tempdir().unwrap();
    let adapter = scratch.path().join("adapter");
    copy_directory(&case.join("adapter"), &adapter);
    let path = adapter.join("adapter_config.json");
    let mut config = read_json(&path);
    change(&mut config);
    write_json(&path, &config);
    let base = case.join(read_json(&case.join("case.json"))["base"].as_str().unwrap());
    (scratch, base)
}

fn expected(name: &str) -> BTreeMap<String, Tensor> {
    read_tensors(&fixtures().join("features").join(name).join("expected_f64.safetensors"))
}

fn agrees(merged: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) -> bool {
    expected.iter().all(|(name, wanted)| {
        let pairs = merged[name].values().into_iter().zip(wanted.values());
        pairs.into_iter().all(|(got, wanted)| (got - wanted).abs() <= 5e-7)
    })
}

/// The merged tensors and the notes of a case, or the refusal.
fn attempt(
    name: &str,
    layout: Option<Layout>,
    change: &dyn Fn(&mut Value),
) -> Result<(BTreeMap<String, Tensor>, Vec<String>), String> {
    let (scratch, base) = reconfigured(name, change);
    let adapter = scratch.path().join("adapter");
    let options =
        MergeOptions { moe_layout: layout, dtype: Some(Dtype::F32), ..MergeOptions::default() };
    let planned = plan(&base, &adapter, &options).map_err(|error| error.to_string())?;
    let notes = planned.notes.iter().map(ToString::to_string).collect();
    let out = scratch.path().join("out");
    merge(&base, &adapter, &out, &options, &RunOptions::default()).unwrap();
    Ok((read_model(&out), notes))
}

/// Where every matrix is square, the release that wrote the adapter decides, and says so; without
/// it nothing does.
#[test]
fn square_experts_are_read_as_their_writer_wrote_them() {
    let name = "moe-layout-peft-018-square";
    let wanted = expected(name);
    let version =
        |version: &'static str| move |config: &mut Value| config["peft_version"] = json!(version);
    let (merged, notes) = attempt(name, None, &|_| {}).unwrap();
    assert!(agrees(&merged, &wanted));
    assert!(
        notes.iter().any(|note| {
            note.contains("`model.layers.*.mlp.experts`: A has the outputs")
                && note.contains("PEFT 0.18.1, which wrote it")
        }),
        "{notes:?}"
    );
    // The first release that turned it round, on a stack of out × in, did the same.
    let (merged, _) = attempt(name, None, &version("0.19.0")).unwrap();
    assert!(agrees(&merged, &wanted));
    let (merged, notes) = attempt(name, None, &version("0.19.1")).unwrap();
    assert!(!agrees(&merged, &wanted));
    assert!(notes.iter().any(|note| note.contains("A has the inputs")), "{notes:?}");
    for open in ["0.19.1.dev0@0123456", "main", ""] {
        let refused = attempt(name, None, &|config| config["peft_version"] = json!(open));
        let refused = refused.unwrap_err();
        assert!(refused.contains("--moe-layout"), "{open}: {refused}");
    }
    let absent = |config: &mut Value| drop(config.as_object_mut().unwrap().remove("peft_version"));
    let refused = attempt(name, None, &absent).unwrap_err();
    for part in
        ["`model.layers.*.mlp.experts`", "as well as", "--moe-layout", "peft-0.18", "block-wise"]
    {
        assert!(refused.contains(part), "{refused}");
    }
    // The user's word goes before the release's, and what speaks against it is said.
    let (merged, _) = attempt(name, Some(Layout::Peft018), &absent).unwrap();
    assert!(agrees(&merged, &wanted));
    let (merged, notes) = attempt(name, Some(Layout::Peft018), &|_| {}).unwrap();
    assert!(agrees(&merged, &wanted));
    assert_eq!(notes, [""; 0]);
    let (merged, notes) = attempt(name, Some(Layout::Peft), &|_| {}).unwrap();
    assert!(!agrees(&merged, &wanted));
    assert!(notes.iter().any(|note| note.contains("though PEFT 0.18.1")), "{notes:?}");
}

/// What shapes decide, no option and no version changes.
#[test]
fn shapes_are_never_overruled() {
    for (name, layout) in [
        ("moe-mixtral-fused", Layout::Peft018),
        ("moe-gpt-oss", Layout::Peft0190),
        ("moe-layout-peft-018", Layout::Peft),
        ("moe-square", Layout::Peft018),
        ("moe-gpt-oss-square", Layout::Peft0190),
    ] {
        let wanted = expected(name);
        let (merged, notes) = attempt(name, Some(layout), &|_| {}).unwrap();
        assert!(agrees(&merged, &wanted), "{name}");
        assert_eq!(notes, [""; 0], "{name}");
        let other = |config: &mut Value| config["peft_version"] = json!("0.19.0");
        assert!(agrees(&attempt(name, None, &other).unwrap().0, &wanted), "{name}");
    }
}

/// unsloth packs B otherwise, or not, depending on its release, and notes which since it does not.
#[test]
fn the_columns_of_b_are_read_as_noted() {
    let name = "moe-layout-block-wise";
    let wanted = expected(name);
    let marked =
        |marker: &'static str| move |config: &mut Value| config["lora_B_layout"] = json!(marker);
    let (merged, notes) = attempt(name, None, &marked("grouped_by_expert")).unwrap();
    assert!(agrees(&merged, &wanted));
    assert!(notes.iter().any(|note| note.contains("by expert, then by rank")), "{notes:?}");
    let detailed = |config: &mut Value| {
        let each = json!({"lora_B_layout": "grouped_by_expert", "num_experts": 3});
        config["lora_B_layout"] = json!("mixed");
        config["unsloth_fused_expert_lora"] = json!({
            "lora_A_layout": "grouped_by_expert",
            "parameters": {"gate_up_proj": each, "down_proj": each},
        });
    };
    assert!(agrees(&attempt(name, None, &detailed).unwrap().0, &wanted));
    for (marker, changed) in [(marked("rank_major"), false), (marked("grouped_by_expert"), true)] {
        let (merged, _) = attempt("moe-mixtral-fused", None, &marker).unwrap();
        assert_eq!(!agrees(&merged, &expected("moe-mixtral-fused")), changed);
    }
    let refused = attempt(name, None, &marked("something")).unwrap_err();
    assert!(refused.contains("`lora_B_layout` is \"something\""), "{refused}");
    let unsloth = |config: &mut Value| config["auto_mapping"] = json!({"unsloth_fixed": true});
    let refused = attempt(name, None, &unsloth).unwrap_err();
    assert!(refused.contains("unsloth") && refused.contains("--moe-layout"), "{refused}");
    assert!(agrees(&attempt(name, Some(Layout::BlockWise), &unsloth).unwrap().0, &wanted));
    let (merged, notes) = attempt(name, Some(Layout::BlockWise), &marked("rank_major")).unwrap();
    assert!(agrees(&merged, &wanted));
    assert!(notes.iter().any(|note| note.contains("though `lora_B_layout`")), "{notes:?}");
}

/// Of rank 1 there is nothing to pack, so nothing to ask.
#[test]
fn rank_one_needs_no_packing() {
    let mut prng = Prng::new(1);
    let layers = [random_layer(&mut prng, 3, 4, 5)];
    let (storage, model, in_out, _) = bases()[0];
    let case = base_case(storage, model, &layers);
    let module = "model.layers.0.mlp.experts";
    let shape = (3, 5, 4);
    let (pair, _) = stacked_factors(&mut prng, module, Layout::BlockWise, in_out, shape, (1, 1.0));
    let config = json!({
        "r": 1,
        "target_parameters": ["mlp.experts.down_proj"],
        "auto_mapping": {"unsloth_fixed": true},
    });
    write_adapter(&case.adapter, &[pair], &config);
    case.plan(&MergeOptions::default()).unwrap();
}

/// A fused adapter of one layer, of experts 3 × (2·4 × 5) and 3 × (5 × 4), and its refusal on a
/// base made by `change` from one that it fits.
fn refusal_of_stacks(
    change: &dyn Fn(&mut Vec<Tensor>),
    storage: Storage,
    config: &Value,
) -> String {
    let mut prng = Prng::new(2);
    let layers = [random_layer(&mut prng, 3, 4, 5)];
    let mut tensors = storage.write(0, &layers[0]);
    change(&mut tensors);
    let case = Case::directory(&json!({"model_type": "qwen3_moe"}), &tensors, &[]);
    let module = "model.layers.0.mlp.experts";
    let mut pair = |name: &str, shape| {
        stacked_factors(&mut prng, name, Layout::Peft, false, shape, (2, 1.0)).0
    };
    let factors = [pair(&format!("{module}.base_layer"), (3, 8, 5)), pair(module, (3, 5, 4))];
    let mut all = json!({
        "r": 2, "lora_alpha": 2,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    });
    for (key, value) in config.as_object().unwrap() {
        all[key] = value.clone();
    }
    write_adapter(&case.adapter, &factors, &all);
    case.refusal(&MergeOptions::default())
}

#[test]
fn stacks_that_do_not_fit_are_refused() {
    let mixtral = MIXTRAL;
    let fused = bases()[0].0;
    let refused = refusal_of_stacks(&|tensors| drop(tensors.remove(4)), mixtral, &json!({}));
    assert!(refused.contains("expert 1"), "{refused}");
    let refused = refusal_of_stacks(
        &|tensors| tensors.retain(|tensor| !tensor.name.contains(".w3.")),
        mixtral,
        &json!({}),
    );
    assert!(refused.contains("no up projection"), "{refused}");
    let refused = refusal_of_stacks(
        &|tensors| tensors.retain(|tensor| !tensor.name.contains("experts.2.")),
        mixtral,
        &json!({}),
    );
    for part in ["A [6, 5] with B [8, 6]", "`gate_up_proj` is 2 experts of 8×5, at rank 2"] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    let other =
        Tensor::zeros("model.layers.0.block_sparse_moe.experts.1.w2.weight", Dtype::F32, &[5, 3]);
    let refused = refusal_of_stacks(
        &|tensors| {
            tensors.retain(|tensor| tensor.name != other.name);
            tensors.push(other.clone());
        },
        mixtral,
        &json!({}),
    );
    assert!(refused.contains("of one shape"), "{refused}");
    let refused = refusal_of_stacks(
        &|tensors| tensors.retain(|tensor| tensor.name.contains("gate_up")),
        fused,
        &json!({}),
    );
    assert!(refused.contains("do not fit"), "{refused}");
    let refused = refusal_of_stacks(&|tensors| drop(tensors.drain(..)), fused, &json!({}));
    assert!(
        refused.contains("`model.layers.0.mlp.experts.down_proj`: the base has no"),
        "{refused}"
    );
    // What is stored twice is of no one.
    let refused = refusal_of_stacks(
        &|tensors| {
            let more: Vec<Tensor> = tensors
                .iter()
                .map(|t| t.renamed(&t.name.replace("block_sparse_moe", "mlp")))
                .collect();
            tensors.extend(more);
            let w1 = tensors.iter().filter(|t| t.name.contains(".w1."));
            let more: Vec<Tensor> =
                w1.map(|t| t.renamed(&t.name.replace(".w1.", ".gate_proj."))).collect();
            tensors.extend(more);
        },
        mixtral,
        &json!({}),
    );
    assert!(refused.contains("twice"), "{refused}");
}

#[test]
fn single_experts_that_do_not_fit_are_refused() {
    let mut prng = Prng::new(3);
    let (experts, inner, hidden) = (3, 4, 5);
    let layers = [random_layer(&mut prng, experts, inner, hidden)];
    let refusal = |storage: Storage, config: &Value, module: &str, shape, extra: &Value| {
        let tensors = storage.write(0, &layers[0]);
        let case = Case::directory(config, &tensors, &[]);
        let mut prng = Prng::new(4);
        let module = format!("model.layers.0.{module}");
        let factors = Factors::random(&mut prng, &module, shape, Dtype::F32, 1.0);
        write_adapter(&case.adapter, &[factors], extra);
        case.refusal(&MergeOptions::default())
    };
    let fused = bases()[0].0;
    let qwen = json!({"model_type": "qwen3_moe"});
    let gate = "mlp.experts.1.gate_proj";
    let no = json!({});
    let refused = refusal(fused, &qwen, gate, (5, 5, 2), &no);
    for part in ["`model.layers.0.mlp.experts.1.gate_proj`", "5×5", "half", "[3, 8, 5]"] {
        assert!(refused.contains(part), "{refused}");
    }
    let refused = refusal(fused, &qwen, "mlp.experts.3.gate_proj", (4, 5, 2), &no);
    assert!(refused.contains("3 experts"), "{refused}");
    // Which outputs of an unknown model's (in, out) stack are whose, nobody says.
    let (in_out, ..) = bases()[3];
    let refused = refusal(in_out, &json!({}), gate, (4, 5, 2), &no);
    assert!(refused.contains("`model_type`"), "{refused}");
    // An ungated stack.
    let down = json!({"model_type": "nemotron_h"});
    let up = [Tensor::zeros("model.layers.0.mlp.experts.up_proj", Dtype::F32, &[3, 4, 5])];
    let case = Case::directory(&down, &up, &[]);
    let module = format!("model.layers.0.{gate}");
    let factors = Factors::random(&mut prng, &module, (4, 5, 2), Dtype::F32, 1.0);
    write_adapter(&case.adapter, &[factors], &no);
    let refused = case.refusal(&MergeOptions::default());
    assert!(refused.contains("no gate projection"), "{refused}");
    // A square one of which nothing tells how it lies.
    let up = [Tensor::zeros("model.layers.0.mlp.experts.up_proj", Dtype::F32, &[3, 4, 4])];
    let case = Case::directory(&down, &up, &[]);
    let module = "model.layers.0.mlp.experts.1.up_proj";
    let factors = Factors::random(&mut prng, module, (4, 4, 2), Dtype::F32, 1.0);
    write_adapter(&case.adapter, &[factors], &no);
    let refused = case.refusal(&MergeOptions::default());
    assert!(refused.contains("square"), "{refused}");
    // DoRA depends on the whole weight of a matrix.
    let case = fixtures().join("features/moe-per-expert-mixtral-fused");
    let base = case.join(read_json(&case.join("case.json"))["base"].as_str().unwrap());
    let scratch = tempfile::tempdir().unwrap();
    let adapter = scratch.path().join("adapter");
    copy_directory(&case.join("adapter"), &adapter);
    let file = adapter.join("adapter_model.safetensors");
    let mut tensors: Vec<Tensor> = read_tensors(&file).into_values().collect();
    let magnitudes: Vec<Tensor> = tensors
        .iter()
        .filter(|tensor| tensor.name.contains("lora_B"))
        .map(|tensor| {
            let name = tensor.name.replace("lora_B.weight", "lora_magnitude_vector");
            Tensor::new(&name, Dtype::F32, &[tensor.shape[0]], &vec![1.0; tensor.shape[0]])
        })
        .collect();
    tensors.extend(magnitudes);
    crate::write_tensors(&file, &tensors, &[("format", "pt")]);
    let path = adapter.join("adapter_config.json");
    let mut config = read_json(&path);
    config["use_dora"] = json!(true);
    write_json(&path, &config);
    let refused = plan(&base, &adapter, &MergeOptions::default()).unwrap_err().to_string();
    assert!(refused.contains("DoRA of one of the experts"), "{refused}");
}

/// Routers and shared experts have other names in other releases of transformers.
#[test]
fn what_stands_beside_experts_is_found_under_its_other_name() {
    for (stored, named) in [
        ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
        ("model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"),
        ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.router"),
        ("model.layers.0.mlp.router.gate", "model.layers.0.mlp.gate"),
        ("model.layers.0.moe.gate", "model.layers.0.mlp.gate"),
        ("model.layers.0.mlp.shared_mlp.up_proj", "model.layers.0.mlp.shared_experts.up_proj"),
        ("model.layers.0.mlp.shared_expert.up_proj", "model.layers.0.mlp.shared_experts.up_proj"),
        ("model.layers.0.share_expert.up_proj", "model.layers.0.mlp.shared_experts.up_proj"),
        ("model.language_model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
    ] {
        let mut prng = Prng::new(5);
        let base = [
            Tensor::random(&mut prng, &format!("{stored}.weight"), Dtype::F32, &[3, 5], 1.0),
            Tensor::zeros("model.layers.0.mlp.experts.0.w1.weight", Dtype::F32, &[4, 5]),
        ];
        let adapter = [Factors::random(&mut prng, named, (3, 5, 2), Dtype::F32, 1.0)];
        let case = Case::directory(&json!({}), &base, &adapter);
        let plan = case.plan(&MergeOptions::default()).unwrap_or_else(|e| panic!("{named}: {e}"));
        let targets: Vec<&str> = plan.targets.iter().map(|target| target.name.as_str()).collect();
        assert_eq!(targets, [format!("{stored}.weight")], "{named}");
    }
    // A model without experts has no such other names.
    let mut prng = Prng::new(6);
    let base = [Tensor::zeros("model.layers.0.mlp.shared_mlp.weight", Dtype::F32, &[3, 5])];
    let named = "model.layers.0.mlp.shared_experts";
    let adapter = [Factors::random(&mut prng, named, (3, 5, 2), Dtype::F32, 1.0)];
    let refused = Case::directory(&json!({}), &base, &adapter).refusal(&MergeOptions::default());
    assert!(refused.contains("the base has no such parameter"), "{refused}");
}

/// Experts quantised as gpt-oss publishes them are full-precision parameters to a merge.
#[test]
fn quantised_stacks_take_experts() {
    let base = fixtures().join("quantised/mxfp4-gpt-oss/base");
    let tensors = read_model(&base);
    let name = tensors.keys().find(|name| name.ends_with("gate_up_proj_blocks")).unwrap();
    let [experts, out, blocks, _] = *tensors[name].shape else { panic!("{name}") };
    let module = name.strip_suffix(".gate_up_proj_blocks").unwrap();
    let mut prng = Prng::new(7);
    let shape = (experts, out, 32 * blocks);
    let (pair, deltas) = stacked_factors(&mut prng, module, Layout::Peft, true, shape, (2, 1.0));
    let scratch = tempfile::tempdir().unwrap();
    let adapter = scratch.path().join("adapter");
    let config =
        json!({"r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.gate_up_proj"]});
    write_adapter(&adapter, &[pair], &config);
    let mut results = Vec::new();
    for (weight, out) in [(1.0, "merged"), (0.0, "plain")] {
        let out = scratch.path().join(out);
        let options = MergeOptions {
            scale: weight,
            dtype: Some(Dtype::F32),
            // Its matrices are square.
            moe_layout: Some(Layout::Peft),
            ..MergeOptions::default()
        };
        merge(&base, &adapter, &out, &options, &RunOptions::default()).unwrap();
        results.push(unstack(&read_model(&out)[&format!("{module}.gate_up_proj")]));
    }
    let (merged, plain) = (&results[0], &results[1]);
    for (expert, [delta, _]) in deltas.iter().enumerate() {
        let delta = delta.transposed();
        for (index, wanted) in delta.values.iter().enumerate() {
            let before = plain[expert].values[index];
            let got = merged[expert].values[index] - before;
            let bound = 1e-5 + 4.0 * unit_roundoff(Dtype::F32) * before.abs();
            assert!((got - wanted).abs() <= bound, "{expert} {index}: {got} for {wanted}");
        }
    }
}

/// Sizes that no memory holds, and none at all.
#[test]
fn absurd_sizes_are_refused() {
    let module = "model.layers.0.mlp.experts";
    let mut prng = Prng::new(8);
    let down = Tensor::zeros("model.layers.0.mlp.experts.down_proj", Dtype::F32, &[3, 5, 4]);
    let empty = Tensor::zeros("model.layers.0.mlp.experts.down_proj", Dtype::F32, &[0, 5, 4]);
    for (base, r) in [(&down, json!(u64::MAX)), (&down, json!(0)), (&empty, json!(2))] {
        let case = Case::directory(&json!({}), std::slice::from_ref(base), &[]);
        let (pair, _) =
            stacked_factors(&mut prng, module, Layout::Peft, false, (3, 5, 4), (2, 1.0));
        let config = json!({"r": r, "target_parameters": ["mlp.experts.down_proj"]});
        write_adapter(&case.adapter, &[pair], &config);
        case.refusal(&MergeOptions::default());
    }
    let far = format!("{module}.{}.down_proj", usize::MAX);
    let adapter = [Factors::random(&mut prng, &far, (5, 4, 2), Dtype::F32, 1.0)];
    let case = Case::directory(&json!({}), &[down], &adapter);
    case.refusal(&MergeOptions::default());
}

/// The prefixes of wrappers may differ, here as elsewhere.
#[test]
fn experts_are_found_behind_wrappers() {
    let mut prng = Prng::new(10);
    let layers = [random_layer(&mut prng, 3, 4, 5)];
    let inside = |tensor: Tensor| {
        tensor.renamed(&tensor.name.replace("model.layers", "model.language_model.layers"))
    };
    let tensors: Vec<Tensor> = MIXTRAL.write(0, &layers[0]).into_iter().map(inside).collect();
    let module = "model.layers.0.mlp.experts";
    let (pair, _) = stacked_factors(&mut prng, module, Layout::Peft, false, (3, 8, 5), (2, 1.0));
    let single =
        Factors::random(&mut prng, &format!("{module}.1.gate_proj"), (4, 5, 2), Dtype::F32, 1.0);
    let config = json!({"r": 2, "target_parameters": ["mlp.experts.gate_up_proj"]});
    for (factors, targets) in [(pair, 6), (single, 1)] {
        let case = Case::directory(&json!({}), &tensors, &[]);
        write_adapter(&case.adapter, &[factors], &config);
        let plan = case.plan(&MergeOptions::default()).unwrap();
        assert_eq!(plan.targets.len(), targets);
        let rename = (String::new(), "language_model".to_owned());
        let named = plan.renames.iter().next().unwrap();
        assert!(named.0.1.ends_with(&rename.1), "{:?}", plan.renames);
        assert_eq!(*named.1, 1);
    }
}

/// Factors of two parameters of one module, innermost first, on a base that has them.
fn two_parameters(names: [&str; 2], shapes: [[usize; 3]; 2], config: &Value) -> Case {
    let mut prng = Prng::new(9);
    let module = "model.layers.0.mixer.experts";
    let base: Vec<Tensor> = names
        .iter()
        .zip(shapes)
        .map(|(name, shape)| Tensor::zeros(&format!("{module}.{name}"), Dtype::F32, &shape))
        .collect();
    let inner = format!("{module}.base_layer");
    let factors = [inner.as_str(), module].map(|name| {
        let [experts, out, input] = shapes[usize::from(name == module)];
        let shape = (experts, out, input);
        stacked_factors(&mut prng, name, Layout::Peft, false, shape, (2, 1.0)).0
    });
    let case = Case::directory(&json!({}), &base, &[]);
    let mut all = json!({
        "r": 2, "lora_alpha": 2,
        "target_parameters": names.map(|name| format!("mixer.experts.{name}")),
    });
    for (key, value) in config.as_object().unwrap() {
        all[key] = value.clone();
    }
    write_adapter(&case.adapter, &factors, &all);
    case
}

/// Where two assignments fit, one with each side, the order of registration decides if it is
/// known.
#[test]
fn the_order_of_registration_decides_where_it_is_known() {
    let shapes = [[3, 4, 5], [3, 5, 4]];
    let case = two_parameters(["up_proj", "down_proj"], shapes, &json!({}));
    case.merge(&MergeOptions::default(), &RunOptions::default()).unwrap();
    let refused = two_parameters(["one", "two"], shapes, &json!({}));
    let refused = refused.refusal(&MergeOptions::default());
    assert!(refused.contains("--moe-layout"), "{refused}");
    // With the side known there is one assignment left.
    let case = two_parameters(["one", "two"], shapes, &json!({}));
    let options = MergeOptions { moe_layout: Some(Layout::Peft), ..MergeOptions::default() };
    case.merge(&options, &RunOptions::default()).unwrap();
    // Two parameters of one square shape.
    let case = two_parameters(["one", "two"], [[3, 4, 4]; 2], &json!({}));
    let refused = case.refusal(&options);
    assert!(refused.contains("more than one order"), "{refused}");
    let case = two_parameters(["up_proj", "down_proj"], [[3, 4, 4]; 2], &json!({}));
    case.merge(&options, &RunOptions::default()).unwrap();
}

/// The factors of so many parameters of one module, all of one shape, nested in each other.
fn nested_parameters(trained: usize, named: usize) -> Case {
    let mut prng = Prng::new(9);
    let module = "model.layers.0.mixer.experts";
    let names: Vec<String> = (0..named).map(|number| format!("a{number}")).collect();
    let base: Vec<Tensor> = names
        .iter()
        .map(|name| Tensor::zeros(&format!("{module}.{name}"), Dtype::F32, &[3, 4, 6]))
        .collect();
    let factors: Vec<Factors> = (0..trained)
        .map(|depth| {
            let name = format!("{module}{}", ".base_layer".repeat(depth));
            stacked_factors(&mut prng, &name, Layout::Peft, false, (3, 4, 6), (2, 1.0)).0
        })
        .collect();
    let case = Case::directory(&json!({}), &base, &[]);
    let targets: Vec<String> = names.iter().map(|name| format!("mixer.experts.{name}")).collect();
    let config = json!({"r": 2, "lora_alpha": 2, "target_parameters": targets});
    write_adapter(&case.adapter, &factors, &config);
    case
}

/// There are n! orders of n parameters of one shape: two of them are as many as anyone needs.
#[test]
fn orders_are_not_enumerated() {
    let options = MergeOptions::default();
    let refused = nested_parameters(4, 4).refusal(&options);
    let orders = "in more than one order (such as a0, a1, a2, a3 and a0, a1, a3, a2), and";
    assert!(refused.contains(orders), "{refused}");
    let refused = nested_parameters(1, 8).refusal(&options);
    assert!(refused.contains("(such as a0 and a1)"), "{refused}");
    let refused = nested_parameters(5, 5).refusal(&options);
    let known = "`model.layers.0.mixer.experts`: factors of 5 nested parameters, of at most 4";
    assert!(refused.contains(known), "{refused}");
    let refused = nested_parameters(1, 9).refusal(&options);
    assert!(refused.contains("names 9 of its parameters, of at most 8 known"), "{refused}");
}

/// One expert's projection has several names, and an adapter may use only one of them.
#[test]
fn two_names_of_one_projection_are_refused() {
    let mut prng = Prng::new(12);
    let layers = [random_layer(&mut prng, 2, 4, 6)];
    let mut attempt = |storage: Storage, model: &str, modules: &[&str]| {
        let factors: Vec<Factors> = modules
            .iter()
            .map(|module| {
                let module = format!("model.layers.0.{module}");
                let out = if module.contains("gate_up") { 8 } else { 4 };
                Factors::random(&mut prng, &module, (out, 6, 2), Dtype::F32, 1.0)
            })
            .collect();
        let case =
            Case::directory(&json!({"model_type": model}), &storage.write(0, &layers[0]), &factors);
        case.plan(&MergeOptions::default()).err().map(|error| error.to_string())
    };
    let fused = bases()[0].0;
    let names = ["block_sparse_moe.experts.0.w1", "mlp.experts.0.gate_proj", "mlp.experts.0.w1"];
    for storage in [fused, MIXTRAL] {
        for pair in [[names[0], names[1]], [names[1], names[2]], [names[0], names[2]]] {
            let refused = attempt(storage, "qwen3_moe", &pair).unwrap();
            assert!(refused.contains("both resolve to"), "{refused}");
            assert_eq!(refused.matches("both resolve to").count(), 1, "{refused}");
        }
        assert!(attempt(storage, "qwen3_moe", &names).unwrap().contains("2 problems"));
        // Other experts, and other projections of the same.
        let apart = ["mlp.experts.0.gate_proj", "mlp.experts.1.w1", "mlp.experts.0.w3"];
        assert_eq!(attempt(storage, "qwen3_moe", &apart), None);
    }
    let parts = ["mlp.experts.gate_up_projs.0", "mlp.experts.0.up_proj"];
    let refused = attempt(fused, "qwen3_moe", &parts).unwrap();
    let words = "`model.layers.0.mlp.experts.0.up_proj` and \
                 `model.layers.0.mlp.experts.gate_up_projs.0` both resolve to \
                 `model.layers.0.mlp.experts.gate_up_proj`";
    assert!(refused.contains(words), "{refused}");
}

/// The terms of a stacked adapter and an ordinary one share the matrix of an expert.
#[test]
fn adapters_of_both_kinds_add_up() {
    let features = fixtures().join("features");
    let (single, stacked) = (features.join("moe-per-expert-mixtral"), features.join("moe-mixtral"));
    let base = single.join(read_json(&single.join("case.json"))["base"].as_str().unwrap());
    let adapters = [&single, &stacked].map(|case| {
        lora_format::read(&case.join("adapter"), &lora_format::ReadOptions::default()).unwrap()
    });
    let checkpoint = lora_format::checkpoint::Checkpoint::open(&base).unwrap();
    let options = MergeOptions { dtype: Some(Dtype::F32), ..MergeOptions::default() };
    let plan =
        lora_merge::MergePlan::new(checkpoint, adapters.map(Into::into).into(), &options).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    crate::write(&plan, crate::TokenizerSource::Auto, &out, &RunOptions::default()).unwrap();
    let (before, merged) = (read_model(&base), read_model(&out));
    let [first, second] = ["moe-per-expert-mixtral", "moe-mixtral"].map(expected);
    let name = "model.layers.0.block_sparse_moe.experts.1.w3.weight";
    let values = |tensors: &BTreeMap<String, Tensor>| tensors[name].values();
    let (before, merged) = (values(&before), values(&merged));
    let (first, second) = (values(&first), values(&second));
    for (index, got) in merged.into_iter().enumerate() {
        let wanted = first[index] + second[index] - before[index];
        assert!((got - wanted).abs() <= 1e-6, "{index}: {got} for {wanted}");
    }
}
