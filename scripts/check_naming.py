#!/usr/bin/env python3
"""Checks the catalogues of `lora_format::naming` against diffusers and transformers, and writes
fixtures/naming/expected.tsv.

Every parameter of an original checkpoint is made as a tensor whose rows hold its number and their
own; diffusers' conversion of single-file checkpoints then shows which rows of which original
parameter each module of diffusers is. Shapes and the list of modules are those of the models
themselves, built without data. Names of adapters are checked the same way, with factors whose rows
are numbered, through diffusers' conversion of adapters.

    cargo run -p lora-format --example list_modules > modules.tsv
    cargo run -p lora-format --example list_modules names > names.tsv
    python3 scripts/check_naming.py modules.tsv names.tsv            compare, rewrite the fixture

Needs torch, transformers, and diffusers 0.42.1 with what it imports.
"""

import collections
import hashlib
import pathlib
import sys
import warnings

import diffusers
import torch
import transformers
from diffusers.loaders import lora_conversion_utils as adapters
from diffusers.loaders import single_file_utils as files

warnings.filterwarnings("ignore")
FIXTURE = pathlib.Path(__file__).resolve().parent.parent / "fixtures/naming/expected.tsv"
SAMPLES = 24
ROW_BITS = 20
# Bare parameters of OpenCLIP, the projection transposed: not in the catalogue.
LEFT_OUT = ("position_embedding.weight", "text_projection.weight")

SD3 = dict(sample_size=128, num_attention_heads=24, caption_projection_dim=1536,
           joint_attention_dim=4096, pooled_projection_dim=2048, in_channels=16, out_channels=16)
SDXL = dict(cross_attention_dim=2048, block_out_channels=[320, 640, 1280],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20],
            use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
WAN_IMAGE = dict(image_dim=1280)

unet, wan = diffusers.UNet2DConditionModel, diffusers.WanTransformer3DModel
sd3 = diffusers.SD3Transformer2DModel
# The model, its conversion from an original checkpoint; None where the names are the same.
DENOISERS = {
    "sd1": (lambda: unet(cross_attention_dim=768), "unet"),
    "sd2": (lambda: unet(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
                         use_linear_projection=True), "unet"),
    "sdxl": (lambda: unet(**SDXL), "unet"),
    "sd3-medium": (lambda: sd3(num_layers=24, pos_embed_max_size=192, **SD3), "sd3"),
    "sd3.5-medium": (lambda: sd3(num_layers=24, pos_embed_max_size=384, qk_norm="rms_norm",
                                 dual_attention_layers=tuple(range(13)), **SD3), "sd3"),
    "sd3.5-large": (lambda: sd3(num_layers=38, pos_embed_max_size=192, qk_norm="rms_norm",
                                **{**SD3, "num_attention_heads": 38,
                                   "caption_projection_dim": 2432}), "sd3"),
    "flux1": (lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
              files.convert_flux_transformer_checkpoint_to_diffusers),
    "flux2": (diffusers.Flux2Transformer2DModel,
              files.convert_flux2_transformer_checkpoint_to_diffusers),
    "wan-1.3b": (lambda: wan(num_attention_heads=12, ffn_dim=8960, num_layers=30,
                             added_kv_proj_dim=1536, **WAN_IMAGE),
                 files.convert_wan_transformer_to_diffusers),
    "wan-14b": (lambda: wan(added_kv_proj_dim=5120, **WAN_IMAGE),
                files.convert_wan_transformer_to_diffusers),
    "qwen-image": (diffusers.QwenImageTransformer2DModel, None),
    "z-image": (diffusers.ZImageTransformer2DModel,
                files.convert_z_image_transformer_checkpoint_to_diffusers),
}


def clip(width, layers, projection=False):
    heads = width // 64
    config = transformers.CLIPTextConfig(hidden_size=width, intermediate_size=4 * width,
                                         num_hidden_layers=layers, num_attention_heads=heads,
                                         projection_dim=width)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def t5():
    return transformers.T5EncoderModel(transformers.T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False))


