use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::*;

const EXPECTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/naming/expected.tsv");

/// What diffusers' models and conversions say of all modules, as `scripts/check_naming.py` wrote
/// it: for each architecture a number, a hash of the sorted lines, and some of the lines.
#[test]
fn the_catalogues_are_those_of_diffusers() {
    let text = std::fs::read_to_string(EXPECTED).unwrap();
    let mut lines = text.lines().filter(|line| !line.starts_with('#')).peekable();
    let mut seen = 0;
    for architecture in Architecture::ALL {
        let fields: Vec<&str> = lines.next().unwrap().split('\t').collect();
        let catalogue = Catalogue::of(architecture);
        let mut ours: Vec<String> = catalogue.modules().iter().map(Module::line).collect();
        ours.sort();
        let name = architecture.name();
        while let Some(sample) = lines.next_if(|line| line.starts_with('\t')) {
            assert!(ours.iter().any(|line| line == sample.trim_start()), "{name}: {sample}");
            seen += 1;
        }
        let mut digest = Sha256::new();
        for line in &ours {
            digest.update(line);
            digest.update("\n");
        }
        let digest: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(fields, [name, &ours.len().to_string(), &digest]);
    }
    assert_eq!(lines.next(), None);
    assert!(seen > 200, "{seen}");
}

fn names_of(architecture: Architecture, naming: Naming) -> (Catalogue, Names) {
    let catalogue = Catalogue::of(architecture);
    let names = catalogue.names(naming);
    (catalogue, names)
}

/// Flattening is not injective in general; in these architectures no two names meet.
#[test]
fn no_two_modules_share_a_spelling() {
    for architecture in Architecture::ALL {
        let catalogue = Catalogue::of(architecture);
        for naming in Naming::ALL {
            let names = catalogue.names(naming);
            for name in names.iter() {
                let resolved = names.resolve(name).unwrap();
                let rows: usize = resolved.pieces.iter().map(|piece| piece.rows).sum();
                assert_eq!(rows, resolved.rows, "{name}");
            }
        }
    }
}

#[test]
fn what_a_naming_writes_it_reads_as_the_same() {
    for architecture in Architecture::ALL {
        let catalogue = Catalogue::of(architecture);
        for naming in Naming::ALL {
            let names = catalogue.names(naming);
            let mut spelled = 0;
            for index in 0..catalogue.modules().len() {
                let whole = catalogue.whole(index).unwrap();
                let Some(name) = catalogue.spell(&whole, naming) else { continue };
                assert_eq!(names.resolve(&name), Ok(&whole), "{naming:?}");
                spelled += 1;
            }
            assert_eq!(spelled > 0, names.iter().next().is_some(), "{naming:?}");
        }
    }
}

#[test]
fn fused_and_split_projections_of_flux() {
    let (catalogue, kohya) = names_of(Architecture::Flux1, Naming::Kohya);
    let linear1 = kohya.resolve("lora_unet_single_blocks_7_linear1").unwrap();
    assert_eq!(linear1.rows, 21_504);
    let split = catalogue.pieces(linear1, Naming::Diffusers).unwrap();
    let rows: Vec<_> =
        split.iter().map(|each| (each.name.as_str(), each.from, each.rows)).collect();
    let block = "transformer.single_transformer_blocks.7";
    assert_eq!(
        rows,
        [
            (format!("{block}.attn.to_q").as_str(), 0, 3072),
            (&format!("{block}.attn.to_k"), 3072, 3072),
            (&format!("{block}.attn.to_v"), 6144, 3072),
            (&format!("{block}.proj_mlp"), 9216, 12_288),
        ]
    );
    assert_eq!(catalogue.spell(linear1, Naming::Diffusers), None);
    let comfy = catalogue.spell(linear1, Naming::Comfy).unwrap();
    assert_eq!(comfy, "diffusion_model.single_blocks.7.linear1");

    let diffusers = catalogue.names(Naming::Diffusers);
    let value = diffusers.resolve(&format!("{block}.attn.to_v")).unwrap();
    assert_eq!(catalogue.spell(value, Naming::Kohya), None);
    let fused = catalogue.pieces(value, Naming::Kohya).unwrap();
    assert_eq!(
        fused,
        [SpelledPiece {
            name: "lora_unet_single_blocks_7_linear1".to_owned(),
            row: 6144,
            from: 0,
            rows: 3072,
            total: 21_504,
        }]
    );
}

