#!/usr/bin/env python3
"""Writes fixtures/native/: the test vectors of docs/FORMAT.md.

NumPy only, no randomness: two runs give the same bytes. Each file has its
description beside it; `bad/` holds one file per rule that a reader must refuse.

    python3 scripts/make_native_fixtures.py            rewrite fixtures/native
    python3 scripts/make_native_fixtures.py --check    regenerate elsewhere, compare
"""

import argparse
import copy
import json
import math
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

import lora_format as lf
from lora_format import Adapter, Added, Base, Component, OfForm, Replaced, Rows, Tensor

NATIVE = Path(__file__).resolve().parent.parent / "fixtures" / "native"


# ---------------------------------------------------------------- tensors


def tensor(dtype, *shape, seed=1):
    """Values in (-1, 1) that fill the mantissa, by a multiplicative hash."""
    index = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(seed * 7919)
    hashed = (index * np.uint64(lf.GOLDEN)) >> np.uint64(40)
    values = (hashed.astype(np.float64) / 2**23 - 1).astype(np.float32)
    if dtype == "BF16":
        data = (lf.rounded(values, dtype).view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    return Tensor(dtype, list(shape), data)


def component(module, rank=2, alpha=16.0, rule="alpha/rank", dtypes="F32", shape=(4, 3), seed=1):
    """`dtypes` is that of both factors, or those of A and B."""
    a, b = dtypes.split() * 2 if " " not in dtypes else dtypes.split()
    a = tensor(a, rank, shape[1], seed=2 * seed)
    return Component(module, a, tensor(b, shape[0], rank, seed=2 * seed + 1), float(alpha), rule)


# ---------------------------------------------------------------- well-formed files


def layers(count=2, **keywords):
    return [component(f"model.layers.{i}.q_proj", seed=i, **keywords) for i in range(count)]


def convolution(module, kernel, rank=2, alpha=16.0, rule="alpha/rank", dtype="F32", shape=(4, 3), seed=1):
    a = tensor(dtype, rank, shape[1], *kernel, seed=2 * seed)
    b = tensor(dtype, shape[0], rank, *(1 for _ in kernel), seed=2 * seed + 1)
    return Component(module, a, b, alpha, rule)


def embedding(module, rank=2, alpha=16.0, shape=(5, 3), seed=1, **keywords):
    """`shape` is vocabulary × dimension."""
    a, b = tensor("F32", rank, shape[0], seed=2 * seed), tensor("F32", shape[1], rank, seed=2 * seed + 1)
    return Component(module, a, b, alpha, "alpha/rank", kind="embedding", **keywords)


def with_magnitude(component, dtype="F32", seed=9):
    component.magnitude = tensor(dtype, component.b.shape[0], seed=seed)
    return component


def opaque(dtype, *shape):
    """A tensor of a dtype that nothing is computed with: its bytes count up."""
    return Tensor(dtype, list(shape), bytes(i & 0xFF for i in range(math.prod(shape) * lf.DTYPES[dtype] // 8)))


def norm(module="model.norm", seed=11):
    return Replaced(module, "weight", tensor("BF16", 6, seed=seed))


def rows(module="model.embed_tokens", indices=(0, 7, 2**40), parameter="weight", dtype="F16"):
    return Rows(module, parameter, list(indices), tensor(dtype, len(indices), 3, seed=12))


def added(module="model.layers.0.q_proj", scale=8.0, parameter="bias", dtype="F32", shape=(4,)):
    return Added(module, parameter, tensor(dtype, *shape, seed=13), scale)


def of_form(label, module, shapes, parameter="weight", dtype="F32", seed=30, **facts):
    """A change by a form that has roles of its own, with tensors of these shapes."""
    roles = {role: tensor(dtype, *shape, seed=seed + i) for i, (role, shape) in enumerate(shapes.items())}
    return OfForm(module, parameter, label, roles, facts)


def scaled(alpha, rule="alpha/rank"):
    return (float(alpha), rule)


HADAMARD = {"w1a": (4, 2), "w1b": (2, 3), "w2a": (4, 2), "w2b": (2, 3)}
EXPERTS = {"A": (6, 3), "B": (4, 6)}
BOUNDED = {"A": (2, 3), "B": (4, 2), "bound": (1,), "norms": (3,)}
SHARED = {"in_gain": (2,), "out_gain": (4,)}
FACTORS = {"A": tensor("F32", 2, 5, seed=60), "B": tensor("F32", 6, 2, seed=61)}


def hadamard(module="m", alpha=16, rank=2, seed=30, **keywords):
    return of_form("hadamard", module, HADAMARD, scaling=scaled(alpha), rank=rank, seed=seed, **keywords)


def decomposed(component, axis="out", length=4, dtype="F32"):
    component.roles["magnitude" if axis == "out" else "in_magnitude"] = tensor(dtype, length, seed=62)
    return component


def vera(module, factors=FACTORS, seed=63, **facts):
    made = of_form("shared", module, SHARED, seed=seed, factors=0, **facts)
    made.roles |= copy.deepcopy(factors)
    return made


def sparse(module="m", indices=((0, 3, 3), (2, 0, 2)), dtype="I32"):
    made = of_form("sparse", module, {"values": (len(indices[0]),)})
    data = np.array(indices, {"I32": "<i4", "I64": "<i8"}[dtype]).tobytes()
    made.roles["indices"] = Tensor(dtype, [2, len(indices[0])], data)
    return made


def experts(module="mlp.experts", parameter="down", depth=0, ranks=(2,), alphas=(16,), shapes=EXPERTS, seed=64):
    candidates = [{"scaling": scaled(alpha), "rank": rank} for rank, alpha in zip(ranks, alphas)]
    return of_form(f"experts.{depth}", module, shapes, parameter, seed=seed, candidates=candidates)


def adalora(module="m", **keywords):
    made = component(module, **keywords)
    made.rank_gain = tensor("F32", made.rank, seed=65)
    return made


def merged(module="attn.c_attn", groups=2, rank=2, alpha=16.0):
    a, b = tensor("F32", groups * rank, 3, seed=66), tensor("F32", groups * 4, rank, seed=67)
    return Component(module, a, b, alpha, "alpha/rank", kind="merged")


def per_input(made, length=3):
    made.in_magnitude = tensor("F32", length, seed=68)
    return made


def mixed_forms():
    """An adapter of everything, and the base that it was made for."""
    components = [
        *layers(2, rank=3),
        convolution("vision.patches", (2, 2), alpha=4.0),
        embedding("model.positions", shape=(6, 4), seed=5),
        with_magnitude(component("model.layers.0.o_proj", alpha=8.0)),
        norm(),
        Replaced("lm_head", "weight", tensor("F16", 9, 3, seed=14)),
        Replaced("model.layers.0.q_proj", "bias", tensor("F32", 4, seed=15)),
        added(),
        rows(indices=(1, 2)),
        Replaced("", "temperature", tensor("F32", seed=16)),
    ]
    shapes = {"vision.patches.weight": (4, 3, 2, 2), "model.positions.weight": (6, 4), "lm_head.weight": (7, 3),
              "model.embed_tokens.weight": (7, 3), "model.norm.weight": (6,), "temperature": (),
              "model.layers.0.q_proj.bias": (4,)}  # fmt: skip
    names = {lf.full_name(c.module, c.parameter) for c in components}
    base = {n: tensor("F32", *shapes.get(n, (4, 3)), seed=70 + i) for i, n in enumerate(sorted(names))}
    return Adapter(components, base={"fingerprint": lf.fingerprint(components, base)}), base


def fingerprinted():
    """An adapter, and the base that it was made for."""
    components = layers(3)
    shapes = [(4, 3), (1, 5), (64, 32)]
    base = {
        f"{c.module}.weight": tensor(dtype, *shape, seed=50 + i)
        for i, (c, shape, dtype) in enumerate(zip(components, shapes, ("F32", "BF16", "F16")))
    }
    for c, shape in zip(components, shapes):
        c.a, c.b = tensor("F32", 2, shape[1], seed=3), tensor("F32", shape[0], 2, seed=4)
    identity = {
        "name": "/home/trainer/models/tiny",
        "revision": "8e5b9b4",
        "fingerprint": lf.fingerprint(components, base),
    }
    return Adapter(components, base=identity), base


PEFT = {
    "alpha_pattern": {},
    "base_model_name_or_path": "gpt2",
    "corda_config": None,
    "fan_in_fan_out": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "peft_type": "LORA",
    "r": 2,
    "rank_pattern": {},
    "target_modules": ["c_attn"],
    "use_rslora": False,
}
NUMBERS = [0, -0.0, 1, -1, 1.0, 100.0, 0.1, 1e-4, 1e-5, 1.5e-5, 1e-6, 1.25e-7, 1e15, 1e16, 1e17,
           1.5e16, 123456789012345680.0, 1e21, 1e22, 5e-324, 1.7976931348623157e308, -2.5e-300,
           2**53, -(2**63), 2**64 - 1, 1 / 3, 2.0**53 + 2]  # fmt: skip
MIXED = [
    component("m.a", 1, 0.1, dtypes="BF16", seed=1),
    component("m.b", 3, 1.5, dtypes="F16", seed=2),
    component("m.c", 8, 16, dtypes="F32", shape=(5, 7), seed=3),
    component("m.d", 2, 16, dtypes="BF16 F32", seed=4),
    component("m.e", 3, -3, dtypes="F32 F16", seed=5),
    component("m.f", 7, 0.1, dtypes="F16 BF16", shape=(1, 1), seed=6),
    component("m.g", 5, 16, dtypes="BF16", seed=7),
    component("m.h", 3, 1e-7, seed=8),
]
ALPHAS = [0.0, -0.0, 2.0**53 - 1, 2.0**53, -(2.0**53), 1e-45, 1e22, 1 / 3, -1.5]
UNICODE = ["modèle.couche.0", "模型.层.1", "😀.q", "\uffee.q", 'quote".\\back', "tab\t.\u0001\u007f", "e\u0301.é"]


def vectors():
    """{name: (adapter, what it exercises)}"""
    extensions = {
        "example.note": {"copy": "safe", "value": "kept by every program"},
        "example.statistics": {"copy": "unsafe", "value": {"norm": 0.25, "steps": [1, 2, None, True]}},
    }
    metadata = {"": "an empty key", "zebra": "last", "Über": "ümlaut", "😀": "\n\t\"\\\u0000\u001f\u2028", "\uffee": ""}
    return {
        "plain": (Adapter(layers()), "two targets, F32, one scaling"),
        "bf16": (Adapter(layers(dtypes="BF16")), "BF16 factors beside F32 alphas (F4's order)"),
        "f16": (Adapter(layers(dtypes="F16")), "F16 factors beside F32 alphas (F4's order)"),
        "mixed": (Adapter(copy.deepcopy(MIXED)),
                  "every dtype, several ranks, overrides, alphas that are no integers"),
        "rslora": (Adapter(layers(rank=3, rule="alpha/sqrt-rank")), "alpha/sqrt-rank: √3"),
        "direct": (Adapter([component("a", 3, 0.3, "direct"), component("b", 3, 0.3, "direct"),
                            component("c", 3, 8, "alpha/rank"), component("d", 2, 8, "alpha/sqrt-rank")]),
                   "direct by default, the other rules in overrides"),
        "tie": (Adapter([component("a", alpha=8, rule="direct"), component("b", alpha=-8), component("c", alpha=8),
                         component("d", alpha=8, rule="alpha/sqrt-rank")]),
                "four scalings, equally common: the first by (rule, alpha's bits) is the default (F13)"),
        "alphas": (Adapter([component(f"m{i}", alpha=a) for i, a in enumerate(ALPHAS)]),
                   "alphas of every notation (F14)"),
        "rounding": (Adapter([component(f"m{rank}", rank, 0.1 * rank, shape=(1, 1)) for rank in (3, 6, 11, 49)]),
                     "s·rank is not alpha in f64, and is rounded once to f32 (F9)"),
        "base-name": (Adapter(layers(1), base={"name": "meta-llama/Llama-3.2-1B", "revision": "main"}),
                      "a base's name and revision, no fingerprint"),
        "fingerprint": (fingerprinted()[0], "the identity of `base/fingerprint.safetensors` (F17)"),
        "extensions": (Adapter(layers(1), extensions=extensions), "a safe and an unsafe extension (F22)"),
        "numbers": (Adapter(layers(1), extensions={"example.numbers": {"copy": "safe", "value": NUMBERS}}),
                    "how numbers are written"),
        "unicode": (Adapter([component(name, alpha=alpha, seed=i) for i, name in enumerate(UNICODE)
                             for alpha in [8 if i % 2 else 16]], metadata=metadata),
                    "names and metadata beyond ASCII; order by code point, not by UTF-16"),
        "peft": (Adapter([component("h.0.attn.c_attn")], base={"name": "gpt2"}, fan_in_fan_out=True,
                         source={"format": "peft", "config": PEFT}, metadata={"author": "someone"}),
                 "the configuration of the format that it came from (F15)"),
        "not-fan-in": (Adapter(layers(1), fan_in_fan_out=False), "`false` is not empty, and is written"),
        "convolution": (Adapter([convolution("c1", (3,)), convolution("c2", (2, 3), dtype="BF16", seed=2),
                                 convolution("c3", (2, 1, 2), alpha=3.0, rule="alpha/sqrt-rank", seed=3),
                                 convolution("point", (1, 1), rank=1, seed=4)]),
                        "kernels of one to three dimensions (F24)"),
        "embedding": (Adapter([embedding("wte"), embedding("wpe", alpha=1.0, seed=2), component("lin", alpha=1.0)]),
                      "the product transposed, without `.alpha` (F25)"),
        "dora": (Adapter([with_magnitude(component("lin")), with_magnitude(convolution("conv", (3, 3)), "BF16"),
                          with_magnitude(embedding("wte"), "F16"), component("plain", seed=4)]),
                 "magnitudes of every kind of layer, beside plain factors (F26)"),
        "other-parameter": (Adapter([Component("attn", tensor("F32", 2, 4), tensor("F32", 12, 2), 4.0, "alpha/rank",
                                               parameter="in_proj_weight"), component("attn.out_proj")]),
                            "factors of a parameter that is no module's `weight`, with an override (F10, F13)"),
        "replace": (Adapter([norm(), Replaced("model.norm", "bias", tensor("F32", 6)),
                             Replaced("head", "weight", tensor("F16", 9, 4)),
                             Replaced("experts", "gate_up_proj", tensor("BF16", 2, 3, 4)),
                             Replaced("bn", "num_batches_tracked", opaque("I64")), Replaced("", "cls_token", tensor("F32", 1, 1, 3)),
                             Replaced("m", "empty", tensor("F32", 0, 3)), Replaced("m", "double", opaque("F64", 2)),
                             Replaced("m", "f8", opaque("F8_E4M3", 3)), Replaced("m", "mask", opaque("BOOL", 3))]),
                    "whole parameters of any dtype and shape, one of them the model's own; no scaling (F27, F12)"),
        "replace-rows": (Adapter([rows(), rows("head", (3,), "weight", "BF16"), rows("m", (0, 1), "table", "F32")]),
                         "rows of matrices, one index beyond 32 bits (F28)"),
        "add": (Adapter([component("model.layers.0.q_proj"), added(), added("m", -0.1, "scale", "BF16", (2, 2)),
                         added("n", 0.0, "weight", "F16", ())]),
                "changes in full, with scales of their own (F29)"),
        "rank-gain": (Adapter([adalora("a"), adalora("b", rank=3, dtypes="BF16", alpha=0.3, rule="direct"),
                               with_magnitude(adalora("c"))]), "gains of ranks, one below a magnitude (F34)"),
        "merged": (Adapter([merged(), merged("attn.qkv", 3, 1), component("plain")]),
                   "factors of two and of three groups of rows (F35)"),
        "in-magnitude": (Adapter([per_input(component("lin")), per_input(convolution("conv", (3, 3))),
                                  per_input(embedding("wte"), 5), per_input(adalora("ada")),
                                  decomposed(hadamard("hada")), decomposed(hadamard("hada-in"), "in", 3),
                                  decomposed(sparse("sparse"), dtype="BF16"), decomposed(vera("vera"), "in", 5)]),
                         "magnitudes per input feature, and magnitudes of other forms (F36)"),
        "base": (Adapter([Base("embed", "weight", tensor("BF16", 7, 3)), embedding("embed", shape=(7, 3)),
                          Base("m", "f8", opaque("F8_E4M3", 3))]), "copies of the base (F37)"),
        "tucker": (Adapter([of_form("tucker", "c1", {"A": (3, 5), "B": (4, 2), "mid": (2, 3, 3)}, scaling=scaled(1)),
                            of_form("tucker", "c2", {"A": (2, 5, 1, 1), "B": (4, 2, 1, 1), "mid": (2, 2, 3, 3)},
                                    scaling=scaled(0.5, "direct"), dtype="F16")]), "kernels with a core (F38)"),
        "hadamard": (Adapter([hadamard("a"), hadamard("b", seed=40), hadamard("c", alpha=8, rank=5, seed=50),
                              of_form("hadamard", "d", {"t1": (2, 3, 3, 3), "w1a": (2, 4), "w1b": (3, 5),
                                      "t2": (2, 3, 3, 3), "w2a": (2, 4), "w2b": (3, 5)}, scaling=scaled(16), rank=3)]),
                     "with and without cores; a rank that is not the stored one (F39)"),
        "kronecker": (Adapter([of_form("kronecker", f"m{i}", left | right, scaling=scaled(8), rank=4) for i, (left, right)
                               in enumerate((left, right) for left in
                                            ({"w1": (2, 3)}, {"w1a": (2, 4), "w1b": (4, 3)}) for right in
                                            ({"w2": (5, 7)}, {"w2": (5, 7, 3, 3)}, {"w2": (5, 7, 3)}, {"w2a": (5, 2), "w2b": (2, 7)},
                                             {"t2": (2, 4, 3, 3), "w2a": (2, 5), "w2b": (4, 7)}))]),
                      "every pair of sides (F40)"),
        "gain": (Adapter([of_form("gain", "k", {"gain": (4, 1)}, axis="out", stored="whole"),
                          of_form("gain", "k", {"gain": (4, 1)}, "bias", axis="out", stored="whole"),
                          of_form("gain", "ff", {"gain": (1, 5)}, axis="in", stored="whole"),
                          of_form("gain", "conv", {"gain": (1, 6, 1, 1)}, axis="in", stored="less-one", dtype="BF16")]),
                 "gains of inputs and outputs, whole and less one (F41)"),
        "rotation": (Adapter([of_form("rotation", "a", {"generators": (2, 6)}, layer="linear", neumann_terms=5),
                              of_form("rotation", "b", {"generators": (1, 3)}, layer="linear", neumann_terms=5),
                              of_form("rotation", "c", {"generators": (3, 0)}, layer="convolution"),
                              of_form("rotation", "d", {"generators": (2, 1)}, layer="embedding", radius=6e-5),
                              of_form("rotation", "e", {"generators": (2, 1)}, layer="linear", neumann_terms=0, radius=2.0)]),
                     "exact, as a series, within a radius; blocks of 4, 3, 1 and 2 (F42)"),
        "reflections": (Adapter([of_form("reflections", "a", {"vectors": (5, 2)}, orthogonal=False),
                                 of_form("reflections", "b", {"vectors": (5, 1)}, orthogonal=True)]), "as they are and made orthogonal (F43)"),
        "butterfly": (Adapter([of_form("butterfly", "a", {"generators": (2, 3, 2, 2), "gain": (4, 1)}),
                               of_form("butterfly", "b", {"generators": (1, 1, 4, 4), "gain": (1, 4)}, dtype="F16")]),
                      "a form without facts (F32, F44)"),
        "tiled": (Adapter([of_form("tiled", "a", {"block": (2, 4)}), of_form("tiled", "b", {"bat": (2, 2, 2)})]), "both rules (F45)"),
        "proportional": (Adapter([of_form("proportional", "lin", {"A": (2, 3), "B": (4, 2)}, scaling=scaled(1, "direct")),
                                  of_form("proportional", "conv", {"A": (2, 3, 3, 3), "B": (4, 2, 1, 1)}, scaling=scaled(2)),
                                  of_form("proportional", "wte", {"embedding_A": (2, 7), "embedding_B": (3, 2)},
                                          scaling=scaled(1, "direct"))]), "of every kind of layer (F46)"),
        "sparse": (Adapter([sparse("a"), sparse("b", ((2**31 - 1,), (0,)), "I64"), sparse("none", ((), ()))]),
                   "single values, some at one place, and none (F47)"),
        "circulant": (Adapter([of_form("circulant", "m", {"kernels": (2, 3, 4)})]), "kernels (F48)"),
        "bounded": (Adapter([of_form("bounded", "m", BOUNDED)]), "factors with a bound and norms (F49)"),
        "grid": (Adapter([of_form("grid", "m", {"A": (2, 3, 4), "B": (2, 4, 5)}, scaling=scaled(64), rank=6),
                          component("m", alpha=64 / 6, rule="direct", shape=(10, 6))]),
                 "fields beside a low-rank change with a scaling of its own (F50, F30)"),
        "shared": (Adapter([vera("a"), vera("b", seed=70), vera("c", {"A": tensor("F32", 2, 5, seed=60), "B": tensor("F32", 7, 2, seed=71)}),
                            vera("d", seed=72)]), "two pairs of factors that four components share (F51)"),
        "experts": (Adapter([experts("l0.experts", "gate|down", ranks=(2, 3), alphas=(16, 4)), experts("l0.experts", "gate|down", 1, (2, 6), (16, 4)),
                             experts("l1.experts", "gate|down", ranks=(2, 3), alphas=(16, 4)), experts("l1.experts", "gate|down", 1, (2, 3), (16, 4)),
                             experts("l2.experts", "gate|down", ranks=(2, 3), alphas=(16, 4)), experts("l3.experts"), component("router")]),
                    "candidates, nested (F52)"),
        "names": (Adapter([component("lora_unet_down_blocks_0_attentions_0_proj_in")], names="kohya",
                          source={"format": "diffusers", "config": {"unet.r": 2, "unet.lora_alpha": 16}}),
                  "modules as another format spells them (F53), the configuration of diffusers (F15)"),
        "forms": (mixed_forms()[0], "everything in one file, several forms on one parameter (F30), the identity of "
                                    "`base-forms/base.safetensors` (F17)"),
    }  # fmt: skip


# ---------------------------------------------------------------- parts, to be broken


class Parts:
    """A well-formed file in its parts."""

    def __init__(self, adapter):
        raw = lf.encode(adapter)
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        self.metadata = header.pop("__metadata__")
        self.config = json.loads(self.metadata.pop("lora_format"))
        data = raw[8 + length :]
        self.tensors = {
            name: Tensor(e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
            for name, e in header.items()
        }

    def bytes(self, text=None, dumps=lf.compact, padding=8):
        """`text` replaces the configuration's JSON."""
        header, at = {"__metadata__": self.metadata | {"lora_format": text or dumps(self.config)}}, 0
        for name, t in self.tensors.items():
            header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.data)]}
            at += len(t.data)
        encoded = dumps(header).encode()
        encoded += b" " * (-len(encoded) % padding)
        return struct.pack("<Q", len(encoded)) + encoded + b"".join(t.data for t in self.tensors.values())


def foreign():
    """{name: (bytes, the file that it is rewritten to, what it exercises)}: valid, but not as written here."""
    out = {}
    parts = Parts(Adapter(layers()))
    parts.config["version"] = "1.7"
    parts.config = {"future": {"a": [1]}} | parts.config | {"base": {"registry": "x"}}
    out["newer-minor"] = (parts.bytes(), "plain", "F21: members that are not known, at the top and in `base`, are dropped")
    parts = Parts(vectors()["mixed"][0])
    parts.tensors = dict(sorted(parts.tensors.items(), key=lambda t: t[0][::-1]))
    parts.config = dict(reversed(parts.config.items()))
    spaced = lambda value: json.dumps(value, indent=1).replace('"pt"', '"\\u0070t"')  # noqa: E731
    out["layout"] = (parts.bytes(dumps=spaced, padding=1), "mixed",
                     "F4, F5: another order, spaces, escapes, tensors that are not aligned")  # fmt: skip
    parts = Parts(Adapter(layers()))
    module = "model.layers.0.q_proj"
    parts.config["overrides"] = [{"scaling": {"alpha": 16.0, "rule": "alpha/rank"}, "modules": [module]}]
    out["needless-override"] = (parts.bytes(), "plain", "F13: an override that says what the default says")
    parts = Parts(vectors()["base-name"][0])
    parts.config["base"]["fingerprint"] = {"algorithm": "samples-9", "targets": {"k": 7}}
    out["fingerprint-unknown"] = (parts.bytes(), "base-name",
                                  "F18: a fingerprint of an unknown algorithm says nothing")  # fmt: skip
    parts = Parts(Adapter(layers()))
    parts.config["version"] = "1.0-draft"
    out["draft"] = (parts.bytes(), "plain", "F20: the version before it was frozen")
    parts = Parts(Adapter(layers()))
    absent = ("overrides", "forms", "fan_in_fan_out", "names", "source", "extensions", "future")
    parts.config |= dict.fromkeys(absent) | {"base": {"name": None, "fingerprint": None}}
    out["nulls"] = (parts.bytes(), "plain", "section 3: `null` is absent")
    parts = Parts(vectors()["rotation"][0])
    parts.config["forms"] = [
        {"form": "rotation", "facts": {"layer": "embedding"}},
        *({"form": "rotation", "facts": facts, "modules": [module]} for module, facts in {
            "a": {"neumann_terms": 5, "radius": None, "layer": "linear"},
            "b": {"layer": "linear", "neumann_terms": 5}, "c": {"layer": "convolution"},
            "d": {"layer": "embedding", "radius": 0.00006},
            "e": {"radius": 2, "neumann_terms": 0, "layer": "linear"}}.items()),
        {"form": "rotation", "facts": {"layer": "linear"}, "modules": []},
    ]  # fmt: skip
    out["facts-one-by-one"] = (parts.bytes(), "rotation", "F32, F33: each component named, facts in another order, `null`")
    parts = Parts(vectors()["shared"][0])
    swapped = {"lora:shared.0.": "lora:shared.9.", "lora:shared.1.": "lora:shared.0."}
    parts.tensors = {swapped.get(n[:14], n[:14]) + n[14:]: t for n, t in parts.tensors.items()}
    for group in parts.config["forms"]:
        group["facts"]["factors"] = 0 if "modules" in group else 9
    out["shared-numbers"] = (parts.bytes(), "shared", "F51: other numbers of the shared factors")
    return out


def bad():
    """{name: (bytes, rule, what is wrong)}"""
    out = {}
    module = "model.layers.0.q_proj"

    def case(name, rule, what, adapter=None, **keywords):
        """Breaks what the caller's function breaks."""

        def build(breaks):
            parts = Parts(adapter or Adapter(layers()))
            text = breaks(parts)
            out[name] = (parts.bytes(text if isinstance(text, str) else None), rule, what)

        return build

    def alpha(dtype, shape, data):
        return lambda parts: parts.tensors.update({f"{module}.alpha": Tensor(dtype, shape, data)})

    def config(**members):
        return lambda parts: parts.config.update(members)

    def without(*names):
        def breaks(parts):
            for name in names:
                parts.config.pop(name, None)
                parts.tensors.pop(f"{module}.{name}", None)
                parts.metadata.pop(name, None)

        return breaks

    def textual(old, new):
        def breaks(parts):
            text = lf.compact(parts.config)
            assert text.count(old) == 1, (old, text)
            return text.replace(old, new)

        return breaks

    f32 = lambda value: struct.pack("<f", value)  # noqa: E731
    scaling = {"alpha": 16, "rule": "alpha/rank"}
    other = {"alpha": 8, "rule": "alpha/rank"}

    case("config-key-twice", "F2", "the configuration has `requires` twice")(
        textual('"requires":["low-rank"]', '"requires":["low-rank"],"requires":["low-rank"]'))
    case("config-key-twice-deep", "F2", "an object within `extensions` has a key twice, once escaped",
         Adapter(layers(), extensions={"a.b": {"copy": "safe", "value": {"k": 1}}}))(
        textual('{"k":1}', '{"k":1,"\\u006b":1}'))
    case("config-not-json", "F3", "the configuration ends in the middle")(lambda p: lf.compact(p.config)[:-5])
    case("config-array", "F3", "the configuration is an array")(lambda p: "[]")
    case("format-missing", "F3", "`__metadata__` lacks `format`")(without("format"))
    case("format-other", "F3", "`format` is `tf`")(lambda p: p.metadata.update(format="tf"))
    for name, members in (("scaling", {"scaling": [16, "alpha/rank"]}), ("base", {"base": []}), ("override", {
        "overrides": [[scaling, [module]]]}), ("forms", {"forms": [["gain", {}]]}), ("source", {"source": ["peft", {}]})):
        case(f"array-{name}", "F3", f"`{name}` is an array of the values that its object would have")(config(**members))
    case("a-without-b", "F11", "lora_A has no lora_B")(without("lora_B.weight"))
    case("b-without-a", "F11", "lora_B has no lora_A")(without("lora_A.weight"))
    case("rank-mismatch", "F7", "lora_A has rank 2, lora_B rank 1")(
        lambda p: p.tensors.update({f"{module}.lora_B.weight": tensor("F32", 8, 1)}))
    case("rank-zero", "F6", "both factors have rank 0", Adapter(layers(1, rank=1)))(
        lambda p: p.tensors.update({f"{module}.lora_A.weight": tensor("F32", 0, 3),
                                    f"{module}.lora_B.weight": tensor("F32", 4, 0)}))
    case("factor-dtype", "F7", "lora_A is I8")(
        lambda p: p.tensors.update({f"{module}.lora_A.weight": Tensor("I8", [2, 3], bytes(6))}))
    case("factor-dimensions", "F24", "lora_A has three dimensions, lora_B two")(
        lambda p: p.tensors.update({f"{module}.lora_A.weight": tensor("F32", 2, 3, 1)}))
    case("factor-one-dimension", "F7", "lora_A has one dimension")(
        lambda p: p.tensors.update({f"{module}.lora_A.weight": tensor("F32", 2)}))
    case("factor-six-dimensions", "F7", "lora_A has six dimensions")(
        lambda p: p.tensors.update({f"{module}.lora_A.weight": tensor("F32", 2, 3, 1, 1, 1, 1)}))
    case("alpha-missing", "F9", "a pair of factors has no `.alpha`")(without("alpha"))
    case("alpha-value", "F9", "`.alpha` holds 17, the configuration says 16")(alpha("F32", [], f32(17)))
    case("alpha-nan", "F9", "`.alpha` holds NaN")(alpha("F32", [], f32(math.nan)))
    case("alpha-dtype", "F9", "`.alpha` is F64, though of the right value")(alpha("F64", [], struct.pack("<d", 16)))
    case("alpha-shape", "F9", "`.alpha` has the shape [1], not []")(alpha("F32", [1], f32(16)))
    case("alpha-rslora", "F9", "`.alpha` holds alpha, not s·rank", Adapter(layers(rank=4, rule="alpha/sqrt-rank")))(
        alpha("F32", [], f32(16)))
    case("alpha-overflow", "F9", "s·rank is beyond f32",
         Adapter(layers(1, alpha=1e39, rank=1)))(lambda p: None)
    case("tensor-unused", "F11", "a tensor `lm_head.weight` belongs to no component")(
        lambda p: p.tensors.update({"lm_head.weight": tensor("F32", 2, 2)}))
    case("tensor-unused-infix", "F11", "a tensor with the infix `.lora:` belongs to no component (F10)")(
        lambda p: p.tensors.update({f"{module}.lora:magnitude": tensor("F32", 4)}))
    case("alpha-unused", "F11", "an `.alpha` without factors")(
        lambda p: p.tensors.update({"lm_head.alpha": Tensor("F32", [], f32(16))}))
    case("override-without-tensors", "F11", "an override names a module without tensors")(
        config(overrides=[{"scaling": other, "modules": ["lm_head"]}]))
    case("scaling-missing", "F12", "`scaling` is missing")(without("scaling"))
    case("rule-unknown", "F12", "the rule is `alpha/rank^2`")(config(scaling=scaling | {"rule": "alpha/rank^2"}))
    case("alpha-beyond-f64", "F3", "alpha is 1e999, beyond f64 (s would not be finite, F12)")(
        lambda p: textual('"alpha":16', '"alpha":1e999')(p))
    case("alpha-string", "F12", "alpha is the string `16`")(config(scaling=scaling | {"alpha": "16"}))
    case("module-in-two-overrides", "F13", "a module is in two overrides")(
        config(overrides=[{"scaling": scaling, "modules": [module]}, {"scaling": scaling, "modules": [module]}]))
    case("module-twice-in-override", "F13", "a module is twice in one override")(
        config(overrides=[{"scaling": scaling, "modules": [module, module]}]))
    fingerprint = fingerprinted()[0].base["fingerprint"]
    shorter = copy.deepcopy(fingerprint)
    shorter["targets"][0]["values"] = shorter["targets"][0]["values"][:16]
    case("fingerprint-short", "F17", "`values` holds 3 samples, not 16", fingerprinted()[0])(
        config(base={"fingerprint": shorter}))
    damaged = copy.deepcopy(fingerprint)
    damaged["targets"][0]["values"] = "*" * 88
    case("fingerprint-not-base64", "F17", "`values` is no base64", fingerprinted()[0])(
        config(base={"fingerprint": damaged}))
    case("version-2", "F20", "version 2.0")(config(version="2.0"))
    case("version-10", "F20", "version 10.0")(config(version="10.0"))
    case("version-missing", "F20", "`version` is missing")(without("version"))
    case("requires-unknown", "F20", "a feature that this version reserves: `rows`")(
        config(requires=["low-rank", "rows"]))
    case("requires-unused", "F20", "`requires` names `magnitude`, which the file does not use")(
        config(requires=["low-rank", "magnitude"]))
    case("requires-unsorted", "F20", "`requires` is not sorted", Adapter([*layers(1), norm()]))(
        config(requires=["replace", "low-rank"]))
    case("requires-too-little", "F20", "`requires` lacks `replace`, which the file uses", Adapter([*layers(1), norm()]))(
        config(requires=["low-rank"]))
    case("requires-nothing", "F20", "`requires` lacks `low-rank`, which the file uses")(config(requires=[]))
    case("requires-missing", "F20", "`requires` is missing")(without("requires"))
    case("scaling-unknown-member", "F21", "`scaling` has a member that is not known")(
        config(scaling=scaling | {"warp": 1}))
    case("override-unknown-member", "F21", "an override has a member that is not known")(
        config(overrides=[{"scaling": other, "modules": [module], "rows": [0, 2]}]))
    case("source-unknown-member", "F21", "`source` has a member that is not known")(
        config(source={"format": "peft", "config": {}, "version": 3}))
    case("extension-name", "F22", "an extension's name has no vendor")(
        config(extensions={"note": {"copy": "safe", "value": 1}}))
    case("extension-copy", "F22", "an extension is neither `safe` nor `unsafe`")(
        config(extensions={"a.b": {"copy": "maybe", "value": 1}}))
    case("extension-bare", "F22", "an extension is a bare value")(config(extensions={"a.b": 1}))
    case("digest-missing", "F23", "`digest` is missing")(without("digest"))
    case("digest-malformed", "F23", "`digest` is of another algorithm")(config(digest="md5:" + "0" * 32))

    def replaced(name, tensor):
        return lambda parts: parts.tensors.update({name: tensor})

    def lost(name):
        return lambda parts: parts.tensors.pop(name)

    conv, table = Adapter([convolution("c", (3, 3))]), Adapter([embedding("e")])
    case("convolution-kernel-in-b", "F24", "lora_B has the kernel, not ones", conv)(
        replaced("c.lora_B.weight", tensor("F32", 4, 2, 3, 3)))
    case("convolution-groups", "F24", "lora_B has the columns of one group only", conv)(
        replaced("c.lora_B.weight", tensor("F32", 4, 1, 1, 1)))
    case("embedding-without-b", "F11", "embedding_A has no embedding_B", table)(lost("e.weight.lora:embedding_B"))
    case("embedding-dimensions", "F25", "embedding_A has three dimensions", table)(
        replaced("e.weight.lora:embedding_A", tensor("F32", 2, 5, 1)))
    case("embedding-alpha", "F11", "an `.alpha` beside the factors of an embedding", table)(
        replaced("e.alpha", Tensor("F32", [], f32(16))))
    dora = Adapter([with_magnitude(component("m"))])
    case("magnitude-missing", "F10", "plain factors under names that no other loader knows", dora)(
        lost("m.weight.lora:magnitude"))
    case("magnitude-shape", "F26", "a magnitude per input", dora)(replaced("m.weight.lora:magnitude", tensor("F32", 3)))
    case("magnitude-dimensions", "F26", "a magnitude of two dimensions", dora)(
        replaced("m.weight.lora:magnitude", tensor("F32", 4, 1)))
    case("magnitude-dtype", "F26", "a magnitude in I8", dora)(replaced("m.weight.lora:magnitude", opaque("I8", 4)))
    case("magnitude-alone", "F11", "a magnitude without factors", Adapter([norm()]))(
        replaced("m.weight.lora:magnitude", tensor("F32", 4)))
    case("value-without-name", "F11", "a whole parameter without a name", Adapter([norm()]))(
        replaced(".lora:value", tensor("F32", 4)))
    case("value-without-module", "F11", "a whole parameter of a module without a name", Adapter([norm()]))(
        replaced(".weight.lora:value", tensor("F32", 4)))
    case("role-unknown", "F11", "a role that is not known", Adapter([norm()]))(
        replaced("m.weight.lora:mid", tensor("F32", 4)))
    case("scaling-needless", "F12", "a scaling, and nothing is scaled", Adapter([norm()]))(config(scaling=scaling))
    case("scaling-in-overrides-only", "F12", "the default scaling is missing, though no component needs it")(
        lambda p: p.config.update(overrides=[{"scaling": p.config.pop("scaling"), "modules": [
            f"model.layers.{i}.q_proj" for i in range(2)]}]))
    some = Adapter([rows("e", (1, 2, 5))])
    i64 = lambda *values: Tensor("I64", [len(values)], struct.pack(f"<{len(values)}q", *values))  # noqa: E731
    for name, rule, what, value in (
        ("order", "F28", "indices that do not ascend", i64(2, 1, 5)),
        ("twice", "F28", "an index twice", i64(1, 1, 5)),
        ("negative", "F28", "a negative index", i64(-1, 2, 5)),
        ("count", "F28", "fewer indices than rows", i64(1, 2)),
        ("dtype", "F28", "indices in I32", opaque("I32", 3)),
        ("shape", "F28", "indices of two dimensions", Tensor("I64", [3, 1], i64(1, 2, 5).data)),
    ):
        case(f"rows-indices-{name}", rule, what, some)(replaced("e.weight.lora:indices", value))
    case("rows-without-indices", "F11", "rows have no indices", some)(lost("e.weight.lora:indices"))
    case("indices-without-rows", "F11", "indices have no rows", some)(lost("e.weight.lora:rows"))
    case("rows-none", "F28", "no rows", some)(
        lambda p: p.tensors.update({"e.weight.lora:rows": tensor("F32", 0, 3), "e.weight.lora:indices": i64()}))
    case("rows-dimensions", "F28", "rows of one dimension", some)(replaced("e.weight.lora:rows", tensor("F32", 3)))
    case("rows-dtype", "F28", "rows in I8", some)(replaced("e.weight.lora:rows", opaque("I8", 3, 3)))
    plus = Adapter([added("m")])
    f64 = lambda value: Tensor("F64", [], struct.pack("<d", value))  # noqa: E731
    case("added-without-scale", "F11", "a change has no scale", plus)(lost("m.bias.lora:scale"))
    case("scale-without-added", "F11", "a scale has no change", Adapter([*layers(1), added("m")]))(
        lost("m.bias.lora:added"))
    case("added-scale-dtype", "F29", "a scale in F32", plus)(replaced("m.bias.lora:scale", Tensor("F32", [], f32(1))))
    case("added-scale-shape", "F29", "a scale of shape [1]", plus)(
        replaced("m.bias.lora:scale", Tensor("F64", [1], f64(1.0).data)))
    case("added-scale-nan", "F29", "a scale that is no number", plus)(replaced("m.bias.lora:scale", f64(math.nan)))
    case("added-dtype", "F29", "a change in I8", plus)(replaced("m.bias.lora:added", opaque("I8", 4)))
    case("clash-rows", "F30", "rows and factors of one parameter", Adapter([component("m"), rows("m")]))(lambda p: None)
    case("clash-added", "F30", "rows and a change in full of one parameter",
         Adapter([added("m", parameter="weight", shape=(5, 3)), rows("m")]))(lambda p: None)
    case("clash-layers", "F30", "one weight is a matrix and an embedding", Adapter([component("m"), embedding("m")]))(
        lambda p: None)

    case("role-of-form-unknown", "F11", "a role that the form has not", Adapter([hadamard()]))(
        replaced("m.weight.lora:hadamard.t3", tensor("F32", 4)))
    case("form-unknown", "F11", "a form that is not known", Adapter([norm()]))(
        replaced("m.weight.lora:fourier.spectrum", tensor("F32", 4)))
    case("experts-depth", "F11", "a depth with a leading zero", Adapter([experts(), norm()]))(
        replaced("mlp.experts.down.lora:experts.01.A", tensor("F32", 6, 3)))
    case("experts-without-depth", "F11", "experts without a depth", Adapter([experts()]))(
        replaced("mlp.experts.down.lora:experts.A", tensor("F32", 6, 3)))
    case("clash-form", "F30", "a copy of the base and a replacement", Adapter(
        [norm("m"), Base("m", "weight", tensor("F32", 6))]))(lambda p: None)
    case("clash-dependent", "F30", "two changes that depend on the weight", Adapter(
        [of_form("gain", "m", {"gain": (4, 1)}, axis="out", stored="whole"), with_magnitude(component("m"))]))(lambda p: None)
    case("clash-decomposed", "F31", "one form with both magnitudes",
         Adapter([decomposed(decomposed(hadamard()), "in", 3)]))(lambda p: None)
    case("magnitudes-both", "F36", "factors with both magnitudes",
         Adapter([per_input(with_magnitude(component("m")))]))(lambda p: None)
    case("in-magnitude-shape", "F36", "a magnitude of inputs that counts outputs",
         Adapter([per_input(component("m"), 4)]))(lambda p: None)
    gained = Adapter([adalora("m")])
    case("rank-gain-shape", "F34", "a gain of two dimensions", gained)(
        replaced("m.weight.lora:rank_gain", tensor("F32", 2, 1)))
    case("rank-gain-dtype", "F34", "a gain in I8", gained)(replaced("m.weight.lora:rank_gain", opaque("I8", 2)))
    fused = Adapter([merged("m")])
    case("merged-rows", "F35", "A has no whole number of ranks", fused)(
        replaced("m.weight.lora:merged_A", tensor("F32", 5, 3)))
    case("merged-groups", "F35", "B has no whole number of groups", fused)(
        replaced("m.weight.lora:merged_B", tensor("F32", 7, 2)))
    case("merged-gain", "F11", "a magnitude of a merged layer", fused)(
        replaced("m.weight.lora:magnitude", tensor("F32", 8)))
    hada = Adapter([hadamard("m"), hadamard("n", alpha=8)])
    case("form-without-role", "F31", "a factor of a product is missing", hada)(lost("m.weight.lora:hadamard.w2b"))
    case("form-one-core", "F31", "one product has a core", hada)(
        replaced("m.weight.lora:hadamard.t1", tensor("F32", 2, 2, 3)))
    case("form-shape", "F31", "the products have not the same outputs", hada)(
        replaced("m.weight.lora:hadamard.w2a", tensor("F32", 5, 2)))
    case("form-dtype", "F31", "a factor in I8", hada)(replaced("m.weight.lora:hadamard.w2a", opaque("I8", 4, 2)))
    case("form-empty", "F31", "factors without outputs", hada)(lambda p: p.tensors.update(
        {f"m.weight.lora:hadamard.{role}": tensor("F32", 0, 2) for role in ("w1a", "w2a")}))
    case("form-both-sides", "F31", "a side in full and as a product", Adapter([of_form(
        "kronecker", "m", {"w1": (2, 2), "w1a": (2, 1), "w1b": (1, 2), "w2": (2, 2)}, scaling=scaled(1), rank=1)]))(lambda p: None)
    case("form-kernel", "F31", "a kernel of four lengths", Adapter([of_form(
        "kronecker", "m", {"w1": (2, 2), "w2": (2, 2, 1, 1, 1, 1)}, scaling=scaled(1), rank=1)]))(lambda p: None)
    case("form-ones", "F31", "B has fewer ones than the kernel lengths", Adapter([of_form(
        "proportional", "m", {"A": (2, 3, 3, 3), "B": (4, 2, 1)}, scaling=scaled(1))]))(lambda p: None)
    case("gain-shape", "F31", "a gain that is a matrix", Adapter([of_form(
        "gain", "m", {"gain": (2, 2)}, axis="in", stored="whole")]))(lambda p: None)
    case("rotation-elements", "F31", "four elements are no triangle", Adapter([of_form(
        "rotation", "m", {"generators": (2, 4)}, layer="linear")]))(lambda p: None)
    case("sparse-indices", "F31", "indices in F32", Adapter([sparse()]))(
        replaced("m.weight.lora:sparse.indices", tensor("F32", 2, 3)))
    def forms(*groups):
        return lambda parts: parts.config.update(forms=list(groups))

    def group(modules=None, form="hadamard", alpha=16, **facts):
        group = {"form": form, "facts": {"scaling": {"alpha": alpha, "rule": "alpha/rank"}, "rank": 2} | facts}
        return group if modules is None else group | {"modules": modules}

    case("forms-missing", "F32", "`forms` is missing", hada)(lambda p: p.config.pop("forms"))
    case("forms-no-default", "F32", "all components are named, and there is no default", hada)(forms(group(["m", "n"])))
    case("forms-two-defaults", "F32", "two groups without modules", hada)(forms(group(), group(alpha=8)))
    case("forms-needless", "F32", "facts of a form that the file has not", hada)(forms(group(), group(form="kronecker")))
    case("forms-without-facts", "F32", "facts of a form that has none", Adapter([of_form(
        "circulant", "m", {"kernels": (2, 3, 4)})]))(forms({"form": "circulant", "facts": {}}))
    case("forms-unknown", "F32", "facts of a form that is not known", hada)(forms(group(), group(form="fourier")))
    case("forms-module-twice", "F32", "a module is in two groups", hada)(forms(group(), group(["m"]), group(["m"])))
    case("forms-without-tensors", "F11", "a group names a module without tensors", hada)(forms(group(), group(["x"])))
    case("forms-unknown-member", "F21", "a group has a member that is not known", hada)(
        forms(group() | {"axis": "in"}))
    case("facts-missing", "F33", "a fact is missing", hada)(forms(group(rank=None)))
    case("facts-needless", "F33", "a fact that the form has not", hada)(forms(group(axis="in")))
    case("facts-rank", "F33", "a rank that is no count", hada)(forms(group(rank=2.0)))
    case("facts-rank-zero", "F6", "a rank of 0", hada)(forms(group(rank=0)))
    case("facts-rule", "F33", "a rule that is not known", hada)(
        forms(group(scaling={"alpha": 1, "rule": "alpha"})))
    case("facts-rank-limit", "F6", "a rank of 65,537", hada)(forms(group(rank=65537)))
    case("facts-axis", "F33", "an axis that is not known", Adapter([of_form(
        "gain", "m", {"gain": (4, 1)}, axis="out", stored="whole")]))(
        forms({"form": "gain", "facts": {"axis": "both", "stored": "whole"}}))
    case("facts-radius", "F42", "a radius below 0", Adapter([of_form(
        "rotation", "m", {"generators": (2, 1)}, layer="linear", radius=-1.0)]))(lambda p: None)
    case("grid-rank", "F50", "a rank that k does not divide", Adapter([of_form(
        "grid", "m", {"A": (2, 3, 3), "B": (2, 3, 5)}, scaling=scaled(1), rank=3)]))(lambda p: None)
    case("shared-unused", "F11", "shared factors that no component shares", Adapter([vera("m")]))(
        replaced("lora:shared.1.A", tensor("F32", 2, 5)))
    case("shared-missing", "F51", "a component shares factors that are not there", Adapter([vera("m")]))(
        forms({"form": "shared", "facts": {"factors": 1}}))
    case("shared-half", "F31", "shared factors without B", Adapter([vera("m")]))(lost("lora:shared.0.B"))
    case("shared-outputs", "F51", "more outputs than the shared B has rows", Adapter([vera("m")]))(
        replaced("m.weight.lora:shared.out_gain", tensor("F32", 7)))
    case("shared-own", "F11", "a factor that should be shared", Adapter([vera("m")]))(
        replaced("m.weight.lora:shared.A", tensor("F32", 2, 5)))
    case("experts-rank", "F52", "A has no whole number of ranks", Adapter([experts(ranks=(4,))]))(lambda p: None)
    case("experts-rank-zero", "F52", "a candidate of rank 0", Adapter([experts(ranks=(0,))]))(lambda p: None)
    case("experts-candidates", "F52", "two parameters, one candidate", Adapter([experts(parameter="gate|down")]))(lambda p: None)
    case("experts-nameless", "F52", "a parameter without a name", Adapter([experts(parameter="gate|", ranks=(2, 2), alphas=(1, 1))]))(
        lambda p: None)
    case("short-name", "F13", "a parameter of the model is called as a module", Adapter(
        [component("m"), Replaced("", "m", tensor("F32", 2))]))(lambda p: None)
    case("names-unknown", "F53", "names of a format that is not known")(config(names="a1111"))
    case("names-own", "F53", "names of a format that names modules as the base does")(config(names="peft"))
    case("source-unknown", "F15", "the configuration of a format that is not known")(
        config(source={"format": "a1111", "config": {}}))

    def damage(parts):
        damaged = parts.tensors[f"{module}.lora_A.weight"]
        damaged.data = damaged.data[:4] + bytes([damaged.data[4] ^ 1]) + damaged.data[5:]

    case("damaged", "F23", "a bit of lora_A is flipped: only a reader that checks the digest sees it")(damage)
    return out


README = """# Vectors of the native format

Written by `python3 scripts/make_native_fixtures.py` (NumPy, no randomness);
this text too. Licence: as the project.

A reader finds in `<name>.safetensors` what `<name>.json` says (as
`scripts/lora_format.py read` prints it), and a program that rewrites the file
gives the same bytes.

| File | What it exercises |
|---|---|
"""
FOREIGN = """
Under `foreign/` are files that are valid, though no writer that follows F5
would write them. Rewritten, each gives the bytes of another file.

| File | Rewritten | Rule: what it exercises |
|---|---|---|
"""
BAD = """# Native files that a reader must refuse

Written by `python3 scripts/make_native_fixtures.py`. One rule of
docs/FORMAT.md each; everything else in the file is well formed (but `digest`
is that of the data before it was broken). `damaged` is the exception: checking
the digest is optional.

| File | Rule | What is wrong |
|---|---|---|
"""


def make(out):
    for folder in (out, out / "base", out / "base-forms", out / "foreign", out / "bad"):
        folder.mkdir(parents=True, exist_ok=True)
    lines = README
    for name, (adapter, what) in vectors().items():
        path = out / f"{name}.safetensors"
        lf.write(path, adapter)
        read = lf.read(path)
        assert lf.encode(read) == path.read_bytes() and read.digest_matches, name
        text = json.dumps(lf.describe(read), indent=1, ensure_ascii=False)
        path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        lines += f"| `{name}` | {what} |\n"
    lines += FOREIGN
    for name, (raw, target, what) in foreign().items():
        path = out / "foreign" / f"{name}.safetensors"
        path.write_bytes(raw)
        assert lf.encode(lf.read(path)) == (out / f"{target}.safetensors").read_bytes(), name
        lines += f"| `foreign/{name}` | `{target}` | {what} |\n"
    (out / "README.md").write_text(lines, encoding="utf-8")

    for made, path in ((fingerprinted(), "base/fingerprint"), (mixed_forms(), "base-forms/base")):
        adapter, base = made
        assert lf.compare(adapter.base["fingerprint"], base) == "same"
        header, at = {}, 0
        stored = sorted(base.items(), key=lambda t: -lf.ORDER[t[1].dtype])
        for name, t in stored:
            header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.data)]}
            at += len(t.data)
        text = lf.compact(header).encode()
        text += b" " * (-len(text) % 8)
        raw = struct.pack("<Q", len(text)) + text + b"".join(t.data for _, t in stored)
        (out / f"{path}.safetensors").write_bytes(raw)

    lines = BAD
    for name, (raw, rule, what) in bad().items():
        path = out / "bad" / f"{name}.safetensors"
        path.write_bytes(raw)
        lines += f"| `{name}` | {rule} | {what} |\n"
        try:
            found = "F23" if not lf.read(path).digest_matches else "nothing"
        except lf.Refused as refused:
            found = refused.rule
        assert found == rule, (name, rule, found)
    (out / "bad" / "README.md").write_text(lines, encoding="utf-8")


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        if not arguments.check:
            shutil.rmtree(NATIVE, ignore_errors=True)
            shutil.copytree(scratch, NATIVE)
            written = files(NATIVE).values()
            print(f"{len(written)} files, the largest of {max(map(len, written))} bytes")
            return
        ours, theirs = files(Path(scratch)), files(NATIVE)
    differing = sorted(str(p) for p in ours.keys() | theirs.keys() if ours.get(p) != theirs.get(p))
    sys.exit(f"different: {', '.join(differing)}" if differing else 0)


if __name__ == "__main__":
    main()
