#!/usr/bin/env python3
"""Writes fixtures/bad/: one small malformed file or directory per rule.

Standard library only, no randomness: two runs give the same bytes. The table
in fixtures/bad/README.md is written from the same list, so no file can lack
its line.

    python3 scripts/make_bad_fixtures.py            rewrite fixtures/bad
    python3 scripts/make_bad_fixtures.py --check    regenerate elsewhere, compare
"""

import argparse
import filecmp
import json
import math
import shutil
import struct
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
MAX_HEADER = 100_000_000


# ------------------------------------------------------------ byte-level tools


def container(header, data=b""):
    """A safetensors file from header text or bytes, padded to 8 with spaces."""
    if isinstance(header, str):
        header = header.encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def floats(values):
    return struct.pack(f"<{len(values)}f", *values)


def ramp(count):
    """Distinct, exactly representable, nonzero values."""
    return [(i + 1) / 64 for i in range(count)]


def tensors(entries, metadata=True):
    """A well-formed file of (name, dtype, shape, bytes)."""
    header = {"__metadata__": {"format": "pt"}} if metadata else {}
    data = b""
    for name, dtype, shape, payload in entries:
        assert len(payload) == SIZES[dtype] * math.prod(shape)
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(payload)],
        }
        data += payload
    return container(json.dumps(header, separators=(",", ":")), data)


def f32(name, shape):
    return name, "F32", shape, floats(ramp(math.prod(shape)))


def entry(shape="[2,2]", offsets="[0,16]", dtype='"F32"'):
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def one(shape="[2,2]", offsets="[0,16]", dtype='"F32"', size=16):
    return container(f'{{"t":{entry(shape, offsets, dtype)}}}', bytes(range(1, size + 1)))


# ------------------------------------------------------------------ containers


