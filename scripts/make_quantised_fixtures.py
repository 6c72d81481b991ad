#!/usr/bin/env python3
"""Writes fixtures/quantised/: tiny bases that are stored quantised.

The methods that this script covers are FP8 (transformers' `fp8`), the formats
of compressed-tensors, and the MXFP4 experts of gpt-oss. Per case:

* `base/`                  config.json and safetensors, one file or shards;
* `expected.safetensors`   the weights as the library itself dequantises them,
                           in f32, under the names and in the shapes that the
                           full-precision model has;
* `case.json`              what is exercised, versions, the dtype that the
                           library dequantises to by itself, tensors that no
                           full-precision model has, and the tolerance.

Where a library computes in the half precision of the scales, it is given the
same scales widened to f32, which is exact; that its own result is this one,
rounded once, is asserted here.

    python3 scripts/make_quantised_fixtures.py            rewrite the cases
    python3 scripts/make_quantised_fixtures.py --check    regenerate elsewhere, compare

Needs scripts/requirements.txt and scripts/requirements_quantised.txt. The case
with an order of columns (`g_idx`) needs compressed-tensors 0.13.0, the last
line of versions that knows it: the script installs that into a scratch folder.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import warnings

warnings.filterwarnings("ignore")

import compressed_tensors
import torch
import transformers
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SEED = 20260802
# The last version whose pack-quantized format knows g_idx.
ORDERED = "0.13.0"
Q, O = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def generator(case):
    """A generator of this case's own, so that cases do not depend on each other."""
    return torch.Generator().manual_seed(SEED + sum(map(ord, case)))


def random(case, *shape, generator_=None):
    """Weights with a spread that differs from row to row, as real ones have."""
    source = generator_ or generator(case)
    spread = torch.rand(*shape[:-1], 1, generator=source) * 0.05 + 0.01
    return torch.randn(*shape, generator=source) * spread


