//! Files of sd-scripts, LyCORIS and diffusers. The fixtures are LyCORIS' own
//! (scripts/make_kohya_fixtures.py).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_format::codec::{WriteOptions, kohya};
use lora_format::container::TensorFile;
use lora_format::io::atomic::{Durability, Overwrite};
use lora_format::model::{AdapterFormat, Form, GainAxis, Scaling, ScalingRule};
use lora_format::{Adapter, Dtype, Error, ReadOptions, Tensor};
use lora_tests::fixture;

fn cases() -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> = std::fs::read_dir(fixture("kohya"))
        .unwrap()
        .map(|entry| entry.unwrap().path().join("adapter.safetensors"))
        .filter(|path| path.exists())
        .collect();
    cases.sort();
    assert_eq!(cases.len(), 14);
    cases
}

fn read(path: &Path) -> Adapter {
    lora_format::read(path, &ReadOptions::default()).unwrap()
}

fn write(adapter: &Adapter, format: AdapterFormat, lossy: bool) -> Result<Written, Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out.safetensors");
    let options = WriteOptions { allow_lossy: lossy, ..WriteOptions::default() };
    let written =
        kohya::write(adapter, format, &path, &options, Overwrite::Never, Durability::Cached)?;
    Ok(Written { directory, path, changes: written.changes })
}

struct Written {
    #[expect(dead_code, reason = "removed when dropped")]
    directory: tempfile::TempDir,
    path: PathBuf,
    changes: Vec<String>,
}

type Contents = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn contents(path: &Path) -> Contents {
    let tensors = TensorFile::open(path).unwrap().tensors;
    tensors
        .into_iter()
        .map(|it| (it.name.clone(), (it.dtype, it.shape.clone(), it.bytes().to_vec())))
        .collect()
}

#[test]
fn what_lycoris_wrote_is_written_again_bit_for_bit() {
    for path in cases() {
        let adapter = read(&path);
        assert_eq!(adapter.format, AdapterFormat::Kohya, "{}", path.display());
        let again = write(&adapter, AdapterFormat::Kohya, false).unwrap();
        assert_eq!(again.changes, Vec::<String>::new());
        let (mut before, mut after) = (contents(&path), contents(&again.path));
        // What means nothing: alpha where nothing is scaled.
        let stray = |name: &str| adapter.notes.iter().any(|note| note.to_string().contains(name));
        before.retain(|name, _| !stray(name));
        after.retain(|name, _| before.contains_key(name) || !name.ends_with(".alpha"));
        assert_eq!(
            before.keys().collect::<Vec<_>>(),
            after.keys().collect::<Vec<_>>(),
            "{}",
            path.display()
        );
        for (name, tensor) in &before {
            let same = after[name] == *tensor;
            // The dtypes of alphas and flags are free; their values are not.
            let scalar = tensor.1.iter().product::<usize>() == 1;
            assert!(same || scalar, "{name} of {}", path.display());
        }
        let twice = read(&again.path);
        let scales = |adapter: &Adapter| -> Vec<Option<u64>> {
            adapter.components.iter().map(|it| scale(&it.form).map(f64::to_bits)).collect()
        };
        assert_eq!(scales(&adapter), scales(&twice));
    }
}

fn scale(form: &Form) -> Option<f64> {
    Some(match form {
        Form::LowRank(form) => form.scale(),
        Form::Tucker(form) => form.scaling.scale(form.rank()),
        Form::Hadamard(form) => form.scaling.scale(form.rank),
        Form::Kronecker(form) => form.scaling.scale(form.rank),
        Form::Decomposed(form) => return scale(&form.change),
        _ => return None,
    })
}

#[test]
fn every_kind_of_change_is_recognised() {
    let methods = |case: &str| {
        let adapter = read(&fixture("kohya").join(case).join("adapter.safetensors"));
        let mut methods: Vec<&str> = adapter.components.iter().map(|it| it.form.method()).collect();
        methods.sort();
        methods.dedup();
        methods.join(" ")
    };
    let expected = [
        ("locon", "LoRA"),
        ("locon-tucker", "LoCon LoRA"),
        ("locon-dora", "DoRA"),
        ("locon-dora-in", "DoRA"),
        ("loha", "LoHa"),
        ("loha-tucker", "LoHa"),
        ("loha-dora", "DoRA"),
        ("lokr", "LoKr"),
        ("ia3", "IA³"),
        ("full", "added"),
        ("norm", "LoRA added"),
    ];
    for (case, expected) in expected {
        assert_eq!(methods(case), expected, "{case}");
    }
    let adapter = read(&fixture("kohya/locon-dora-in/adapter.safetensors"));
    assert!(adapter.components.iter().all(|it| match &it.form {
        Form::Decomposed(form) => form.axis == GainAxis::In,
        _ => false,
    }));
    let adapter = read(&fixture("kohya/locon/adapter.safetensors"));
    assert_eq!(
        adapter.components.iter().map(|it| scale(&it.form)).collect::<Vec<_>>(),
        [Some(0.5); 4]
    );
}

/// A tensor's name and shape.
type Named<'a> = (&'a str, &'a [usize]);

