//! Tied embeddings: every combination of what was trained, how it was saved, what the base stores
//! and what the user chose, against the closed form.

use lora_format::Dtype;
use lora_merge::engine::RunOptions;
use lora_merge::{MergeOptions, Tied};
use serde_json::{Value, json};

use crate::support::{Prng, Tensor, read_json, write_json, write_tensors};
use crate::{Case, Merged};

const VOCABULARY: usize = 300;
const WIDTH: usize = 6;
const RANK: usize = 2;
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// A base that ties, with one other layer.
fn base(prng: &mut Prng, head_stored: bool) -> Vec<Tensor> {
    let table = Tensor::random(prng, EMBEDDING, Dtype::F32, &[VOCABULARY, WIDTH], 1.0);
    let mut tensors = vec![
        Tensor::random(prng, "model.layers.0.q.weight", Dtype::F32, &[4, WIDTH], 1.0),
        table.clone(),
    ];
    if head_stored {
        tensors.push(table.renamed(HEAD));
    }
    tensors
}

fn config() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true, "vocab_size": VOCABULARY})
}

fn named(tensor: &Tensor, name: &str) -> Tensor {
    tensor.renamed(&format!("base_model.model.{name}"))
}

/// LoRA of the embedding and of the head: their tensors, and Δ as the table has its elements.
fn lora(prng: &mut Prng, head: bool) -> (Vec<Tensor>, Vec<f64>) {
    let (names, a, b) = match head {
        true => {
            (["lm_head.lora_A.weight", "lm_head.lora_B.weight"], [RANK, WIDTH], [VOCABULARY, RANK])
        }
        false => (
            ["model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"],
            [RANK, VOCABULARY],
            [WIDTH, RANK],
        ),
    };
    let a = named(&Tensor::random(prng, "", Dtype::F32, &a, 0.3), names[0]);
    let b = named(&Tensor::random(prng, "", Dtype::F32, &b, 0.3), names[1]);
    let (left, right) = (b.values(), a.values());
    let mut delta = vec![0.0; VOCABULARY * WIDTH];
    for token in 0..VOCABULARY {
        for feature in 0..WIDTH {
            for k in 0..RANK {
                delta[token * WIDTH + feature] += match head {
                    true => left[token * RANK + k] * right[k * WIDTH + feature],
                    false => left[feature * RANK + k] * right[k * VOCABULARY + token],
                };
            }
        }
    }
    (vec![a, b], delta)
}

fn case(base: &[Tensor], tensors: &[Tensor], fields: &Value) -> Case {
    let case = Case::directory(&config(), base, &[]);
    write_tensors(&case.adapter.join("adapter_model.safetensors"), tensors, &[("format", "pt")]);
    let mut config = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"});
    for (field, value) in fields.as_object().unwrap() {
        config[field] = value.clone();
    }
    write_json(&case.adapter.join("adapter_config.json"), &config);
    case
}

fn merged(case: &Case, tied: Tied) -> Result<Merged, String> {
    let options = MergeOptions { tied, ..MergeOptions::default() };
    case.merge(&options, &RunOptions::default()).map_err(|error| error.to_string())
}

fn assert_close(found: &[f64], wanted: &[f64], label: &str) {
    assert_eq!(found.len(), wanted.len(), "{label}");
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        assert!((found - wanted).abs() < 1e-6, "{label} [{index}]: {found} for {wanted}");
    }
}

fn sum(parts: &[&[f64]]) -> Vec<f64> {
    (0..parts[0].len()).map(|index| parts.iter().map(|part| part[index]).sum()).collect()
}

#[test]
fn every_combination_is_its_closed_form() {
    let mut prng = Prng::new(5);
    let zero = vec![0.0; VOCABULARY * WIDTH];
    for number in 0..12 {
        let (head_stored, copies) = (number % 2 == 1, number / 2 % 2 == 1);
        let (embedding, head) = [(true, true), (true, false), (false, true)][number / 4];
        let base = base(&mut prng, head_stored);
        let mut tensors = Vec::new();
        let (mut of_embedding, mut of_head) = (zero.clone(), zero.clone());
        if embedding {
            let (factors, delta) = lora(&mut prng, false);
            tensors.extend(factors);
            of_embedding = delta;
            // PEFT saves a copy of what it targets.
            tensors.extend(copies.then(|| named(&base[1], "model.embed_tokens.base_layer.weight")));
        }
        if head {
            let (factors, delta) = lora(&mut prng, true);
            tensors.extend(factors);
            of_head = delta;
            tensors.extend(copies.then(|| named(&base[1], "lm_head.base_layer.weight")));
        }
        let case = case(&base, &tensors, &json!({}));
        let label =
            format!("embedding {embedding}, head {head}, stored {head_stored}, copies {copies}");
        let error = merged(&case, Tied::Refuse).err().unwrap_or_else(|| panic!("{label}: merged"));
        assert!(error.contains("ties its output head to its input embedding"), "{label}: {error}");

        let table = base[1].values();
        let untied = merged(&case, Tied::Untie).unwrap_or_else(|error| panic!("{label}: {error}"));
        let values = |merged: &Merged, name: &str| merged.tensors[name].values();
        assert_close(&values(&untied, EMBEDDING), &sum(&[&table, &of_embedding]), &label);
        assert_close(&values(&untied, HEAD), &sum(&[&table, &of_head]), &label);
        let config = read_json(&untied.output.join("config.json"));
        assert_eq!(config["tie_word_embeddings"], false, "{label}");

        let both = merged(&case, Tied::Both).unwrap_or_else(|error| panic!("{label}: {error}"));
        let shared = sum(&[&table, &of_embedding, &of_head]);
        assert_close(&values(&both, EMBEDDING), &shared, &label);
        assert_eq!(both.tensors.contains_key(HEAD), head_stored, "{label}");
        if head_stored {
            assert_eq!(values(&both, HEAD), values(&both, EMBEDDING), "{label}");
        }
        let config = read_json(&both.output.join("config.json"));
        assert_eq!(config["tie_word_embeddings"], true, "{label}");
    }
}