/// x-flux changes the first three sevenths of `linear1`, and has no name for the rest.
#[test]
fn x_flux_has_part_of_a_fused_layer() {
    let (catalogue, x_flux) = names_of(Architecture::Flux1, Naming::XFlux);
    let name = "single_blocks.3.processor.qkv_lora";
    let projections = x_flux.resolve(name).unwrap();
    assert_eq!((projections.rows, projections.pieces.len()), (9216, 3));
    assert_eq!(catalogue.spell(projections, Naming::XFlux).as_deref(), Some(name));
    assert_eq!(catalogue.spell(projections, Naming::Kohya), None);
    let kohya = catalogue.names(Naming::Kohya);
    let linear1 = kohya.resolve("lora_unet_single_blocks_3_linear1").unwrap();
    assert_eq!(catalogue.pieces(linear1, Naming::XFlux), None);
    let names = ["double_blocks.0.processor.qkv_lora2", "double_blocks.18.processor.proj_lora1"];
    for name in names {
        assert!(x_flux.resolve(name).is_ok(), "{name}");
    }
}

#[test]
fn scale_and_shift_are_swapped() {
    let (catalogue, diffusers) = names_of(Architecture::Flux1, Naming::Diffusers);
    let norm = diffusers.resolve("transformer.norm_out.linear").unwrap();
    let pieces = catalogue.pieces(norm, Naming::Kohya).unwrap();
    let rows: Vec<_> = pieces.iter().map(|each| (each.from, each.row, each.rows)).collect();
    assert_eq!(rows, [(0, 3072, 3072), (3072, 0, 3072)]);
    assert_eq!(catalogue.spell(norm, Naming::Kohya), None);
}

