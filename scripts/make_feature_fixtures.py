#!/usr/bin/env python3
"""Writes fixtures/features/: one directory per adapter feature.

* `bases/<name>/`             tiny base models, shared by the cases;
* `<case>/adapter*/`          adapters written by PEFT's own `save_pretrained`
                              (or by loralib, or by hand where the case says so);
* `<case>/expected.safetensors`      PEFT's merge of the base in f32;
* `<case>/expected_f64.safetensors`  the closed form of feature_formulas.py,
                              computed in NumPy float64 from the stored values;
* `<case>/case.json`          what is exercised, names, tolerances, versions.

Both expected files hold the tensors that differ from the base, are new or
changed shape, and no others, named as in the base file.

    python3 scripts/make_feature_fixtures.py                  rewrite everything
    python3 scripts/make_feature_fixtures.py --only dora lora rewrite cases that
                                                              start with these
    python3 scripts/make_feature_fixtures.py --check          regenerate elsewhere, compare
"""

import make_fixtures as common  # pins the environment first, so it comes first

import argparse
import contextlib
import functools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import traceback
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import loralib as lora
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch import nn

import feature_formulas as f

ROOT = common.ROOT
SEED = common.SEED
CAUSAL = {"task_type": "CAUSAL_LM"}
PREFIX = "base_model.model."


# --------------------------------------------------------------------- bases


class Layers(nn.Module):
    """One of each layer kind, with and without bias."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 10)
        self.plain = nn.Linear(10, 12, bias=False)
        self.embedding = nn.Embedding(15, 6)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv1_plain = nn.Conv1d(6, 4, 2, bias=False)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.conv2_plain = nn.Conv2d(6, 8, 3, bias=False)
        self.pointwise = nn.Conv2d(6, 4, 1)
        self.conv3 = nn.Conv3d(2, 4, 3)
        self.conv3_plain = nn.Conv3d(4, 3, 2, bias=False)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 4)
        self.conv_wide = nn.Conv2d(8, 12, 3, bias=False)
        self.conv_grouped = nn.Conv2d(4, 6, 2, groups=2)

    def forward(self, x):
        return self.head(self.norm(self.linear(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.mha(x, x, x)[0])


class Matrix(nn.Module):
    """A bare 2-D parameter, the target of `target_parameters`."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.randn(6, 10) * 0.3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x @ self.inner.weight.T)


MOE = dict(
    hidden_size=8, intermediate_size=10, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=8, num_experts_per_tok=2, max_position_embeddings=32,
    initializer_range=0.2, bos_token_id=1, eos_token_id=2,
)


def mixtral(**overrides):
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**MOE, "num_local_experts": EXPERTS, **overrides}))


def qwen3_moe():
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **MOE, moe_intermediate_size=10, num_experts=EXPERTS, head_dim=4))


def gpt_oss(**overrides):
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(
        **{**MOE, "num_local_experts": EXPERTS, "head_dim": 4, **overrides}))


SMALL = dict(
    hidden_size=12, intermediate_size=18, num_hidden_layers=1, vocab_size=16,
    num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
)


def small_llama(**overrides):
    return common.llama(**{**SMALL, **overrides})


BASES = {
    "llama": small_llama,
    "llama-bias": lambda: small_llama(attention_bias=True, mlp_bias=True),
    "llama-bf16": small_llama,
    "llama-tied": lambda: small_llama(tie_word_embeddings=True),
    "llama-square": lambda: small_llama(vocab_size=12),
    "gpt2": lambda: common.gpt2(
        n_embd=12, n_inner=20, n_layer=1, vocab_size=24, n_positions=16, initializer_range=0.2
    ),
    "layers": Layers,
    "attention": Attention,
    "matrix": Matrix,
    # transformers saves the experts of these two one by one ...
    "mixtral": lambda: mixtral(),
    "qwen3-moe": lambda: qwen3_moe(),
    # ... and here the same models as they are in memory, experts in one tensor
    "mixtral-fused": lambda: mixtral(),
    "qwen3-moe-fused": lambda: qwen3_moe(),
    "mixtral-fused-square": lambda: mixtral(intermediate_size=4),
    # (E, in, out), the other way round; saved as it is in memory
    "gpt-oss": lambda: gpt_oss(),
    "gpt-oss-square": lambda: gpt_oss(intermediate_size=4),
}
EXPERTS = 3
BF16 = {"llama-bf16"}
DEFAULT_CLASSES = {}


def build_base(name):
    """The model in memory, weights as on disk, in f32."""
    torch.manual_seed(SEED)
    model = BASES[name]().eval()
    generator = torch.Generator().manual_seed(SEED)
    for key, parameter in model.named_parameters():
        # zero biases and unit norms would hide mistakes
        if key.endswith("bias") or "norm" in key or ".ln_" in key:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.add_(noise)
    return model


def write_base(bases, name):
    directory = bases / name
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    model = build_base(name)
    if name in BF16:
        model = model.to(torch.bfloat16)
    if name in FUSED:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()},
                  directory / "model.safetensors", metadata={"format": "pt"})
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(directory)
    else:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()},
                  directory / "model.safetensors", metadata={"format": "pt"})
        common.write_json(directory / "config.json",
                          {"architectures": [type(model).__name__], "model_type": "custom"})
    (directory / "generation_config.json").unlink(missing_ok=True)


def load_base(name, dtype=torch.float32, model_class=None, prepare=None):
    """The base as PEFT sees it, read from its directory (the working
    directory is the one that holds bases/)."""
    directory = Path("bases") / name
    torch.manual_seed(SEED)
    fresh = BASES[name]()
    if name in FUSED:
        fresh.load_state_dict(load_file(directory / "model.safetensors"))
        model = fresh.to(dtype)
    elif hasattr(fresh, "save_pretrained"):
        model_class = model_class or type(fresh)
        torch.manual_seed(SEED)
        model = model_class.from_pretrained(directory, dtype=dtype)
    else:
        fresh.load_state_dict(load_file(directory / "model.safetensors"))
        model = fresh.to(dtype)
    model = model.eval()
    if prepare:
        torch.manual_seed(SEED)
        model = prepare(model) or model
    if hasattr(model, "config"):
        # A relative path: PEFT looks there for the vocabulary size of the base
        common.set_name(model, f"bases/{name}")
    return model


FUSED = {"mixtral-fused", "mixtral-fused-square", "qwen3-moe-fused"}