def write(root, case, shards, config, expected, about):
    """One case. `shards` is a list of state dictionaries; one means one file."""
    base = root / case / "base"
    base.mkdir(parents=True)
    plain = {"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
    shards = [{**plain, **shards[0]}, *shards[1:]]
    shards = [{k: v.contiguous() for k, v in shard.items()} for shard in shards]
    if len(shards) == 1:
        save_file(shards[0], base / "model.safetensors", metadata={"format": "pt"})
    else:
        names, size = {}, 0
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(shard, base / name, metadata={"format": "pt"})
            names |= dict.fromkeys(shard, name)
            size += sum(t.numel() * t.element_size() for t in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
        dump(base / "model.safetensors.index.json", index)
    dump(base / "config.json", {"model_type": "llama", **config})
    expected = {k: v.contiguous() for k, v in expected.items()}
    assert all(t.dtype == torch.float32 for t in expected.values()), case
    save_file(expected, root / case / "expected.safetensors")
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compressed-tensors": compressed_tensors.__version__,
    }
    dump(root / case / "case.json", {**about, "tolerance": 0, "versions": versions})


def dump(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


# FP8, as DeepSeek's checkpoints and transformers have it


def to_fp8(weight, block, scale_of=lambda amax: amax / 448):
    """Codes and one scale per block, edges included."""
    rows, columns = weight.shape[-2:]
    down, across = -(-rows // block[0]), -(-columns // block[1])
    scales = torch.zeros(*weight.shape[:-2], down, across)
    wide = torch.zeros_like(weight)
    for i in range(down):
        for j in range(across):
            at = (
                ...,
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scale = scale_of(weight[at].abs().amax(dim=(-2, -1)))
            scales[..., i, j] = scale
            wide[at] = scale[..., None, None]
    return (weight / wide).to(torch.float8_e4m3fn), scales


def from_fp8(codes, scales, block):
    """transformers' two ways, which agree where the simpler one is defined."""
    from transformers.integrations import finegrained_fp8 as fp8

    result = fp8._dequantize_fp8_weight(codes, scales, block, torch.float32)
    rows, columns = codes.shape[-2:]
    if block is None or (rows % block[0] == 0 and columns % block[1] == 0):
        other = fp8.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
        assert torch.equal(result, other)
    return result


def fp8_config(block, **more):
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    quantization |= {"weight_block_size": block, **more}
    return {"torch_dtype": "bfloat16", "quantization_config": quantization}


def fp8_block(root):
    case, block = "fp8-block", [128, 128]
    source = generator(case)
    q, s_q = to_fp8(random(case, 131, 40, generator_=source), block)
    o, s_o = to_fp8(random(case, 37, 139, generator_=source), block)
    # Every code there is, NaN apart: zeros of both signs, subnormals, the largest.
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F]
    q.view(torch.uint8).view(-1)[: len(every)] = every
    expected = {f"{Q}.weight": from_fp8(q, s_q, block), f"{O}.weight": from_fp8(o, s_o, block)}
    first = {f"{Q}.weight": q, f"{Q}.weight_scale_inv": s_q, f"{O}.weight_scale_inv": s_o}
    second = {
        f"{O}.weight": o,
        "lm_head.weight": random(case, 16, 8, generator_=source).bfloat16(),
    }
    config = fp8_config(block, modules_to_not_convert=["lm_head"])
    feature = "128x128 blocks with ragged edges, a scale in another shard, every finite code"
    about = {"feature": feature, "dtype": "BF16", "dropped": []}
    write(root, case, [first, second], config, expected, about)


def fp8_e8m0(root):
    case, block = "fp8-block-e8m0", [32, 32]
    power = lambda amax: torch.exp2(torch.ceil(torch.log2(amax / 448)))
    q, scales = to_fp8(random(case, 40, 72), block, power)
    scales = scales.to(torch.float8_e8m0fnu)
    expected = {f"{Q}.weight": from_fp8(q, scales, block)}
    state = {f"{Q}.weight": q, f"{Q}.weight_scale_inv": scales}
    config = fp8_config(block, scale_fmt="ue8m0")
    feature = "powers of two as scales (F8_E8M0), 32x32 blocks, ragged"
    about = {"feature": feature, "dtype": "BF16", "dropped": []}
    write(root, case, [state], config, expected, about)


def fp8_tensor(root):
    case = "fp8-tensor"
    source = generator(case)
    weight = random(case, 24, 50, generator_=source)
    q, scale = to_fp8(weight, weight.shape)
    scale = scale.reshape(())
    experts = random(case, 3, 12, 20, generator_=source)
    e, s_e = to_fp8(experts, experts.shape[-2:])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    expected = {f"{Q}.weight": from_fp8(q, scale, None), name: from_fp8(e, s_e, None)}
    state = {
        f"{Q}.weight": q,
        f"{Q}.weight_scale_inv": scale,
        f"{Q}.activation_scale": torch.tensor(0.5),
        name: e,
        f"{name}_scale_inv": s_e,
    }
    config = fp8_config(None, activation_scheme="static")
    feature = "one scale per matrix, a stack of experts, a static scale of activations"
    about = {"feature": feature, "dtype": "BF16", "dropped": [f"{Q}.activation_scale"]}
    write(root, case, [state], config, expected, about)


# compressed-tensors


def parameters(weight, args):
    """Scale and zero point per tensor, row, group or block, by the library's own rule."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = weight.unflatten(1, (-1, args.group_size))
        low, high = groups.amin(2), groups.amax(2)
    return calculate_qparams(low, high, args)


def compressor(form):
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(form)


def compressed(root, case, form, feature, args, shapes, dtype=torch.bfloat16, activations=None,
               extra=None, dropped=(), more=None):
    """A case of one Linear per shape, all quantised alike."""
    source = generator(case)
    args = QuantizationArgs(**args)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, format=form,
        input_activations=QuantizationArgs(**activations) if activations else None,
    )
    state, expected = {}, {}
    for module, shape in shapes.items():
        weight = random(case, *shape, generator_=source).to(dtype).float()
        local = {"weight": weight.to(dtype)}
        if form.startswith("nvfp4"):
            amax = weight.abs().max()
            local["weight_global_scale"] = (448.0 * 6.0 / amax).reshape(1).float()
            groups = weight.unflatten(1, (-1, 16)).abs().amax(2)
            scale = (groups / 6 * local["weight_global_scale"]).clamp(2**-9, 448)
            local["weight_scale"] = scale.to(torch.float8_e4m3fn).to(dtype)
        elif form.startswith("mx"):
            largest = 6 if form.startswith("mxfp4") else 448
            groups = weight.unflatten(1, (-1, 32)).abs().amax(2)
            local["weight_scale"] = torch.exp2(torch.ceil(torch.log2(groups / largest))).to(dtype)
        else:
            scale, zero = parameters(weight, args)
            local["weight_scale"] = scale.to(dtype)
            if not args.symmetric:
                local["weight_zero_point"] = zero.to(torch.int8)
        stored = compressor(form).compress(local, scheme)
        wide = dict(stored)
        if stored["weight_scale"].dtype in (torch.bfloat16, torch.float16):
            wide["weight_scale"] = stored["weight_scale"].float()
        own = compressor(form).decompress(dict(stored), scheme)["weight"]
        if form.startswith("nvfp4"):
            # The library rounds to bf16 at the end, whatever it is given: the same steps, less that.
            from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
            from compressed_tensors.quantization.lifecycle.forward import dequantize

            codes = unpack_fp4_from_uint8(stored["weight_packed"], *shape, dtype=torch.float32)
            scales = stored["weight_scale"].float()
            result = dequantize(codes, scales, args=args,
                                global_scale=stored["weight_global_scale"])
        else:
            result = compressor(form).decompress(wide, scheme)["weight"].float()
        assert torch.equal(result.to(own.dtype), own), case
        assert result.shape == torch.Size(shape), case
        assert (result - weight).abs().max() < 0.5 * weight.abs().max(), case
        state |= {f"{module}.{name}": tensor for name, tensor in stored.items()}
        expected[f"{module}.weight"] = result
    state |= extra or {}
    head = {"lm_head.weight": random(case, 16, 8, generator_=source).to(dtype)}
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, ignore=["lm_head"],
        quantization_status="compressed", **(more or {}),
    )
    config = {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "quantization_config": json.loads(config.model_dump_json()),
    }
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    about = {"feature": feature, "dtype": name, "dropped": sorted(dropped)}
    write(root, case, [{**state, **head}], config, expected, about)


FLOAT8 = {"num_bits": 8, "type": "float"}
DYNAMIC8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def compressed_cases(root):
    scalar = lambda value: torch.tensor([value], dtype=torch.bfloat16)
    cache = {f"model.layers.0.self_attn.{name}_scale": scalar(0.25) for name in "kv"}
    static = {f"{Q}.input_scale": scalar(0.125), **cache}
    compressed(
        root, "ct-float-tensor", "float-quantized",
        "FP8, one scale; static scales of activations and of the key-value cache",
        {**FLOAT8, "strategy": "tensor"}, {Q: (20, 36)},
        activations={"num_bits": 8, "type": "float", "strategy": "tensor"},
        extra=static, dropped=static,
        more={"kv_cache_scheme": QuantizationArgs(num_bits=8, type="float", strategy="tensor")},
    )
    compressed(
        root, "ct-float-channel", "float-quantized", "FP8, a scale per row, in f16",
        {**FLOAT8, "strategy": "channel"}, {Q: (21, 35)}, torch.float16, DYNAMIC8,
    )
    compressed(
        root, "ct-float-block", "float-quantized", "FP8, 16x24 blocks, ragged edges",
        {**FLOAT8, "strategy": "block", "block_structure": [16, 24]},
        {Q: (37, 50), O: (16, 24)}, activations=DYNAMIC8,
    )
    compressed(
        root, "ct-mxfp8", "mxfp8-quantized", "FP8, groups of 32, exponents as U8",
        {**FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        {Q: (12, 96)},
    )
    compressed(
        root, "ct-int8-channel", "int-quantized", "8-bit integers, a scale per row",
        {"num_bits": 8, "strategy": "channel"}, {Q: (20, 36), O: (7, 13)},
        activations=DYNAMIC_INT8,
    )
    compressed(
        root, "ct-int8-channel-asymmetric", "int-quantized",
        "8-bit integers, a scale and a zero point per row, f32",
        {"num_bits": 8, "strategy": "channel", "symmetric": False}, {Q: (20, 36)},
        torch.float32, DYNAMIC_INT8,
    )
    compressed(
        root, "ct-int8-tensor-asymmetric", "int-quantized",
        "8-bit integers, one scale and zero point",
        {"num_bits": 8, "strategy": "tensor", "symmetric": False}, {Q: (9, 17)},
        activations=DYNAMIC_INT8,
    )
    compressed(
        root, "ct-pack4-group", "pack-quantized", "4-bit integers in i32, groups of 32",
        {"num_bits": 4, "strategy": "group", "group_size": 32}, {Q: (20, 96), O: (8, 32)},
    )
    compressed(
        root, "ct-pack4-group-asymmetric", "pack-quantized",
        "4-bit integers, groups of 16, packed zero points of a number of rows not a multiple of 8",
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
        {Q: (21, 64), O: (8, 16)}, torch.float16,
    )
    compressed(
        root, "ct-pack4-channel-asymmetric", "pack-quantized",
        "4-bit integers, a scale and a zero point per row, rows longer than they need be",
        {"num_bits": 4, "strategy": "channel", "symmetric": False}, {Q: (19, 77)},
    )
    compressed(
        root, "ct-pack8-group-asymmetric", "pack-quantized",
        "8-bit integers in i32, groups of 16, packed zero points",
        {"num_bits": 8, "strategy": "group", "group_size": 16, "symmetric": False},
        {Q: (10, 48)}, torch.float32,
    )
    compressed(
        root, "ct-pack8-channel", "pack-quantized", "8-bit integers in i32, padded columns",
        {"num_bits": 8, "strategy": "channel"}, {Q: (11, 37)},
    )
    compressed(
        root, "ct-pack2-group", "pack-quantized", "2-bit integers, groups of 16",
        {"num_bits": 2, "strategy": "group", "group_size": 16}, {Q: (10, 48)},
    )
    compressed(
        root, "ct-nvfp4", "nvfp4-pack-quantized",
        "FP4, groups of 16, E4M3 scales divided by a global one",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "symmetric": True},
        {Q: (20, 96), UP: (8, 16)}, extra={f"{Q}.input_global_scale": torch.tensor([64.0])},
        dropped=[f"{Q}.input_global_scale"],
    )
    compressed(
        root, "ct-mxfp4", "mxfp4-pack-quantized", "FP4, groups of 32, exponents as U8",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        {Q: (20, 96)},
    )


def ordered(root):
    """`g_idx`, by the version of the library that has it, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*install, folder, f"compressed-tensors=={ORDERED}"], check=True)
        environment = {**os.environ, "PYTHONPATH": folder}
        command = [sys.executable, __file__, "--ordered", str(root)]
        subprocess.run(command, check=True, env=environment)


def ordered_case(root):
    from compressed_tensors.compressors import PackedQuantizationCompressor

    assert compressed_tensors.__version__ == ORDERED
    case = "ct-pack4-group-ordered"
    source = generator(case)
    args = QuantizationArgs(
        num_bits=4, strategy="group", group_size=16, symmetric=False, actorder="group",
    )
    tool = PackedQuantizationCompressor()
    weight = random(case, 12, 64, generator_=source)
    order = torch.arange(64, dtype=torch.int32)[torch.randperm(64, generator=source)] // 16
    sorted_columns = weight[:, torch.argsort(order)]
    scale, zero = parameters(sorted_columns, args)
    scale, zero = scale.float(), zero.to(torch.int8)
    stored = tool.compress_weight(weight, scale, args, zero, order)
    stored |= {"weight_scale": scale, "weight_g_idx": order}
    expected = tool.decompress_weight(dict(stored), args).float()
    assert (expected - weight).abs().max() < 0.5 * weight.abs().max()
    # The table filled with -1 is none.
    other = random(case, 8, 32, generator_=source)
    none = torch.full((32,), -1, dtype=torch.int32)
    s_other, z_other = parameters(other, args)
    z_other = z_other.to(torch.int8)
    stored_other = tool.compress_weight(other, s_other.float(), args, z_other, none)
    stored_other |= {"weight_scale": s_other.float(), "weight_g_idx": none}
    expected_other = tool.decompress_weight(dict(stored_other), args).float()
    state = {f"{Q}.{name}": tensor for name, tensor in stored.items()}
    state |= {f"{O}.{name}": tensor for name, tensor in stored_other.items()}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"],
        quantization_status="compressed",
    )
    config = {"torch_dtype": "float32",
              "quantization_config": json.loads(config.model_dump_json())}
    feature = "4-bit integers, groups of columns by g_idx, and g_idx filled with -1"
    about = {"feature": feature, "dtype": "F32", "dropped": []}
    result = {f"{Q}.weight": expected, f"{O}.weight": expected_other}
    write(root, case, [state], config, result, about)