def containers():
    data = bytes(range(1, 33))
    good = f'{{"t":{entry()}}}'
    two = lambda first, second: container(
        f'{{"a":{entry(offsets=first)},"b":{entry(offsets=second)}}}', data
    )
    nested = "[" * 10_000 + "]" * 10_000
    yield "empty-file", "no bytes at all", b""
    yield "header-length-truncated", "5 bytes: the 8-byte header length is cut off", b"\x10\0\0\0\0"
    yield (
        "header-length-beyond-file",
        "the header length says 4096, the file is 8 + 64 bytes",
        struct.pack("<Q", 4096) + good.encode().ljust(64),
    )
    yield (
        "header-length-too-large",
        f"the header length says {MAX_HEADER + 1}, above the limit of {MAX_HEADER} "
        "(and beyond the file)",
        struct.pack("<Q", MAX_HEADER + 1) + good.encode(),
    )
    yield (
        "header-length-u64-max",
        "the header length says 2^64-1: adding 8 to it overflows",
        struct.pack("<Q", 2**64 - 1) + good.encode(),
    )
    yield "header-length-zero", "the header length is 0: there is no JSON", struct.pack("<Q", 0)
    yield (
        "header-leading-space",
        "the header does not start with '{' but with a space",
        container(" " + good, data[:16]),
    )
    yield "header-is-array", "the header is a JSON array", container("[]")
    yield (
        "header-invalid-utf8",
        "a tensor name holds the byte 0xff",
        container(good.encode().replace(b'"t"', b'"\xff"'), data[:16]),
    )
    yield (
        "header-byte-order-mark",
        "the header starts with a UTF-8 byte order mark",
        container(b"\xef\xbb\xbf" + good.encode(), data[:16]),
    )
    yield "header-invalid-json", "the JSON ends in the middle", container(good[:-3], data[:16])
    yield (
        "header-trailing-json",
        "a second JSON value follows the header object",
        container(good + "{}", data[:16]),
    )
    yield (
        "header-nested-array",
        "an array nested 10,000 deep where a tensor entry belongs",
        container(f'{{"t":{nested}}}'),
    )
    yield (
        "header-nested-object",
        "objects nested 3,000 deep in __metadata__",
        container('{"__metadata__":' + '{"m":' * 3_000 + '"x"' + "}" * 3_000 + "}"),
    )
    yield (
        "tensor-duplicate",
        "the tensor 't' is listed twice",
        container(f'{{"t":{entry()},"t":{entry(offsets="[16,32]")}}}', data),
    )
    yield (
        "tensor-duplicate-escaped",
        "the tensor 't' is listed twice, once spelled with a \\u escape",
        container(f'{{"t":{entry()},"\\u0074":{entry(offsets="[16,32]")}}}', data),
    )
    yield (
        "metadata-duplicate",
        "__metadata__ is given twice",
        container(
            '{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"},"t":' + entry() + "}", data[:16]
        ),
    )
    yield (
        "metadata-duplicate-key",
        "a key of __metadata__ is given twice",
        container('{"__metadata__":{"a":"1","a":"2"},"t":' + entry() + "}", data[:16]),
    )
    yield (
        "metadata-value-number",
        "a value of __metadata__ is a number, not a string",
        container('{"__metadata__":{"step":7},"t":' + entry() + "}", data[:16]),
    )
    yield (
        "metadata-not-object",
        "__metadata__ is a string",
        container('{"__metadata__":"pt","t":' + entry() + "}", data[:16]),
    )
    yield "dtype-unknown", "the dtype 'Q7' does not exist", one(dtype='"Q7"')
    yield "dtype-lowercase", "the dtype is written 'f32'", one(dtype='"f32"')
    yield "dtype-not-string", "the dtype is a number", one(dtype="32")
    yield (
        "entry-missing-dtype",
        "an entry has no dtype",
        container('{"t":{"shape":[2,2],"data_offsets":[0,16]}}', data[:16]),
    )
    yield (
        "entry-missing-shape",
        "an entry has no shape",
        container('{"t":{"dtype":"F32","data_offsets":[0,16]}}', data[:16]),
    )
    yield (
        "entry-missing-offsets",
        "an entry has no data_offsets",
        container('{"t":{"dtype":"F32","shape":[2,2]}}', data[:16]),
    )
    yield (
        "entry-duplicate-shape",
        "an entry gives its shape twice",
        container(
            '{"t":{"dtype":"F32","shape":[2,2],"shape":[4],"data_offsets":[0,16]}}', data[:16]
        ),
    )
    yield (
        "entry-unknown-key",
        "an entry has the unknown key 'strides'",
        container(
            '{"t":{"dtype":"F32","shape":[2,2],"strides":[2,1],"data_offsets":[0,16]}}', data[:16]
        ),
    )
    yield "offsets-reversed", "begin > end", one(offsets="[16,0]")
    yield "offsets-one-number", "data_offsets has one number", one(offsets="[16]")
    yield "offsets-three-numbers", "data_offsets has three numbers", one(offsets="[0,8,16]")
    yield "offsets-negative", "begin is negative", one(offsets="[-16,0]")
    yield "offsets-beyond-file", "the file ends 8 bytes before the tensor does", one(size=8)
    yield (
        "offsets-u64-max",
        "end is 2^64-1",
        one(shape="[18446744073709551615]", offsets="[0,18446744073709551615]", dtype='"U8"'),
    )
    yield "offsets-overlap", "two tensors share 8 bytes", two("[0,16]", "[8,24]")
    yield "offsets-same", "two tensors share all their bytes", container(
        f'{{"a":{entry()},"b":{entry()}}}', data[:16]
    )
    yield "offsets-hole", "16 bytes between two tensors belong to none", container(
        f'{{"a":{entry()},"b":{entry(offsets="[32,48]")}}}', data + data[:16]
    )
    yield "offsets-hole-at-start", "the first tensor starts at byte 8", one(
        offsets="[8,24]", size=24
    )
    yield "trailing-bytes", "8 bytes follow the last tensor", one(size=24)
    yield "size-mismatch", "F32 [2,3] needs 24 bytes, the offsets span 16", one(shape="[2,3]")
    yield (
        "shape-product-overflow",
        "the shape's product is 2^64, which wraps to 0 and would fit the empty span",
        one(shape="[4294967296,4294967296]", offsets="[0,0]", size=0),
    )
    yield (
        "shape-bytes-overflow",
        "2^62 elements fit u64, times 4 bytes they wrap to 0",
        one(shape="[4611686018427387904]", offsets="[0,0]", size=0),
    )
    yield "shape-negative", "a dimension is -2", one(shape="[-2,-2]")
    yield "shape-float", "a dimension is 2.0", one(shape="[2.0,2]")
    yield "shape-too-large", "a dimension is 2^64", one(shape="[18446744073709551616]")
    yield "shape-not-array", "the shape is a number", one(shape="4")