def disk_tensors(model, name):
    """The tensors of a merged model under the names of its base file."""
    if name in FUSED or not hasattr(model, "save_pretrained"):
        return {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        return common.read_tensors(Path(scratch))


FAILED = []


def tolerant(function):
    """A case that fails is reported and left out; the run goes on and ends with
    exit status 1."""

    @functools.wraps(function)
    def wrapped(out, name, **arguments):
        try:
            function(out, name, **arguments)
        except Exception:
            traceback.print_exc()
            FAILED.append(name)
            shutil.rmtree(out / name, ignore_errors=True)

    return wrapped


# ------------------------------------------------------------------- helpers


def wide(tensors):
    return {k: v.double().numpy() for k, v in tensors.items()}


class Adapter:
    """What a closed form sees of one adapter: tensors by key without PEFT's
    prefix, its config, and the names of the modules that it touches."""

    def __init__(self, directory):
        raw = common.read_tensors(directory)
        self.shapes = {k: (list(v.shape), common.NAMES[v.dtype] if v.dtype in common.NAMES
                           else str(v.dtype).removeprefix("torch.")) for k, v in sorted(raw.items())}
        self.tensors = {k.removeprefix(PREFIX): v.double().numpy() for k, v in raw.items()}
        path = directory / "adapter_config.json"
        self.config = json.loads(path.read_text()) if path.exists() else {}

    def __getitem__(self, key):
        return self.tensors[key]

    def __contains__(self, key):
        return key in self.tensors

    def modules(self, suffix):
        return sorted(k.removesuffix(suffix) for k in self.tensors if k.endswith(suffix))

    def scale(self, rank=None):
        c = self.config
        return f.scale(rank or c["r"], c.get("lora_alpha", c.get("alpha")), c.get("use_rslora"))


def perturb(model, deviation=0.05, only=None, overrides=None):
    """Random values wherever the optimizer would have moved something."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(model.named_parameters()):
        if only is not None and not only(name):
            continue
        if only is None and not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * noise)
        else:
            amount = deviation
            for part, value in (overrides or {}).items():
                if part in name:
                    amount = value
            parameter.data.add_((noise * amount).to(parameter.dtype))


@contextlib.contextmanager
def working_directory(path):
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def write_expected(case, stem, tensors):
    path = case / f"{stem}.safetensors"
    if stem.startswith("expected_f64") or stem.endswith("_f64"):
        save_numpy({k: np.ascontiguousarray(v) for k, v in sorted(tensors.items())}, path)
    else:
        save_file({k: v.contiguous() for k, v in sorted(tensors.items())}, path)


def changed_only(merged, base):
    out = {}
    for name, tensor in merged.items():
        before = base.get(name)
        if before is None or before.shape != tensor.shape or not torch.equal(
            before.to(torch.float32), tensor.to(torch.float32)
        ):
            out[name] = tensor.to(torch.float32)
    return out


def finish(case, base, adapters, facts, merged, closed, tolerance, peft_wrong):
    """Writes the expected files and case.json, and checks one against the other."""
    stored = common.read_tensors(Path("bases") / base)
    facts["peft_tolerance"] = tolerance
    facts["measured"] = None
    names = set(closed)
    if merged is not None:
        expected = changed_only(merged, stored)
        assert set(expected) == names, (case.name, sorted(set(expected) ^ names))
        worst = 0.0
        for name in sorted(names):
            ours, theirs = closed[name], expected[name].double().numpy()
            assert ours.shape == theirs.shape, (case.name, name, ours.shape, theirs.shape)
            worst = max(worst, float(np.abs(ours - theirs).max()))
        facts["measured"] = float(f"{worst:.3g}")
        assert worst <= tolerance, (case.name, worst, tolerance)
        write_expected(case, "expected", expected)
    else:
        assert peft_wrong, case.name
        facts["peft_tolerance"] = None
    for name in names & set(stored):
        before = stored[name].double().numpy()
        if before.shape == closed[name].shape:
            assert np.linalg.norm(closed[name] - before) > 1e-3 * np.linalg.norm(before), (case.name, name)
    assert all(v.dtype == np.float64 and np.isfinite(v).all() for v in closed.values()), case.name
    write_expected(case, "expected_f64", closed)
    facts["changed"] = sorted(names & set(stored))
    facts["added"] = sorted(names - set(stored))


def save_adapter(model, directory, **kwargs):
    model.save_pretrained(directory, **kwargs)
    (directory / "README.md").unlink(missing_ok=True)


def write_facts(case, facts):
    """JSON with short lists on one line."""
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: (
        joined if len(joined := " ".join(m.group().split())) < 100 else m.group()), text)
    (case / "case.json").write_text(text + "\n")


VERSIONS = {k: common.VERSIONS[k] for k in ("torch", "transformers", "peft", "numpy")}


def describe(case, feature, formula, base, adapters, weights, methods, options, config_changes, notes):
    return {
        "case": case,
        "feature": feature,
        "formula": formula,
        "base": f"../bases/{base}",
        "adapters": [{"path": p, "weight": w} for p, w in zip(adapters, weights)],
        "options": options or {},
        "methods": methods,
        "config_changes": config_changes or {},
        "notes": list(notes),
    }


def method_names(config):
    saved = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kind = getattr(saved["peft_type"], "value", saved["peft_type"])
    extras = []
    for key in ("use_dora", "use_rslora", "lora_bias", "modules_to_save", "trainable_token_indices",
                "target_parameters", "use_bdlora", "kasa_config", "velora_config",
                "monteclora_config"):
        if kind == "LORA" and saved.get(key):
            extras.append(key)
    if saved.get("bias") not in (None, "none"):
        extras.append(f"bias={saved['bias']}")
    if isinstance(saved.get("init_lora_weights"), str):
        extras.append(f"init_lora_weights={saved['init_lora_weights']}")
    return [kind, *extras]


@tolerant
def make(
    out,
    name,
    *,
    feature,
    formula,
    base,
    config,
    closed=None,
    model_class=None,
    prepare=None,
    deviation=0.05,
    overrides=None,
    perturbed=None,
    train=None,
    after_save=None,
    save_kwargs=None,
    tolerance=1e-6,
    peft_wrong=None,
    refused=None,
    merge=True,
    options=None,
    config_changes=None,
    notes=(),
    extra=None,
    extra_expected=None,
    adapter_name="default",
):
    """One adapter on one base. `closed(W, adapter)` gives the f64 result."""
    case = out / name
    case.mkdir(parents=True)
    adapter = case / "adapter"
    dtype = torch.bfloat16 if base in BF16 else torch.float32
    model = load_base(base, dtype, model_class, prepare)
    torch.manual_seed(SEED)
    config_before = json.loads(json.dumps(method_names(config)))
    model = get_peft_model(model, config, adapter_name=adapter_name)
    if train:
        train(model)
    elif perturbed:
        perturbed(model)
    else:
        perturb(model, deviation, overrides=overrides)
    save_adapter(model, adapter, **(save_kwargs or {}))
    if adapter_name != "default":
        adapter = adapter / adapter_name
        (adapter / "README.md").unlink(missing_ok=True)
    if after_save:
        after_save(adapter)
    methods = config_before + [m for m in method_names(config) if m not in config_before]
    facts = describe(name, feature, formula, base, [str(adapter.relative_to(case))], [1.0], methods, options,
                     config_changes, notes)
    parsed = Adapter(adapter)
    if refused:
        facts["refused"] = refused
    else:
        merged = None
        if merge and not peft_wrong:
            wide_model = load_base(base, torch.float32, model_class, prepare)
            wide_model = PeftModel.from_pretrained(wide_model, adapter)
            merged = disk_tensors(wide_model.merge_and_unload(), base)
        if peft_wrong:
            facts["peft_wrong"] = peft_wrong
        W = wide(common.read_tensors(Path("bases") / base))
        finish(case, base, [parsed], facts, merged, closed(W, parsed), tolerance, peft_wrong)
        for stem, tensors in (extra_expected(W, parsed) if extra_expected else {}).items():
            write_expected(case, stem, tensors)
    facts.update(extra or {})
    facts["versions"] = VERSIONS
    write_facts(case, facts)


# ------------------------------------------------------- closed forms by shape


def lora_linear(W, A, transposed=(), skip=()):
    """Every linear LoRA of an adapter, with DoRA and lora_bias where present."""
    result = {}
    for module in A.modules(".lora_A.weight"):
        if module in skip:
            continue
        a, b = A[f"{module}.lora_A.weight"], A[f"{module}.lora_B.weight"]
        weight = W[f"{module}.weight"]
        flip = module in transposed or any(module.endswith("." + t) for t in transposed)
        s = A.scale(a.shape[0])
        if a.ndim > 2:
            delta = s * f.product_conv(a, b, weight.shape)
        else:
            delta = s * f.product(a, b)
            delta = delta.T if flip else delta
        if f"{module}.lora_magnitude_vector" in A:
            m = A[f"{module}.lora_magnitude_vector"]
            result[f"{module}.weight"] = f.dora(weight, delta, m, axis=1 if flip else 0)
        else:
            result[f"{module}.weight"] = weight + delta
        if f"{module}.lora_B.bias" in A:
            result[f"{module}.bias"] = W[f"{module}.bias"] + s * A[f"{module}.lora_B.bias"]
    for module in A.modules(".lora_embedding_A"):
        a, b = A[f"{module}.lora_embedding_A"], A[f"{module}.lora_embedding_B"]
        weight = A[f"{module}.base_layer.weight"] if f"{module}.base_layer.weight" in A else W[f"{module}.weight"]
        delta = A.scale(a.shape[0]) * (b @ a).T
        if f"{module}.lora_magnitude_vector" in A:
            result[f"{module}.weight"] = f.dora(weight, delta, A[f"{module}.lora_magnitude_vector"], axis=1)
        else:
            result[f"{module}.weight"] = weight + delta
    return result


def replaced(A, *keys):
    return {key: A[key] for key in keys}


# --------------------------------------------------------------------- cases

CASES = []


def case(function):
    CASES.append(function)
    return function


LORA = dict(r=3, lora_alpha=5)
PROJ = dict(target_modules=["q_proj", "down_proj"], **CAUSAL)
NET = ["linear", "plain"]


@case
def dora_linear(out):
    make(out, "dora-linear", feature="DoRA on linear layers, no bias",
         formula="m[:,None] * V/|V|row, V = W + s*B@A", base="llama",
         config=LoraConfig(**LORA, **PROJ, use_dora=True), closed=lora_linear)
    make(out, "dora-linear-bias", feature="DoRA on linear layers with bias (the bias stays)",
         formula="m[:,None] * V/|V|row, V = W + s*B@A", base="llama-bias",
         config=LoraConfig(**LORA, **PROJ, use_dora=True), closed=lora_linear)
    make(out, "dora-linear-bf16", feature="DoRA on a bf16 base",
         formula="m[:,None] * V/|V|row, V = W + s*B@A", base="llama-bf16",
         config=LoraConfig(**LORA, **PROJ, use_dora=True), closed=lora_linear)
    make(out, "dora-rslora", feature="DoRA with rsLoRA and a rank_pattern",
         formula="m[:,None] * V/|V|row, V = W + alpha/sqrt(r)*B@A", base="llama",
         config=LoraConfig(**LORA, **PROJ, use_dora=True, use_rslora=True,
                           rank_pattern={"q_proj": 5}), closed=lora_linear)
    make(out, "dora-embedding", feature="DoRA on an embedding",
         formula="m[None,:] * V/|V|col, V = W + s*(B@A).T", base="layers",
         config=LoraConfig(**LORA, target_modules=["embedding"], use_dora=True),
         closed=lora_linear)
    make(out, "dora-conv1d-gpt2", feature="DoRA on GPT-2's Conv1D (weight stored (in, out), with bias)",
         formula="m[None,:] * V/|V|col, V = W + s*(B@A).T", base="gpt2",
         config=LoraConfig(**LORA, target_modules=["c_attn", "attn.c_proj"], use_dora=True,
                           fan_in_fan_out=True, **CAUSAL),
         closed=lambda W, A: {k.replace("X", ""): v for k, v in lora_linear(
             prefixed(W, "transformer."), A, transposed=["c_attn", "c_proj"]).items()})


def prefixed(W, prefix):
    """GPT-2 is saved with or without its prefix; closed forms use PEFT's names."""
    return W if any(k.startswith(prefix) for k in W) else {prefix + k: v for k, v in W.items()}


@case
def embedding(out):
    make(out, "embedding", feature="LoRA on an embedding, (V, d) not square, and a linear layer",
         formula="W + s*(B@A).T; lora_embedding_A (r,V), lora_embedding_B (d,r)", base="layers",
         config=LoraConfig(**LORA, target_modules=["embedding", "linear"]), closed=lora_linear)
    make(out, "embedding-square", feature="LoRA on an embedding with V == d: no shape tells",
         formula="W + s*(B@A).T", base="llama-square",
         config=LoraConfig(**LORA, target_modules=["embed_tokens"], **CAUSAL),
         save_kwargs={"save_embedding_layers": False}, closed=lora_linear)
    make(out, "embedding-saved-base",
         feature="LoRA on embed_tokens and lm_head; PEFT's default also saves copies of the base "
         "as ...base_layer.weight, here equal to the base",
         formula="W + s*(B@A).T; lm_head W + s*B@A", base="llama",
         config=LoraConfig(**LORA, target_modules=["embed_tokens", "lm_head", "q_proj"], **CAUSAL),
         closed=lora_linear)


@case
def biases(out):
    make(out, "lora-bias", feature="lora_bias=True", formula="W + s*B@A; bias + s*lora_B.bias",
         base="llama-bias", config=LoraConfig(**LORA, **PROJ, lora_bias=True), closed=lora_linear)
    make(out, "lora-bias-conv", feature="lora_bias=True on convolutions",
         formula="W + s*B@A; bias + s*lora_B.bias", base="layers",
         config=LoraConfig(**LORA, target_modules=["conv1", "conv2", "conv3"], lora_bias=True),
         closed=lora_linear)
    make(out, "lora-bias-without-base-bias",
         feature="lora_bias=True on layers without bias", formula="-", base="llama",
         config=LoraConfig(**LORA, **PROJ, lora_bias=True),
         refused="lora_bias adds to the bias of the base layer, which has none; PEFT raises "
         "'Impossible to merge LoRA with `lora_bias=True`'")

    def with_biases(W, A):
        result = lora_linear(W, A)
        for key in A.tensors:
            if key.endswith(".bias") and ".lora_B." not in key:
                result[key.replace(".base_layer.", ".")] = A[key]
        return result

    make(out, "bias-all", feature="bias='all': every bias of the base, saved values replace",
         formula="W + s*B@A; bias := saved", base="llama-bias",
         config=LoraConfig(**LORA, **PROJ, bias="all"), closed=with_biases)
    make(out, "bias-all-norms", feature="bias='all' on GPT-2: layer norms and Conv1D biases too",
         formula="W + s*(B@A).T; bias := saved", base="gpt2",
         config=LoraConfig(**LORA, target_modules=["c_attn"], bias="all", fan_in_fan_out=True,
                           **CAUSAL),
         closed=lambda W, A: {**with_biases_gpt2(W, A)})
    make(out, "bias-lora-only", feature="bias='lora_only': biases of targeted layers replace",
         formula="W + s*B@A; bias := saved", base="llama-bias",
         config=LoraConfig(**LORA, **PROJ, bias="lora_only"), closed=with_biases)
    make(out, "bias-lora-only-lora-bias",
         feature="bias='lora_only' and lora_bias=True together: the saved bias replaces, then the "
         "delta is added",
         formula="bias := saved + s*lora_B.bias", base="llama-bias",
         config=LoraConfig(**LORA, **PROJ, bias="lora_only", lora_bias=True),
         closed=lambda W, A: {
             **lora_linear(W, A),
             **{f"{m}.bias": A[f"{m}.base_layer.bias"] + A.scale() * A[f"{m}.lora_B.bias"]
                for m in A.modules(".lora_A.weight")}})


def with_biases_gpt2(W, A):
    result = lora_linear(W, A, transposed=["c_attn"])
    for key in A.tensors:
        if key.endswith(".bias"):
            result[key.replace(".base_layer.", ".")] = A[key]
    return result


@case
def saved_modules(out):
    make(out, "modules-to-save", feature="modules_to_save: the head is replaced",
         formula="W + s*B@A; lm_head.weight := saved", base="llama",
         config=LoraConfig(**LORA, **PROJ, modules_to_save=["lm_head"]),
         closed=lambda W, A: {**lora_linear(W, A), **replaced(A, "lm_head.weight")})
    make(out, "modules-to-save-embedding",
         feature="modules_to_save: embed_tokens and a norm, suffix match on several modules",
         formula="W + s*B@A; named weights := saved", base="llama-bias",
         config=LoraConfig(**LORA, **PROJ, modules_to_save=["embed_tokens", "post_attention_layernorm"]),
         closed=lambda W, A: {**lora_linear(W, A), **replaced(
             A, *[k for k in A.tensors if "embed_tokens" in k or "layernorm" in k])})
    make(out, "modules-to-save-classifier",
         feature="task SEQ_CLS on a causal base: PEFT adds `score` to modules_to_save; the base "
         "file has no such tensor",
         formula="W + s*B@A; score.weight is new", base="llama",
         model_class=transformers.LlamaForSequenceClassification,
         config=LoraConfig(**LORA, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS"),
         closed=lambda W, A: {**lora_linear(W, A), **replaced(A, "score.weight")},
         config_changes={"architectures": ["LlamaForSequenceClassification"]},
         notes=["A model saved by transformers after this merge has no lm_head.weight; the merge "
                "itself neither needs nor changes it."],
         extra={"absent_in_peft": ["lm_head.weight"]})

    def with_head(W, A):
        result = lora_linear(W, A)
        for key in A.tensors:
            if key.endswith(".bias") and ".modules_to_save." not in key and ".original_module." not in key:
                result[key.replace(".base_layer.", ".")] = A[key]
        result["head.weight"] = A["head.weight"]
        result["head.bias"] = A["head.bias"]
        return result

    make(out, "bias-all-modules-to-save",
         feature="bias='all' and modules_to_save together: PEFT also writes "
         "head.modules_to_save.bias (the trained value again) and head.original_module.bias",
         formula="W + s*B@A; head := saved; other biases := saved", base="layers",
         config=LoraConfig(**LORA, target_modules=["linear"], bias="all", modules_to_save=["head"]),
         closed=with_head)


def token_rows(W, A, module="model.embed_tokens", infix="token_adapter."):
    indices = A.config.get("trainable_token_indices") or A.config.get("token_indices")
    if isinstance(indices, dict):
        indices = next(iter(indices.values()))
    return {f"{module}.weight": f.rows_replaced(
        W[f"{module}.weight"], indices, A[f"{module}.{infix}trainable_tokens_delta"])}


@case
def tokens(out):
    make(out, "tokens", feature="trainable_token_indices with LoRA on other layers",
         formula="rows := saved", base="llama",
         config=LoraConfig(**LORA, **PROJ, trainable_token_indices=[7, 2, 15]),
         closed=lambda W, A: {**lora_linear(W, A), **token_rows(W, A)},
         notes=["PEFT keeps the order of the indices; row i of the delta belongs to index i."])
    make(out, "tokens-named", feature="trainable_token_indices as a table {module: indices}, embedding and head",
         formula="rows := saved", base="llama",
         config=LoraConfig(**LORA, **PROJ, trainable_token_indices={"embed_tokens": [1, 4], "lm_head": [3]}),
         closed=lambda W, A: {
             **lora_linear(W, A),
             "model.embed_tokens.weight": f.rows_replaced(
                 W["model.embed_tokens.weight"], [1, 4],
                 A["model.embed_tokens.token_adapter.trainable_tokens_delta"]),
             "lm_head.weight": f.rows_replaced(
                 W["lm_head.weight"], [3], A["lm_head.token_adapter.trainable_tokens_delta"])})
    make(out, "tokens-only", feature="TrainableTokensConfig on its own",
         formula="rows := saved", base="llama",
         config=peft.TrainableTokensConfig(token_indices=[5, 0], target_modules=["embed_tokens"], **CAUSAL),
         closed=lambda W, A: token_rows(W, A, infix=""))
    make(out, "tokens-tied", feature="trainable_token_indices on a tied model, with LoRA elsewhere",
         formula="rows := saved (the one stored embedding, which is also the head)", base="llama-tied",
         config=LoraConfig(**LORA, **PROJ, trainable_token_indices=[7, 2]),
         closed=lambda W, A: {**lora_linear(W, A), **token_rows(W, A)})


def vocabulary_tokens(W, A):
    table = "model.embed_tokens.weight"
    stem = "model.embed_tokens.token_adapter."
    saved = next(A[k] for k in (table, stem + "base_layer.weight", "model.embed_tokens.original_module.weight")
                 if k in A)
    return {**lora_linear(W, A), "lm_head.weight": A["lm_head.weight"],
            table: f.rows_replaced(saved, A.config["trainable_token_indices"], A[stem + "trainable_tokens_delta"])}


@case
def vocabulary(out):
    def resize(model):
        model.resize_token_embeddings(20)

    def new_tables(A, keys=("model.embed_tokens.weight", "lm_head.weight")):
        return replaced(A, *keys)

    make(out, "vocabulary", feature="vocabulary resized from 16 to 20 before training; PEFT saves "
         "embed_tokens and lm_head whole",
         formula="W + s*B@A; embed_tokens.weight, lm_head.weight := saved", base="llama",
         config=LoraConfig(**LORA, **PROJ), prepare=resize,
         closed=lambda W, A: {**lora_linear(W, A), **new_tables(A)},
         config_changes={"vocab_size": 20})
    make(out, "vocabulary-lora",
         feature="resized vocabulary with LoRA on embed_tokens and lm_head on top: the saved "
         "...base_layer.weight has 20 rows, the base 16",
         formula="base_layer.weight + s*(B@A).T, base_layer.weight + s*B@A", base="llama",
         config=LoraConfig(**LORA, target_modules=["q_proj", "embed_tokens", "lm_head"], **CAUSAL),
         prepare=resize,
         closed=lambda W, A: lora_linear(
             {**W, "lm_head.weight": A["lm_head.base_layer.weight"]}, A),
         config_changes={"vocab_size": 20})
    make(out, "vocabulary-tied",
         feature="resized vocabulary on a tied model: PEFT saves both embed_tokens and lm_head",
         formula="W + s*B@A; embed_tokens.weight := saved", base="llama-tied",
         config=LoraConfig(**LORA, **PROJ), prepare=resize,
         closed=lambda W, A: {**lora_linear(W, A), **new_tables(A, ["model.embed_tokens.weight"])},
         config_changes={"vocab_size": 20})
    make(out, "vocabulary-tokens",
         feature="resized vocabulary, the new tokens trained by trainable_token_indices",
         formula="embed_tokens.weight := saved table (20 rows), then rows := saved; lm_head.weight := saved",
         base="llama",
         config=LoraConfig(**LORA, **PROJ, trainable_token_indices=[16, 17, 18, 19]), prepare=resize,
         closed=vocabulary_tokens, config_changes={"vocab_size": 20})
    make(out, "vocabulary-modules-to-save",
         feature="resized vocabulary, embed_tokens and lm_head in modules_to_save",
         formula="W + s*B@A; embed_tokens.weight, lm_head.weight := saved", base="llama",
         config=LoraConfig(**LORA, **PROJ, modules_to_save=["embed_tokens", "lm_head"]), prepare=resize,
         closed=lambda W, A: {**lora_linear(W, A), **new_tables(A)},
         config_changes={"vocab_size": 20})


# ------------------------------------------------------------- IA3, LoHa, LoKr


def ia3_form(W, A, feedforward=(), transposed=()):
    result = {}
    for module in A.modules(".ia3_l"):
        weight = W[f"{module}.weight"]
        l = A[f"{module}.ia3_l"].reshape(-1)
        is_ff = any(module == t or module.endswith("." + t) for t in feedforward)
        flip = any(module.endswith("." + t) for t in transposed)
        axis = (1 if is_ff else 0) if not flip else (0 if is_ff else 1)
        shape = [1] * weight.ndim
        shape[axis] = -1
        result[f"{module}.weight"] = weight * l.reshape(shape)
        if not is_ff and f"{module}.bias" in W:
            result[f"{module}.bias"] = W[f"{module}.bias"] * l
    return result


@case
def ia3(out):
    make(out, "ia3", feature="IA3: k_proj (scales rows and bias), down_proj as feedforward (scales columns)",
         formula="W * l[:,None], bias * l; feedforward W * l[None,:]", base="llama-bias",
         config=peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"],
                               feedforward_modules=["down_proj"], **CAUSAL),
         deviation=0.2, closed=lambda W, A: ia3_form(W, A, ["down_proj"]))
    make(out, "ia3-conv1d-gpt2", feature="IA3 on GPT-2's Conv1D",
         formula="W(in,out) * l[None,:], bias * l; feedforward W * l[:,None]", base="gpt2",
         config=peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"],
                               fan_in_fan_out=True, **CAUSAL),
         deviation=0.2,
         closed=lambda W, A: ia3_form(W, A, ["mlp.c_proj"], ["c_attn", "c_proj"]))
    make(out, "ia3-conv", feature="IA3 on Conv2d and Conv3d, feedforward and not",
         formula="W * l over out (and bias), or over in", base="layers",
         config=peft.IA3Config(target_modules=["conv2", "conv2_plain", "conv3"],
                               feedforward_modules=["conv2_plain"]),
         deviation=0.2, closed=lambda W, A: ia3_form(W, A, ["conv2_plain"]))