/// A file made in memory.
fn made(names: &[Named], metadata: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("made.safetensors");
    let data: Vec<(String, Vec<u8>, Vec<usize>)> = names
        .iter()
        .enumerate()
        .map(|(seed, (name, shape))| {
            let count: usize = shape.iter().product();
            let value = |at: usize| ((seed * 31 + at * 7) % 17) as f32 / 8.0 - 1.0;
            let bytes = (0..count).flat_map(|at| value(at).to_le_bytes()).collect();
            ((*name).to_owned(), bytes, shape.to_vec())
        })
        .collect();
    let views = data.iter().map(|(name, bytes, shape)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name.clone(), view.unwrap())
    });
    let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    safetensors::serialize_to_file(views, Some(metadata), &path).unwrap();
    (directory, path)
}

#[test]
fn diffusers_files_of_every_age_are_read() {
    let files: [&[Named]; 3] = [
        &[
            ("unet.mid_block.attentions.0.proj_in.lora_A.weight", &[2, 6]),
            ("unet.mid_block.attentions.0.proj_in.lora_B.weight", &[4, 2]),
        ],
        &[
            (
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
                &[2, 6],
            ),
            (
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",
                &[4, 2],
            ),
        ],
        &[
            (
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
                &[2, 6],
            ),
            (
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
                &[4, 2],
            ),
        ],
    ];
    for names in files {
        let (_directory, path) = made(names, &[]);
        let adapter = read(&path);
        assert_eq!(adapter.format, AdapterFormat::Diffusers);
        assert_eq!(scale(&adapter.components[0].form), Some(1.0));
        let notes: Vec<String> = adapter.notes.iter().map(ToString::to_string).collect();
        assert!(notes[0].contains("no alpha is recorded for 1 modules"), "{notes:?}");
    }
}

#[test]
fn diffusers_configuration_gives_the_scales_and_is_written_again() {
    let config = r#"{"unet.r": 2, "unet.lora_alpha": 3, "unet.use_rslora": true,
        "text_encoder.r": 2, "text_encoder.lora_alpha": 8,
        "text_encoder.alpha_pattern": {"k_proj": 5}}"#;
    let (_directory, path) = made(
        &[
            ("unet.mid_block.proj_in.lora_A.weight", &[2, 6]),
            ("unet.mid_block.proj_in.lora_B.weight", &[4, 2]),
            ("text_encoder.layers.0.q_proj.lora_A.weight", &[2, 6]),
            ("text_encoder.layers.0.q_proj.lora_B.weight", &[4, 2]),
            ("text_encoder.layers.0.k_proj.lora_A.weight", &[2, 6]),
            ("text_encoder.layers.0.k_proj.lora_B.weight", &[4, 2]),
        ],
        &[(kohya::ADAPTER_METADATA, config)],
    );
    let adapter = read(&path);
    let scales: Vec<f64> = adapter.components.iter().filter_map(|it| scale(&it.form)).collect();
    let expected = [5.0 / 2.0, 8.0 / 2.0, 3.0 / 2.0_f64.sqrt()];
    assert_eq!(scales, expected);
    let again = write(&adapter, AdapterFormat::Diffusers, false).unwrap();
    let twice = read(&again.path);
    let scales: Vec<f64> = twice.components.iter().filter_map(|it| scale(&it.form)).collect();
    assert_eq!(scales, expected);
    assert_eq!(contents(&path), contents(&again.path));
    // No f32 divided by two is the scale of the rule with the root.
    let refused = write(&adapter, AdapterFormat::Kohya, false).err().unwrap().to_string();
    assert!(refused.contains("`unet.mid_block.proj_in` exactly"), "{refused}");
    let lossy = write(&adapter, AdapterFormat::Kohya, true).unwrap();
    assert!(lossy.changes[0].contains("is rounded to"), "{:?}", lossy.changes);
}

#[test]
fn what_is_known_and_not_implemented_is_refused_by_name() {
    let cases: [(&[Named], &str); 4] = [
        (
            &[("lora_unet_x.oft_blocks", &[2, 3, 3]), ("lora_unet_x.alpha", &[1])],
            "`lora_unet_x.oft_blocks`",
        ),
        (&[("lora_unet_x.a1.weight", &[2, 3]), ("lora_unet_x.b1.weight", &[2, 3])], "GLoRA"),
        (&[("lora_unet_x.lora_down.weight", &[2, 3])], "has no partner"),
        (
            &[
                ("lora_unet_x.lora_down.weight", &[2, 3]),
                ("lora_unet_x.lora_up.weight", &[3, 2]),
                ("lora_unet_x.other", &[1]),
            ],
            "`lora_unet_x.other` belongs to no component",
        ),
    ];
    for (names, words) in cases {
        let (_directory, path) = made(names, &[]);
        let error = lora_format::read(&path, &ReadOptions::default()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_form_without_names_is_refused() {
    let adapter = read(&fixture("kohya/loha/adapter.safetensors"));
    let error = write(&adapter, AdapterFormat::Diffusers, true).err().unwrap().to_string();
    assert!(
        error.contains("diffusers cannot hold a change of") && error.contains("LoHa"),
        "{error}"
    );
    let mut adapter = read(&fixture("kohya/locon/adapter.safetensors"));
    let Form::LowRank(form) = &mut adapter.components[0].form else { panic!("low rank") };
    form.rank_gain = Tensor::new("e".to_owned(), Dtype::F32, vec![1], vec![0; 4]);
    form.scaling = Scaling { alpha: 1.0, rule: ScalingRule::Direct };
    let error = write(&adapter, AdapterFormat::Kohya, true).err().unwrap().to_string();
    assert!(error.contains("AdaLoRA"), "{error}");
}