# MXFP4


def gpt_oss(root):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    case, (experts, hidden, inner) = "mxfp4-gpt-oss", (2, 64, 32)
    source = generator(case)
    prefix = "model.layers.0.mlp.experts"
    state, expected = {}, {}
    for name, out, columns in [("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)]:
        shape = (experts, out, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=source, dtype=torch.uint8)
        scales = torch.randint(110, 130, shape, generator=source, dtype=torch.uint8)
        # The smallest exponent there is, and a large one.
        scales.view(-1)[:2] = torch.tensor([0, 250], dtype=torch.uint8)
        state[f"{prefix}.{name}_blocks"], state[f"{prefix}.{name}_scales"] = blocks, scales
        state[f"{prefix}.{name}_bias"] = torch.zeros(experts, out, dtype=torch.bfloat16)
        wide = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        expected[f"{prefix}.{name}"] = wide
        own = convert_moe_packed_tensors(blocks, scales)
        assert torch.equal(wide.bfloat16(), own)
        assert wide.shape == (experts, columns, out)
    quantization = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    config = {"model_type": "gpt_oss", "quantization_config": quantization}
    feature = "stacks of experts, transposed; the smallest and a large exponent"
    about = {"feature": feature, "dtype": "BF16", "dropped": []}
    write(root, case, [state], config, expected, about)


def generate(root):
    for make in [fp8_block, fp8_e8m0, fp8_tensor, compressed_cases, ordered, gpt_oss]:
        make(root)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--ordered", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ordered:
        ordered_case(options.ordered)
        return
    fixtures = ROOT / "fixtures" / "quantised"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        generate(made)
        different = []
        for case in sorted(path.name for path in made.iterdir()):
            files = [p.relative_to(made / case) for p in (made / case).rglob("*") if p.is_file()]
            if options.check:
                _, wrong, missing = filecmp.cmpfiles(
                    made / case, fixtures / case, [str(f) for f in files], shallow=False
                )
                different += [f"{case}/{name}" for name in wrong + missing]
            else:
                shutil.rmtree(fixtures / case, ignore_errors=True)
                shutil.copytree(made / case, fixtures / case)
    if different:
        sys.exit("different: " + ", ".join(different))


if __name__ == "__main__":
    main()