def loha_form(W, A):
    result = {}
    for m in A.modules(".hada_w1_a"):
        get = lambda part: A.tensors.get(f"{m}.hada_{part}")
        r = get("w1_b").shape[0]
        result[f"{m}.weight"] = W[f"{m}.weight"] + f.loha(
            get("w1_a"), get("w1_b"), get("w2_a"), get("w2_b"), A.scale(r), W[f"{m}.weight"].shape,
            get("t1"), get("t2"))
    return result


def lokr_form(W, A):
    result = {}
    modules = sorted({k.rpartition(".lokr_")[0] for k in A.tensors})
    for m in modules:
        parts = {k.rpartition(".lokr_")[2]: v for k, v in A.tensors.items() if k.startswith(m + ".lokr_")}
        result[f"{m}.weight"] = W[f"{m}.weight"] + f.lokr(parts, A.scale(), W[f"{m}.weight"].shape)
    return result


@case
def lycoris(out):
    make(out, "loha", feature="LoHa on linear layers, alpha over a rank_pattern's rank",
         formula="W + s*(w1a@w1b)*(w2a@w2b)", base="llama",
         config=peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"],
                                rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 5}, **CAUSAL),
         deviation=0.3, closed=loha_form)
    make(out, "loha-conv", feature="LoHa on Conv2d 3x3, 1x1 and Conv1d, flattened",
         formula="W + (s*(w1a@w1b)*(w2a@w2b)).reshape", base="layers",
         config=peft.LoHaConfig(r=3, alpha=5, target_modules=["conv2", "pointwise", "conv1"]),
         deviation=0.3, closed=loha_form)
    make(out, "loha-conv-effective",
         feature="LoHa on convolutions with use_effective_conv2d (CP, t1 and t2); 1x1 stays flat",
         formula="W + s*cp(t1,w1)*cp(t2,w2); cp = einsum(ijkl,jr,ip->prkl)", base="layers",
         config=peft.LoHaConfig(r=3, alpha=5, target_modules=["conv2", "pointwise", "conv1"],
                                use_effective_conv2d=True),
         deviation=0.3, closed=loha_form)
    lokr = dict(alpha=5)
    make(out, "lokr", feature="LoKr: w1 full, w2 factored", formula="W + s*kron(w1, w2a@w2b)", base="llama",
         config=peft.LoKrConfig(r=1, **lokr, target_modules=["q_proj", "down_proj"], **CAUSAL),
         deviation=0.3, closed=lokr_form)
    make(out, "lokr-decompose-both", feature="LoKr: decompose_both, both factored (r=1)",
         formula="W + s*kron(w1a@w1b, w2a@w2b)", base="llama",
         config=peft.LoKrConfig(r=1, **lokr, decompose_both=True,
                                target_modules=["q_proj", "down_proj"], **CAUSAL),
         deviation=0.3, closed=lokr_form)
    make(out, "lokr-decompose-factor", feature="LoKr: decompose_factor=2",
         formula="W + s*kron(w1, w2a@w2b)", base="llama",
         config=peft.LoKrConfig(r=2, **lokr, decompose_factor=2,
                                target_modules=["q_proj", "down_proj"], **CAUSAL),
         deviation=0.3, closed=lokr_form)
    make(out, "lokr-full", feature="LoKr: rank so large that w2 is full too; alpha/r still applies",
         formula="W + alpha/r*kron(w1, w2)", base="llama",
         config=peft.LoKrConfig(r=8, **lokr, target_modules=["q_proj", "down_proj"], **CAUSAL),
         deviation=0.3, closed=lokr_form,
         notes=["r is in the config only: no stored tensor has it as a dimension."])
    make(out, "lokr-patterns", feature="LoKr with rank_pattern and alpha_pattern; where w2 is full the rank is in "
         "no tensor, only in rank_pattern",
         formula="W + alpha/r*kron(w1, w2)", base="llama",
         config=peft.LoKrConfig(r=1, **lokr, rank_pattern={"down_proj": 7}, alpha_pattern={"q_proj": 3},
                                target_modules=["q_proj", "down_proj"], **CAUSAL),
         deviation=0.3, closed=lambda W, A: {
             f"{m}.weight": W[f"{m}.weight"] + f.lokr(
                 {k.rpartition(".lokr_")[2]: v for k, v in A.tensors.items() if k.startswith(m + ".lokr_")},
                 s, W[f"{m}.weight"].shape)
             for m, s in (("model.layers.0.self_attn.q_proj", 3 / 1), ("model.layers.0.mlp.down_proj", 5 / 7))})
    make(out, "lokr-conv", feature="LoKr on Conv2d (factored, flattened)",
         formula="W + s*kron(w1, w2a@w2b).reshape", base="layers",
         config=peft.LoKrConfig(r=1, **lokr, decompose_factor=2, target_modules=["conv2", "pointwise", "conv1"]),
         deviation=0.3, closed=lokr_form)
    make(out, "lokr-conv-effective", feature="LoKr on convolutions with use_effective_conv2d (t2)",
         formula="W + s*kron(w1[:,:,1,1], cp(t2,w2))", base="layers",
         config=peft.LoKrConfig(r=2, **lokr, decompose_factor=2, use_effective_conv2d=True,
                                target_modules=["conv_wide"]),
         deviation=0.3, closed=lokr_form)
    make(out, "lokr-conv-full", feature="LoKr on Conv2d with w2 full (4-D)",
         formula="W + s*kron(w1[:,:,1,1], w2)", base="layers",
         config=peft.LoKrConfig(r=4, **lokr, target_modules=["conv2"]),
         deviation=0.3, closed=lokr_form)
    make(out, "lokr-conv1d-full",
         feature="LoKr on Conv1d with w2 full (3-D): kron widens w1 at the front, so the result "
         "(c, a*d, b*k) is reshaped, not placed block by block",
         formula="W + s*kron(w1[None], w2).reshape", base="layers",
         config=peft.LoKrConfig(r=4, **lokr, target_modules=["conv1"]),
         deviation=0.3, closed=lokr_form,
         notes=["PEFT's forward pass uses the same matrix, so this is what the adapter was trained as."])


# ------------------------------------------------------------------------ OFT


def oft_form(W, A, transposed=()):
    c = A.config
    result = {}
    for m in A.modules(".oft_R.weight"):
        weight = W[f"{m}.weight"]
        flat = weight.reshape(weight.shape[0], -1)
        R = f.oft_rotation(A[f"{m}.oft_R.weight"], flat.shape[1], c["use_cayley_neumann"],
                           c["num_cayley_neumann_terms"], c["eps"] if c["coft"] else None)
        result[f"{m}.weight"] = (flat @ R.T).reshape(weight.shape)
    return result


@case
def oft(out):
    common_ = dict(target_modules=["k_proj", "down_proj"], **CAUSAL)
    make(out, "oft", feature="OFT, oft_block_size given, Cayley-Neumann (the default, 5 terms)",
         formula="W @ R.T; R = blocks of I+2Q+2Q^2+2Q^3+Q^4", base="llama",
         config=peft.OFTConfig(oft_block_size=6, r=0, **common_), deviation=0.1, closed=oft_form)
    make(out, "oft-r", feature="OFT, r (number of blocks) given, exact Cayley",
         formula="W @ R.T; R = blocks of (I-Q)(I+Q)^-1", base="llama",
         config=peft.OFTConfig(oft_block_size=0, r=4, use_cayley_neumann=False, **common_),
         deviation=0.1, closed=oft_form)
    make(out, "oft-terms", feature="OFT, three Neumann terms", formula="R = I+2Q+2Q^2+Q^3 (see README)",
         base="llama",
         config=peft.OFTConfig(oft_block_size=4, r=0, num_cayley_neumann_terms=3, **common_),
         deviation=0.1, closed=oft_form)
    make(out, "oft-block-share", feature="OFT, block_share: one stored block for all",
         formula="W @ R.T, all blocks equal", base="llama",
         config=peft.OFTConfig(oft_block_size=6, r=0, block_share=True, **common_),
         deviation=0.1, closed=oft_form)
    make(out, "coft", feature="constrained OFT: Q is scaled down to norm eps/sqrt(blocks) where larger",
         formula="Q := Q * eps'/|Q| if |Q| > eps', eps' = eps/sqrt(blocks)", base="llama",
         config=peft.OFTConfig(oft_block_size=6, r=0, coft=True, eps=0.2, **common_),
         deviation=0.1, closed=oft_form)
    make(out, "oft-conv2d", feature="OFT on Conv2d: rotation over in*k*k",
         formula="W.reshape(out,-1) @ R.T", base="layers",
         config=peft.OFTConfig(oft_block_size=6, r=0, target_modules=["conv2", "linear"]),
         deviation=0.1, closed=oft_form)


@case
def oft_embedding(out):
    def closed(W, A):
        weight, c = W["embedding.weight"], A.config
        R = f.oft_rotation(A["embedding.oft_embedding_R.weight"], weight.shape[1], c["use_cayley_neumann"],
                           c["num_cayley_neumann_terms"])
        return {"embedding.weight": weight @ R}

    make(out, "oft-embedding", feature="OFT on an embedding: R and not R.T", formula="W @ R", base="layers",
         config=peft.OFTConfig(oft_block_size=3, r=0, target_modules=["embedding"]), deviation=0.1, closed=closed)


# ----------------------------------------------------------------- VeRA, MiSS


def vera_form(W, A, transposed=()):
    result = {}
    for m in A.modules(".vera_lambda_b"):
        weight = W[f"{m}.weight"]
        rows, cols = weight.shape
        flip = any(m.endswith("." + t) for t in transposed)
        if flip:
            rows, cols = cols, rows
        big_a, big_b = A["base_model.vera_A"], A["base_model.vera_B"]
        d, b = A[f"{m}.vera_lambda_d"], A[f"{m}.vera_lambda_b"]
        delta = (b[:, None] * big_b[:rows]) @ (d[:, None] * big_a[:, :cols])
        result[f"{m}.weight"] = weight + (delta.T if flip else delta)
    return result