ENCODERS = {
    "ClipL": (lambda: clip(768, 12), None),
    "ClipG": (lambda: clip(1280, 32, projection=True), "conditioner.embedders.1.model."),
    "ClipH": (lambda: clip(1024, 23), "cond_stage_model.model."),
    "T5": (t5, None),
}


class Failed(Exception):
    pass


def shapes_of(build):
    """The weights of a model, as transformers' and diffusers' files name them."""
    with torch.device("meta"):
        model = build()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    if isinstance(model, transformers.CLIPTextModel) and "embeddings.token_embedding.weight" in shapes:
        # transformers 5 leaves out the prefix in memory and has it in files.
        shapes = {"text_model." + name: shape for name, shape in shapes.items()}
    shapes = {name: shape for name, shape in shapes.items()
              if name.endswith(".weight") and not name.endswith(LEFT_OUT)}
    shapes.pop("encoder.embed_tokens.weight", None)  # T5's `shared` again
    return model, shapes


def numbered(rows, number, dimensions):
    values = torch.arange(rows, dtype=torch.float64) + number * 2.0**ROW_BITS
    return values.reshape([rows] + [1] * (dimensions - 1))


def decode(tensor):
    """Runs (module row, number of the original, its row, rows) of a converted tensor."""
    runs = []
    values = tensor.reshape(tensor.shape[0], -1)[:, 0].to(torch.int64).tolist()
    for row, value in enumerate(values):
        number, original = value >> ROW_BITS, value & (2**ROW_BITS - 1)
        if runs:
            start, last, first, rows = runs[-1]
            if last == number and first + rows == original:
                runs[-1] = (start, last, first, rows + 1)
                continue
        runs.append((row, number, original, 1))
    return runs


def checkpoint_of(originals, prefix=""):
    """The original checkpoint, numbered. Biases come with every weight; they are not compared."""
    names = list(originals)
    checkpoint = {}
    for number, name in enumerate(names):
        rows, dimensions = originals[name]
        checkpoint[prefix + name] = numbered(rows, number, dimensions)
        if name.endswith("weight"):
            bias = name.removesuffix("weight") + "bias"
            checkpoint[prefix + bias] = numbered(rows, number, 1)
    return names, checkpoint


def convert(conversion, model, originals, part):
    if conversion == "unet":
        names, checkpoint = checkpoint_of(originals, "model.diffusion_model.")
        return names, files.convert_ldm_unet_checkpoint(checkpoint, dict(model.config))
    if isinstance(conversion, str) and conversion != "sd3":
        names, checkpoint = checkpoint_of(originals, conversion)
        width = model.config.hidden_size
        checkpoint[conversion + "text_projection"] = torch.zeros(width, 1)
        return names, files.convert_open_clip_checkpoint(model, checkpoint, conversion)
    names, checkpoint = checkpoint_of(originals)
    if conversion == "sd3":
        checkpoint["pos_embed"] = torch.zeros(1)
        return names, files.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    return names, conversion(checkpoint)


def expected_lines(part, build, conversion, listed):
    """What diffusers says of every module, in the format of the catalogue's list."""
    model, shapes = shapes_of(build)
    originals = collections.OrderedDict()
    for _, original, _, shape, runs, _ in listed:
        ends = [int(start) + int(rows) for _, start, rows in (r.split(":") for r in runs.split(","))]
        rows, _ = originals.get(original, (0, 0))
        originals[original] = (max([rows] + ends), shape.count(",") + 1)
    optional = {line[2]: line[5] for line in listed}
    if conversion is None:
        converted = None
    else:
        names, converted = convert(conversion, model, originals, part)
    lines = []
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if converted is None:
            original, runs = name, f"0:0:{shape[0]}"
        else:
            if name not in converted:
                raise Failed(f"{part}: the catalogue lacks {name}")
            found = decode(converted[name])
            if converted[name].shape[0] != shape[0] or len({run[1] for run in found}) != 1:
                raise Failed(f"{part}: {name} is not rows of one parameter of the right height")
            original = names[found[0][1]]
            runs = ",".join(f"{row}:{start}:{rows}" for row, _, start, rows in found)
        size = str(shape).replace(" ", "")
        lines.append("\t".join([part, original, module, size, runs, optional.get(module, "0")]))
    return lines


