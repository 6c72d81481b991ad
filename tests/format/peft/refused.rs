//! Adapters made for one refusal each, and mangled ones that must not make the reader panic.

use std::path::Path;

use lora_format::codec::loralib::{self, Expansions};
use lora_format::container::safetensors::{Declared, SafetensorsFile, encode_header};
use lora_format::model::{Component, Form, Layer, LowRank, Note, Scaling, ScalingRule};
use lora_format::{Adapter, Dtype, ExpansionProblem, ReadOptions, Tensor};
use lora_tests::fixture;
use serde_json::{Map, Value, json};

use crate::{Random, entries, name, read};

/// Writes an adapter of F32 tensors that hold 0, 1, 2 and so on.
fn write(folder: &Path, tensors: &[(&str, &[usize])], config: &Value) {
    let sizes: Vec<usize> =
        tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).collect();
    let declared = tensors.iter().zip(&sizes).map(|(&(name, shape), &size)| Declared {
        name,
        dtype: Dtype::F32,
        shape,
        bytes: size as u64 * 4,
    });
    let mut bytes = encode_header(&[], declared);
    for size in sizes {
        bytes.extend((0..size).flat_map(|value| (value as f32).to_le_bytes()));
    }
    std::fs::write(folder.join("adapter_model.safetensors"), bytes).unwrap();
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
}

/// What reading such an adapter gives.
fn try_read(tensors: &[(&str, &[usize])], config: Value) -> Result<Adapter, String> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), tensors, &config);
    let prefix = format!("{}/", folder.path().display());
    read(folder.path()).map_err(|error| error.to_string().replace(&prefix, ""))
}

const A: (&str, &[usize]) = ("base_model.model.q.lora_A.weight", &[2, 3]);
const B: (&str, &[usize]) = ("base_model.model.q.lora_B.weight", &[4, 2]);

/// A LoRA configuration with more fields.
fn lora(more: Value) -> Value {
    of("LORA", json!({"lora_alpha": 2, "r": 2}), more)
}

fn of(peft_type: &str, fields: Value, more: Value) -> Value {
    let mut config = Map::from_iter([("peft_type".to_owned(), peft_type.into())]);
    for value in [fields, more] {
        config.extend(value.as_object().unwrap().clone());
    }
    config.into()
}

/// Asserts that reading fails with a message that holds `expected`.
#[track_caller]
fn refused(tensors: &[(&str, &[usize])], config: Value, expected: &str) {
    let message = try_read(tensors, config).unwrap_err();
    assert!(message.contains(expected), "{message}");
}

#[test]
fn fields_are_refused_by_name() {
    for (field, value, expected) in [
        ("layer_replication", json!([[0, 1]]), "layers that share weights"),
        ("use_qalora", json!(true), "QALoRA pools its inputs"),
        ("kasa_config", json!({"beta": 1}), "KaSA truncates"),
        ("alora_invocation_tokens", json!([1]), "after its invocation tokens"),
        ("arrow_config", json!({"top_k": 3}), "Arrow routes"),
        ("megatron_config", json!({"a": 1}), "Megatron"),
        ("init_lora_weights", json!("pissa_niter_4"), "--residual-base"),
        ("init_lora_weights", json!("corda"), "--residual-base"),
        ("init_lora_weights", json!("OLoRA"), "--residual-base"),
        ("init_lora_weights", json!("lora_ga"), "--residual-base"),
        ("init_lora_weights", json!("loftq"), "LoftQ quantises the base"),
        ("init_lora_weights", json!("magic"), "this initialisation is unknown"),
        ("init_lora_weights", json!(7), "this field is unknown here"),
        ("mystery", json!(1), "this field is unknown here"),
        ("target_parameters", json!("x"), "must be a list of names"),
        ("modules_to_save", json!("x"), "must be a list of names"),
        ("use_dora", json!("yes"), "must be a boolean"),
        ("use_bdlora", json!({"nblocks": 2, "more": 1}), "must be of known fields"),
    ] {
        refused(&[A, B], lora(json!({ field: value })), &format!("`{field}`"));
        refused(&[A, B], lora(json!({ field: value })), expected);
    }
    for field in ["layer_replication", "init_lora_weights", "mystery"] {
        assert!(try_read(&[A, B], lora(json!({ field: null }))).is_ok(), "{field}");
    }
    for init in [json!(true), json!("gaussian"), json!("eva"), json!("orthogonal"), json!("mica")] {
        assert!(try_read(&[A, B], lora(json!({ "init_lora_weights": init }))).is_ok());
    }
}