@case
def vera(out):
    make(out, "vera", feature="VeRA, shared projections saved; layers of different sizes",
         formula="W + (b[:,None]*B[:out]) @ (d[:,None]*A[:,:in])", base="llama",
         config=peft.VeraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"], **CAUSAL),
         deviation=0.3, closed=vera_form)
    make(out, "vera-conv1d-gpt2", feature="VeRA on GPT-2's Conv1D", formula="W + (..).T", base="gpt2",
         config=peft.VeraConfig(r=4, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, **CAUSAL),
         deviation=0.3, closed=lambda W, A: vera_form(W, A, ["c_attn", "c_proj"]))
    make(out, "vera-no-projection", feature="VeRA, save_projection=False", formula="-", base="llama",
         config=peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False, **CAUSAL),
         deviation=0.3,
         refused="vera_A and vera_B are not in the file; they come from torch's random number "
         "generator with projection_prng_key as seed")


def miss_form(W, A):
    mode = A.config["init_weights"]
    result = {}
    for m in A.modules(".miss_block"):
        weight, block = W[f"{m}.weight"], A[f"{m}.miss_block"]
        if mode == "bat":
            result[f"{m}.weight"] = weight + f.miss_bat(weight, block)
        else:
            if mode == "mini":
                block = np.tile(block, (1, weight.shape[0] // A.config["mini_r"]))
            result[f"{m}.weight"] = weight + f.miss(block, weight.shape[1])
    return result


@case
def miss(out):
    make(out, "miss", feature="MiSS; r divides in_features",
         formula="W[o,i] + block[i % r, o]", base="llama",
         config=peft.MissConfig(r=6, target_modules=["q_proj", "down_proj"], **CAUSAL), closed=miss_form)
    make(out, "miss-ragged", feature="MiSS; r does not divide in_features",
         formula="W[o,i] + block[i % r, o]", base="llama",
         config=peft.MissConfig(r=5, target_modules=["q_proj", "down_proj"], **CAUSAL), closed=miss_form)
    make(out, "miss-bat", feature="MiSS, init_weights='bat' (the update depends on W); block (out/r, r, r)",
         formula="per r-by-r tile: W + W@M[o] + M[o]", base="llama",
         config=peft.MissConfig(r=6, init_weights="bat", target_modules=["q_proj", "down_proj"], **CAUSAL),
         closed=miss_form)
    make(out, "miss-mini", feature="MiSS, init_weights='mini'; block (r, mini_r)",
         formula="W[o,i] + block[i % r, o % mini_r]", base="llama",
         config=peft.MissConfig(r=6, mini_r=4, init_weights="mini",
                                target_modules=["q_proj", "down_proj"], **CAUSAL), closed=miss_form)


@case
def bone(out):
    """Bone became MiSS; PEFT 0.21 has no Bone any more, PEFT 0.18 wrote these keys."""

    def as_bone(directory):
        path = directory / "adapter_model.safetensors"
        tensors = {k.replace("miss_block", "bone_block"): v for k, v in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        edit_config(directory, peft_type="BONE", peft_version="0.18.1", mini_r=None, miss_dropout=None)

    def closed(W, A):
        A.tensors = {k.replace("bone_block", "miss_block"): v for k, v in A.tensors.items()}
        return miss_form(W, A)

    for name, mode in (("bone", True), ("bone-bat", "bat")):
        make(out, name, feature="Bone" + (", init_weights='bat'" if mode == "bat" else "")
             + ", keys bone_block (a MiSS adapter renamed by the script)",
             formula="as miss" + ("-bat" if mode == "bat" else ""), base="llama",
             config=peft.MissConfig(r=6, init_weights=mode, target_modules=["k_proj", "down_proj"], **CAUSAL),
             after_save=as_bone, closed=closed,
             peft_wrong="PEFT 0.21 does not know peft_type BONE; PEFT 0.18.1 merges this adapter to the same values")


# -------------------------------------------------------------------- AdaLoRA


def adalora_form(W, A, transposed=()):
    result = {}
    for m in A.modules(".lora_E"):
        a, b, e = (A[f"{m}.lora_{x}"] for x in "ABE")
        alpha = A.config["lora_alpha"] if A.config["lora_alpha"] > 0 else A.config["init_r"]
        delta = f.adalora(a, b, e, alpha, A.config["init_r"])
        if a.shape[0] == 0:
            continue
        flip = any(m.endswith("." + t) for t in transposed)
        weight = W[f"{m}.weight"]
        result[f"{m}.weight"] = weight + (delta.T if flip else delta.reshape(weight.shape))
    return result


@case
def adalora(out):
    make(out, "adalora", feature="AdaLoRA before any budget allocation (rank_pattern null)",
         formula="W + B@(A*E) * alpha/(init_r + 1e-5)", base="llama",
         config=peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10,
                                   target_modules=["q_proj", "down_proj"], **CAUSAL),
         deviation=0.3, closed=adalora_form)

    def trained(model):
        generator = torch.Generator().manual_seed(SEED)
        perturb(model, 0.3)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        model.train()
        for step in range(10):
            ids = torch.randint(0, 16, (4, 8), generator=generator)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        model.eval()

    make(out, "adalora-allocated",
         feature="AdaLoRA after budget allocation: rank_pattern holds masks, the files only the kept "
         "triplets; ranks differ by layer",
         formula="W + B@(A*E) * alpha/(init_r + 1e-5), init_r and not the kept rank", base="llama",
         config=peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, tinit=2, tfinal=2,
                                   deltaT=1, target_modules=["q_proj", "k_proj", "down_proj"], **CAUSAL),
         train=trained, closed=adalora_form)

    def emptied(model):
        trained(model)
        pattern = model.peft_config["default"].rank_pattern
        key = next(k for k in pattern if "k_proj" in k)
        pattern[key] = [False] * 4

    make(out, "adalora-rank-zero",
         feature="AdaLoRA, one layer with an all-false mask: lora_A (0, in), lora_B (out, 0), that weight stays",
         formula="W + B@(A*E) * alpha/(init_r + 1e-5)", base="llama",
         config=peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, tinit=2, tfinal=2,
                                   deltaT=1, target_modules=["q_proj", "k_proj", "down_proj"], **CAUSAL),
         train=emptied, closed=adalora_form)


# ---------------------------------------------------------------- layer kinds


@case
def convolutions(out):
    conv = dict(r=3, lora_alpha=5)
    formula = "W + s*(B.view(out,r)@A.view(r,-1)).view(W.shape)"
    make(out, "conv1d", feature="LoRA on Conv1d, kernels 3 and 2", formula=formula, base="layers",
         config=LoraConfig(**conv, target_modules=["conv1", "conv1_plain"]), closed=lora_linear)
    make(out, "conv2d", feature="LoRA on Conv2d, kernel 3x3 and 1x1", formula=formula, base="layers",
         config=LoraConfig(**conv, target_modules=["conv2", "pointwise"]), closed=lora_linear)
    make(out, "conv3d", feature="LoRA on Conv3d", formula=formula, base="layers",
         config=LoraConfig(**conv, target_modules=["conv3", "conv3_plain"]), closed=lora_linear)
    dora = "m[:,None..] * V/|V|, norm over all axes but out; m stored (1,out,1..)"
    make(out, "dora-conv1d", feature="DoRA on Conv1d, with and without bias", formula=dora, base="layers",
         config=LoraConfig(**conv, use_dora=True, target_modules=["conv1", "conv1_plain"]), closed=lora_linear)
    make(out, "dora-conv2d", feature="DoRA on Conv2d 3x3 and 1x1, with and without bias", formula=dora,
         base="layers",
         config=LoraConfig(**conv, use_dora=True, target_modules=["conv2", "conv2_plain", "pointwise"]),
         closed=lora_linear)
    make(out, "dora-conv3d", feature="DoRA on Conv3d, with and without bias", formula=dora, base="layers",
         config=LoraConfig(**conv, use_dora=True, target_modules=["conv3", "conv3_plain"]), closed=lora_linear)


@case
def grouped_convolution(out):
    make(out, "conv2d-grouped", feature="LoRA on Conv2d with groups=2", formula="-", base="layers",
         config=LoraConfig(r=4, lora_alpha=5, target_modules=["conv_grouped"]),
         refused="PEFT raises 'Merging is not supported for _ConvNd layers with groups > 1!'; the base weight is "
         "(out, in/groups, ..), so A's channels do not match it")


@case
def multihead_attention(out):
    def closed(W, A, times=2):
        s = A.scale()
        result = {
            "mha.in_proj_weight": W["mha.in_proj_weight"]
            + s * f.product(A["mha.lora_A.weight"], A["mha.lora_B.weight"]),
            "mha.out_proj.weight": W["mha.out_proj.weight"]
            + times * s * f.product(A["mha.base_layer.out_proj.lora_A.weight"],
                                    A["mha.base_layer.out_proj.lora_B.weight"]),
        }
        if "mha.base_layer.out_proj.lora_B.bias" in A:
            result["mha.out_proj.bias"] = (
                W["mha.out_proj.bias"] + s * A["mha.base_layer.out_proj.lora_B.bias"])
        return result

    twice = ("PEFT adds out_proj's delta twice, in merge() and, as its forward pass is merge and unmerge, "
             "in training and inference too. The expected values are the model that PEFT runs; "
             "expected_once_f64.safetensors has the delta once, as one would write it down.")
    for name, bias in (("multihead-attention", False), ("multihead-attention-lora-bias", True)):
        make(out, name, base="attention",
             feature="nn.MultiheadAttention: in_proj (3d, d) and out_proj" + (", lora_bias" if bias else ""),
             formula="in_proj_weight + s*B@A; out_proj.weight + 2*s*B@A (twice, see case.json)"
             + ("; out_proj.bias + s*lora_B.bias" if bias else ""),
             config=LoraConfig(**LORA, target_modules=["mha"], lora_bias=bias), closed=closed,
             notes=[twice] + (["in_proj's lora_B.bias is saved but used nowhere, in forward or merge."]
                              if bias else []),
             extra_expected=lambda W, A: {"expected_once_f64": closed(W, A, 1)})


def split_experts(result, module, name, style):
    """One fused (E, out, in) array under the per-expert names of a base."""
    if style == "mixtral":
        stem, first, second, down = module.replace(".mlp.", ".block_sparse_moe."), "w1", "w3", "w2"
    else:
        stem, first, second, down = module, "gate_proj", "up_proj", "down_proj"
    out = {}
    for e, weight in enumerate(result):
        if name == "gate_up_proj":
            half = weight.shape[0] // 2
            out[f"{stem}.{e}.{first}.weight"] = weight[:half]
            out[f"{stem}.{e}.{second}.weight"] = weight[half:]
        else:
            out[f"{stem}.{e}.{down}.weight"] = weight
    return out


EXPERT_MODULE = "model.layers.0.mlp.experts"


def fused_weights(W, style):
    """gate_up_proj (E,2I,H) and down_proj (E,H,I) of a base with per-expert names."""
    if style is None:
        return {k: W[f"{EXPERT_MODULE}.{k}"] for k in ("gate_up_proj", "down_proj")}
    if style == "mixtral":
        stem, names = EXPERT_MODULE.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
    else:
        stem, names = EXPERT_MODULE, ("gate_proj", "up_proj", "down_proj")
    get = lambda n: np.stack([W[f"{stem}.{e}.{n}.weight"] for e in range(EXPERTS)])
    return {"gate_up_proj": np.concatenate([get(names[0]), get(names[1])], axis=1),
            "down_proj": get(names[2])}