# -------------------------------------------------------------------- adapters

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"lora_alpha": 4, "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def config(**changes):
    return json.dumps({**CONFIG, **changes}, indent=2) + "\n"


def factors(a=None, b=None):
    """Well-formed factors for q_proj of a (4, 4) weight; pass an entry to replace one."""
    return tensors(
        [
            a or f32(f"{PREFIX}.lora_A.weight", [2, 4]),
            b or f32(f"{PREFIX}.lora_B.weight", [4, 2]),
        ]
    )


CATASTROPHIC = ("a" * 60 + "b", "ab" * 30)


def module_factors(module):
    prefix = f"base_model.model.{module}"
    return tensors([f32(f"{prefix}.lora_A.weight", [2, 4]), f32(f"{prefix}.lora_B.weight", [4, 2])])


def base():
    """The one well-formed thing here: a base that every adapter below names tensors of."""
    names = [PREFIX.removeprefix("base_model.model."), *CATASTROPHIC]
    return {
        "config.json": '{"model_type": "llama"}\n',
        "model.safetensors": tensors([f32(f"{name}.weight", [4, 4]) for name in names]),
    }


def poisoned(value):
    values = ramp(8)
    values[5] = value
    return (f"{PREFIX}.lora_A.weight", "F32", [2, 4], floats(values))