/// A few trained rows are a trained table; more rows behind the base's are a grown one.
#[test]
fn a_trained_table_is_told_from_a_grown_one() {
    let mut prng = Prng::new(6);
    let base = base(&mut prng, false);
    let fields = json!({"modules_to_save": ["embed_tokens"]});
    let table = |values: &[f64]| {
        let shape = [values.len() / WIDTH, WIDTH];
        named(&Tensor::new("", Dtype::F32, &shape, values), EMBEDDING)
    };
    let mut values = base[1].values();
    values[250 * WIDTH + 3] = 7.0;
    let trained = case(&base, &[table(&values)], &fields);
    assert!(merged(&trained, Tied::Refuse).unwrap_err().contains("ties its output head"));
    let untied = merged(&trained, Tied::Untie).unwrap();
    assert_eq!(untied.tensors[HEAD].values(), base[1].values());
    assert_eq!(untied.tensors[EMBEDDING].values(), values);

    let mut values = base[1].values();
    values.extend(prng.values(5 * WIDTH, 1.0));
    let values = table(&values).values();
    let grown = case(&base, &[table(&values)], &fields);
    let merged = merged(&grown, Tied::Refuse).unwrap();
    assert_eq!(merged.tensors[EMBEDDING].values(), values);
    assert!(!merged.tensors.contains_key(HEAD));
    assert_eq!(read_json(&merged.output.join("config.json"))["vocab_size"], VOCABULARY + 5);
}

/// A copy of the base that is not the base's is another base.
#[test]
fn a_copy_of_another_base_is_refused() {
    let mut prng = Prng::new(7);
    let base = base(&mut prng, false);
    let (mut tensors, delta) = lora(&mut prng, false);
    let other = Tensor::random(&mut prng, "", Dtype::F32, &[VOCABULARY, WIDTH], 1.0);
    tensors.push(named(&other, "model.embed_tokens.base_layer.weight"));
    let case = case(&base, &tensors, &json!({}));
    let error = merged(&case, Tied::Both).unwrap_err();
    assert!(error.contains("brings a copy of it as it was when training began"), "{error}");
    let options =
        MergeOptions { tied: Tied::Both, allow_different_base: true, ..MergeOptions::default() };
    let merged = case.merge(&options, &RunOptions::default()).unwrap();
    let wanted = sum(&[&other.values(), &delta]);
    assert_close(&merged.tensors[EMBEDDING].values(), &wanted, "the copy");
}

/// A head whose name in this kind of model is not known is not invented.
#[test]
fn an_unknown_head_is_not_named() {
    let mut prng = Prng::new(8);
    let table = Tensor::random(
        &mut prng,
        "bert.embeddings.word_embeddings.weight",
        Dtype::F32,
        &[VOCABULARY, WIDTH],
        1.0,
    );
    let (tensors, _) = lora(&mut prng, false);
    let tensors: Vec<Tensor> = tensors
        .iter()
        .map(|tensor| {
            let name = tensor.name.replace("model.embed_tokens", "bert.embeddings.word_embeddings");
            tensor.renamed(&name.replace("base_model.bert", "base_model.model.bert"))
        })
        .collect();
    let case = case(&[table], &tensors, &json!({}));
    let config = json!({"architectures": ["BertForMaskedLM"], "vocab_size": VOCABULARY});
    write_json(&case.base.join("config.json"), &config);
    assert!(merged(&case, Tied::Refuse).unwrap_err().contains("ties its output head"));
    let error = merged(&case, Tied::Untie).unwrap_err();
    assert!(error.contains("what its output head is called"), "{error}");
    merged(&case, Tied::Both).unwrap();
}