#[test]
fn tensors_are_refused_by_name() {
    let plain = json!({});
    for (tensor, expected) in [
        ("q.lora_C.weight", "an unknown kind of LoRA tensor"),
        ("q.lora_A.default.weight", "save_pretrained"),
        ("q.lora_embedding_A.default", "save_pretrained"),
        ("head.modules_to_save.default.weight", "save_pretrained"),
        ("embed.token_adapter.trainable_tokens_delta.default", "save_pretrained"),
        ("q.lora_magnitude_vector", "though `use_dora` is not set"),
        ("q.lora_magnitude_vector.default.weight", "save_pretrained"),
        ("q.dora_scale", "a form that PEFT does not write"),
        ("q.lora_B.bias", "though `lora_bias` is not set"),
        ("q.lora_diag", "KaSA's diagonal"),
        ("q.lora_velora_embed", "there is no `velora_config`"),
        ("q.lora_monteclora_sampler.std_prior", "there is no `monteclora_config`"),
        ("q.hada_w1_a", "a tensor of another method"),
        ("q.bias", "no field of the configuration speaks of"),
        ("score.weight", "no field of the configuration speaks of"),
        ("weight", "a tensor of no module"),
        ("base_layer.weight", "a tensor of no module"),
        ("head.original_module.weight", "belongs to no component"),
        ("e.token_adapter.trainable_tokens_delta", "does not say which tokens"),
        ("q.base_layer.lora_A.weight", "`target_parameters` does not name"),
    ] {
        let name = format!("base_model.model.{tensor}");
        refused(&[A, B, (&name, &[2, 2])], lora(plain.clone()), expected);
    }
    refused(
        &[A, B, ("q.lora_A.weight", &[2, 3])],
        lora(plain),
        "two tensors mean the same factor: `base_model.model.q.lora_A.weight` and \
         `q.lora_A.weight`",
    );
}

