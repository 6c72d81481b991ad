#!/usr/bin/env python3
"""Writes fixtures/gguf/, fixtures/mlx/ and fixtures/torchtune/ with those programs' own code.

gguf/<case>/       base/config.json, a PEFT adapter of random factors, and adapter.gguf:
                   what llama.cpp's convert_lora_to_gguf.py makes of it.
gguf/raw/          files written with the Python package gguf alone.
mlx/<case>/        what mlx-lm saves of a model with random factors; expected.safetensors
                   has the change of every weight as mlx-lm fuses it, F32.
torchtune/<case>/  a state dict under torchtune's names; expected.safetensors is what
                   torchtune's tune_to_peft_adapter_weights makes of it.

    python3 scripts/make_gguf_mlx_fixtures.py --llama-cpp DIR --torchtune DIR [--check]

DIR are checkouts (of llama.cpp, the copy in llama_cpp_python-0.3.36.tar.gz; of torchtune,
bd2a0fc). Packages: requirements.txt and requirements_gguf_mlx.txt.
"""

import argparse
import filecmp
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3_moe
from mlx_lm.tuner.utils import linear_to_lora_layers
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

ROOT = Path(__file__).resolve().parent.parent
SEED = 20261201
HIDDEN, INNER, VOCABULARY, HEADS, KV_HEADS, HEAD = 16, 12, 6, 4, 2, 4
EXPERTS = 3

# ---------------------------------------------------------------- llama.cpp

ATTENTION = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
}
UP, DOWN = (INNER, HIDDEN), (HIDDEN, INNER)
GATED = {"mlp.gate_proj": UP, "mlp.up_proj": UP, "mlp.down_proj": DOWN}


def experts(prefix, gate, up, down):
    return {
        f"{prefix}.experts.{index}.{name}": shape
        for index in range(EXPERTS)
        for name, shape in ((gate, UP), (up, UP), (down, DOWN))
    }


MIXTRAL = experts("block_sparse_moe", "w1", "w3", "w2") | {"block_sparse_moe.gate": (EXPERTS, HIDDEN)}
QWEN_EXPERTS = experts("mlp", "gate_proj", "up_proj", "down_proj") | {"mlp.gate": (EXPERTS, HIDDEN)}
SHARED = {
    "mlp.shared_expert.gate_proj": UP,
    "mlp.shared_expert.up_proj": UP,
    "mlp.shared_expert.down_proj": DOWN,
    "mlp.shared_expert_gate": (1, HIDDEN),
}
FUSED = {
    "self_attn.qkv_proj": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_up_proj": (2 * INNER, HIDDEN),
    "mlp.down_proj": DOWN,
}
STARCODER = ATTENTION | {"mlp.c_fc": UP, "mlp.c_proj": DOWN}

# class, model_type, modules of a layer, whether the embedding and the head have changes
CASES = {
    "llama": ("LlamaForCausalLM", "llama", ATTENTION | GATED, True),
    "mistral": ("MistralForCausalLM", "mistral", ATTENTION, False),
    "mixtral": ("MixtralForCausalLM", "mixtral", ATTENTION | MIXTRAL, False),
    "granite": ("GraniteForCausalLM", "granite", ATTENTION, False),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3", ATTENTION, False),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", ATTENTION | GATED, False),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", ATTENTION | GATED, False),
    "qwen2moe": ("Qwen2MoeForCausalLM", "qwen2_moe", ATTENTION | QWEN_EXPERTS | SHARED, False),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe", ATTENTION | QWEN_EXPERTS, False),
    "gemma": ("GemmaForCausalLM", "gemma", ATTENTION | GATED, False),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", ATTENTION | GATED, False),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text", ATTENTION | GATED, False),
    "phi3": ("Phi3ForCausalLM", "phi3", FUSED, False),
    "starcoder2": ("Starcoder2ForCausalLM", "starcoder2", STARCODER, False),
}
RANK, ALPHA, LAYER = 2, 6.0, 1


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def base_config(architecture, model_type):
    return {
        "architectures": [architecture],
        "head_dim": HEAD,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "model_type": model_type,
        "num_attention_heads": HEADS,
        "num_experts": EXPERTS,
        "num_hidden_layers": 2,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": EXPERTS,
        "vocab_size": VOCABULARY,
    }


def normal(random, *shape):
    return random.standard_normal(shape).astype(np.float32)