def adapters():
    a, b = f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"

    def with_tensors(name, wrong, payload, **changes):
        return name, wrong, {
            "adapter_config.json": config(**changes),
            "adapter_model.safetensors": payload,
        }

    def with_config(name, wrong, text):
        return name, wrong, {
            "adapter_config.json": text,
            "adapter_model.safetensors": factors(),
        }

    yield with_tensors("nan", "lora_A holds a NaN", factors(a=poisoned(math.nan)))
    yield with_tensors("inf", "lora_A holds +Inf", factors(a=poisoned(math.inf)))
    yield with_tensors("a-without-b", "lora_A has no lora_B", tensors([f32(a, [2, 4])]))
    yield with_tensors("b-without-a", "lora_B has no lora_A", tensors([f32(b, [4, 2])]))
    yield with_tensors("rank-mismatch", "lora_A has rank 2, lora_B rank 3",
                       factors(b=f32(b, [4, 3])))
    yield with_tensors("rank-not-config", "the factors have rank 2, the config says r = 3",
                       factors(), r=3)
    yield with_tensors("a-3d", "lora_A has three dimensions", factors(a=f32(a, [2, 2, 2])))
    yield with_tensors("a-1d", "lora_A has one dimension", factors(a=f32(a, [8])))
    yield with_tensors("rank-zero-tensors", "both factors have rank 0",
                       factors(a=f32(a, [0, 4]), b=f32(b, [4, 0])))
    yield with_tensors("dtype-integer", "lora_A is I8",
                       factors(a=(a, "I8", [2, 4], bytes(range(1, 9)))))
    yield with_tensors("no-tensors", "the adapter holds no tensor at all", tensors([]))
    yield with_tensors("key-unknown", "a tensor is neither lora_A nor lora_B",
                       tensors([f32(a, [2, 4]), f32(b, [4, 2]), f32(f"{PREFIX}.lora_C.weight", [2])]))
    yield "no-config", "adapter_config.json is missing", {"adapter_model.safetensors": factors()}
    yield "no-weights", "adapter_model.safetensors is missing", {"adapter_config.json": config()}
    yield with_config("config-invalid-json", "the config's JSON ends in the middle",
                      config()[:-4])
    yield with_config("config-not-object", "the config is an array", "[]\n")
    yield with_config("config-duplicate-key", "lora_alpha is given twice",
                      config().replace('"r": 2', '"lora_alpha": 8,\n  "r": 2'))
    for key in ("r", "lora_alpha"):
        yield with_config(f"config-missing-{key.replace('_', '-')}", f"{key} is missing",
                          json.dumps({k: v for k, v in CONFIG.items() if k != key}, indent=2) + "\n")
    yield with_config("config-r-zero", "r is 0", config(r=0))
    yield with_config("config-r-negative", "r is -2", config(r=-2))
    yield with_config("config-r-string", 'r is the string "2"', config(r="2"))
    yield with_config("config-r-fraction", "r is 2.5", config(r=2.5))
    yield with_config("config-alpha-nan", "lora_alpha is the literal NaN, which is not JSON",
                      config(lora_alpha=math.nan))
    yield with_config("config-alpha-infinity", "lora_alpha is 1e999, beyond f64",
                      config().replace('"lora_alpha": 4', '"lora_alpha": 1e999'))
    yield with_config("config-peft-type-unknown", "peft_type is 'LORAX'",
                      config(peft_type="LORAX"))
    yield with_config("config-peft-type-missing", "peft_type is missing",
                      json.dumps({k: v for k, v in CONFIG.items() if k != "peft_type"}) + "\n")
    yield with_config("config-key-unknown", "the unknown key use_mystery is true",
                      config(use_mystery=True))
    yield with_config("config-use-rslora-string", "use_rslora is a string",
                      config(use_rslora="yes"))
    yield with_config("config-rank-pattern-array", "rank_pattern is an array",
                      config(rank_pattern=["q_proj", 2]))
    yield with_config("config-rank-pattern-string-value", "a value of rank_pattern is a string",
                      config(rank_pattern={"q_proj": "2"}))
    yield with_config("config-rank-pattern-duplicate-key", "a key of rank_pattern is given twice",
                      config().replace('"r": 2', '"r": 2,\n  "rank_pattern": {"q": 2, "q": 4}'))
    yield with_config("config-alpha-pattern-null-value", "a value of alpha_pattern is null",
                      config(alpha_pattern={"q_proj": None}))
    yield with_config("config-pattern-invalid", "a pattern key is not a regular expression",
                      config(alpha_pattern={"q_proj(": 8}))
    yield with_config("config-pattern-look-ahead",
                      "a pattern key uses look-ahead: valid in Python (it matches), absent from "
                      "linear-time regex engines; support it or refuse it by name",
                      config(alpha_pattern={"(?!k_)q_proj": 8}))
    yield with_config("config-pattern-back-reference",
                      "a pattern key uses a back-reference: valid in Python, not regular",
                      config(alpha_pattern={"(?P<p>q)_proj(?P=p)?": 8}))
    yield with_tensors("config-pattern-catastrophic",
                       "a pattern key is (a+)+$ and a module is named 60 'a's and a 'b': "
                       "exponential in Python's engine; must end in bounded time",
                       module_factors(CATASTROPHIC[0]), alpha_pattern={"(a+)+$": 8})
    yield with_tensors("config-pattern-catastrophic-look-ahead",
                       "a pattern key is (a|b|ab)*(?=c) and a module is named 'ab' 30 times: "
                       "exponential wherever look-ahead is done by backtracking; must end in "
                       "bounded time",
                       module_factors(CATASTROPHIC[1]), alpha_pattern={"(a|b|ab)*(?=c)": 8})
    yield with_config("config-pattern-huge",
                      "a pattern key compiles to a huge automaton: must hit a size limit",
                      config(alpha_pattern={"((a{500}){500}){500}": 8}))


# --------------------------------------------------------------- sharded bases

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index(weight_map, **extra):
    value = {"metadata": {"total_size": 128}, "weight_map": weight_map, **extra}
    return json.dumps(value, indent=2) + "\n"