#[test]
fn shapes_must_fit_together() {
    let magnitude = "base_model.model.q.lora_magnitude_vector";
    refused(&[A, B, (magnitude, &[3])], lora(json!({"use_dora": true})), "one value per output");
    refused(&[A, B], lora(json!({"use_dora": true})), "lora_magnitude_vector`");
    refused(
        &[A, B],
        lora(json!({"lora_bias": true})),
        "no partner `base_model.model.q.lora_B.bias`",
    );
    let grouped: [(&str, &[usize]); 2] = [(A.0, &[4, 3, 3, 3]), (B.0, &[6, 2, 1, 1])];
    refused(&grouped, lora(json!({})), "a convolution in groups");
    let bare: [(&str, &[usize]); 2] = [(A.0, &[9, 3]), (B.0, &[4, 9])];
    let named = json!({"target_parameters": ["q.fused"]});
    refused(&bare, lora(named.clone()), "A has 9 rows, not a multiple of the rank 2");
    let nested = [
        A,
        B,
        ("base_model.model.q.base_layer.lora_A.weight", A.1),
        ("base_model.model.q.base_layer.lora_B.weight", B.1),
    ];
    refused(&nested, lora(json!({})), "a bare parameter that `target_parameters` does not name");
    refused(&nested[2..], lora(named.clone()), "no partner `base_model.model.q.lora_A.weight`");
    let depths = |adapter: Adapter| {
        let depth = |component: &Component| match &component.form {
            Form::Experts(experts) => (component.target.name(), experts.depth),
            form => panic!("{form:?}"),
        };
        adapter.components.iter().map(depth).collect::<Vec<_>>()
    };
    let more = lora(json!({"target_parameters": ["q.b", "q.a", "r.c"]}));
    let expected = [("q.a|b".to_owned(), 0), ("q.a|b".to_owned(), 1)];
    assert_eq!(depths(try_read(&nested, more).unwrap()), expected);

    // With and without a module.
    let mixed = lora(json!({"target_parameters": ["q.b", "a"]}));
    assert_eq!(depths(try_read(&nested, mixed).unwrap()), expected);

    let ada = |more| of("ADALORA", json!({"lora_alpha": 2, "init_r": 2}), more);
    let (a, b) = ("base_model.model.q.lora_A", "base_model.model.q.lora_B");
    let e = "base_model.model.q.lora_E";
    let triple: [(&str, &[usize]); 3] = [(a, &[2, 3]), (b, &[4, 2]), (e, &[2, 1])];
    assert!(try_read(&triple, ada(json!({}))).is_ok());
    let mask = json!({"rank_pattern": {"q.lora_E": [true, false]}});
    refused(&triple, ada(mask), "the configuration says rank 1, the tensors have rank 2");
    refused(&triple[..2], ada(json!({})), "has no partner `base_model.model.q.lora_E`");

    let vera: [(&str, &[usize]); 4] = [
        ("base_model.vera_A", &[2, 3]),
        ("base_model.vera_B", &[4, 2]),
        ("base_model.model.q.vera_lambda_d", &[2]),
        ("base_model.model.q.vera_lambda_b", &[5]),
    ];
    refused(&vera, of("VERA", json!({}), json!({})), "at most B's rows");
    refused(&vera[1..], of("VERA", json!({}), json!({})), "no partner `base_model.vera_A`");

    let miss: [(&str, &[usize]); 1] = [("base_model.model.q.miss_block", &[2, 4])];
    for (init, expected) in [("bat", "out/rank × rank × rank"), ("mini", "rank × mini_r")] {
        refused(&miss, of("MISS", json!({}), json!({"init_weights": init, "mini_r": 2})), expected);
    }
    refused(&miss, of("MISS", json!({}), json!({"init_weights": "odd"})), "`bat` or `mini`");
}

#[test]
fn rotations_of_other_versions_are_refused() {
    let tensor: [(&str, &[usize]); 1] = [("base_model.model.q.oft_R.weight", &[2, 3])];
    let oft = |more| of("OFT", json!({"oft_block_size": 3, "peft_version": "0.18.0"}), more);
    assert!(try_read(&tensor, oft(json!({}))).is_ok());
    refused(&tensor, oft(json!({"oft_block_size": null})), "OFT as PEFT wrote it before 0.16");
    refused(&tensor, oft(json!({"peft_version": "0.17.1"})), "`peft_version`: \"0.17.1\"");
    let exact = json!({"peft_version": null, "use_cayley_neumann": false});
    assert!(try_read(&tensor, oft(exact)).is_ok());
    refused(&tensor, oft(json!({"block_share": true})), "with block_share it is one row");
    let odd: [(&str, &[usize]); 1] = [("base_model.model.q.oft_R.weight", &[2, 4])];
    refused(&odd, oft(json!({})), "above a block's diagonal");
    let old: [(&str, &[usize]); 1] = [("base_model.model.q.oft_r", &[2, 3])];
    refused(&old, oft(json!({})), "OFT as PEFT wrote it before 0.16");
}

/// IA³'s axis follows from the shape, or where that leaves it open from the configuration.
#[test]
fn gains_belong_to_the_configured_features() {
    let read = |shape: &[usize], forward: Value| {
        let tensor = [("base_model.model.up.ia3_l", shape)];
        try_read(&tensor, of("IA3", json!({}), json!({ "feedforward_modules": forward })))
    };
    let count = |adapter: Result<Adapter, String>| adapter.unwrap().components.len();
    // Of output features the bias has a gain too.
    assert_eq!(count(read(&[3, 1], json!([]))), 2);
    assert_eq!(count(read(&[3, 1], Value::Null)), 2);
    assert_eq!(count(read(&[1, 3], json!(["p"]))), 1);
    assert_eq!(count(read(&[1, 3, 1, 1], json!(["p"]))), 1);
    assert_eq!(count(read(&[1, 3, 1, 1], json!("u."))), 1);
    assert_eq!(count(read(&[1, 3, 1, 1], json!("p"))), 2);
    assert!(read(&[1, 3, 1, 1], Value::Null).unwrap_err().contains("`feedforward_modules`"));
    assert!(read(&[1, 3], json!([])).unwrap_err().contains("belongs to the other features"));
    assert!(read(&[2, 3], json!([])).unwrap_err().contains("l is 1 × in or out × 1"));
}