def peft_case(random, folder, architecture, model_type, modules, ends):
    write_json(folder / "base/config.json", base_config(architecture, model_type))
    tensors = {}
    for name, (out, inside) in modules.items():
        module = f"base_model.model.model.layers.{LAYER}.{name}"
        tensors[f"{module}.lora_A.weight"] = normal(random, RANK, inside)
        tensors[f"{module}.lora_B.weight"] = normal(random, out, RANK)
    if ends:
        embedding = "base_model.model.model.embed_tokens"
        tensors[f"{embedding}.lora_embedding_A"] = normal(random, RANK, VOCABULARY)
        tensors[f"{embedding}.lora_embedding_B"] = normal(random, HIDDEN, RANK)
        tensors["base_model.model.lm_head.lora_A.weight"] = normal(random, RANK, HIDDEN)
        tensors["base_model.model.lm_head.lora_B.weight"] = normal(random, VOCABULARY, RANK)
    save_into(folder / "adapter/adapter_model.safetensors", tensors)
    names = sorted({name.rsplit(".", 1)[-1] for name in modules})
    config = {
        "base_model_name_or_path": "lora-fixtures/tiny",
        "lora_alpha": ALPHA,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": names + (["embed_tokens", "lm_head"] if ends else []),
    }
    write_json(folder / "adapter/adapter_config.json", config)


def save_into(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata)


