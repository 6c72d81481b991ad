#!/usr/bin/env python3
"""Writes fixtures/torch/: files of `torch.save`, and hostile ones in fixtures/torch/bad/.

The good ones come from torch itself. Beside each lies what torch reads back
from it, `<name>.expected.safetensors`. The hostile ones are bytes put
together here, or a good file with one thing changed.

    python3 scripts/make_torch_fixtures.py            rewrite fixtures/torch
    python3 scripts/make_torch_fixtures.py --check    regenerate elsewhere, compare
"""

import argparse
import collections
import filecmp
import io
import os
import pickle
import pickletools
import shutil
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent


def ramp(*shape, dtype=torch.float32, start=1):
    count = 1
    for size in shape:
        count *= size
    return (torch.arange(start, start + count, dtype=torch.float32) / 64).reshape(shape).to(dtype)


# ------------------------------------------------------------------------ good


def dtypes():
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    floats += [torch.float8_e4m3fn, torch.float8_e5m2]
    whole = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
    values = {str(d).split(".")[1]: ramp(2, 2, dtype=d) for d in floats}
    values |= {str(d).split(".")[1]: torch.arange(3).to(d) for d in whole}
    return values | {"bool": torch.tensor([True, False])}


def views():
    whole = ramp(4, 6)
    return collections.OrderedDict(
        whole=whole,
        again=whole,
        rows=whole[1:3],
        columns=whole[:, 2:4],
        transposed=whole.t(),
        expanded=ramp(3)[:, None].expand(3, 2),
        parameter=torch.nn.Parameter(ramp(2, 2, dtype=torch.bfloat16)),
        scalar=torch.tensor(0.5),
        empty=torch.zeros(0, 3),
    )


def some_views():
    kept = views()
    return {name: kept[name] for name in ("whole", "again", "rows", "transposed", "parameter")}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        with torch.no_grad():
            self.inner.weight.copy_(ramp(2, 3))
            self.inner.bias.copy_(ramp(2))


def checkpoint():
    """A trainer's: a state dict with torch's `_metadata`, the optimiser's state beside it."""
    net = Net()
    optimiser = torch.optim.Adam(net.parameters())
    net.inner(ramp(1, 3)).sum().backward()
    optimiser.step()
    return {
        "epoch": 3,
        "loss": 0.25,
        "name": "run",
        "hyper_parameters": argparse.Namespace(rank=4),
        "betas": (0.9, None, True),
        "config": {"alpha": 16, "targets": ["q_proj", "v_proj"]},
        "tags": {1, 2},
        "optimizer_states": [optimiser.state_dict()],
        "state_dict": net.state_dict(),
    }


def nested():
    return {"unet": {"down": {"lora_A": ramp(1, 2)}}, "text": {"lora_A": ramp(1, 3)}, "step": 7}


def loralib():
    return {"layer.lora_A": ramp(2, 6), "layer.lora_B": ramp(4, 2), "layer.bias": ramp(4)}


GOOD = {
    "dtypes": (dtypes, {}),
    "views": (views, {}),
    "views-legacy": (some_views, {"_use_new_zipfile_serialization": False}),
    "checkpoint": (checkpoint, {}),
    "nested": (nested, {}),
    "nested-protocol-4": (nested, {"pickle_protocol": 4}),
    "nested-legacy-protocol-5": (
        nested,
        {"pickle_protocol": 5, "_use_new_zipfile_serialization": False},
    ),
    "loralib": (loralib, {}),
    "loralib-wrapped": (lambda: {"model_state_dict": loralib()}, {}),
}


def pickles(data, count):
    """The first pickles of a file."""
    stream = io.BytesIO(data)
    for _ in range(count):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        yield data[start : stream.tell()]


def save_legacy(make, **options):
    """A legacy file whose storages have small numbers. torch names them by their addresses and sorts
    them by these, so it is made until they lie in the order of their use."""
    others = []
    while True:
        others.append(make())
        stream = io.BytesIO()
        torch.save(others[-1], stream, **options)
        data = stream.getvalue()
        *_, used, keys = pickles(data, 5)
        keys = pickle.loads(keys)
        if keys == sorted(keys, key=lambda key: used.index(key.encode())):
            break
    for number, key in enumerate(keys):
        data = data.replace(key.encode(), f"{number:0{len(key)}d}".encode())
    return data


def save(make, path, **options):
    if options.get("_use_new_zipfile_serialization") is False:
        path.write_bytes(save_legacy(make, **options))
    else:
        torch.save(make(), path, **options)