/// Rows come in ascending order; of two for one token the last counts, as in PyTorch.
#[test]
fn token_rows_are_sorted() {
    let rows = "base_model.model.embed.token_adapter.trainable_tokens_delta";
    let read = |indices: Value, count: usize| {
        let tensors: [(&str, &[usize]); 3] = [A, B, (rows, &[count, 1])];
        try_read(&tensors, lora(json!({ "trainable_token_indices": indices })))
    };
    let found = |adapter: &Adapter| {
        let Form::Rows { indices, rows } = &adapter.components[0].form else { panic!() };
        (indices.clone(), rows.to_f32().unwrap())
    };
    assert_eq!(found(&read(json!([5, 9]), 2).unwrap()), (vec![5, 9], vec![0.0, 1.0]));
    assert_eq!(found(&read(json!([9, 5]), 2).unwrap()), (vec![5, 9], vec![1.0, 0.0]));
    assert_eq!(found(&read(json!([9, 5, 9]), 3).unwrap()), (vec![5, 9], vec![1.0, 2.0]));
    assert_eq!(found(&read(json!({"bed": [4]}), 1).unwrap()), (vec![4], vec![0.0]));
    for (indices, count, expected) in [
        (json!([1, 2]), 3, "has 3 rows, and the configuration gives it 2 tokens"),
        (json!([-1]), 1, "must be a list of row numbers"),
        (json!({"head": [1]}), 1, "does not say which tokens it holds"),
        (json!({"bed": [1], "embed": [2]}), 1, "both fit it"),
    ] {
        let message = read(indices, count).unwrap_err();
        assert!(message.contains(expected), "{message}");
    }
}

/// AdapterHub's bottleneck adapters have the same name for their configuration.
#[test]
fn bottleneck_adapters_are_recognised() {
    let config = json!({
        "config": {"architecture": null, "non_linearity": "relu", "reduction_factor": 16},
        "hidden_size": 768, "model_type": "bert", "name": "x",
    });
    let tensor: [(&str, &[usize]); 1] = [("bert.adapters.x.adapter_down.0.weight", &[2, 3])];
    refused(&tensor, config.clone(), "a bottleneck adapter has a nonlinearity");
    // As the library saves them: without a file that is read here.
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    std::fs::write(folder.path().join("pytorch_adapter.bin"), "").unwrap();
    let message = read(folder.path()).unwrap_err().to_string();
    assert!(message.contains("AdapterHub"), "{message}");
}

/// An alpha belongs into the field that the method reads it from, if it reads one.
#[test]
fn a_given_alpha_goes_where_the_method_reads_it() {
    let with_alpha = |tensors: &[(&str, &[usize])], config: Value| {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), tensors, &config);
        let options = ReadOptions { alpha: Some(6.0), ..ReadOptions::default() };
        lora_format::read(folder.path(), &options).map_err(|error| error.to_string())
    };
    let loha: [(&str, &[usize]); 4] = [
        ("base_model.model.q.hada_w1_a", &[4, 2]),
        ("base_model.model.q.hada_w1_b", &[2, 3]),
        ("base_model.model.q.hada_w2_a", &[4, 2]),
        ("base_model.model.q.hada_w2_b", &[2, 3]),
    ];
    let adapter = with_alpha(&loha, of("LOHA", json!({"r": 2}), json!({}))).unwrap();
    let Form::Hadamard(form) = &adapter.components[0].form else { panic!() };
    assert_eq!(form.scaling.scale(form.rank), 3.0);
    assert_eq!(adapter.notes, [Note::AlphaGiven { alpha: "6".into() }]);
    let ia3: [(&str, &[usize]); 1] = [("base_model.model.q.ia3_l", &[3, 1])];
    let message = with_alpha(&ia3, of("IA3", json!({}), json!({}))).unwrap_err();
    assert!(message.contains("no alpha can be given for it: its method has none"), "{message}");
}