def write_gguf(folder, llama_cpp):
    random = np.random.default_rng(SEED)
    for case, values in CASES.items():
        peft_case(random, folder / case, *values)
        command = [sys.executable, "convert_lora_to_gguf.py", "--base", folder / case / "base"]
        command += ["--outfile", folder / case / "adapter.gguf", folder / case / "adapter"]
        done = subprocess.run(command, cwd=llama_cpp, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{case}: {done.stderr[-2000:]}")
    write_raw(folder / "raw", random)


def write_raw(folder, random):
    folder.mkdir(parents=True, exist_ok=True)

    def file(name, *, architecture="qwen2", alpha=None, kind="adapter", extra=None, tensors=None):
        writer = gguf.GGUFWriter(folder / name, architecture)
        writer.add_type(kind)
        writer.add_string("adapter.type", "lora")
        if alpha is not None:
            writer.add_float32("adapter.lora.alpha", alpha)
        if extra:
            extra(writer)
        for key, value in (tensors or plain()).items():
            if isinstance(value, tuple):
                writer.add_tensor(key, value[0], raw_dtype=value[1])
            else:
                writer.add_tensor(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def plain(name="blk.0.attn_v"):
        a, b = normal(random, RANK, HIDDEN), normal(random, KV_HEADS * HEAD, RANK)
        return {f"{name}.weight.lora_a": a.astype(np.float16), f"{name}.weight.lora_b": b}

    a, b = normal(random, RANK, HIDDEN), normal(random, KV_HEADS * HEAD, RANK)
    bf16 = gguf.quants.quantize(b, gguf.GGMLQuantizationType.BF16)
    half = {
        "blk.0.attn_v.weight.lora_a": a.astype(np.float16),
        "blk.0.attn_v.weight.lora_b": (bf16, gguf.GGMLQuantizationType.BF16),
    }
    file("no-alpha.gguf", tensors=half)
    file("zero-alpha.gguf", alpha=0.0)
    file("model.gguf", kind="model")
    file("unknown-architecture.gguf", architecture="nonesuch")
    file("stranger.gguf", tensors=plain("blk.0.attn_x"))
    file("unpaired.gguf", tensors=dict(list(plain().items())[:1]))
    file("alora.gguf", extra=lambda it: it.add_array("adapter.alora.invocation_tokens", [1, 2]))
    file("norm.gguf", tensors=plain() | {"blk.0.attn_norm.weight": normal(random, HIDDEN)})
    wide = normal(random, RANK, 32)
    q8 = gguf.quants.quantize(wide, gguf.GGMLQuantizationType.Q8_0)
    file("q8.gguf", tensors=plain() | {
        "blk.0.attn_v.weight.lora_a": (q8, gguf.GGMLQuantizationType.Q8_0)})
    writer = gguf.GGUFWriter(folder / "big-endian.gguf", "qwen2", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------- mlx-lm


def mlx_llama():
    return llama.Model(llama.ModelArgs(
        model_type="llama", hidden_size=HIDDEN, num_hidden_layers=2, intermediate_size=INNER,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5,
        vocab_size=VOCABULARY, tie_word_embeddings=False))


def mlx_moe():
    return qwen3_moe.Model(qwen3_moe.ModelArgs(
        model_type="qwen3_moe", hidden_size=HIDDEN, num_hidden_layers=1, intermediate_size=INNER,
        num_attention_heads=HEADS, num_experts=EXPERTS, num_experts_per_tok=1,
        decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=INNER, rms_norm_eps=1e-5,
        vocab_size=VOCABULARY, num_key_value_heads=KV_HEADS, head_dim=HEAD, rope_theta=1e4,
        tie_word_embeddings=False, max_position_embeddings=64, norm_topk_prob=True))


MLX_CASES = {
    "lora": (mlx_llama, 1, "lora", ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", "lm_head"]),
    "dora": (mlx_llama, 1, "dora", ["self_attn.q_proj", "mlp.down_proj"]),
    "moe": (mlx_moe, -1, "lora", ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj", "mlp.gate"]),
    "dora-embedding": (mlx_llama, 1, "dora", ["model.embed_tokens"]),
}


def write_mlx(folder):
    random = np.random.default_rng(SEED + 1)
    for case, (build, layers, kind, keys) in MLX_CASES.items():
        mx.random.seed(SEED)
        parameters = {"rank": RANK, "scale": 2.5, "dropout": 0.0, "keys": keys}
        model = build()
        model.freeze()
        linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
        shapes = tree_flatten(model.trainable_parameters())
        trained = [(name, mx.array(np.abs(normal(random, *value.shape)))) if name.endswith(".m")
                   else (name, mx.array(normal(random, *value.shape))) for name, value in shapes]
        model.load_weights(trained, strict=False)
        (folder / case).mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(folder / case / "adapters.safetensors"), dict(trained))
        write_json(folder / case / "adapter_config.json", {
            "fine_tune_type": kind, "lora_parameters": parameters, "model": "lora-fixtures/tiny",
            "num_layers": layers, "seed": 0})
        if case == "dora-embedding":
            continue
        expected = {}
        for name, module in model.named_modules():
            if hasattr(module, "fuse"):
                inner = module.embedding if "embedding" in module else module.linear
                before, after = np.array(inner.weight), np.array(module.fuse().weight)
                expected[f"{name}.before"], expected[f"{name}.after"] = before, after
        save_into(folder / case / "expected.safetensors", expected)
    whole = mlx_llama()
    whole.freeze()
    whole.layers[1].self_attn.unfreeze()
    (folder / "full").mkdir(parents=True, exist_ok=True)
    trained = [(name, mx.array(normal(random, *value.shape)))
               for name, value in tree_flatten(whole.trainable_parameters())]
    mx.save_safetensors(str(folder / "full/adapters.safetensors"), dict(trained))
    write_json(folder / "full/adapter_config.json", {
        "fine_tune_type": "full", "lora_parameters": None, "num_layers": 1})


# ---------------------------------------------------------------- torchtune

TUNE = {
    "attn.q_proj": (HEADS * HEAD, HIDDEN), "attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "attn.v_proj": (KV_HEADS * HEAD, HIDDEN), "attn.output_proj": (HIDDEN, HEADS * HEAD),
    "mlp.w1": UP, "mlp.w2": DOWN, "mlp.w3": UP,
}


def write_torchtune(folder, torchtune):
    path = torchtune / "torchtune/models/convert_weights.py"
    spec = importlib.util.spec_from_file_location("convert_weights", path)
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    random = np.random.default_rng(SEED + 2)
    for case in ("lora", "dora"):
        state = {}
        for name, (out, inside) in TUNE.items():
            # Magnitudes of q and k are not reordered by torchtune's export, and have to be.
            if case == "dora" and name in ("attn.q_proj", "attn.k_proj"):
                continue
            state[f"layers.1.{name}.lora_a.weight"] = normal(random, RANK, inside)
            state[f"layers.1.{name}.lora_b.weight"] = normal(random, out, RANK)
            if case == "dora":
                state[f"layers.1.{name}.magnitude"] = np.abs(normal(random, out))
        if case == "lora":
            state["output.lora_a.weight"] = normal(random, RANK, HIDDEN)
            state["output.lora_b.weight"] = normal(random, VOCABULARY, RANK)
        torches = {name: torch.from_numpy(value) for name, value in state.items()}
        save_into(folder / case / "adapter.safetensors", state)
        names = sorted({name.split(".lora")[0].rsplit(".", 1)[-1] for name in state if "lora" in name})
        config = {"r": RANK, "lora_alpha": 6, "target_modules": names, "peft_type": "LORA"}
        config = convert.tune_to_peft_adapter_config(config, "lora-fixtures/tiny")
        write_json(folder / case / "adapter_config.json", config)
        done = convert.tune_to_peft_adapter_weights({
            name: value for name, value in torches.items() if "magnitude" not in name},
            num_heads=HEADS, num_kv_heads=KV_HEADS, dim=HIDDEN, head_dim=HEAD)
        save_torch({name: value.contiguous() for name, value in done.items()},
                   folder / case / "expected.safetensors")
    write_json(folder / "base/config.json", base_config("LlamaForCausalLM", "llama"))
    write_json(folder / "qwen/config.json", base_config("Qwen2ForCausalLM", "qwen2"))


def compare(made, kept):
    differing = []
    for path in sorted(made.rglob("*")):
        other = kept / path.relative_to(made)
        if path.is_file() and not (other.is_file() and filecmp.cmp(path, other, shallow=False)):
            differing.append(str(path.relative_to(made)))
    if differing:
        sys.exit("differ: " + ", ".join(differing))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--torchtune", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if arguments.check else ROOT / "fixtures"
        write_gguf(out / "gguf", arguments.llama_cpp.resolve())
        write_mlx(out / "mlx")
        write_torchtune(out / "torchtune", arguments.torchtune.resolve())
        if arguments.check:
            compare(out, ROOT / "fixtures")


if __name__ == "__main__":
    main()