def check_modules(path):
    listed = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in open(path, encoding="utf-8"):
        architecture, *rest = line.rstrip("\n").split("\t")
        listed[architecture][rest[0]].append(rest)
    text = ["# Written by scripts/check_naming.py: diffusers "
            f"{diffusers.__version__}, transformers {transformers.__version__}, "
            f"torch {torch.__version__.split('+')[0]}"]
    failures = 0
    for architecture, parts in listed.items():
        expected = []
        for part, lines in parts.items():
            build, conversion = (DENOISERS[architecture] if part == "Denoiser" else ENCODERS[part])
            if part == "ClipG" and architecture != "sdxl":
                conversion = None
            expected += expected_lines(part, build, conversion, lines)
        found = {"\t".join(line) for lines in parts.values() for line in lines}
        wrong = sorted(found.symmetric_difference(expected))
        for line in wrong[:6]:
            print(architecture, "only here" if line in found else "only there", line)
        failures += len(wrong)
        expected.sort()
        digest = hashlib.sha256("".join(line + "\n" for line in expected).encode()).hexdigest()
        text.append(f"{architecture}\t{len(expected)}\t{digest}")
        step = max(1, len(expected) // SAMPLES)
        text += ["\t" + line for line in expected[::step]]
        print(architecture, len(expected), "modules,", len(wrong), "differences")
    if failures:
        raise Failed(f"{failures} differences")
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(FIXTURE.stat().st_size, "bytes")


class Unet:
    """What the conversion of sgm's block numbers asks of a UNet's configuration."""
    layers_per_block = 2


def unet_adapter(state):
    state = adapters._maybe_map_sgm_blocks_to_diffusers(state, Unet)
    return adapters._convert_non_diffusers_lora_to_diffusers(state)[0]


# Architecture, naming, which of its names, the suffixes of the factors, diffusers' conversion.
KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
X_FLUX = (".down.weight", ".up.weight")
ADAPTERS = [
    ("sd1", "Kohya", ("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_", "lora_te_"), KOHYA,
     unet_adapter),
    ("sdxl", "Kohya", ("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_",
                       "lora_unet_time_embed_", "lora_unet_label_emb_", "lora_unet_out_2",
                       "lora_te1_", "lora_te2_"), KOHYA, unet_adapter),
    ("flux1", "Kohya", ("lora_unet_double_blocks_", "lora_unet_single_blocks_", "lora_te1_"),
     KOHYA, adapters._convert_kohya_flux_lora_to_diffusers),
    ("flux1", "XFlux", ("double_blocks.", "single_blocks."), X_FLUX,
     adapters._convert_xlabs_flux_lora_to_diffusers),
    ("flux2", "Comfy", ("diffusion_model.",), PEFT,
     adapters._convert_non_diffusers_flux2_lora_to_diffusers),
    ("flux2", "Kohya", ("lora_unet_double_blocks_", "lora_unet_single_blocks_"), KOHYA,
     adapters._convert_kohya_flux2_lora_to_diffusers),
    ("wan-14b", "Comfy", ("diffusion_model.",), PEFT,
     adapters._convert_non_diffusers_wan_lora_to_diffusers),
    ("wan-14b", "Kohya", ("lora_unet_blocks_",), KOHYA,
     adapters._convert_musubi_wan_lora_to_diffusers),
    ("z-image", "Comfy", ("diffusion_model.layers.", "diffusion_model.noise_refiner.",
                          "diffusion_model.context_refiner."),
     (".lora.down.weight", ".lora.up.weight"),
     adapters._convert_non_diffusers_z_image_lora_to_diffusers),
    ("z-image", "Kohya", ("lora_unet_layers_",), KOHYA,
     adapters._convert_non_diffusers_z_image_lora_to_diffusers),
    ("qwen-image", "Comfy", ("diffusion_model.",), PEFT,
     adapters._convert_non_diffusers_qwen_lora_to_diffusers),
]
# (Architecture, naming): names that its conversion does not take, takes in part, or gets wrong.
EXCEPT = {
    # Its conversion of adapters does not swap scale and shift; that of checkpoints does.
    ("flux2", "Comfy"): ("final_layer.adaLN_modulation.1",),
    ("wan-14b", "Comfy"): ("patch_embedding",),
    # Names cut as diffusers cuts them: musubi-tuner does not write them.
    ("wan-14b", "Kohya"): ("_attn1_", "_attn2_", "_ffn_net_"),
    # Where both cuts are in one file it keeps only the finer one.
    ("z-image", "Comfy"): ("attention.to_",),
    # The original cut is ComfyUI's; this conversion knows musubi-tuner's.
    ("z-image", "Kohya"): ("attention_qkv", "attention_out"),
}
# Not layers that adapters have factors for, or that these conversions do not know.
NO_FACTORS = ("norm", "embeddings", "_ln_", "in_layers_0", "out_layers_0", "layernorm", "scale",
              "emb.proj.0", "emb.proj.4")


def diffusers_module(key):
    """The module that a converted factor belongs to, without its component."""
    for suffix in (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight",
                   ".up.weight"):
        if key.endswith(suffix):
            key = key.removesuffix(suffix)
            break
    else:
        return None
    for component in ("unet.", "transformer.", "text_encoder_2.", "text_encoder."):
        if key.startswith(component):
            return component, key.removeprefix(component)
    raise Failed(f"no component before {key}")


def check_names(path):
    listed = collections.defaultdict(dict)
    for line in open(path, encoding="utf-8"):
        architecture, naming, part, name, meaning = line.rstrip("\n").split("\t")
        if meaning == "?":
            raise Failed(f"{architecture} {naming}: {name} is ambiguous")
        pieces = [piece.rsplit(":", 3) for piece in meaning.split(",")]
        listed[architecture, naming][name] = part, pieces
    failures = 0
    for architecture, naming, wanted, (down, up), conversion in ADAPTERS:
        names = {name: meaning for name, meaning in listed[architecture, naming].items()
                 if name.startswith(wanted) and not any(no in name for no in NO_FACTORS)
                 and not any(no in name for no in EXCEPT.get((architecture, naming), ()))}
        if architecture.startswith("flux") and naming == "Kohya":
            # The names that ComfyUI takes besides, which sd-scripts does not write.
            names = {name: meaning for name, meaning in names.items()
                     if "_transformer_blocks_" not in name}
        state, order = {}, list(names)
        for number, name in enumerate(order):
            rows = sum(int(piece[3]) for piece in names[name][1])
            state[name + down] = torch.ones(1, 1, dtype=torch.float64)
            state[name + up] = numbered(rows, number, 2)
            if down == KOHYA[0]:
                state[name + ".alpha"] = torch.tensor(1.0)
        converted = conversion(state)
        # Older names of attention layers are ours too: they are read with the catalogue's.
        older = listed[architecture, "Processor"]
        found, expected = set(), set()
        for key, tensor in converted.items():
            module = diffusers_module(key)
            if module is None:
                continue
            component, path = module
            if component + path in older:
                [[path, _, _, _]] = older[component + path][1]
            runs = decode(tensor)
            found |= {(order[number], path, row, start, rows) for row, number, start, rows in runs}
        for name, (_, pieces) in names.items():
            expected |= {(name, path, int(row), int(start), int(rows))
                         for path, row, start, rows in pieces}
        wrong = sorted(found.symmetric_difference(expected))
        for each in wrong[:8]:
            print("only in diffusers" if each in found else "only here", each)
        failures += len(wrong)
        print(architecture, naming, len(names), "names,", len(wrong), "differences")
    if failures:
        raise Failed(f"{failures} differences")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    check_modules(sys.argv[1])
    check_names(sys.argv[2])