def experts_form(keys, *, transposed=False, style=None, block_wise=False, old=False):
    """`keys`: parameter -> key prefix of its factors, e.g. experts.base_layer."""

    def closed(W, A):
        result = lora_linear(W, A, skip=set(keys.values()) | {"model.layers.0.mlp.gate"})
        weights = fused_weights(W, style)
        for name, module in keys.items():
            a, b = A[f"{module}.lora_A.weight"], A[f"{module}.lora_B.weight"]
            s = A.scale(a.shape[0] // EXPERTS)
            # PEFT's alpha_pattern for converted targets keeps alpha/r
            for pattern, alpha in A.config["alpha_pattern"].items():
                if name in pattern:
                    s = f.scale(a.shape[0] // EXPERTS, alpha, A.config["use_rslora"])
            delta = s * f.product_experts(a, b, EXPERTS, block_wise)
            if transposed or old:
                delta = delta.transpose(0, 2, 1)
            merged = weights[name] + delta
            if style:
                result.update(split_experts(merged, module_of_experts(), name, style))
            else:
                result[f"{EXPERT_MODULE}.{name}"] = merged
        if "model.layers.0.mlp.gate.lora_A.weight" in A:
            gate = "model.layers.0.mlp.gate"
            disk = gate.replace(".mlp.", ".block_sparse_moe.") if style == "mixtral" else gate
            result[f"{disk}.weight"] = W[f"{disk}.weight"] + A.scale() * f.product(
                A[f"{gate}.lora_A.weight"], A[f"{gate}.lora_B.weight"])
        return result

    return closed


def module_of_experts():
    return EXPERT_MODULE


NESTED = {"gate_up_proj": f"{EXPERT_MODULE}.base_layer", "down_proj": EXPERT_MODULE}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    settings = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None and key in settings:
            del settings[key]
        else:
            settings[key] = value
    path.write_text(json.dumps(settings, indent=2, sort_keys=True))


def repack(function):
    """Rewrites the expert factors of a saved adapter; function(A (E,r,in),
    B (E,out,r)) returns the two stored matrices."""

    def edit(directory):
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        for key in [k for k in tensors if "experts" in k and k.endswith(".lora_A.weight")]:
            other = key.replace("lora_A", "lora_B")
            a, b = tensors[key], tensors[other]
            r = a.shape[0] // EXPERTS
            a = a.reshape(EXPERTS, r, -1)
            b = b.reshape(b.shape[0], r, EXPERTS).permute(2, 0, 1)
            tensors[key], tensors[other] = (t.contiguous() for t in function(a, b))
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def expert_fastest(b):
    """(E, out, r) -> (out, r*E), column k*E + e: as PEFT packs it."""
    return b.permute(1, 2, 0).reshape(b.shape[1], -1)


def block_wise(a, b):
    return a.reshape(-1, a.shape[2]), b.permute(1, 0, 2).reshape(b.shape[1], -1)


def old_layout(a, b):
    """PEFT <= 0.18 called axis 1 `in` and axis 2 `out`, whatever the model:
    its A_e is our B_e transposed and the other way round."""
    swapped_a, swapped_b = b.transpose(1, 2), a.transpose(1, 2)
    return swapped_a.reshape(-1, swapped_a.shape[2]), expert_fastest(swapped_b)


@case
def experts(out):
    q = dict(r=2, lora_alpha=5, target_modules=["q_proj"], **CAUSAL)
    formula = "per expert W_e + s*B_e@A_e; A row e*r+k, B column k*E+e"
    for base, style in (("mixtral-fused", None), ("mixtral", "mixtral"),
                        ("qwen3-moe-fused", None), ("qwen3-moe", "qwen")):
        make(out, f"moe-{base}", base=base, formula=formula,
             feature="target_parameters: both fused expert parameters of one module, nested "
             "(gate_up_proj innermost); base on disk "
             + ("fused, as in memory" if style is None else "per expert, as transformers saves it"),
             config=LoraConfig(**q, target_parameters=BOTH), closed=experts_form(NESTED, style=style))
    make(out, "moe-gate-up-only", base="mixtral-fused", formula=formula,
         feature="target_parameters: gate_up_proj alone, keys experts.lora_A",
         config=LoraConfig(**q, target_parameters=BOTH[:1]),
         closed=experts_form({"gate_up_proj": EXPERT_MODULE}))
    make(out, "moe-down-only", base="mixtral-fused", formula=formula,
         feature="target_parameters: down_proj alone, the same keys as moe-gate-up-only",
         config=LoraConfig(**q, target_parameters=BOTH[1:]),
         closed=experts_form({"down_proj": EXPERT_MODULE}))
    make(out, "moe-square", base="mixtral-fused-square", formula=formula,
         feature="target_parameters, gate_up_proj (3,8,8) and r*E = 6 twice: no shape tells in from out",
         config=LoraConfig(**q, target_parameters=BOTH), closed=experts_form(NESTED))
    transposed = "per expert W_e + (s*B_e@A_e).T, W_e (in, out)"
    make(out, "moe-gpt-oss", base="gpt-oss", formula=transposed,
         feature="target_parameters on a module with is_transposed=True: parameters (E, in, out)",
         config=LoraConfig(**q, target_parameters=BOTH), closed=experts_form(NESTED, transposed=True))
    make(out, "moe-gpt-oss-square", base="gpt-oss-square", formula=transposed,
         feature="is_transposed=True and gate_up_proj (3,8,8)",
         config=LoraConfig(**q, target_parameters=BOTH), closed=experts_form(NESTED, transposed=True))
    make(out, "moe-rslora", base="gpt-oss", formula=transposed + ", s = alpha/sqrt(r)",
         feature="target_parameters with rsLoRA and a rank_pattern on one parameter",
         config=LoraConfig(**q, target_parameters=BOTH, use_rslora=True, rank_pattern={"experts.down_proj": 3}),
         closed=experts_form(NESTED, transposed=True))
    make(out, "target-parameter-2d", base="matrix", formula="W + s*B@A",
         feature="target_parameters: a bare 2-D parameter and the weight of a linear layer",
         config=LoraConfig(**LORA, target_parameters=["inner.weight", "head.weight"]), closed=lora_linear)
    make(out, "moe-mixtral-v4-targets", base="mixtral", formula=formula,
         feature="made under transformers 5 with the old names as target_modules (w1, w2, w3, gate): PEFT "
         "turns them into target_parameters, doubles r and alpha of gate_up_proj through patterns, and "
         "adapts the router as the 2-D parameter gate.weight",
         config=LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "w1", "w2", "w3", "gate"], **CAUSAL),
         closed=experts_form(NESTED, style="mixtral"))
    old = dict(formula="per expert (E, in, out) as PEFT <= 0.18 saw it: W_e + (s*B_e@A_e).T")

    def as_version(version):
        return lambda d: (repack(old_layout)(d), edit_config(d, peft_version=version))

    make(out, "moe-layout-peft-018", base="mixtral-fused", **old,
         feature="hand-packed: the layout of PEFT <= 0.18, which read every 3-D parameter as (E, in, out)",
         config=LoraConfig(**q, target_parameters=BOTH), after_save=as_version("0.18.1"),
         closed=experts_form(NESTED, old=True), options={"moe_layout": "peft-0.18"},
         peft_wrong="PEFT 0.21 raises (sizes do not match); PEFT 0.18.1 merges it to these values",
         notes=["The expected values are those of moe-mixtral-fused: the same adapter, packed otherwise."])
    make(out, "moe-layout-peft-018-square", base="mixtral-fused-square", **old,
         feature="hand-packed: the layout of PEFT <= 0.18, gate_up_proj (3,8,8) alone: no shape tells",
         config=LoraConfig(**q, target_parameters=BOTH[:1]), after_save=as_version("0.18.1"),
         closed=experts_form({"gate_up_proj": EXPERT_MODULE}, old=True), options={"moe_layout": "peft-0.18"},
         peft_wrong="PEFT 0.21 loads it without a word and adds every delta transposed; PEFT 0.18.1 merges it to "
         "these values. Only peft_version in the config tells.")
    make(out, "moe-layout-peft-0190", base="gpt-oss",
         formula="per expert (E, out, in) as PEFT 0.19.0 saw gpt-oss: W_e + s*B_e@A_e",
         feature="hand-packed: the layout of PEFT 0.19.0 on is_transposed=True, where it swapped the wrong way round",
         config=LoraConfig(**q, target_parameters=BOTH), after_save=as_version("0.19.0"),
         closed=experts_form(NESTED), options={"moe_layout": "peft-0.19.0"},
         peft_wrong="PEFT 0.21 raises (sizes do not match); PEFT 0.19.0 merges it to these values",
         notes=["The expected values are those of moe-gpt-oss."])
    for suffix, base in (("", "mixtral-fused"), ("-square", "mixtral-fused-square")):
        make(out, f"moe-layout-block-wise{suffix}", base=base,
             formula="per expert W_e + s*B_e@A_e; A row e*r+k, B column e*r+k",
             feature="hand-packed: B in blocks per expert, as some other trainers write it",
             config=LoraConfig(**q, target_parameters=BOTH), after_save=repack(block_wise),
             closed=experts_form(NESTED, block_wise=True), options={"moe_layout": "block-wise"},
             peft_wrong="PEFT reads column k*E+e and merges something else; no shape tells the two packings apart",
             notes=[f"The expected values are those of moe-{'square' if suffix else 'mixtral-fused'}."])


def per_expert_keys(style, targets):
    stem = (EXPERT_MODULE.replace(".mlp.", ".block_sparse_moe.") if style == "mixtral" else EXPERT_MODULE)
    return [f"{stem}.{e}.{t}" for e in range(EXPERTS) for t in targets]


def write_v4_adapter(directory, style, r, alpha, targets, base, rslora=False, fused=False):
    """The keys that transformers 4 and PEFT wrote for experts that were linear
    layers. PEFT under transformers 5 can read them but no longer make them."""
    directory.mkdir(parents=True)
    hidden, inner = 8, 10
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for module in per_expert_keys(style, targets):
        down = module.endswith((".w2", ".down_proj"))
        rows, cols = (hidden, inner) if down else (inner, hidden)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(r, cols, generator=generator) * 0.2
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(rows, r, generator=generator) * 0.1
    q = f"{PREFIX}model.layers.0.self_attn.q_proj"
    tensors[f"{q}.lora_A.weight"] = torch.randn(r, hidden, generator=generator) * 0.2
    tensors[f"{q}.lora_B.weight"] = torch.randn(hidden, r, generator=generator) * 0.1
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = LoraConfig(r=r, lora_alpha=alpha, target_modules=[], use_rslora=rslora, **CAUSAL).to_dict()
    settings = {k: (sorted(v) if isinstance(v, set) else v) for k, v in settings.items()}
    for key in ("peft_version", "target_parameters", "runtime_config", "eva_config", "kasa_config"):
        settings.pop(key, None)
    settings.update(target_modules=sorted(["q_proj", *targets]), base_model_name_or_path=f"bases/{base}",
                    inference_mode=True, peft_type="LORA", task_type="CAUSAL_LM")
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True, default=str))


@tolerant
def make_v4(out, name, *, feature, base, style, base_style, targets, rslora=False, peft_wrong=None, notes=()):
    case = out / name
    case.mkdir(parents=True)
    write_v4_adapter(case / "adapter", style, 2, 5, targets, base, rslora)
    A = Adapter(case / "adapter")
    facts = describe(name, feature, "per expert W + s*B@A", base, ["adapter"], [1.0],
                     ["LORA"] + (["use_rslora"] if rslora else []), {}, {}, notes)
    W = wide(common.read_tensors(Path("bases") / base))
    weights = fused_weights(W, base_style)
    result = {}
    q = "model.layers.0.self_attn.q_proj"
    result[f"{q}.weight"] = W[f"{q}.weight"] + A.scale() * f.product(
        A[f"{q}.lora_A.weight"], A[f"{q}.lora_B.weight"])
    touched = set()
    for module in per_expert_keys(style, targets):
        e, target = int(module.split(".")[-2]), module.split(".")[-1]
        delta = A.scale() * f.product(A[f"{module}.lora_A.weight"], A[f"{module}.lora_B.weight"])
        if target in ("w2", "down_proj"):
            weights["down_proj"][e] += delta
            touched.add("down_proj")
        else:
            half = delta.shape[0]
            start = 0 if target in ("w1", "gate_proj") else half
            weights["gate_up_proj"][e, start:start + half] += delta
            touched.add("gate_up_proj")
    for name_ in touched:
        if base_style:
            result.update({k: v for k, v in split_experts(weights[name_], EXPERT_MODULE, name_, base_style).items()
                           if not np.array_equal(v, W[k])})
        else:
            result[f"{EXPERT_MODULE}.{name_}"] = weights[name_]
    merged = None
    if peft_wrong:
        facts["peft_wrong"] = peft_wrong
    else:
        model = PeftModel.from_pretrained(load_base(base), case / "adapter")
        merged = disk_tensors(model.merge_and_unload(), base)
    finish(case, base, [A], facts, merged, result, 1e-6, peft_wrong)
    facts["versions"] = VERSIONS
    write_facts(case, facts)


@case
def experts_v4(out):
    hand = " (keys written by hand as transformers 4 and PEFT did)"
    for base, style, targets, base_style in (
        ("mixtral", "mixtral", ["w1", "w2", "w3"], "mixtral"),
        ("mixtral-fused", "mixtral", ["w1", "w2", "w3"], None),
        ("qwen3-moe", "qwen", ["gate_proj", "up_proj", "down_proj"], "qwen"),
        ("qwen3-moe-fused", "qwen", ["gate_proj", "up_proj", "down_proj"], None),
    ):
        make_v4(out, f"moe-per-expert-{base}", base=base, style=style, base_style=base_style, targets=targets,
                feature="per-expert adapter on a base with "
                + ("per-expert" if base_style else "fused") + " experts" + hand)
    make_v4(out, "moe-per-expert-one-branch", base="mixtral-fused", style="mixtral", base_style=None,
            targets=["w1"], feature="per-expert adapter on w1 alone, fused base" + hand,
            peft_wrong="PEFT refuses: w1 cannot be converted without w3; the sum itself is well defined")
    make_v4(out, "moe-per-expert-rslora", base="mixtral-fused", style="mixtral", base_style=None,
            targets=["w1", "w2", "w3"], rslora=True, feature="per-expert adapter with rsLoRA, fused base" + hand,
            peft_wrong=RSLORA_V4)


RSLORA_V4 = ("PEFT doubles r and alpha of gate_up_proj, so alpha/sqrt(r) becomes 2*alpha/sqrt(2r): its delta "
             "of w1 and w3 is sqrt(2) times too large")


# ------------------------------------------------------------ LoRA's variants


def lora_variant(W, A, factors):
    """`factors(module, a, b)` gives the product (out, in) without the scale."""
    result = {}
    for m in A.modules(".lora_A.weight"):
        a, b = A[f"{m}.lora_A.weight"], A[f"{m}.lora_B.weight"]
        result[f"{m}.weight"] = W[f"{m}.weight"] + A.scale() * factors(m, a, b)
    return result


@case
def variants(out):
    def kasa(W, A):
        result = {}
        for m in A.modules(".lora_A.weight"):
            a, b = A[f"{m}.lora_A.weight"], A[f"{m}.lora_B.weight"]
            result[f"{m}.weight"] = f.truncated(W[f"{m}.weight"], A.config["r"]) + A.scale() * (
                (b * A[f"{m}.lora_diag"]) @ a)
        return result

    make(out, "kasa", feature="KaSA: the base loses its r smallest singular components first",
         formula="trunc(W) + s*B@diag(lora_diag)@A", base="llama",
         config=LoraConfig(**LORA, **PROJ, kasa_config=peft.KasaConfig()), closed=kasa,
         notes=["PEFT truncates again whenever the adapter is loaded onto a base."])

    def bdlora(W, A):
        c = A.config["use_bdlora"]
        expand = lambda m, which, x: (
            f.block_diagonal(x, c["nblocks"], True)
            if any(t in m for t in (c[f"target_modules_bd_{which}"] or [])) else x)
        return lora_variant(W, A, lambda m, a, b: expand(m, "b", b) @ expand(m, "a", a))

    make(out, "bd-lora", feature="BD-LoRA: A block-diagonal on one target, B on the other",
         formula="W + s*B@A, one factor block_diag of row chunks", base="llama",
         config=LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **CAUSAL,
                           use_bdlora=peft.tuners.lora.config.BdLoraConfig(
                               target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"], nblocks=2)),
         closed=bdlora)
    plain = lambda W, A: lora_variant(W, A, lambda m, a, b: b @ a)
    make(out, "velora", feature="VeLoRA: merges as plain LoRA; an extra lora_velora_embed per layer",
         formula="W + s*B@A", base="llama",
         config=LoraConfig(**LORA, **PROJ, velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=3)),
         closed=plain)
    make(out, "monteclora", feature="MonteCLoRA: merges as plain LoRA; extra sampler tensors",
         formula="W + s*B@A", base="llama",
         config=LoraConfig(**LORA, target_modules=["q_proj"], **CAUSAL,
                           monteclora_config=peft.tuners.lora.config.MontecloraConfig(
                               num_samples=2, buffer_size=2)),
         closed=plain)
    make(out, "mica", feature="MiCA (init_lora_weights='mica'): the base is not changed, merges as plain LoRA",
         formula="W + s*B@A", base="llama",
         config=LoraConfig(**LORA, **PROJ, init_lora_weights="mica"), closed=plain)
    make(out, "orthogonal", feature="init_lora_weights='orthogonal': the base is not changed",
         formula="W + s*B@A", base="llama",
         config=LoraConfig(r=4, lora_alpha=5, **PROJ, init_lora_weights="orthogonal"), closed=plain)
    make(out, "alora", feature="aLoRA", formula="-", base="llama",
         config=LoraConfig(**LORA, **PROJ, alora_invocation_tokens=[5, 6]),
         refused="active only after the invocation tokens, so no single weight has its effect; PEFT raises too")