def indexes():
    first, second = tensors([f32("a", [4, 4])]), tensors([f32("b", [4, 4])])
    good = {"a": SHARDS[0], "b": SHARDS[1]}

    def case(name, wrong, text, shards=(first, second)):
        files = {"config.json": '{"model_type": "llama"}\n', "model.safetensors.index.json": text}
        files.update((n, p) for n, p in zip(SHARDS, shards) if p is not None)
        return name, wrong, files

    yield case("shard-missing", "the second shard does not exist", index(good), (first, None))
    yield case("path-parent", "a shard path is ../x.safetensors",
               index({**good, "b": "../x.safetensors"}), (first, None))
    yield case("path-absolute", "a shard path is absolute",
               index({**good, "b": "/x.safetensors"}), (first, None))
    yield case("path-empty", "a shard path is empty", index({**good, "b": ""}), (first, None))
    yield case("path-not-string", "a shard path is a number",
               index({**good, "b": 2}), (first, None))
    yield case("tensor-absent", "the index lists 'c' in the second shard, which lacks it",
               index({**good, "c": SHARDS[1]}))
    yield case("tensor-unlisted", "the second shard also holds 'c', which the index does not list",
               index(good), (first, tensors([f32("b", [4, 4]), f32("c", [2])])))
    yield case("tensor-stale-duplicate",
               "the second shard also holds a stale 'a' (other values), which the index maps to "
               "the first",
               index(good),
               (first, tensors([f32("b", [4, 4]), ("a", "F32", [4, 4], floats([-1.0] * 16))])))
    yield case("weight-map-array", "weight_map is an array", index(["a", "b"]))
    yield case("weight-map-missing", "there is no weight_map",
               '{"metadata": {"total_size": 128}}\n')
    yield case("weight-map-duplicate-key", "'a' is mapped twice, to both shards",
               index(good).replace('"b":', f'"a": "{SHARDS[1]}",\n    "b":'))
    yield case("index-invalid-json", "the index's JSON ends in the middle", index(good)[:-6])
    yield case("shard-truncated", "the second shard is cut in its tensor data",
               index(good), (first, second[:-8]))


# ------------------------------------------------------------------------ main

README = """\
# Malformed inputs

Written by `python3 scripts/make_bad_fixtures.py` (standard library only, no
randomness); this table too. One rule each; everything else in the file is
well formed. Licence: as the project.

`base/` is the exception: it is well formed, and holds the weights that the
adapters under `adapter/` are for, so that only the adapter is at fault.

Three containers are accepted by the safetensors library (0.8.0) all the same:
`header-leading-space` and `metadata-duplicate-key`, which the format's own
text forbids, and `entry-unknown-key`, on which it is silent. The
`config-pattern-*` adapters other than `invalid` are valid to Python's engine:
a tool may merge them if it gives Python's answer, or refuse them by name, and
must do either in bounded time. Python's answers: `look-ahead` and
`back-reference` match q_proj, the others match nothing.

"""


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def generate(out):
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    lines = ["## Containers", "", "| File | What is wrong |", "|---|---|"]
    for name, wrong, payload in containers():
        write(out / f"{name}.safetensors", payload)
        lines.append(f"| `{name}.safetensors` | {wrong} |")
    for folder, title, cases in (
        ("adapter", "Adapter directories", adapters()),
        ("index", "Sharded base directories", indexes()),
    ):
        lines += ["", f"## {title}", "", "| Directory | What is wrong |", "|---|---|"]
        for name, wrong, files in cases:
            for file, content in files.items():
                write(out / folder / name / file, content)
            wrong = wrong.replace("|", "\\|")
            lines.append(f"| `{folder}/{name}/` | {wrong} |")
    for file, content in base().items():
        write(out / "base" / file, content)
    write(out / "README.md", README + "\n".join(lines) + "\n")


def compare(left, right):
    files = lambda root: {p.relative_to(root) for p in root.rglob("*") if p.is_file()}
    ours, theirs = files(left), files(right)
    differing = sorted(ours ^ theirs)
    differing += [p for p in sorted(ours & theirs) if not filecmp.cmp(left / p, right / p, False)]
    for path in differing:
        print(f"differs: {path}")
    print(f"{len(ours | theirs)} files, {len(differing)} differ")
    return not differing


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "fixtures" / "bad")
    parser.add_argument("--check", action="store_true", help="compare, write nothing there")
    arguments = parser.parse_args()
    if not arguments.check:
        generate(arguments.out)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch) / "bad")
        return 0 if compare(arguments.out, Path(scratch) / "bad") else 1


if __name__ == "__main__":
    sys.exit(main())
