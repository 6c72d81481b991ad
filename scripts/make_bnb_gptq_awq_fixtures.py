#!/usr/bin/env python3
"""Writes fixtures/quantised/{bnb,gptq,awq}-*: tiny bases that are stored quantised.

As scripts/make_quantised_fixtures.py does for the other methods, per case:

* `base/`                  config.json and model.safetensors;
* `expected.safetensors`   the weights as the library itself dequantises them,
                           in f32, under the names that the full-precision
                           model has;
* `case.json`              what is exercised, versions, the dtype that the
                           library dequantises to by itself, and the tolerance.

bitsandbytes: whole models go through transformers' `save_pretrained` on CPU,
single weights through `QuantState.as_dict(packed=True)`. The expected values of
4-bit weights are those of its generic kernel; that its compiled CPU kernel
gives the same is asserted where rows are whole blocks (where they are not, the
compiled kernel of 0.50.2 counts blocks row by row and is wrong).

GPTQ and AWQ: codes are rounded to nearest here, packed by the library
(GPTQModel's TorchLinear, AutoAWQ's WQLinear_GEMM) and unpacked by it again
with the scales widened to f32, which is exact; that the result in the library's
own precision is this one, rounded once, is asserted.

    python3 scripts/make_bnb_gptq_awq_fixtures.py            rewrite the cases
    python3 scripts/make_bnb_gptq_awq_fixtures.py --check    regenerate elsewhere, compare

Needs scripts/requirements.txt, scripts/requirements_quantised.txt, and the
unpacked source distributions of two libraries that cannot be installed without
a GPU, in the folders that GPTQMODEL_SOURCE and AUTOAWQ_SOURCE name:

    pip download --no-deps --no-binary :all: gptqmodel==7.7.0 autoawq==0.2.9
"""

import argparse
import filecmp
import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Plain kernels: what a compiler fuses may be rounded once less.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import warnings

warnings.filterwarnings("ignore")

GPTQMODEL = Path(os.environ.get("GPTQMODEL_SOURCE", "gptqmodel-7.7.0"))
AUTOAWQ = Path(os.environ.get("AUTOAWQ_SOURCE", "autoawq-0.2.9"))
sys.path.insert(0, str(GPTQMODEL))
# AutoAWQ's packages import models that transformers no longer has; the modules
# needed here do not, so the packages' own code is left out.
for package in ["awq", "awq.modules", "awq.modules.linear"]:
    module = types.ModuleType(package)
    module.__path__ = [str(AUTOAWQ / package.replace(".", "/"))]
    sys.modules[package] = module

import bitsandbytes
import bitsandbytes.functional as bnb
import gptqmodel
import torch
import transformers
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import (
    convert_gptq_v1_to_v2_format_module,
    convert_gptq_v2_to_v1_format_module,
)
from safetensors.torch import load_file, save_file

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SEED = 20260803
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def generator(case):
    """A generator of this case's own, so that cases do not depend on each other."""
    return torch.Generator().manual_seed(SEED + sum(map(ord, case)))


def random(source, rows, columns):
    """Weights with a spread that differs from row to row, as real ones have."""
    spread = torch.rand(rows, 1, generator=source) * 0.05 + 0.01
    return torch.randn(rows, columns, generator=source) * spread


def write(root, case, library, tensors, config, expected, dtype, feature):
    base = root / case / "base"
    base.mkdir(parents=True)
    tensors = {"model.norm.weight": torch.ones(8, dtype=dtype), **tensors}
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    describe(root, case, library, expected, dtype, feature)


def describe(root, case, library, expected, dtype, feature):
    expected = {name: weight.float().contiguous() for name, weight in expected.items()}
    save_file(expected, root / case / "expected.safetensors")
    about = {
        "feature": feature,
        "dtype": DTYPES[dtype],
        "dropped": [],
        "tolerance": 0,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **library,
        },
    }
    (root / case / "case.json").write_text(json.dumps(about, indent=2) + "\n")


def model_config(dtype, quantization):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "quantization_config": quantization,
    }


# --------------------------------------------------------------- bitsandbytes

BNB = {"bitsandbytes": bitsandbytes.__version__}