@case
def lies(out):
    make(out, "fan-in-fan-out-lies-linear", base="llama", formula="W + s*B@A",
         feature="the config says fan_in_fan_out=true, the layers are linear (q_proj square): PEFT goes by the layer",
         config=LoraConfig(**LORA, **PROJ), closed=lora_linear,
         after_save=lambda d: edit_config(d, fan_in_fan_out=True),
         notes=["fan_in_fan_out was changed by the script after saving."])
    make(out, "fan-in-fan-out-lies-conv1d", base="gpt2", formula="DoRA, W + s*(B@A).T",
         feature="the config says fan_in_fan_out=false, the layers are Conv1D (attn.c_proj square), DoRA",
         config=LoraConfig(**LORA, target_modules=["c_attn", "attn.c_proj"], use_dora=True,
                           fan_in_fan_out=True, **CAUSAL),
         closed=lambda W, A: lora_linear(W, A, transposed=["c_attn", "c_proj"]),
         after_save=lambda d: edit_config(d, fan_in_fan_out=False),
         notes=["fan_in_fan_out was changed by the script after saving."])
    make(out, "adapter-name", base="llama", formula="W + s*B@A",
         feature="saved under the adapter name 'style': the files lie in adapter/style/",
         config=LoraConfig(**LORA, **PROJ), closed=lora_linear, adapter_name="style")


# ---------------------------------------------- bases that the adapter changed


def pissa_like(out, kind):
    """residual base, converted adapter, raw adapter."""
    settings = dict(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], **CAUSAL)
    formula = "W' = W_res + s*B@A, W_res = W - s*B0@A0"
    residual = f"llama-{kind}"

    def trained(init):
        model = load_base("llama")
        torch.manual_seed(SEED)
        model = get_peft_model(model, LoraConfig(**settings, init_lora_weights=init))
        return model

    model = trained(kind)
    model.peft_config["default"].init_lora_weights = True
    with tempfile.TemporaryDirectory() as scratch:
        initial = Path(scratch) / "initial"
        model.save_pretrained(initial)
        perturb(model, 0.05)
        # converted: both factors joined with the initial ones, for the original base
        model.save_pretrained(Path(scratch) / "converted", path_initial_model_for_weight_conversion=str(initial))
        # residual base: what is in memory without the adapter
        model.save_pretrained(Path(scratch) / "raw")
        stored = Path("bases") / residual
        stored.parent.mkdir(exist_ok=True)
        if stored.exists():
            shutil.rmtree(stored)
        model.unload().save_pretrained(stored)
        (stored / "generation_config.json").unlink(missing_ok=True)

        # The model that was trained, in f64 from its parts
        def from_directory(directory):
            def copy(target):
                shutil.rmtree(target)
                shutil.copytree(directory, target, ignore=shutil.ignore_patterns("README.md"))
            return copy

        BASES.setdefault(residual, BASES["llama"])
        make(out, f"{kind}-residual", base=residual, formula="W_res + s*B@A",
             feature=f"{kind}: the adapter as saved, on the residual base saved beside it (config already set to "
             "init_lora_weights=true, as PEFT's guide does)",
             config=LoraConfig(**settings), after_save=from_directory(Path(scratch) / "raw"), closed=lora_linear)
        make(out, f"{kind}-converted", base="llama", formula="W + s'*[B,-B0]@[A;A0]",
             feature=f"{kind}: converted by path_initial_model_for_weight_conversion, on the original base (r and "
             "alpha doubled)",
             config=LoraConfig(**settings), after_save=from_directory(Path(scratch) / "converted"),
             closed=lora_linear,
             notes=[f"The result is that of {kind}-residual but for rounding."])
        raw = Path(scratch) / "raw"
        edit_config(raw, init_lora_weights=kind)
        make(out, f"{kind}-raw", base="llama", formula=formula,
             feature=f"{kind}: the raw adapter on the original base",
             config=LoraConfig(**settings), after_save=from_directory(raw),
             refused=f"init_lora_weights={kind} changed the base at initialisation; A and B are no delta to this "
             "base. (PEFT repeats the decomposition when it loads such an adapter.)")


@case
def changed_bases(out):
    pissa_like(out, "pissa")
    pissa_like(out, "olora")
    make(out, "loftq-raw", base="llama", formula="-",
         feature="LoftQ: the raw adapter on the original base (config edited by the script: PEFT's LoftQ "
         "needs scipy)",
         config=LoraConfig(**LORA, **PROJ),
         after_save=lambda d: edit_config(d, init_lora_weights="loftq", loftq_config={
             "loftq_bits": 4, "loftq_iter": 1}),
         refused="init_lora_weights=loftq quantized the base at initialisation; A and B are no delta to this base")


# ------------------------------------------------------------- tied embeddings


@tolerant
def make_tied(out, name, *, feature, targets, untie, both, ensure=False, peft_wrong=None, notes=()):
    base = "llama-tied"
    case = out / name
    case.mkdir(parents=True)
    model = load_base(base)
    torch.manual_seed(SEED)
    config = LoraConfig(**LORA, target_modules=targets, ensure_weight_tying=ensure, **CAUSAL)
    model = get_peft_model(model, config)
    perturb(model)
    save_adapter(model, case / "adapter", save_embedding_layers=False)
    A = Adapter(case / "adapter")
    W = wide(common.read_tensors(Path("bases") / base))
    facts = describe(name, feature, "untie: only the targeted one changes; both: the shared table changes",
                     base, ["adapter"], [1.0], ["LORA"], {}, {}, notes)
    merged = PeftModel.from_pretrained(load_base(base), case / "adapter").merge_and_unload()
    memory = {k: v.detach() for k, v in merged.state_dict().items()}
    results = {"untie": untie(W, A), "both": both(W, A)}
    agreement = {}
    for stem, result in results.items():
        # PEFT against each reading, over the two names in memory
        full = {"model.embed_tokens.weight": W["model.embed_tokens.weight"], **result}
        full.setdefault("lm_head.weight", full["model.embed_tokens.weight"])
        agreement[stem] = float(f"{max(float(np.abs(memory[k].double().numpy() - full[k]).max()) for k in full):.3g}")
        save_numpy({k: np.ascontiguousarray(v) for k, v in sorted(result.items())},
                   case / f"expected_{stem}.safetensors")
    facts["peft_minus_closed"] = agreement
    facts["peft_result"] = [k for k, v in agreement.items() if v < 1e-6]
    facts["peft_config_tie_word_embeddings"] = merged.config.tie_word_embeddings
    facts["peft_tolerance"] = 1e-6
    facts["measured"] = min(agreement.values())
    if not facts["peft_result"]:
        facts["peft_wrong"] = peft_wrong
        facts["measured"] = None
    # Which reading computes what the unmerged adapter computes?
    ids = torch.arange(12)[None]
    adapted = PeftModel.from_pretrained(load_base(base), case / "adapter").eval()
    logits = adapted(ids).logits.detach()
    forward = {}
    for stem, result in results.items():
        plain = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(
            Path("bases") / base, tie_word_embeddings=False)).eval()
        tensors = {**W, **result}
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        plain.load_state_dict({k: torch.tensor(v, dtype=torch.float32) for k, v in tensors.items()})
        forward[stem] = float(f"{float((plain(ids).logits - logits).abs().max()):.3g}")
    facts["logits_minus_unmerged_adapter"] = forward
    facts["changed"] = {k: sorted(set(v) & set(W)) for k, v in results.items()}
    facts["added"] = {k: sorted(set(v) - set(W)) for k, v in results.items()}
    facts["config_changes"] = {"untie": {"tie_word_embeddings": False}, "both": {}}
    facts["versions"] = VERSIONS
    write_facts(case, facts)


@case
def tied(out):
    table, head = "model.embed_tokens.weight", "lm_head.weight"

    def head_delta(A):
        return A.scale() * f.product(A["lm_head.lora_A.weight"], A["lm_head.lora_B.weight"])

    def table_delta(A):
        m = "model.embed_tokens"
        return A.scale() * f.product(A[f"{m}.lora_embedding_A"], A[f"{m}.lora_embedding_B"]).T

    def others(W, A):
        return {k: v for k, v in lora_linear({**W, head: W[table]}, A).items() if k not in (table, head)}

    make_tied(out, "tied-head", feature="LoRA on lm_head of a tied model", targets=["q_proj", "lm_head"],
              untie=lambda W, A: {**others(W, A), head: W[table] + head_delta(A)},
              both=lambda W, A: {**others(W, A), table: W[table] + head_delta(A)})
    make_tied(out, "tied-embedding", feature="LoRA on embed_tokens of a tied model",
              targets=["q_proj", "embed_tokens"],
              untie=lambda W, A: {**others(W, A), table: W[table] + table_delta(A), head: W[table]},
              both=lambda W, A: {**others(W, A), table: W[table] + table_delta(A)})
    make_tied(out, "tied-embedding-and-head", feature="LoRA on embed_tokens and lm_head of a tied model",
              targets=["embed_tokens", "lm_head"],
              untie=lambda W, A: {table: W[table] + table_delta(A), head: W[table] + head_delta(A)},
              both=lambda W, A: {table: W[table] + table_delta(A) + head_delta(A)})
    make_tied(out, "tied-ensured", ensure=True, targets=["embed_tokens"],
              feature="ensure_weight_tying=True on embed_tokens of a tied model",
              untie=lambda W, A: {table: W[table] + table_delta(A), head: W[table] + head_delta(A)},
              both=lambda W, A: {table: W[table] + table_delta(A)},
              peft_wrong="PEFT adds the delta of embed_tokens and the equal one of lm_head to the one shared table, "
              "W + 2*delta; its own forward pass uses W + delta in both places",
              notes=["lm_head.lora_A is embed_tokens.lora_embedding_B transposed, and the other way round: one "
                     "delta, saved twice. Both readings agree on the values."])


# -------------------------------------------------------------- other methods


def per_module(suffix, form):
    """closed form over every module that has a tensor with this suffix."""

    def closed(W, A):
        result = {}
        for m in A.modules(suffix):
            value = form(W[f"{m}.weight"], A, m)
            if isinstance(value, tuple):
                result[f"{m}.weight"], bias = value[0], value[1](W.get(f"{m}.bias"))
                if bias is not None:
                    result[f"{m}.bias"] = bias
            else:
                result[f"{m}.weight"] = value
        return result

    return closed


def flat(W, matrix):
    return (W.reshape(W.shape[0], -1) @ matrix).reshape(W.shape)