/// What a component holds, by the parameter's name.
fn forms(adapter: &Adapter) -> Vec<(String, &'static str)> {
    let components = adapter.components.iter();
    components.map(|component| (component.target.name(), component.form.method())).collect()
}

/// A bias that the configuration says was trained is no copy of the base's, wherever it lies.
#[test]
fn trained_biases_are_read_under_every_name() {
    let biases: [(&str, &[usize]); 5] = [
        A,
        B,
        ("base_model.model.q.base_layer.bias", &[4]),
        ("base_model.model.mha.base_layer.in_proj_bias", &[9]),
        ("base_model.model.other.in_proj_bias", &[9]),
    ];
    let adapter = try_read(&biases, lora(json!({"bias": "all"}))).unwrap();
    let replaced = ["mha.in_proj_bias", "other.in_proj_bias", "q.bias"];
    let mut expected: Vec<(String, &str)> =
        replaced.into_iter().map(|name| (name.to_owned(), "replaced")).collect();
    expected.push(("q.weight".to_owned(), "LoRA"));
    assert_eq!(forms(&adapter), expected);
    let only = lora(json!({"bias": "lora_only"}));
    assert!(try_read(&biases[..3], only.clone()).is_ok());
    refused(&biases[..4], only, "`base_model.model.mha.base_layer.in_proj_bias`: a copy of");
    refused(
        &biases[..3],
        lora(json!({})),
        "`base_model.model.q.base_layer.bias`: a tensor stored in full that no field",
    );
}

/// PEFT saves a copy of a base's weight for targeted embeddings and heads, beside their change.
#[test]
fn copies_of_the_base_are_those_that_peft_saves() {
    let head: [(&str, &[usize]); 3] = [
        ("base_model.model.lm_head.base_layer.weight", &[4, 3]),
        ("base_model.model.lm_head.lora_A.weight", A.1),
        ("base_model.model.lm_head.lora_B.weight", B.1),
    ];
    let adapter = try_read(&head, lora(json!({}))).unwrap();
    let lm_head = |method| ("lm_head.weight".to_owned(), method);
    assert_eq!(forms(&adapter), [lm_head("base copy"), lm_head("LoRA")]);
    let lone = "a copy of the base's weight beside no change of it";
    let strange = "a copy of the base's parameter, of which PEFT saves only the weights of \
                   embeddings and output heads";
    for (tensor, expected) in [
        ("lm_head.base_layer.weight", lone),
        ("embed_tokens.token_adapter.base_layer.weight", lone),
        ("q.base_layer.weight", strange),
        ("q.base_layer.out_proj.weight", strange),
        ("lm_head.base_layer.scale", strange),
        ("lm_head.base_layer.weight.absmax", strange),
    ] {
        let name = format!("base_model.model.{tensor}");
        let expected = format!("`{name}`: {expected}");
        refused(&[A, B, (&name, &[4, 3])], lora(json!({})), &expected);
    }
}