def dequantised(codes, state):
    """A 4-bit weight in f32, by the library's generic kernel."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    table = bnb.get_4bit_type(state.quant_type, device="cpu")
    assert torch.equal(table, state.code)
    shape, codes = tuple(state.shape), codes.view(torch.uint8).reshape(-1)
    arguments = absmax, table, state.blocksize, shape
    weight = _dequantize_4bit_compute(codes, *arguments, torch.float32)
    if shape[-1] % state.blocksize == 0:
        own = bnb.dequantize_4bit(codes.reshape(-1, 1), state)
        assert torch.equal(own, weight.to(state.dtype))
    return weight


def bnb_model(root, case, feature, **quantization):
    """A tiny Llama, quantised and saved by transformers."""
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=16,
        max_position_embeddings=32,
        dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as plain:
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
        settings = transformers.BitsAndBytesConfig(**quantization)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
        )
    model.save_pretrained(root / case / "base")
    (root / case / "base/generation_config.json").unlink()
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            expected[f"{name}.weight"] = dequantised(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            codes, scales = module.weight.data, module.weight.SCB
            expected[f"{name}.weight"] = bnb.int8_vectorwise_dequant(codes, scales)
    assert len(expected) == 7
    describe(root, case, BNB, expected, torch.bfloat16, feature)


def bnb_weights(root, case, feature, weights, dtype, **quantization):
    """Single weights; `weights` maps modules to shapes."""
    source, tensors, expected = generator(case), {}, {}
    for module, shape in weights.items():
        name = f"{module}.weight"
        weight = random(source, *shape).to(dtype)
        codes, state = bnb.quantize_4bit(weight, **quantization)
        tensors[name] = codes
        for key, tensor in state.as_dict(packed=True).items():
            tensors[f"{name}.{key}"] = tensor
        expected[name] = dequantised(codes, state)
    config = model_config(
        dtype,
        {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": quantization["quant_type"],
            "bnb_4bit_use_double_quant": quantization.get("compress_statistics", False),
            "quant_method": "bitsandbytes",
        },
    )
    write(root, case, BNB, tensors, config, expected, dtype, feature)


def bnb_cases(root):
    bnb_model(
        root,
        "bnb-nf4-nested",
        "NF4 with quantised scales, a model saved by transformers; blocks cross rows",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    bnb_model(root, "bnb-int8", "LLM.int8, a model saved by transformers", load_in_8bit=True)
    bnb_weights(
        root,
        "bnb-nf4-nested-blocks",
        "NF4, blocks of 32, more of them than one scale of scales is for",
        {Q: (96, 88)},
        torch.bfloat16,
        quant_type="nf4",
        blocksize=32,
        compress_statistics=True,
    )
    bnb_weights(
        root,
        "bnb-nf4",
        "NF4 with plain scales; rows of whole blocks, an unfinished block, an odd number of codes",
        {Q: (16, 64), K: (6, 50), "model.layers.0.mlp.up_proj": (15, 17)},
        torch.float16,
        quant_type="nf4",
        blocksize=64,
    )
    bnb_weights(
        root,
        "bnb-nf4-storage",
        "NF4 with quantised scales, blocks of 128, codes stored as BF16 (for FSDP)",
        {Q: (16, 128), K: (8, 24)},
        torch.bfloat16,
        quant_type="nf4",
        blocksize=128,
        compress_statistics=True,
        quant_storage=torch.bfloat16,
    )
    bnb_weights(
        root,
        "bnb-fp4",
        "FP4 with plain scales",
        {Q: (16, 64), K: (8, 24)},
        torch.float32,
        quant_type="fp4",
        blocksize=64,
    )
    bnb_weights(
        root,
        "bnb-fp4-nested",
        "FP4 with quantised scales",
        {Q: (16, 64), K: (8, 24)},
        torch.float16,
        quant_type="fp4",
        blocksize=64,
        compress_statistics=True,
    )


# ------------------------------------------------------------------ GPTQ, AWQ


def grouped(weight, groups, count, bits, sym, dtype):
    """Scales and zero points (out, groups) that round `weight` (out, in) to nearest."""
    top = 2**bits - 1
    scales, zeros = [], []
    for group in range(count):
        members = weight[:, groups == group]
        low = members.amin(1).clamp(max=0)
        high = members.amax(1).clamp(min=0)
        if sym:
            scale = 2 * torch.maximum(-low, high) / top
            zero = torch.full_like(scale, (top + 1) // 2)
        else:
            scale = (high - low) / top
            zero = (-low / scale).round().clamp(0, top)
        scales.append(scale.clamp(min=1e-6).to(dtype).float())
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def gptq(root, case, feature, weights, bits, group_size, sym, desc_act, version, index=True):
    source, tensors, expected = generator(case), {}, {}
    dtype = torch.float16
    for module, (rows, columns) in weights.items():
        size = columns if group_size == -1 else group_size
        groups = torch.arange(columns) // size
        if desc_act:
            groups = groups[torch.randperm(columns, generator=source)]
        count = -(-columns // size)
        weight = random(source, rows, columns)
        if not sym:
            # Rows of one sign only: their zero points are 0 and the largest code.
            weight[0::5] = weight[0::5].abs()
            weight[1::5] = -weight[1::5].abs()
        scales, zeros = grouped(weight, groups, count, bits, sym, dtype)
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight

        def layer():
            return TorchLinear(
                bits=bits,
                group_size=size,
                sym=sym,
                desc_act=desc_act,
                in_features=columns,
                out_features=rows,
                bias=False,
            )

        packed = layer()
        packed.pack_original(linear, scales, zeros, groups.to(torch.int32))
        if version == "gptq":
            settings = types.SimpleNamespace(bits=bits, pack_dtype=torch.int32)
            convert_gptq_v2_to_v1_format_module(packed, settings)
        stored = {key: getattr(packed, key).clone() for key in ["qweight", "qzeros", "scales"]}
        if index:
            stored["g_idx"] = packed.g_idx.clone()
        tensors |= {f"{module}.{key}": tensor for key, tensor in stored.items()}

        opened = layer()
        for key, tensor in stored.items():
            getattr(opened, key).copy_(tensor)
        if version == "gptq":
            convert_gptq_v1_to_v2_format_module(opened, bits, torch.int32)
        opened._init_wf_unsqueeze_buffers()
        own = opened.dequantize_weight()
        opened.scales = opened.scales.float()
        values = opened.dequantize_weight()
        assert own.dtype == dtype and torch.equal(own, values.to(dtype))
        assert ((values.T - weight).abs() <= 0.51 * scales[:, groups] + 1e-3).all()
        expected[f"{module}.weight"] = values.T
    quantization = {
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": sym,
        "lm_head": False,
        "method": "gptq",
        "quant_method": "gptq",
        "format": version,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"gptqmodel:{gptqmodel.__version__}"]},
    }
    library = {"gptqmodel": gptqmodel.__version__}
    config = model_config(dtype, quantization)
    write(root, case, library, tensors, config, expected, dtype, feature)


def gptq_cases(root):
    square = {Q: (32, 64)}
    ragged = {Q: (24, 56), K: (8, 40)}
    many = {Q: (72, 32), K: (32, 32)}
    cases = [
        ("gptq-2", "2 bits, asymmetric", square, 2, 16, False, False, "gptq"),
        ("gptq-3", "3 bits: codes straddle words", square, 3, 32, True, False, "gptq"),
        ("gptq-3-wrapped", "3 bits, zero points of 0", square, 3, 32, False, False, "gptq"),
        ("gptq-3-v2", "3 bits, zero points as they are", square, 3, -1, False, False, "gptq_v2"),
        ("gptq-4", "4 bits, more rows than a strip", many, 4, 32, True, False, "gptq"),
        ("gptq-4-wrapped", "4 bits, zero points of 0", square, 4, 32, False, False, "gptq"),
        ("gptq-4-order", "4 bits, desc_act", square, 4, 16, True, True, "gptq"),
        ("gptq-4-ragged", "4 bits, words not full, g_idx", ragged, 4, 16, False, False, "gptq_v2"),
        ("gptq-8", "8 bits, one group, desc_act", square, 8, -1, True, True, "gptq"),
    ]
    for case, feature, *settings in cases:
        gptq(root, case, f"GPTQ, {feature}", *settings)
    feature = "GPTQ, 4 bits without g_idx"
    gptq(root, "gptq-4-no-index", feature, square, 4, 16, False, False, "gptq_v2", index=False)


def awq(root, case, feature, weights, group_size):
    source, tensors, expected = generator(case), {}, {}
    dtype = torch.float16
    for module, (rows, columns) in weights.items():
        size = columns if group_size == -1 else group_size
        groups = torch.arange(columns) // size
        weight = random(source, rows, columns)
        scales, zeros = grouped(weight, groups, columns // size, 4, False, dtype)
        linear = torch.nn.Linear(columns, rows, bias=False)
        # What AWQ packs is already clipped to the range of the codes.
        steps = (weight / scales[:, groups]).round()
        steps = steps.clamp(-zeros[:, groups], 15 - zeros[:, groups])
        linear.weight.data = steps * scales[:, groups]
        packed = WQLinear_GEMM.from_linear(
            linear, 4, size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        stored = {key: getattr(packed, key) for key in ["qweight", "qzeros", "scales"]}
        tensors |= {f"{module}.{key}": tensor for key, tensor in stored.items()}
        unpack = lambda scales: dequantize_gemm(packed.qweight, packed.qzeros, scales, 4, size)
        values = unpack(packed.scales.float())
        assert torch.equal(unpack(packed.scales), values.to(dtype))
        assert torch.equal(values.T, linear.weight.data)
        expected[f"{module}.weight"] = values.T
    quantization = {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    library = {"autoawq": AUTOAWQ.resolve().name.removeprefix("autoawq-")}
    config = model_config(dtype, quantization)
    write(root, case, library, tensors, config, expected, dtype, feature)


def awq_cases(root):
    awq(root, "awq", "AWQ, more rows than a strip", {Q: (96, 32), K: (32, 48)}, 16)
    awq(root, "awq-whole", "AWQ, one group, channels not a multiple of 32", {Q: (32, 40)}, -1)


# ----------------------------------------------------------------------- main


def build(root):
    bnb_cases(root)
    gptq_cases(root)
    awq_cases(root)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    target = ROOT / "fixtures/quantised"
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch))
        files = [path for path in sorted(Path(scratch).rglob("*")) if path.is_file()]
        if check:
            changed = [
                path.relative_to(scratch)
                for path in files
                if not (target / path.relative_to(scratch)).is_file()
                or not filecmp.cmp(path, target / path.relative_to(scratch), shallow=False)
            ]
            for path in changed:
                print(f"differs: {path}")
            sys.exit(bool(changed))
        for case in sorted(Path(scratch).iterdir()):
            shutil.rmtree(target / case.name, ignore_errors=True)
            shutil.copytree(case, target / case.name)
        print(f"{len(files)} files, {sum(path.stat().st_size for path in files)} bytes")


if __name__ == "__main__":
    main()