class DenseBlocks:
    """Stands in for the CUDA kernel of BOFT: (N, D, b, b) -> (N, D*b, D*b)."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*torch.unbind(b)) for b in blocks])


@contextlib.contextmanager
def butterfly_kernel():
    import peft.tuners.boft.layer as boft

    before = boft.get_fbd_cuda, boft.FastBlockDiag
    boft.get_fbd_cuda, boft.FastBlockDiag = (lambda: True), DenseBlocks
    try:
        yield
    finally:
        boft.get_fbd_cuda, boft.FastBlockDiag = before


@case
def rotations(out):
    pair = dict(target_modules=["k_proj", "down_proj"], **CAUSAL)
    boft = per_module(".boft_R", lambda W, A, m: flat(W, f.boft_matrix(A[f"{m}.boft_R"]).T)
                      * A[f"{m}.boft_s"].reshape(-1, *[1] * (W.ndim - 1)))
    make(out, "boft", feature="BOFT, boft_block_size; one butterfly factor (all that PEFT does without its CUDA kernel)",
         formula="(W @ M.T) * s[:,None], M = blocks of Cayley((R-R.T)/2)", base="llama",
         config=peft.BOFTConfig(boft_block_size=6, **pair), deviation=0.1, closed=boft)
    with butterfly_kernel():
        make(out, "boft-butterfly", feature="BOFT with boft_n_butterfly_factor=2, a dense stand-in for the CUDA kernel",
             formula="M = M1@M0, Mi = Pi@blocks(Ri)@Pi.T", base="llama",
             config=peft.BOFTConfig(boft_block_size=6, boft_n_butterfly_factor=2,
                                    target_modules=["q_proj", "k_proj"], **CAUSAL), deviation=0.1,
             closed=boft)
    make(out, "boft-conv2d", feature="BOFT on Conv2d: rotation over in*k*k, boft_s (1, out)",
         formula="(W.reshape(out,-1) @ M.T) * s", base="layers",
         config=peft.BOFTConfig(boft_block_size=6, target_modules=["conv2"]), deviation=0.1, closed=boft)
    for name, gs in (("hra", False), ("hra-gram-schmidt", True)):
        make(out, name, feature="HRA" + (" with apply_GS" if gs else "") + " on linear and Conv2d",
             formula="W @ prod_i (I - 2*u_i@u_i.T/|u_i|^2)" + (", u orthogonalised first" if gs else ""),
             base="layers", config=peft.HRAConfig(r=3, apply_GS=gs, target_modules=["linear", "conv2"], init_weights=False),
             deviation=0.1, closed=per_module(
                 ".hra_u", lambda W, A, m: flat(W, f.householder(A[f"{m}.hra_u"], A.config["apply_GS"]))))
    for variant in ("road_1", "road_2", "road_4"):
        rotate = lambda A, m: f.road(A.config["variant"], A.config["group_size"], A[f"{m}.road_theta"],
                                     A[f"{m}.road_alpha"])
        make(out, variant.replace("_", "-"), feature=f"RoAd, {variant}; weight and bias",
             formula="R@W, R@bias", base="llama-bias",
             config=peft.RoadConfig(variant=variant, group_size=6, target_modules=["q_proj", "k_proj"], **CAUSAL),
             deviation=0.2, closed=per_module(".road_theta", lambda W, A, m: (
                 rotate(A, m) @ W, lambda b: None if b is None else rotate(A, m) @ b)))


@case
def additive(out):
    pair = dict(target_modules=["k_proj", "down_proj"], **CAUSAL)

    def vblora(W, A, m):
        bank = A["base_model.vblora_vector_bank"]
        factors = []
        for x in "AB":
            if f"{m}.vblora_logits_{x}" in A:
                factors.append(f.vblora_factor(A[f"{m}.vblora_logits_{x}"], bank, A.config["topk"]))
            else:
                factors.append(f.vblora_stored(A[f"{m}.vblora_logits_{x}_topk_indices"],
                                               A[f"{m}.vblora_logits_{x}_topk_weights"], bank))
        return W + f.vblora(*factors)

    for name, only in (("vblora", False), ("vblora-topk", True)):
        make(out, name, base="llama",
             feature="VB-LoRA" + (", save_only_topk_weights: indices and all weights but the last" if only else ""),
             formula="W + B@A, rows mixed from the vector bank by softmax over the top k",
             config=peft.VBLoRAConfig(r=2, num_vectors=12, vector_length=6, topk=2, save_only_topk_weights=only,
                                      **pair),
             overrides={"vector_bank": 0.3, "logits": 0.5},
             closed=per_module(".vblora_logits_A" + ("_topk_indices" if only else ""), vblora))
    make(out, "fourierft", feature="FourierFT", formula="-", base="llama",
         config=peft.FourierFTConfig(n_frequency=12, **pair), deviation=1.0,
         refused="the places of the spectrum are drawn from torch's random number generator with "
         "random_loc_seed; they are in no file")
    randlora = per_module(".randlora_lambda", lambda W, A, m: W
                          + A.config["randlora_alpha"] / A.config["r"] * f.randlora(
                              A["base_model.randlora_A"], A["base_model.randlora_B"], A[f"{m}.randlora_lambda"],
                              A[f"{m}.randlora_gamma"], W.shape))
    make(out, "randlora", feature="RandLoRA, bases saved; in > out, in < out and equal",
         formula="W + alpha/r * B@(lambda*A*gamma)", base="llama",
         config=peft.RandLoraConfig(r=4, randlora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"], **CAUSAL),
         overrides={"lambda": 0.2, "gamma": 0.05}, closed=randlora, tolerance=1e-6)
    make(out, "randlora-no-projection", feature="RandLoRA, save_projection=False", formula="-", base="llama",
         config=peft.RandLoraConfig(r=4, save_projection=False, **pair),
         refused="randlora_A and randlora_B are not in the file; they come from torch's random number generator")

    def shira(W, A, m):
        result = W.copy()
        rows, cols = A[f"{m}.shira_indices"].astype(int)
        np.add.at(result, (rows, cols), A[f"{m}.shira_weight"])
        return result

    make(out, "shira", feature="SHiRA: sparse values at stored (int) places", formula="W[i,j] += v",
         base="llama", config=peft.ShiraConfig(r=2, random_seed=7, **pair), closed=per_module(".shira_weight", shira))
    make(out, "c3a", feature="C3A: block-circulant", formula="W + circ/in; block (p,l) = kernel[(l-p) % b]",
         base="llama", config=peft.C3AConfig(block_size=6, **pair), deviation=1.0,
         closed=per_module(".c3a_kernel", lambda W, A, m: W + f.c3a(A[f"{m}.c3a_kernel"], W.shape[1])))
    make(out, "delora", feature="DeLoRA, with the stored column norms of the base",
         formula="W + B@diag(lambda/(r*|A_i|*|B_i|))@A * w_norm[None,:]", base="llama",
         config=peft.DeloraConfig(r=3, delora_lambda=5, **pair), deviation=0.1,
         closed=per_module(".delora_A", lambda W, A, m: W + f.delora(
             A[f"{m}.delora_A"], A[f"{m}.delora_B"], A[f"{m}.delora_lambda"], A[f"{m}.delora_w_norm"],
             A.config["r"])))

    def gralora(W, A, m):
        c = A.config
        delta = f.gralora(A[f"{m}.gralora_A"], A[f"{m}.gralora_B"])
        if c["hybrid_r"]:
            delta = delta + A[f"{m}.gralora_B_general.weight"] @ A[f"{m}.gralora_A_general.weight"]
        return W + c["alpha"] / (c["r"] + c["hybrid_r"]) * delta

    for name, hybrid in (("gralora", 0), ("gralora-hybrid", 2)):
        make(out, name, feature="GraLoRA" + (" with hybrid_r" if hybrid else ""),
             formula="W + alpha/(r+hybrid_r) * (blocks" + (" + B@A)" if hybrid else ")"), base="llama",
             config=peft.GraloraConfig(r=4, alpha=6, gralora_k=2, hybrid_r=hybrid, **pair),
             closed=per_module(".gralora_A", gralora))

    def hira(W, A, m):
        a, b = A[f"{m}.hira_A"], A[f"{m}.hira_B"]
        return W * (1 + (f.product_conv(a, b, W.shape) if W.ndim > 2 else b @ a))

    make(out, "hira", feature="HiRA on linear and Conv2d; no alpha", formula="W * (1 + B@A)", base="layers",
         config=peft.HiraConfig(r=3, target_modules=["linear", "plain", "conv2"]), deviation=0.3,
         closed=per_module(".hira_A", hira))


@case
def hira_embedding(out):
    make(out, "hira-embedding", feature="HiRA on an embedding", formula="W * (1 + (B@A).T)", base="layers",
         config=peft.HiraConfig(r=3, target_modules=["embedding"]), deviation=0.3,
         closed=per_module(".hira_embedding_A", lambda W, A, m: W * (
             1 + (A[f"{m}.hira_embedding_B"] @ A[f"{m}.hira_embedding_A"]).T)))


@case
def glora(out):
    def path(A, m, letter):
        if f"{m}.glora_{letter}.Xd" in A:
            return A[f"{m}.glora_{letter}.Xd"] @ A[f"{m}.glora_{letter}.Xu"]
        return A[f"{m}.glora_{letter}.X"] if f"{m}.glora_{letter}.X" in A else 0.0

    def closed(W, A):
        result = {}
        modules = sorted({k.rpartition(".glora_")[0] for k in A.tensors})
        for m in modules:
            weight = W[f"{m}.weight"]
            result[f"{m}.weight"] = weight + weight * path(A, m, "A") + path(A, m, "B")
            if f"{m}.bias" in W:
                bias, c = W[f"{m}.bias"], path(A, m, "C")
                through = (weight @ c).reshape(-1) if isinstance(c, np.ndarray) else 0.0
                new = bias + bias * path(A, m, "D") + path(A, m, "E") + through
                if not np.array_equal(new, bias):
                    result[f"{m}.bias"] = new
        return result

    targets = dict(target_modules=["q_proj", "down_proj"], **CAUSAL)
    formula = "W + W*A + B; bias + bias*D + E + W@C"
    make(out, "glora", feature="GLoRA: A, B, C low-rank, D, E vectors", formula=formula, base="llama-bias",
         config=peft.GloraConfig(r=2, config_A_B="lora", config_C="lora", config_D_E="vector", **targets),
         deviation=0.1, closed=closed)
    make(out, "glora-vector", feature="GLoRA: A, B, C vectors, D, E constants", formula=formula, base="llama-bias",
         config=peft.GloraConfig(r=2, config_A_B="vector", config_C="vector", config_D_E="constant", **targets),
         deviation=0.1, closed=closed)
    make(out, "glora-constant", feature="GLoRA: A, B constants, the rest off, layers without bias", formula=formula,
         base="llama", config=peft.GloraConfig(r=2, config_A_B="constant", config_C="none", config_D_E="none", **targets),
         deviation=0.1, closed=closed)


@case
def norm_tuning(out):
    def closed(W, A):
        return {k.replace(".ln_tuning_layers.", ".").replace(".base_layer.", "."): v for k, v in A.tensors.items()}

    make(out, "ln-tuning", feature="LN tuning on RMSNorm", formula="weight := saved", base="llama",
         config=peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **CAUSAL), closed=closed)
    make(out, "ln-tuning-bias", feature="LN tuning on LayerNorm (weight and bias)", formula="weight, bias := saved",
         base="gpt2", config=peft.LNTuningConfig(target_modules=["ln_1", "ln_f"], **CAUSAL), closed=closed)


@case
def conv1d_additive(out):
    c_attn = dict(target_modules=["c_attn"], fan_in_fan_out=True, **CAUSAL)
    make(out, "vblora-conv1d-gpt2", feature="VB-LoRA on GPT-2's Conv1D", formula="W + (B@A).T", base="gpt2",
         config=peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=6, topk=2, **c_attn),
         overrides={"vector_bank": 0.3, "logits": 0.5},
         closed=per_module(".vblora_logits_A", lambda W, A, m: W + f.vblora(*(
             f.vblora_factor(A[f"{m}.vblora_logits_{x}"], A["base_model.vblora_vector_bank"], A.config["topk"])
             for x in "AB")).T))
    make(out, "randlora-conv1d-gpt2", feature="RandLoRA on GPT-2's Conv1D", formula="W + (..).T", base="gpt2",
         config=peft.RandLoraConfig(r=4, randlora_alpha=8, **c_attn), overrides={"lambda": 0.2, "gamma": 0.05},
         closed=per_module(".randlora_lambda", lambda W, A, m: W + 2 * f.randlora(
             A["base_model.randlora_A"], A["base_model.randlora_B"], A[f"{m}.randlora_lambda"],
             A[f"{m}.randlora_gamma"], W.shape[::-1]).T))
    make(out, "gralora-conv1d-gpt2", feature="GraLoRA on GPT-2's Conv1D", formula="W + (..).T", base="gpt2",
         config=peft.GraloraConfig(r=4, alpha=6, gralora_k=2, **c_attn),
         closed=per_module(".gralora_A", lambda W, A, m: W + 6 / 4 * f.gralora(
             A[f"{m}.gralora_A"], A[f"{m}.gralora_B"]).T))
    make(out, "hira-conv1d-gpt2", feature="HiRA on GPT-2's Conv1D", formula="W * (1 + (B@A).T)", base="gpt2",
         config=peft.HiraConfig(r=3, **c_attn), deviation=0.3,
         closed=per_module(".hira_A", lambda W, A, m: W * (1 + (A[f"{m}.hira_B"] @ A[f"{m}.hira_A"]).T)))


@case
def conv1d_others(out):
    make(out, "adalora-conv1d-gpt2", base="gpt2", feature="AdaLoRA on GPT-2's Conv1D",
         formula="W + (B@(A*E)).T * alpha/(init_r + 1e-5)",
         config=peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=6, total_step=10, fan_in_fan_out=True,
                                   target_modules=["c_attn"], **CAUSAL),
         deviation=0.3, closed=lambda W, A: adalora_form(W, A, ["c_attn"]))
    make(out, "adalora-conv2d", base="layers", feature="AdaLoRA on Conv2d, lora_A (r, in*k*k)",
         formula="W + (B@(A*E)).view * alpha/(init_r + 1e-5)",
         config=peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=6, total_step=10, target_modules=["conv2"]),
         deviation=0.3, closed=adalora_form)


# -------------------------------------------------------------------- loralib


class Qkv(nn.Module):
    """A tiny model of loralib layers."""

    def __init__(self, r=2, alpha=6, enable=(True, False, True)):
        super().__init__()
        self.emb = lora.Embedding(10, 6, r=r, lora_alpha=alpha)
        self.qkv = lora.MergedLinear(6, 18, r=r, lora_alpha=alpha, enable_lora=list(enable))
        self.all = lora.MergedLinear(6, 18, r=r, lora_alpha=alpha, enable_lora=[True] * 3)
        self.c_attn = lora.MergedLinear(6, 18, r=r, lora_alpha=alpha, enable_lora=list(enable), fan_in_fan_out=True)
        self.dense = lora.Linear(6, 8, r=r, lora_alpha=alpha)
        self.conv = lora.Conv2d(4, 6, 3, r=r, lora_alpha=alpha)


def loralib_base(model):
    """Names of the model without LoRA: loralib keeps Conv2d's weight under .conv."""
    return {k.replace("conv.conv.", "conv."): v.detach().clone().contiguous()
            for k, v in model.state_dict().items() if "lora_" not in k}


@tolerant
def make_loralib(out, name, *, feature, formula, modules, bias="none", options=None, closed, notes=()):
    base = "loralib"
    case = out / name
    (case / "adapter").mkdir(parents=True)
    torch.manual_seed(SEED)
    model = Qkv().train()  # train mode: not merged
    generator = torch.Generator().manual_seed(SEED)
    stored = load_file(Path("bases") / base / "model.safetensors")
    assert all(torch.equal(v, stored[k]) for k, v in loralib_base(model).items())
    for key, parameter in sorted(model.named_parameters()):
        if "lora_" in key:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        elif key.endswith("bias") and bias != "none":
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tensors = {k: v for k, v in lora.lora_state_dict(model, bias=bias).items()
               if k.split(".")[0] in modules}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, case / "adapter" / "adapter.safetensors",
              metadata={"format": "pt"})
    A = Adapter(case / "adapter")
    for key, parameter in model.named_parameters():
        if key.split(".")[0] not in modules and "lora_" in key:
            parameter.data.zero_()
        elif key.split(".")[0] not in modules and key.endswith("bias"):
            parameter.data.copy_(stored[key.replace("conv.conv.", "conv.")])
    model.eval()  # merges
    merged = loralib_base(model)
    facts = describe(name, feature, formula, base, ["adapter/adapter.safetensors"], [1.0], ["loralib"],
                     options, {}, notes)
    W = wide(stored)
    finish(case, base, [A], facts, merged, closed(W, A), 1e-6, None)
    facts["versions"] = {**VERSIONS, "loralib": metadata.version("loralib")}
    write_facts(case, facts)