/// Factors that are stored without their zeros take no more than the limit with them.
#[test]
fn zeros_are_written_out_within_a_limit() {
    // 256 blocks of one row: 256 times the bytes.
    let b: (&str, &[usize]) = ("base_model.model.q.lora_B.weight", &[4096, 2]);
    let bd = |blocks: u32| {
        let blocks = json!({"nblocks": blocks, "target_modules_bd_a": [],
            "target_modules_bd_b": ["q"], "match_strict": true});
        lora(json!({"use_bdlora": blocks}))
    };
    let a = |blocks: usize| [2 * blocks, 3];
    assert!(try_read(&[(A.0, &a(32)), b], bd(32)).is_ok());
    // (2·256·3 + 4096·2)·4 bytes are stored.
    refused(
        &[(A.0, &a(256)), b],
        bd(256),
        "`base_model.model.q.lora_B.weight` is stored without its zeros and would take 8388608 \
         bytes with them; the limit for an adapter of this size is 2490368",
    );

    let folder = tempfile::tempdir().unwrap();
    let fused: [(&str, &[usize]); 2] = [("q.lora_A", &[256, 1]), ("q.lora_B", &[4096, 1])];
    write(folder.path(), &fused, &json!({}));
    let path = folder.path().join("loralib.safetensors");
    std::fs::rename(folder.path().join("adapter_model.safetensors"), &path).unwrap();
    std::fs::remove_file(folder.path().join("adapter_config.json")).unwrap();
    let options =
        |groups| ReadOptions { alpha: Some(1.0), enable_lora: groups, ..ReadOptions::default() };
    let expected = "`q.lora_B` is stored without its zeros and would take 4194304 bytes with \
                    them; the limit for an adapter of this size is 1114112";
    let message = lora_format::read(&path, &options(Some(vec![true; 256]))).unwrap_err();
    assert!(message.to_string().contains(expected), "{message}");
    let adapter = lora_format::read(&path, &options(None)).unwrap();
    let Form::LowRank(form) = &adapter.components[0].form else { panic!() };
    let problem = loralib::merged(form, &[true; 256], &mut Expansions::of(&adapter)).unwrap_err();
    assert_eq!(problem.to_string(), expected);
    let problem = loralib::merged(form, &[true; 2], &mut Expansions::of(&adapter)).unwrap_err();
    assert_eq!(problem, ExpansionProblem::Shape);
}

/// The largest adapters that people train with loralib are within the limits.
#[test]
fn loralibs_own_adapters_are_within_the_limits() {
    let tensor = |name: &str, shape: [usize; 2]| {
        let bytes = vec![0; shape.iter().product::<usize>() * 4];
        Tensor::new(name.to_owned(), Dtype::F32, shape.to_vec(), bytes).unwrap()
    };
    let adapter = |form: LowRank, layers: usize| {
        let fixture = fixture("features/loralib-merged-linear-all/adapter/adapter.safetensors");
        let options = ReadOptions { alpha: Some(6.0), ..ReadOptions::default() };
        let mut adapter = lora_format::read(&fixture, &options).unwrap();
        let component = Component { form: Form::LowRank(form), ..adapter.components[0].clone() };
        adapter.components = vec![component; layers];
        adapter
    };
    let scaling = Scaling { alpha: 1.0, rule: ScalingRule::AlphaOverRank };
    // GPT-2 XL. One layer is written out at a time here; the limit counts all.
    let qkv = LowRank::linear(tensor("a", [3 * 64, 1600]), tensor("b", [4800, 64]), scaling);
    let qkv = LowRank { layer: Layer::Merged, ..qkv };
    let mut expansions = Expansions::of(&adapter(qkv.clone(), 48));
    for _ in 0..48 {
        let linear = loralib::merged(&qkv, &[true; 3], &mut expansions).unwrap();
        assert_eq!(linear.b.shape, [4800, 192]);
    }
    for (kernel, channels, layers) in [(3, 512, 16), (7, 64, 1), (1, 2048, 8)] {
        let (rank, wide) = (8 * kernel, channels * kernel);
        let form = LowRank::linear(tensor("a", [rank, wide]), tensor("b", [wide, rank]), scaling);
        let shape = [channels, channels, kernel, kernel];
        let mut expansions = Expansions::of(&adapter(form.clone(), layers));
        for _ in 0..layers {
            let change = loralib::convolution(&form, &shape, &mut expansions).unwrap();
            assert_eq!(change.a.shape, [kernel * rank, channels, kernel, kernel]);
        }
    }
}

/// What loralib's shapes leave open is asked for.
#[test]
fn loralib_needs_an_alpha() {
    let path = fixture("features/loralib-merged-linear/adapter/adapter.safetensors");
    let message =
        |options: ReadOptions| lora_format::read(&path, &options).unwrap_err().to_string();
    assert!(message(ReadOptions::default()).contains("no alpha given"));
    let options = |flags: &[bool]| ReadOptions {
        alpha: Some(6.0),
        enable_lora: Some(flags.to_vec()),
        ..ReadOptions::default()
    };
    assert!(message(options(&[true; 3])).contains("the factors of 2 fused groups, and the 3"));
    let adapter = lora_format::read(&path, &options(&[true, false, true])).unwrap();
    assert_eq!(adapter.plain_low_rank("PEFT").unwrap().len(), 1);
    let ReadOptions { alpha, .. } = options(&[]);
    let adapter =
        lora_format::read(&path, &ReadOptions { alpha, ..ReadOptions::default() }).unwrap();
    let Form::LowRank(form) = &adapter.components[0].form else { panic!() };
    assert_eq!((form.layer, form.scale()), (lora_format::model::Layer::Merged, 3.0));
}