#[test]
fn the_names_that_trainers_write() {
    let known = [
        (
            Architecture::Sd1,
            Naming::Kohya,
            "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
        ),
        (
            Architecture::Sd1,
            Naming::Kohya,
            "lora_te_text_model_encoder_layers_11_self_attn_q_proj",
            "text_model.encoder.layers.11.self_attn.q_proj",
        ),
        (
            Architecture::Sdxl,
            Naming::Kohya,
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        (
            Architecture::Sdxl,
            Naming::Processor,
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
        (
            Architecture::Sdxl,
            Naming::Comfy,
            "text_encoders.clip_g.transformer.text_model.encoder.layers.31.mlp.fc1",
            "text_model.encoder.layers.31.mlp.fc1",
        ),
        (
            Architecture::Flux1,
            Naming::OneTrainer,
            "lora_transformer_single_transformer_blocks_0_attn_to_q",
            "single_transformer_blocks.0.attn.to_q",
        ),
        (
            Architecture::Flux1,
            Naming::Kohya,
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "encoder.block.0.layer.0.SelfAttention.q",
        ),
        (
            Architecture::Wan14b,
            Naming::Comfy,
            "diffusion_model.blocks.39.cross_attn.k_img",
            "blocks.39.attn2.add_k_proj",
        ),
    ];
    for (architecture, naming, name, path) in known {
        let (catalogue, names) = names_of(architecture, naming);
        let resolved = names.resolve(name).unwrap();
        let [piece] = resolved.pieces.as_slice() else { panic!("{name}") };
        assert_eq!(catalogue.modules()[piece.module].diffusers, path);
        assert_eq!(catalogue.spell(resolved, naming).as_deref(), Some(name));
    }
}

#[test]
fn unknown_names_are_unknown() {
    let (_, names) = names_of(Architecture::Sd1, Naming::Kohya);
    let name = "lora_unet_down_blocks_9_resnets_0_conv1";
    assert_eq!(names.resolve(name), Err(NamingProblem::Unknown { name: name.to_owned() }));
    let nearest = names.nearest(name);
    assert_eq!(nearest.len(), 3);
    assert!(nearest.iter().all(|each| each.ends_with("_resnets_0_conv1")), "{nearest:?}");
}

/// A base that stores one component of a catalogue in one layout.
fn store(
    catalogue: &Catalogue,
    part: Part,
    side: Side,
    prefix: &str,
    base: &mut BTreeMap<String, Vec<usize>>,
) {
    for module in catalogue.modules().iter().filter(|module| module.part == part) {
        let name = match side {
            Side::Diffusers => module.diffusers_parameter(),
            Side::Original => module.original.clone(),
        };
        let shape = base.entry(format!("{prefix}{name}")).or_insert_with(|| {
            let mut shape = module.shape.clone();
            shape[0] = 0;
            shape
        });
        shape[0] += module.rows();
    }
}

#[test]
fn a_single_file_of_sdxl() {
    let catalogue = Catalogue::of(Architecture::Sdxl);
    let mut base = BTreeMap::new();
    let prefix = "model.diffusion_model.";
    store(&catalogue, Part::Denoiser, Side::Original, prefix, &mut base);
    let clip_l = "conditioner.embedders.0.transformer.";
    store(&catalogue, Part::ClipL, Side::Diffusers, clip_l, &mut base);
    let clip_g = "conditioner.embedders.1.model.";
    store(&catalogue, Part::ClipG, Side::Original, clip_g, &mut base);
    let linked = Catalogue::of_base(&base).unwrap().unwrap();
    assert_eq!(linked.catalogue().architecture(), Architecture::Sdxl);
    let names = linked.catalogue().names(Naming::Kohya);
    let resolved = names.resolve("lora_te2_text_model_encoder_layers_5_self_attn_k_proj").unwrap();
    let pieces = linked.pieces(resolved).unwrap();
    let name = "conditioner.embedders.1.model.transformer.resblocks.5.attn.in_proj_weight";
    assert_eq!(
        pieces,
        [BasePiece { name: name.to_owned(), row: 1280, from: 0, rows: 1280, total: 3840 }]
    );
    assert_eq!(Linked::bias_of(name), Some(name.replace("in_proj_weight", "in_proj_bias")));
    let resolved = names.resolve("lora_unet_output_blocks_2_2_conv").unwrap();
    let pieces = linked.pieces(resolved).unwrap();
    assert_eq!(pieces[0].name, "model.diffusion_model.output_blocks.2.2.conv.weight");
}

#[test]
fn every_architecture_is_recognised_in_both_layouts() {
    for architecture in Architecture::ALL {
        let catalogue = Catalogue::of(architecture);
        for (side, prefix) in [
            (Side::Original, "model.diffusion_model."),
            (Side::Original, ""),
            (Side::Diffusers, ""),
        ] {
            let mut base = BTreeMap::new();
            store(&catalogue, Part::Denoiser, side, prefix, &mut base);
            let optional = catalogue.modules().iter().filter(|module| module.optional);
            for module in optional {
                base.remove(&format!("{prefix}{}", module.original));
                base.remove(&module.diffusers_parameter());
            }
            let linked = Catalogue::of_base(&base).unwrap().unwrap();
            assert_eq!(linked.catalogue().architecture(), architecture);
            let mut covered: BTreeMap<String, usize> = BTreeMap::new();
            for (index, module) in catalogue.modules().iter().enumerate() {
                if module.part != Part::Denoiser || module.optional {
                    continue;
                }
                for piece in linked.pieces(&catalogue.whole(index).unwrap()).unwrap() {
                    assert_eq!(base[&piece.name][0], piece.total);
                    *covered.entry(piece.name).or_default() += piece.rows;
                }
            }
            // Every row of the base belongs to one module.
            let rows = base.iter().map(|(name, shape)| (name.clone(), shape[0]));
            assert!(covered.into_iter().eq(rows), "{side:?}");
        }
    }
}

#[test]
fn what_a_base_lacks_is_said() {
    let catalogue = Catalogue::of(Architecture::Flux1);
    let mut base = BTreeMap::new();
    store(&catalogue, Part::Denoiser, Side::Original, "", &mut base);
    base.retain(|name, _| !name.starts_with("guidance_in"));
    // A control model reads more channels.
    base.insert("img_in.weight".to_owned(), vec![3072, 128]);
    let linked = Catalogue::of_base(&base).unwrap().unwrap();
    let names = linked.catalogue().names(Naming::Kohya);
    let guidance = names.resolve("lora_unet_guidance_in_in_layer").unwrap();
    let parameter = "guidance_in.in_layer.weight".to_owned();
    assert_eq!(linked.pieces(guidance), Err(NamingProblem::NoParameter { parameter }));
    let text = names.resolve("lora_te1_text_model_encoder_layers_0_mlp_fc1").unwrap();
    assert_eq!(linked.pieces(text), Err(NamingProblem::NoPart { part: Part::ClipL }));

    base.remove("double_blocks.3.img_attn.qkv.weight");
    assert!(Catalogue::of_base(&base).unwrap().is_none());
}

#[test]
fn a_component_stored_twice_is_refused() {
    let catalogue = Catalogue::of(Architecture::Sd1);
    let mut base = BTreeMap::new();
    let prefix = "model.diffusion_model.";
    store(&catalogue, Part::Denoiser, Side::Original, prefix, &mut base);
    store(&catalogue, Part::Denoiser, Side::Diffusers, "unet.", &mut base);
    assert_eq!(
        Catalogue::of_base(&base).unwrap_err(),
        NamingProblem::SeveralLayouts { part: Part::Denoiser, found: 2 }
    );
}

fn observed(name: &str, shape: Option<(usize, usize)>) -> Observed<'_> {
    Observed { name, shape }
}

#[test]
fn names_and_shapes_tell_the_architecture() {
    let name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k";
    let fitting = detect(&[observed(name, None)]).fitting;
    let architectures: Vec<_> = fitting.iter().map(|each| each.0).collect();
    assert_eq!(architectures, [Architecture::Sd1, Architecture::Sd2]);
    for (width, architecture) in [(768, Architecture::Sd1), (1024, Architecture::Sd2)] {
        let found = detect(&[observed(name, Some((320, width)))]);
        assert_eq!(found.unique(), Some((architecture, Naming::Kohya)));
    }
    let name = "transformer.single_transformer_blocks.37.proj_mlp";
    let found = detect(&[observed(name, None)]);
    assert_eq!(found.unique(), Some((Architecture::Flux1, Naming::Diffusers)));
    let unknown = observed("lora_unet_no_such_module", None);
    assert_eq!(detect(&[observed(name, None), unknown]), Detection::default());
    assert_eq!(detect(&[]), Detection::default());
}

#[test]
fn names_that_follow_from_any_base() {
    let names = BaseNames::new([
        "model.layers.0.self_attn.q_proj.weight",
        "model.diffusion_model.blocks.0.to_q.weight",
        "blocks.1.a_b.weight",
        "blocks.1.a.b.weight",
        "scale",
    ]);
    let query = "model.layers.0.self_attn.q_proj.weight";
    for name in [
        "model.layers.0.self_attn.q_proj",
        "base_model.model.model.layers.0.self_attn.q_proj",
        "lycoris_model_layers_0_self_attn_q_proj",
    ] {
        assert_eq!(names.resolve(name), Ok(query), "{name}");
    }
    for name in
        ["lora_unet_blocks_0_to_q", "diffusion_model.blocks.0.to_q", "transformer.blocks.0.to_q"]
    {
        assert_eq!(names.resolve(name), Ok("model.diffusion_model.blocks.0.to_q.weight"), "{name}");
    }
    assert_eq!(names.resolve("blocks.1.a_b"), Ok("blocks.1.a_b.weight"));
    assert_eq!(names.resolve("scale"), Ok("scale"));
    let collision = names.resolve("lora_unet_blocks_1_a_b").unwrap_err();
    let NamingProblem::Ambiguous { candidates, .. } = collision else { panic!("{collision}") };
    assert_eq!(candidates, ["blocks.1.a_b.weight", "blocks.1.a.b.weight"]);
    assert!(names.resolve("lora_unet_blocks_2").is_err());
}
