#!/usr/bin/env python3
"""How many elements of a merge are correctly rounded, by dtype, rank and regime.

    python3 scripts/measure_numerics.py LORA_CLI

Merges random matrices with the given binary and compares every element with W0 + s·B·A in f64,
rounded once. Prints the table of docs/numerics.md. Needs NumPy.
"""

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SHAPE = (1024, 1024)


def truncate_bits(values, kept):
    """f64 values rounded to nearest even with `kept` bits after the leading one."""
    bits = values.view(np.uint64)
    drop = np.uint64(52 - kept)
    half = (np.uint64(1) << (drop - np.uint64(1))) - np.uint64(1)
    bits = bits + half + ((bits >> drop) & np.uint64(1))
    return ((bits >> drop) << drop).view(np.float64)


def rounded(values, dtype):
    """Rounded once from f64. Some values here are subnormal in f16, none in the other two."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float64)
    return truncate_bits(values, {"BF16": 7, "F32": 23}[dtype])


def encode(values, dtype):
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def decode(data, dtype):
    if dtype == "F32":
        return np.frombuffer(data, "<f4").astype(np.float64)
    if dtype == "F16":
        return np.frombuffer(data, "<f2").astype(np.float64)
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)


def save(path, tensors):
    header, data = {}, b""
    for name, dtype, values in tensors:
        raw = encode(values, dtype)
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def measure(cli, dtype, rank, alpha, delta):
    """delta: the standard deviation of the delta relative to that of the weights."""
    random = np.random.default_rng(rank)
    scale = alpha / rank
    weights = rounded(random.normal(0, 0.02, SHAPE), dtype)
    a = random.normal(0, 1, (rank, SHAPE[1])).astype(np.float32).astype(np.float64)
    b = random.normal(0, 0.02 * delta / scale / rank**0.5, (SHAPE[0], rank))
    b = b.astype(np.float32).astype(np.float64)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        save(scratch / "base.safetensors", [("x.weight", dtype, weights)])
        prefix = "base_model.model.x."
        factors = [(prefix + "lora_A.weight", "F32", a), (prefix + "lora_B.weight", "F32", b)]
        save(scratch / "adapter_model.safetensors", factors)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
        (scratch / "adapter_config.json").write_text(json.dumps(config))
        arguments = ["base.safetensors", "adapter_model.safetensors", "-o", "out.safetensors", "-q"]
        # Square: say how it is stored.
        arguments += ["--fan-in-fan-out", "false"]
        subprocess.run([cli, "merge", *arguments], cwd=scratch, check=True, stderr=subprocess.DEVNULL)
        output = (scratch / "out.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", output[:8])
    ours = decode(output[8 + length :], dtype).reshape(SHAPE)
    exact = weights + scale * (b @ a)
    wrong = int((ours != rounded(exact, dtype)).sum())
    unit = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}[dtype]
    n = min(rank, 64) * 2.0**-24
    # Below the smallest normal number the spacing no longer shrinks.
    smallest = 2.0**-14 if dtype == "F16" else 2.0**-126
    bound = unit * np.maximum(np.abs(exact), smallest) + (1 + unit) * n / (1 - n) * abs(scale) * (np.abs(b) @ np.abs(a))
    return 1 - wrong / exact.size, float((np.abs(ours - exact) / bound).max())


def main():
    cli = str(Path(sys.argv[1]).resolve())
    print("| output | rank | scale | ‖ΔW‖/‖W0‖ | correctly rounded | largest error ÷ bound |")
    print("|---|---:|---:|---:|---:|---:|")
    for dtype in ("BF16", "F16", "F32"):
        for rank, alpha in ((8, 16), (64, 128), (64, 96), (256, 512), (1024, 1024)):
            for delta in (0.03, 1.0):
                share, error = measure(cli, dtype, rank, alpha, delta)
                print(
                    f"| {dtype} | {rank} | {alpha / rank:g} | {delta:g} | {100 * share:.4f} % |"
                    f" {error:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