/// Mangled names, shapes and configurations are refused or read, and nothing else happens.
#[test]
fn mangled_adapters_never_panic() {
    let mut adapters = Vec::new();
    for case in entries(&fixture("features"), "") {
        let adapter = case.join("adapter");
        if name(&case) != "bases" && adapter.join("adapter_model.safetensors").is_file() {
            let file = SafetensorsFile::open(&adapter.join("adapter_model.safetensors")).unwrap();
            let header = file.header().tensors.iter();
            let tensors: Vec<(String, Vec<usize>)> =
                header.map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
            let config = std::fs::read(adapter.join("adapter_config.json")).unwrap();
            let config: Map<String, Value> = serde_json::from_slice(&config).unwrap();
            adapters.push((tensors, config));
        }
    }
    let mut random = Random(1);
    let folder = tempfile::tempdir().unwrap();
    let mut read_at_all = 0;
    for _ in 0..2000 {
        let (mut tensors, mut config) = random.pick(&adapters).clone();
        for _ in 0..1 + random.below(3) {
            mangle(&mut random, &mut tensors, &mut config);
        }
        // The header refuses a name that comes twice before any of this is asked.
        tensors.sort();
        tensors.dedup_by(|x, y| x.0 == y.0);
        let borrowed: Vec<(&str, &[usize])> =
            tensors.iter().map(|(name, shape)| (&**name, &**shape)).collect();
        write(folder.path(), &borrowed, &config.into());
        read_at_all += usize::from(read(folder.path()).is_ok());
    }
    assert!(read_at_all > 50, "{read_at_all}");
}

fn mangle(
    random: &mut Random,
    tensors: &mut Vec<(String, Vec<usize>)>,
    config: &mut Map<String, Value>,
) {
    const SEGMENTS: [&str; 16] = [
        "base_layer",
        "lora_A",
        "weight",
        "default",
        "token_adapter",
        "",
        "modules_to_save",
        "bias",
        "trainable_tokens_delta",
        "original_module",
        "lora_embedding_B",
        "oft_R",
        "ia3_l",
        "é",
        "lora_magnitude_vector",
        "out_proj",
    ];
    let values = [
        json!(null),
        json!(true),
        json!("all"),
        json!("bat"),
        json!(0),
        json!(3),
        json!(-1),
        json!(1e300),
        json!([]),
        json!(["q_proj", "experts.down_proj"]),
        json!({"q_proj": [1, 0]}),
        json!({"q_proj": 2}),
        json!([0, 0, 1]),
        json!("(a+)+"),
    ];
    let at = random.below(tensors.len().max(1));
    match (random.below(6), tensors.get_mut(at)) {
        (0, Some((name, _))) => {
            let mut segments: Vec<&str> = name.split('.').collect();
            let at = random.below(segments.len());
            match random.below(3) {
                0 => drop(segments.remove(at)),
                1 => segments.insert(at, *random.pick::<&str>(&SEGMENTS)),
                _ => segments[at] = *random.pick::<&str>(&SEGMENTS),
            }
            *name = segments.join(".");
        }
        (1, Some((_, shape))) => match random.below(3) {
            0 => drop(shape.pop()),
            1 => shape.push(random.below(3)),
            _ => {
                if let Some(length) = shape.first_mut() {
                    *length = random.below(5);
                }
            }
        },
        (2, Some(_)) => drop(tensors.remove(at)),
        (3, Some((name, shape))) => {
            let copy = (format!("{name}{}", random.text(3)), shape.clone());
            tensors.push(copy);
        }
        _ => {
            let keys: Vec<String> = config.keys().cloned().collect();
            let key = random.pick(&keys).clone();
            config.insert(key, random.pick(&values).clone());
        }
    }
}