def flat(value, prefix=""):
    for key, item in value.items():
        if isinstance(item, torch.Tensor):
            yield prefix + key, item.detach().contiguous().clone()
        elif isinstance(item, dict):
            yield from flat(item, prefix + key + ".")


def good(folder):
    for name, (make, options) in GOOD.items():
        path = folder / f"{name}.pt"
        save(make, path, **options)
        read = torch.load(path, weights_only=False)
        for wrapper in ("state_dict", "model_state_dict"):
            read = read.get(wrapper, read)
        save_file(dict(flat(read)), folder / f"{name}.expected.safetensors")
    source = ROOT / "fixtures/peft/llama-rslora/adapter"
    target = folder / "peft"
    target.mkdir()
    shutil.copy(source / "adapter_config.json", target)
    torch.save(load_file(source / "adapter_model.safetensors"), target / "adapter_model.bin")


# --------------------------------------------------------------------- hostile


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape=(2, 2), strides=(2, 1), offset=0, key="0", elements=4, kind="torch\nFloatStorage"):
    storage = b"(" + text("storage") + f"c{kind}\n".encode() + text(key) + text("cpu")
    storage += number(elements) + b"tQ"
    arguments = b"(" + storage + number(offset) + numbers(*shape) + numbers(*strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"\x89}tR"


def state(*pairs):
    return b"\x80\x02}(" + b"".join(key + value for key, value in pairs) + b"u."


def one(**options):
    return state((text("t"), tensor(**options)))


def archive(data_pickle, extra=(), storage=bytes(range(16)), method=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as out:
        entries = [("a/data.pkl", data_pickle), ("a/data/0", storage), *extra]
        for name, data in entries:
            out.writestr(zipfile.ZipInfo(name), data, method)
    return stream.getvalue()


def directory_entry(data, number):
    """Where the record of an entry is in the directory."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    return at


def patched(data, at, form, value):
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


def torch_bytes(value, **options):
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def quantised():
    return {"q": torch.quantize_per_tensor(ramp(2, 2), 0.1, 0, torch.qint8)}


def overlapping(data):
    """The data of the first entry reach into the second entry."""
    first = directory_entry(data, 0)
    size = struct.unpack_from("<I", data, first + 24)[0] + 8
    return patched(patched(data, first + 20, "<I", size), first + 24, "<I", size)


def hostile():
    legacy = save_legacy(lambda: {"w": ramp(2, 2)}, _use_new_zipfile_serialization=False)
    plain = archive(one())
    second = directory_entry(plain, 1)
    doubling = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    dicts = b"}" + text("t") + tensor() + b"sq\x01"
    for _ in range(60):
        dicts += b"0}(" + text("a") + b"h\x01" + text("b") + b"h\x01" + b"uq\x01"
    itself = b"\x80\x02}q\x00" + text("t") + tensor() + b"s" + text("in") + b"h\x00s."
    return {
        "call-os-system": archive(pickle.dumps(Calls(os.system, "true"), 2)),
        "call-os-system-beside": archive(
            state((text("state_dict"), one()[2:-1]), (text("x"), pickle.dumps(Calls(os.system, "true"), 2)[2:-1]))
        ),
        "call-eval-protocol-4": archive(pickle.dumps({"a": Calls(eval, "1")}, 4)),
        "call-eval-bare": pickle.dumps(Calls(eval, "1"), 2),
        "call-inst": archive(b"\x80\x02(" + text("true") + b"iposix\nsystem\n."),
        "call-obj": archive(b"\x80\x02(cposix\nsystem\n" + text("true") + b"o."),
        "call-unknown-class": archive(b"\x80\x02c__main__\nConfig\n)\x81}b."),
        "call-of-value": archive(b"\x80\x02" + text("a") + b")R."),
        "memo-tuples": archive(b"\x80\x02)" + doubling + b"."),
        "memo-dicts": archive(b"\x80\x02" + dicts + b"."),
        "dict-in-itself": archive(itself),
        "pickle-cut": archive(one()[:-20]),
        "pickle-trailing": archive(one() + b"N."),
        "pickle-left-over": archive(b"\x80\x02NN."),
        "pickle-protocol-0": archive(b"I1\n."),
        "pickle-protocol-9": archive(b"\x80\x09N."),
        "pickle-empty-stack": archive(b"\x80\x02R."),
        "pickle-memo": archive(b"\x80\x02h\x05."),
        "pickle-deep": archive(b"\x80\x02" + b"(" * 2000 + b"."),
        "pickle-string-length": archive(b"\x80\x02X\xff\xff\xff\x7fa."),
        "pickle-append-to-dict": archive(b"\x80\x02}Na."),
        "root-list": archive(b"\x80\x02]" + tensor() + b"a."),
        "root-tensor": archive(b"\x80\x02" + tensor() + b"."),
        "key-integer": archive(state((b"K\x01", tensor()))),
        "name-twice": archive(state((text("t"), tensor()), (text("t"), tensor()))),
        "name-twice-nested": archive(
            state((text("a.b"), tensor()), (text("a"), b"}" + text("b") + tensor() + b"s"))
        ),
        "list-of-tensors": archive(state((text("l"), b"]" + tensor() + b"a"))),
        "shape-huge": archive(one(shape=(1 << 40, 1 << 40), strides=(0, 0))),
        "shape-expanded": archive(one(shape=(1 << 20, 1 << 12), strides=(0, 0))),
        "shape-negative": archive(one(shape=(-1, 2))),
        "shape-beyond": archive(one(shape=(2, 3), strides=(3, 1))),
        "stride-beyond": archive(one(strides=(1 << 62, 1 << 62))),
        "stride-count": archive(one(strides=(1,))),
        "offset-beyond": archive(one(offset=1)),
        "offset-huge": archive(one(offset=(1 << 63) - 1)),
        "offset-negative": archive(one(offset=-1)),
        "storage-missing": archive(one(key="1")),
        "storage-short": archive(one(), storage=bytes(12)),
        "dtype-complex": torch_bytes({"c": torch.zeros(1, dtype=torch.complex64)}),
        "dtype-float4": torch_bytes({"f": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}),
        "kind-quantised": torch_bytes(quantised()),
        "kind-sparse": torch_bytes({"s": torch.eye(2).to_sparse()}),
        "view-negated": torch_bytes({"n": torch._neg_view(ramp(2))}),
        "big-endian": archive(one(), [("a/byteorder", b"big")]),
        "torchscript": archive(one(), [("a/constants.pkl", b"\x80\x02).")]),
        "zip-no-pickle": archive(one()).replace(b"data.pkl", b"data.pkx"),
        "zip-other-directory": archive(one(), [("b/version", b"3")]),
        "zip-entry-twice": archive(one(), [("a/data/1", b"3")]).replace(b"a/data/1", b"a/data/0"),
        "zip-compressed": archive(one(), method=zipfile.ZIP_DEFLATED),
        "zip-bomb": archive(one(), [("a/zeros", bytes(1 << 20))], method=zipfile.ZIP_DEFLATED),
        "zip-claims-more": patched(plain, second + 24, "<I", 1 << 30),
        "zip-entry-beyond": patched(patched(plain, second + 20, "<I", 1 << 30), second + 24, "<I", 1 << 30),
        "zip-entry-in-directory": patched(patched(plain, second + 20, "<I", 20), second + 24, "<I", 20),
        "zip-overlap": overlapping(plain),
        "zip-names-differ": plain.replace(b"a/data/0", b"a/data/1", 1),
        "zip-count": patched(plain, plain.index(b"PK\x05\x06") + 10, "<H", 65000),
        "zip-cut": plain[:-30],
        "zip-trailing": plain + b"\0" * 8,
        "legacy-cut": legacy[:-3],
        "legacy-trailing": legacy + b"\0",
        "legacy-count": patched(legacy, len(legacy) - 24, "<q", 1 << 61),
        "legacy-count-negative": patched(legacy, len(legacy) - 24, "<q", -1),
        "legacy-big-endian": legacy.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        "legacy-other-pickle": pickle.dumps({"a": 1}, 2),
        "tar": b"pickle".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"),
    }


# ------------------------------------------------------------------------ main


def write(folder):
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "bad").mkdir(parents=True)
    good(folder)
    for name, data in hostile().items():
        (folder / "bad" / f"{name}.pt").write_bytes(data)


def compare(left, right):
    result = filecmp.dircmp(left, right)
    differences = result.left_only + result.right_only
    _, unequal, failed = filecmp.cmpfiles(left, right, result.common_files, shallow=False)
    differences += unequal + failed
    for inner in result.common_dirs:
        differences += compare(Path(left) / inner, Path(right) / inner)
    return differences


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    folder = ROOT / "fixtures" / "torch"
    if not parser.parse_args().check:
        write(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "torch")
        differences = compare(folder, Path(scratch) / "torch")
    if differences:
        sys.exit(f"differ: {', '.join(sorted(differences))}")


if __name__ == "__main__":
    main()