@case
def loralib_cases(out):
    torch.manual_seed(SEED)
    base = Path("bases") / "loralib"
    base.mkdir(parents=True, exist_ok=True)
    save_file(loralib_base(Qkv().train()), base / "model.safetensors", metadata={"format": "pt"})
    common.write_json(base / "config.json", {"architectures": ["Qkv"], "model_type": "custom"})
    s = 6 / 2

    def merged_linear(W, A, m, enable, flip=False):
        delta = s * f.merged_linear(A[f"{m}.lora_A"], A[f"{m}.lora_B"], enable)
        return {f"{m}.weight": W[f"{m}.weight"] + (delta.T if flip else delta)}

    some = [True, False, True]
    formula = "per enabled group g: W[g] + alpha/r * B[g]@A[g*r:(g+1)*r]"
    alpha = {"alpha": 6}
    make_loralib(out, "loralib-merged-linear", modules=["qkv"], feature="loralib MergedLinear, enable_lora [T,F,T]",
                 formula=formula, options={**alpha, "enable_lora": some},
                 closed=lambda W, A: merged_linear(W, A, "qkv", some))
    make_loralib(out, "loralib-merged-linear-all", modules=["all"], feature="loralib MergedLinear, enable_lora [T,T,T]",
                 formula=formula, options={**alpha, "enable_lora": [True] * 3},
                 closed=lambda W, A: merged_linear(W, A, "all", [True] * 3))
    make_loralib(out, "loralib-merged-linear-conv1d", modules=["c_attn"],
                 feature="loralib MergedLinear as in its GPT-2: fan_in_fan_out, [T,F,T]", formula=formula + ", transposed",
                 options={**alpha, "enable_lora": some, "fan_in_fan_out": True},
                 closed=lambda W, A: merged_linear(W, A, "c_attn", some, True))
    make_loralib(out, "loralib-linear", modules=["dense"], feature="loralib Linear", formula="W + alpha/r*B@A", options=alpha,
                 closed=lambda W, A: {"dense.weight": W["dense.weight"] + s * A["dense.lora_B"] @ A["dense.lora_A"]})
    make_loralib(out, "loralib-linear-bias", modules=["dense"], bias="lora_only",
                 feature="loralib Linear with lora_state_dict(bias='lora_only'): the bias replaces",
                 formula="W + alpha/r*B@A; bias := saved", options=alpha,
                 closed=lambda W, A: {"dense.weight": W["dense.weight"] + s * A["dense.lora_B"] @ A["dense.lora_A"],
                                      "dense.bias": A["dense.bias"]})
    make_loralib(out, "loralib-embedding", modules=["emb"], feature="loralib Embedding; plain lora_A (r,V), lora_B (d,r)",
                 formula="W + alpha/r*(B@A).T", options=alpha,
                 closed=lambda W, A: {"emb.weight": W["emb.weight"] + s * (A["emb.lora_B"] @ A["emb.lora_A"]).T})
    make_loralib(out, "loralib-conv2d", modules=["conv"], feature="loralib Conv2d; lora_A (r*k, in*k), lora_B (out*k, r*k)",
                 formula="W + alpha/r*(B@A).view(W.shape)", options=alpha,
                 closed=lambda W, A: {"conv.weight": W["conv.weight"] + s * (
                     A["conv.lora_B"] @ A["conv.lora_A"]).reshape(W["conv.weight"].shape)},
                 notes=["In loralib the wrapped layer is conv.conv; the base here has the plain name conv.weight. "
                        "r is not a dimension of either factor: r*k is."])


# ----------------------------------------------------------- several adapters


@tolerant
def make_several(out, name, *, feature, formula, base, configs, weights, closed, in_peft=True,
                 peft_wrong=None, tolerance=1e-6, notes=(), deviations=None):
    """Several adapters, each made on its own; PEFT merges them one after the
    other with every scale multiplied by its weight."""
    case = out / name
    case.mkdir(parents=True)
    paths = [f"adapter-{chr(ord('a') + i)}" for i in range(len(configs))]
    methods, parsed = [], []
    for i, (path, config) in enumerate(zip(paths, configs)):
        model = load_base(base)
        torch.manual_seed(SEED + i)
        methods.append(method_names(config))
        model = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(SEED + i)
        for key, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                amount = (deviations or [0.05] * len(configs))[i]
                if "magnitude" in key:
                    parameter.data.mul_(1 + 0.2 * noise)
                else:
                    parameter.data.add_(amount * noise)
        save_adapter(model, case / path)
        parsed.append(Adapter(case / path))
    facts = describe(name, feature, formula, base, paths, weights,
                     sorted({m for ms in methods for m in ms}), {}, {}, notes)
    merged = None
    if in_peft:
        model = load_base(base)
        model = PeftModel.from_pretrained(model, case / paths[0], adapter_name="a0")
        for i, path in enumerate(paths[1:], 1):
            model.load_adapter(case / path, adapter_name=f"a{i}")
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                for i, weight in enumerate(weights):
                    if f"a{i}" in module.scaling:
                        module.scaling[f"a{i}"] *= weight
        merged = model.merge_and_unload(adapter_names=[f"a{i}" for i in range(len(paths))])
        merged = disk_tensors(merged, base)
    W = wide(common.read_tensors(Path("bases") / base))
    if peft_wrong:
        facts["peft_wrong"] = peft_wrong
    finish(case, base, parsed, facts, merged, closed(W, *parsed), tolerance, peft_wrong)
    facts["versions"] = VERSIONS
    write_facts(case, facts)


def summed(W, weights, results):
    """W0 + sum of w_i * (f_i(W0) - W0)."""
    total = {}
    for weight, result in zip(weights, results):
        for name, value in result.items():
            total[name] = total.get(name, W[name]) + weight * (value - W[name])
    return total


@case
def several(out):
    def plain(weights):
        return lambda W, *adapters: summed(W, weights, [lora_linear(W, a) for a in adapters])

    plain_lora = lambda targets, **more: LoraConfig(target_modules=targets, **CAUSAL, **more)
    make_several(out, "two-lora", feature="two plain LoRA adapters of different rank, weights 0.7 and 0.3",
                 formula="W + sum w_i*s_i*B_i@A_i", base="llama",
                 configs=[plain_lora(["q_proj", "down_proj"], r=3, lora_alpha=5),
                          plain_lora(["q_proj", "down_proj"], r=5, lora_alpha=4)],
                 weights=[0.7, 0.3], closed=plain([0.7, 0.3]))
    make_several(out, "two-lora-overlap", feature="LoRA and rsLoRA on partly the same layers",
                 formula="W + sum w_i*s_i*B_i@A_i", base="llama-bf16",
                 configs=[plain_lora(["q_proj", "v_proj"], r=3, lora_alpha=5),
                          plain_lora(["v_proj", "down_proj"], r=4, lora_alpha=5, use_rslora=True)],
                 weights=[1.0, 0.5], closed=plain([1.0, 0.5]))
    make_several(out, "three-lora", feature="three LoRA adapters",
                 formula="W + sum w_i*s_i*B_i@A_i", base="llama",
                 configs=[plain_lora(["q_proj"], r=2, lora_alpha=4), plain_lora(["q_proj", "v_proj"], r=3, lora_alpha=4),
                          plain_lora(["q_proj", "v_proj", "up_proj"], r=1, lora_alpha=2)],
                 weights=[0.5, 0.25, 0.25], closed=plain([0.5, 0.25, 0.25]))
    make_several(out, "two-lora-negative", feature="two LoRA adapters, the second with weight -0.5",
                 formula="W + sum w_i*s_i*B_i@A_i", base="llama",
                 configs=[plain_lora(["q_proj", "down_proj"], r=3, lora_alpha=5),
                          plain_lora(["q_proj", "down_proj"], r=3, lora_alpha=5)],
                 weights=[1.0, -0.5], closed=plain([1.0, -0.5]))
    make_several(out, "lora-dora", feature="LoRA and DoRA on the same layer",
                 formula="W + w1*D1 + w2*(f2(W) - W)", base="llama",
                 configs=[plain_lora(["q_proj", "down_proj"], r=3, lora_alpha=5),
                          plain_lora(["q_proj"], r=3, lora_alpha=5, use_dora=True)],
                 weights=[1.0, 0.5], closed=plain([1.0, 0.5]), in_peft=False,
                 peft_wrong="PEFT merges one after the other, so its DoRA rescales the first adapter's "
                 "delta too and the result depends on the order; it has no weight for DoRA either")
    make_several(out, "lora-ia3", feature="LoRA and IA3 on the same layer",
                 formula="W + w1*D1 + w2*(W*l - W); bias + w2*(bias*l - bias)", base="llama-bias",
                 configs=[plain_lora(["k_proj", "down_proj"], r=3, lora_alpha=5),
                          peft.IA3Config(target_modules=["k_proj", "down_proj"],
                                         feedforward_modules=["down_proj"], **CAUSAL)],
                 weights=[1.0, 0.5], deviations=[0.05, 0.2],
                 closed=lambda W, a, b: summed(W, [1.0, 0.5],
                                               [lora_linear(W, a), ia3_form(W, b, ["down_proj"])]),
                 in_peft=False, peft_wrong="PEFT cannot load LoRA and IA3 into one model")


# ------------------------------------------------------------------------ main


def write_readme(out):
    rows = []
    for path in sorted(out.glob("*/case.json")):
        facts = json.loads(path.read_text())
        tensors = []
        for entry in facts["adapters"]:
            place = path.parent / entry["path"]
            files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
            label = f"{entry['path']}: " if len(facts["adapters"]) > 1 else ""
            for file in files:
                for key, tensor in sorted(load_file(file).items()):
                    key = key.removeprefix(PREFIX).replace("model.layers.0.", "L0.")
                    key = key.replace("transformer.h.0.", "H0.")
                    tensors.append(f"{label}`{key}` {'x'.join(map(str, tensor.shape))}")
        tensors = ", ".join(tensors)
        if facts.get("refused"):
            difference = "refused"
        elif facts["measured"] is None:
            difference = "closed form only"
        else:
            difference = f"{facts['measured']:.1e}"
        formula = facts["formula"].replace("|", "\\|")
        rows.append(f"| `{facts['case']}` | {facts['feature']} | {formula} | {tensors} | {difference} |")
    text = README + "\n".join(rows) + "\n"
    (out / "README.md").write_text(text)


README = """# Feature fixtures

Written by `scripts/make_feature_fixtures.py` (PEFT, transformers, torch and
loralib as pinned in `scripts/requirements.txt`); nothing is edited by hand.
The closed forms are in `scripts/feature_formulas.py`.

One directory per case. `case.json` names the base under `bases/`, the
adapters with their weights, the options, the tensors that change
(`changed`) or are new (`added`), what must change in the base's config.json
(`config_changes`), the largest difference between PEFT in f32 and the closed
form in f64 that was `measured`, and the one that a test may allow
(`peft_tolerance`). `refused` says why an adapter must not be merged (no
expected files then); `peft_wrong` why there is only the closed form.

Keys are given without PEFT's prefix `base_model.model.` (`base_model.vera_A`
and the like have another prefix and are given in full), and `L0.` stands for
`model.layers.0.`, `H0.` for `transformer.h.0.`.

More files and fields in some cases:

* `expected_once_f64.safetensors` (multihead-attention): out_proj's delta once, where PEFT adds it twice.
* `expected_untie.safetensors`, `expected_both.safetensors` (tied, F64): the two readings of an adapter on a shared
  table; `peft_minus_closed` says how far PEFT's merge is from each, `logits_minus_unmerged_adapter` how far each is
  from what PEFT computes without merging. (PEFT merges to `both`, and computes `untie`.)
* `options.moe_layout`: how the expert factors are packed where it is not PEFT's way of today; `options.alpha`,
  `options.enable_lora` and `options.fan_in_fan_out`: what loralib does not store.
* `absent_in_peft`: base tensors that the model class of the adapter does not have.

Bases: `mixtral` and `qwen3-moe` have per-expert names, as transformers 5 saves them; the `-fused` ones the names that
the same models have in memory; `llama-pissa` and `llama-olora` are residual bases; `layers`, `attention`, `matrix`
and `loralib` are plain torch modules; `llama-bf16` is bf16, the others f32.

| Case | Feature | Formula | Adapter tensors | PEFT - f64 |
|---|---|---|---|---|
"""


def generate(out, only=None):
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for name in BASES:
            write_base(scratch / "bases", name)
        with working_directory(scratch):
            for function in CASES:
                if only and not any(function.__name__.startswith(o) for o in only):
                    continue
                print(function.__name__, flush=True)
                function(scratch)
        for path in sorted(scratch.iterdir()):
            target = out / path.name
            if path.name == "bases":
                for base in sorted(path.iterdir()):
                    sync(base, target / base.name)
                if not only:
                    for stale in set(os.listdir(target)) - set(os.listdir(path)):
                        shutil.rmtree(target / stale)
            else:
                sync(path, target)
        if not only:
            for stale in [p for p in out.iterdir() if p.is_dir() and not (scratch / p.name).exists()]:
                shutil.rmtree(stale)
    write_readme(out)
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def sync(source, target):
    if target.exists() and not common.filecmp.dircmp(source, target).right_only:
        same = all(
            (target / p.relative_to(source)).is_file()
            and common.filecmp.cmp(p, target / p.relative_to(source), False)
            for p in source.rglob("*") if p.is_file()
        ) and len(list(source.rglob("*"))) == len(list(target.rglob("*")))
        if same:
            return
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "fixtures" / "features")
    parser.add_argument("--only", nargs="+", help="groups (functions) by prefix, the others stay")
    parser.add_argument("--check", action="store_true", help="compare, write nothing there")
    arguments = parser.parse_args()
    if not arguments.check:
        generate(arguments.out.resolve(), arguments.only)
        print("failed:", *FAILED if FAILED else ["none"])
        return 1 if FAILED else 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch) / "features")
        return 0 if common.compare(arguments.out, Path(scratch) / "features") else 1


if __name__ == "__main__":
    sys.exit(main())
