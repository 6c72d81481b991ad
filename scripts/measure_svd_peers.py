#!/usr/bin/env python3
"""Truncated SVDs of weight changes: ours beside torch and scikit-learn, in one run.

    python3 scripts/measure_svd_peers.py matrices --data DIR [--bench BIN] [--threads N]
    python3 scripts/measure_svd_peers.py model --data DIR --layers 32 --cli LORA_CLI [--threads N]
    python3 scripts/measure_svd_peers.py resize --data DIR --layers 32 --cli LORA_CLI [--threads N]
    python3 scripts/measure_svd_peers.py peak [--threads N]

`matrices` makes bf16 pairs W0, W1 whose difference has a chosen spectrum, computes the optimal
error of every rank from the f64 Gram matrix, and times in turn, round after round:

- torch.linalg.svd in f32, the algorithm of mergekit, PEFT and kohya (once: it takes minutes),
- torch.svd_lowrank with q = rank + 8 and 2, 4 and 7 power iterations,
- scikit-learn's randomized_svd as it comes,
- ours: the benchmark program BIN (below), and whole processes of `lora-cli extract` with --cli.

Every method starts from the two bf16 matrices in memory (ours: mapped) and ends with two f32
factors; the subtraction is part of the time. The error is ‖ΔW − BA‖_F of the factors in f64, and the
excess is that over the optimum, less 1. Round 0 is not counted. The ratio at equal accuracy is to
the fewest power iterations that reach our excess; if 7 do not, it is marked ≥.

`model` makes a pair in the shape of an 8B Llama (seven matrices per layer, 32 layers are 224 of
them, 14 GB each), extracts with lora-cli, and holds the written factors of a sample of
matrices against their optimum. torch.svd_lowrank runs over all matrices beside it; the exact
algorithm is timed once for every shape and multiplied up.

`resize` makes an adapter of the same shape, of rank 128, and resizes it to 32: lora-cli beside what
kohya does (form BA, exact SVD; once for every shape, multiplied up) and beside QR of the factors
and an SVD of the core in torch.

What is in DIR already is not made again. Needs NumPy, torch and safetensors; scikit-learn
(scripts/requirements_svd.txt) if its rows are wanted. Nothing is fetched.

BIN is called as `BIN PAIR_DIR --rank R --threads N --json`, once a round.
"""

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

try:
    import sklearn
    from sklearn.utils.extmath import randomized_svd
except ImportError:
    sklearn = None

SEED = 20261123
SHAPES = {"4096x4096": (4096, 4096), "4096x11008": (4096, 11008)}
SPECTRA = ("decaying", "fast", "flat")
RANKS = (16, 64, 256)
NITERS = (2, 4, 7)
OVERSAMPLING = 8

WEIGHT_DEVIATION = 0.02  # of the base's weights
CHANGE = 0.05  # ‖ΔW‖_F over ‖W0‖_F
TENSOR = "model.layers.0.mlp.up_proj.weight"


# ------------------------------------------------------------------ synthetic


def orthonormal(rows, columns, generator):
    """Columns without preference: the Q of a Gaussian matrix."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]


def change(rows, columns, spectrum, generator):
    """ΔW with the named spectrum, up to scale; rows <= columns."""
    if spectrum == "decaying":
        values = torch.arange(1, rows + 1, dtype=torch.float32).rsqrt()
        left = orthonormal(rows, rows, generator) * values
        return left @ orthonormal(columns, rows, generator).T
    noise = torch.randn(rows, columns, generator=generator)
    if spectrum == "fast":
        # Rank 32, singular values from 1 down to 1/2, and a tenth of their norm in noise.
        values = torch.linspace(1, 0.5, 32)
        noise *= 0.1 * values.norm() / noise.norm()
    elif spectrum == "flat":
        # A Marchenko–Pastur bulk whose edge is 1, and 64 values above it.
        values = torch.linspace(4, 1.2, 64)
        noise /= math.sqrt(rows) + math.sqrt(columns)
    else:
        raise ValueError(spectrum)
    left = orthonormal(rows, len(values), generator) * values
    return noise.addmm_(left, orthonormal(columns, len(values), generator).T)


def make_pair(path, rows, columns, spectrum):
    """base.safetensors, tuned.safetensors and truth.json (the f64 spectrum of what is stored)."""
    generator = torch.Generator().manual_seed(SEED)
    base = (WEIGHT_DEVIATION * torch.randn(rows, columns, generator=generator)).bfloat16()
    delta = change(rows, columns, spectrum, generator)
    delta *= CHANGE * base.float().norm() / delta.norm()
    tuned = (base.float() + delta).bfloat16()
    del delta
    with making(path) as out:
        for name, tensor in (("base", base), ("tuned", tuned)):
            save_file({TENSOR: tensor}, out / f"{name}.safetensors", metadata={"format": "pt"})
        values = gram_singular_values(base, tuned)
        (out / "truth.json").write_text(json.dumps({"singular_values": values.tolist()}))


def gram_singular_values(base, tuned):
    """Of tuned - base, largest first: square roots of the eigenvalues of the f64 Gram matrix.

    Accurate to about 1e-8 of the largest, far below the tails that are compared here.
    """
    rows, columns = base.shape
    gram = torch.zeros(min(rows, columns), min(rows, columns), dtype=torch.float64)
    step = 1024
    for start in range(0, max(rows, columns), step):
        part = (slice(None), slice(start, start + step))
        part = part if columns >= rows else part[::-1]
        piece = tuned[part].double() - base[part].double()
        piece = piece if columns >= rows else piece.T
        gram.addmm_(piece, piece.T)
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt().numpy()


def optimum(values, rank):
    """The least Frobenius error of any matrix of this rank (Eckart and Young)."""
    return math.sqrt(math.fsum(v * v for v in values[rank:]))


class making:
    """A directory that appears under its name only when it is complete."""

    def __init__(self, path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")

    def __enter__(self):
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial

    def __exit__(self, kind, *_):
        if kind is None:
            self.partial.rename(self.path)


# -------------------------------------------------------------------- methods


def subtract(base, tuned):
    return tuned.float() - base.float()


def exact_svd(base, tuned, rank):
    """All singular triples in f32; the factors of every rank are slices of them."""
    u, s, vh = torch.linalg.svd(subtract(base, tuned), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def lowrank(niter):
    def run(base, tuned, rank):
        delta = subtract(base, tuned)
        u, s, v = torch.svd_lowrank(delta, q=rank + OVERSAMPLING, niter=niter)
        return u[:, :rank] * s[:rank], v[:, :rank].T

    return run


def sklearn_svd(base, tuned, rank):
    delta = subtract(base, tuned).numpy()
    u, s, vh = randomized_svd(delta, n_components=rank, random_state=0)
    return torch.from_numpy(u * s), torch.from_numpy(vh)


def error(base, tuned, b, a):
    """‖ΔW − BA‖_F in f64, a block of rows at a time."""
    total, step = 0.0, 512
    a = a.double()
    for start in range(0, base.shape[0], step):
        part = slice(start, start + step)
        delta = tuned[part].double() - base[part].double()
        total += delta.addmm_(b[part].double(), a, alpha=-1).square_().sum().item()
    return math.sqrt(total)


def run_bench(bench, pair, rank, threads):
    """Ours: seconds, relative error ‖ΔW − BA‖/‖ΔW‖ and, where it says so, floating-point operations.

    The one place that knows what the benchmark program prints.
    """
    command = [bench, pair, "--rank", rank, "--threads", threads, "--json"]
    report = json.loads(run(command).stdout)
    return report["seconds"], report["relative_error"], report.get("flops")


def run_extract(cli, pair, rank, threads, out):
    """A whole process of lora-cli on the same pair: seconds and the written factors B, A."""
    remove(out)
    start = time.perf_counter()
    command = [cli, "extract", pair / "base.safetensors", pair / "tuned.safetensors", "-o", out]
    run([*command, "--rank", rank, "--threads", threads, "--quiet"])
    seconds = time.perf_counter() - start
    return seconds, written_factors(out)[TENSOR]


def written_factors(adapter):
    """base tensor name -> (B times the scale, A) of an adapter in our format.

    Beside its factors a module has the tensor `alpha`, which is the scale times the rank.
    """
    factors = {}
    with safe_open(adapter, "pt") as file:
        for key in file.keys():
            module = key.removesuffix(".lora_A.weight")
            if module != key:
                a, b = file.get_tensor(key), file.get_tensor(f"{module}.lora_B.weight")
                scale = file.get_tensor(f"{module}.alpha").double() / a.shape[0]
                factors[f"{module}.weight"] = b.double() * scale, a
    return factors


def run(command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        shown = " ".join(map(str, command))
        raise SystemExit(f"{shown}: status {result.returncode}\n{result.stderr.strip()}")
    return result


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# -------------------------------------------------------------------- machine


def peak():
    """GFLOP/s of large matrix products: what the machine's libraries reach."""
    sizes, report = 4096, {}
    for label, dtype in (("sgemm", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn(sizes, sizes, generator=torch.Generator().manual_seed(SEED)).to(dtype)
        y, best = x.T.contiguous(), math.inf
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(x, y)
            best = min(best, time.perf_counter() - start)
        report[f"torch {label}"] = 2e-9 * sizes**3 / best
    x = np.random.default_rng(SEED).standard_normal((sizes, sizes), dtype=np.float32)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - start)
    report["numpy sgemm"] = 2e-9 * sizes**3 / best
    return report


def machine(threads):
    model = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    kernel = ".".join(platform.release().split(".")[:2])
    libraries = [
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"NumPy {np.__version__}",
        *([f"scikit-learn {sklearn.__version__}"] if sklearn else []),
    ]
    return (
        f"{datetime.date.today()}, {model}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GB, Linux {kernel}; "
        f"{threads} threads, load {os.getloadavg()[0]:.1f} before; {', '.join(libraries)}"
    )


# ------------------------------------------------------------------- matrices


class Rows:
    """Seconds and error of each method at one (matrix, rank)."""

    def __init__(self):
        self.seconds, self.errors, self.flops = {}, {}, {}

    def add(self, method, seconds, error, flops=None):
        self.seconds.setdefault(method, []).append(seconds)
        self.errors[method] = max(error, self.errors.get(method, 0.0))
        if flops:
            self.flops[method] = flops

    def median(self, method):
        return statistics.median(self.seconds[method])


def load(pair):
    with safe_open(pair / "base.safetensors", "pt") as file:
        base = file.get_tensor(TENSOR)
    with safe_open(pair / "tuned.safetensors", "pt") as file:
        tuned = file.get_tensor(TENSOR)
    return base.clone(), tuned.clone()


def measure_case(pair, ranks, options, note):
    base, tuned = load(pair)
    values = json.loads((pair / "truth.json").read_text())["singular_values"]
    norm = optimum(values, 0)
    results = {rank: Rows() for rank in ranks}

    if options.exact:
        note("torch.linalg.svd")
        start = time.perf_counter()
        b, a = exact_svd(base, tuned, max(ranks))
        seconds = time.perf_counter() - start
        for rank in ranks:
            results[rank].add(
                "torch.linalg.svd", seconds, error(base, tuned, b[:, :rank], a[:rank])
            )
        del b, a

    peers = {f"svd_lowrank, niter {n}": lowrank(n) for n in options.niter}
    if sklearn:
        peers["sklearn randomized_svd"] = sklearn_svd
    for rank in ranks:
        rows = results[rank]
        for turn in range(options.rounds + 1):
            note(f"rank {rank}, round {turn}")
            counted = turn > 0
            if options.bench:
                seconds, relative, flops = run_bench(options.bench, pair, rank, options.threads)
                if counted:
                    rows.add("ours", seconds, relative * norm, flops)
            if options.cli:
                out = pair / "extracted.safetensors"
                seconds, (b, a) = run_extract(options.cli, pair, rank, options.threads, out)
                if counted:
                    rows.add("lora-cli extract, process", seconds, error(base, tuned, b, a))
                remove(out)
            for method, function in peers.items():
                torch.manual_seed(SEED + turn)
                start = time.perf_counter()
                b, a = function(base, tuned, rank)
                seconds = time.perf_counter() - start
                if counted:
                    rows.add(method, seconds, error(base, tuned, b, a))
                del b, a
    return values, results


HEAD = "| matrix | spectrum | rank | method | min s | median s | excess | GFLOP/s | ÷ ours |"
RULE = "|---|---|---:|---|---:|---:|---:|---:|---:|"


def print_rows(shape, spectrum, rank, values, rows, sgemm):
    best = optimum(values, rank)
    ours = next((m for m in ("ours", "lora-cli extract, process") if m in rows.seconds), None)
    equal = equal_accuracy(rows, ours, best)
    for method, seconds in rows.seconds.items():
        ratio = f"{rows.median(method) / rows.median(ours):.1f}" if ours else ""
        if equal and method == equal[0]:
            ratio = f"**{equal[1]}{ratio}**"
        rate = rows.flops[method] / rows.median(method) / 1e9 if method in rows.flops else None
        rate = f"{rate:.0f} ({100 * rate / sgemm:.0f} %)" if rate else ""
        excess = rows.errors[method] / best - 1
        print(
            f"| {shape} | {spectrum} | {rank} | {method} | {min(seconds):.3f} "
            f"| {rows.median(method):.3f} | {excess:.1e} | {rate} | {ratio} |",
            flush=True,
        )


def equal_accuracy(rows, ours, best):
    """The cheapest svd_lowrank that is as good as ours, or the best one and '≥'."""
    lowranks = sorted(
        (m for m in rows.seconds if m.startswith("svd_lowrank")), key=lambda m: rows.median(m)
    )
    if not ours or not lowranks:
        return None
    # Below a ten-millionth both are at the noise of f32.
    wanted = max(rows.errors[ours], best * (1 + 1e-7))
    good = [m for m in lowranks if rows.errors[m] <= wanted]
    if good:
        return good[0], ""
    return min(lowranks, key=lambda m: rows.errors[m]), "≥ "


def matrices(options):
    note = progress(options)
    sgemm = print_head(options)
    print(HEAD, RULE, sep="\n", flush=True)
    for shape in options.shapes:
        for spectrum in options.spectra:
            pair = options.data / f"{shape}-{spectrum}"
            if not pair.exists():
                note(f"making {pair.name}")
                make_pair(pair, *SHAPES[shape], spectrum)
            values, results = measure_case(
                pair, options.ranks, options, lambda text: note(f"{pair.name}: {text}")
            )
            for rank, rows in results.items():
                print_rows(shape, spectrum, rank, values, rows, sgemm)
    note("")
    return 0


def print_head(options):
    print(machine(options.threads))
    rates = peak()
    print("Peak GFLOP/s:", ", ".join(f"{label} {rate:.0f}" for label, rate in rates.items()))
    print()
    return rates["torch sgemm"]


# ---------------------------------------------------------------- whole model

HIDDEN, KEYS, FEED = 4096, 1024, 14336
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED, HIDDEN),
    "mlp.up_proj": (FEED, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED),
}
MODEL_RANK = 128  # of the part of the change that is not noise
MODEL_NOISE = 0.3  # share of the change's norm that is noise


def model_tensors(layers):
    return [
        (layer, f"model.layers.{layer}.{name}.weight", shape)
        for layer in range(layers)
        for name, shape in LAYER.items()
    ]


def make_model(root, layers):
    """base and tuned, one shard a layer.

    Random numbers are drawn once, into a pool a little larger than the largest matrix, and every
    matrix starts elsewhere in it: what matters is the spectrum of the difference, which is low
    rank (σ_i = i^-0.7) plus white noise plus what bf16 rounds.
    """
    generator = torch.Generator().manual_seed(SEED)
    largest = FEED * HIDDEN
    pools = [torch.randn(largest + (1 << 20), generator=generator) for _ in range(2)]
    factor = torch.randn(FEED + 4096, MODEL_RANK, generator=generator)
    decay = torch.arange(1, MODEL_RANK + 1).float() ** -0.7

    def pooled(pool, shape):
        start = torch.randint(0, 1 << 20, (1,), generator=generator).item()
        return pool[start : start + shape[0] * shape[1]].view(shape)

    def factors(rows):
        start = torch.randint(0, 4096, (1,), generator=generator).item()
        return factor[start : start + rows] / math.sqrt(rows)

    with making(root / "base") as base, making(root / "tuned") as tuned:
        index = {}
        for layer in range(layers):
            shards = {}, {}
            for _, name, shape in [t for t in model_tensors(layers) if t[0] == layer]:
                weight = (WEIGHT_DEVIATION * pooled(pools[0], shape)).bfloat16()
                delta = (factors(shape[0]) * decay) @ factors(shape[1]).T
                strength = CHANGE * WEIGHT_DEVIATION * math.sqrt(shape[0] * shape[1])
                delta *= strength * math.sqrt(1 - MODEL_NOISE**2) / delta.norm()
                delta.add_(pooled(pools[1], shape), alpha=MODEL_NOISE * CHANGE * WEIGHT_DEVIATION)
                shards[0][name] = weight
                shards[1][name] = delta.add_(weight).bfloat16()
                index[name] = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
            for out, tensors in zip((base, tuned), shards):
                file = out / f"model-{layer + 1:05}-of-{layers:05}.safetensors"
                save_file(tensors, file, metadata={"format": "pt"})
        total = sum(2 * rows * columns for _, _, (rows, columns) in model_tensors(layers))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": FEED,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "dtype": "bfloat16",
        }
        for out in (base, tuned):
            (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (out / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
            )


def model_reader(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]

    def get(name):
        with safe_open(directory / index[name], "pt") as file:
            return file.get_tensor(name)

    return get


def model(options):
    note = progress(options)
    print_head(options)
    root = options.data / f"model-{options.layers}-layers"
    if not (root / "base").exists():  # the last to get its name
        note("making the pair")
        make_model(root, options.layers)
    tensors = model_tensors(options.layers)
    get_base, get_tuned = model_reader(root / "base"), model_reader(root / "tuned")
    rank = options.rank
    note("reading both models once")
    for directory in (root / "base", root / "tuned"):
        for path in directory.glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass
    total = sum(2 * rows * columns for _, _, (rows, columns) in tensors)
    print(f"{len(tensors)} matrices, {2 * total / 1e9:.1f} GB of bf16 in both models, rank {rank}")
    print()
    print("| method | seconds | median s | worst excess | mean excess | of | ÷ ours |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)

    sample = sampled(tensors, options.check)
    best = {}
    truth = root / "truth.json"
    known = json.loads(truth.read_text()) if truth.exists() else {}
    for name in sample:
        if name not in known:
            note(f"optimum of {name}")
            known[name] = gram_singular_values(get_base(name), get_tuned(name)).tolist()
            truth.write_text(json.dumps(known))
        best[name] = optimum(known[name], rank)

    ours, written, lows = [], {}, []
    low_excess = {}
    for turn in range(options.rounds + 1):
        if options.cli:
            note(f"lora-cli extract, round {turn}")
            out = root / "extracted.safetensors"
            remove(out)
            start = time.perf_counter()
            command = [options.cli, "extract", root / "base", root / "tuned", "-o", out]
            command += ["--rank", rank, "--threads", options.threads, "--quiet"]
            run(command + options.extract)
            if turn:
                ours.append(time.perf_counter() - start)
        if options.lowrank:
            note(f"svd_lowrank over all matrices, round {turn}")
            torch.manual_seed(SEED + turn)
            seconds = 0.0
            for _, name, _ in tensors:
                base, tuned = get_base(name), get_tuned(name)
                start = time.perf_counter()
                b, a = lowrank(2)(base, tuned, rank)
                seconds += time.perf_counter() - start
                if turn == 1 and name in best:
                    low_excess[name] = error(base, tuned, b, a) / best[name] - 1
            if turn:
                lows.append(seconds)

    if options.cli:
        written = written_factors(root / "extracted.safetensors")
        excess = {
            name: error(get_base(name), get_tuned(name), *written[name]) / best[name] - 1
            for name in sample
        }
        print_model_row("lora-cli extract, process", ours, excess, ours)
    if options.lowrank:
        print_model_row("svd_lowrank, q = rank + 8, niter 2", lows, low_excess, ours)
    if options.exact:
        # Once for every shape, largest last.
        seconds = 0.0
        for shape in sorted(set(LAYER.values()), key=math.prod):
            alike = [name for _, name, other in tensors if other == shape]
            note(f"torch.linalg.svd of one {shape[0]}×{shape[1]}")
            base, tuned = get_base(alike[0]), get_tuned(alike[0])
            start = time.perf_counter()
            exact_svd(base, tuned, rank)
            seconds += len(alike) * (time.perf_counter() - start)
        print_model_row("torch.linalg.svd, projected", [seconds], {}, ours)
    note("")
    return 0


# --------------------------------------------------------------------- resize


def make_adapter(path, layers, rank):
    """A PEFT directory in bf16, its singular values falling by half over 32."""
    generator = torch.Generator().manual_seed(SEED)
    decay = torch.exp2(-torch.arange(rank) / 32)
    tensors = {}
    for _, name, (rows, columns) in model_tensors(layers):
        prefix = "base_model.model." + name.removesuffix(".weight")
        a = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        b = torch.randn(rows, rank, generator=generator) / math.sqrt(rows) * decay
        tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
        tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in LAYER),
    }
    with making(path) as out:
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def adapter_factors(path, names):
    """B and A in f32; here alpha is the rank."""
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        for name in names:
            prefix = "base_model.model." + name.removesuffix(".weight")
            a, b = (file.get_tensor(f"{prefix}.lora_{x}.weight").float() for x in "AB")
            yield name, b, a


def core(b, a):
    """SVD of BA without forming it."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    return qb @ u, s, vh @ qa.T


def resize(options):
    note = progress(options)
    print_head(options)
    before, after = options.before, options.rank
    adapter = options.data / f"adapter-{options.layers}-layers-r{before}"
    if not adapter.exists():
        note("making the adapter")
        make_adapter(adapter, options.layers, before)
    tensors = model_tensors(options.layers)
    names = [name for _, name, _ in tensors]
    print(f"{len(tensors)} modules of rank {before}, resized to {after}\n")
    print("| method | seconds | median s | worst excess | mean excess | of | ÷ ours |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)

    ours, factored, excess = [], [], {}
    out = options.data / "resized.safetensors"
    for turn in range(options.rounds + 1):
        if options.cli:
            note(f"lora-cli resize, round {turn}")
            remove(out)
            start = time.perf_counter()
            command = [options.cli, "resize", adapter, "-o", out, "--to", "lora", "--rank", after]
            run([*command, "--threads", options.threads, "--quiet"])
            if turn:
                ours.append(time.perf_counter() - start)
        note(f"QR and core, round {turn}")
        seconds = 0.0
        for _, b, a in adapter_factors(adapter, names):
            start = time.perf_counter()
            u, s, vh = core(b, a)
            u, vh = u[:, :after] * s[:after], vh[:after].contiguous()
            seconds += time.perf_counter() - start
        if turn:
            factored.append(seconds)
    if options.cli:
        written = written_factors(out)
        for name, b, a in adapter_factors(adapter, sampled(tensors, options.check)):
            b, a = b.double(), a.double()
            best = optimum(core(b, a)[1].tolist(), after)
            c, d = (part.double() for part in written[name])
            difference = core(torch.cat([b, -c], 1), torch.cat([a, d], 0))[1]
            excess[name] = difference.norm().item() / best - 1
        print_model_row("lora-cli resize, process", ours, excess, ours)
    print_model_row("torch, QR and SVD of the core", factored, {}, ours)
    if options.exact:
        seconds = 0.0
        for shape in sorted(set(LAYER.values()), key=math.prod):
            alike = [name for _, name, other in tensors if other == shape]
            note(f"torch.linalg.svd of one {shape[0]}×{shape[1]}")
            _, b, a = next(adapter_factors(adapter, alike[:1]))
            start = time.perf_counter()
            torch.linalg.svd(b @ a, full_matrices=False)
            seconds += len(alike) * (time.perf_counter() - start)
        print_model_row("torch.linalg.svd of BA, projected", [seconds], {}, ours)
    note("")
    return 0


def sampled(tensors, count):
    """All of the first layer, and others spread over the model."""
    first = [name for layer, name, _ in tensors if layer == 0]
    rest = [name for layer, name, _ in tensors if layer != 0]
    step = max(1, len(rest) // max(1, count - len(first)))
    return (first + rest[step - 1 :: step])[:count] if count > len(first) else first[:count]


def print_model_row(method, seconds, excess, ours):
    median = statistics.median(seconds)
    ratio = f"{median / statistics.median(ours):.1f}" if ours else ""
    worst = f"{max(excess.values()):.1e}" if excess else ""
    mean = f"{statistics.mean(excess.values()):.1e}" if excess else ""
    every = ", ".join(f"{s:.2f}" for s in seconds)
    print(
        f"| {method} | {every} | {median:.2f} | {worst} | {mean} | {len(excess) or ''} | {ratio} |",
        flush=True,
    )


# ----------------------------------------------------------------------- main


def progress(options):
    """One line on stderr that says what is running, if anyone looks."""
    if options.quiet or not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (
        ("matrices", matrices),
        ("model", model),
        ("resize", resize),
        ("peak", print_head),
    ):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        command.add_argument("--quiet", action="store_true")
        if name == "peak":
            continue
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--cli", type=Path, help="lora-cli: whole processes of extract")
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--no-exact", dest="exact", action="store_false")
        if name == "matrices":
            command.add_argument("--bench", type=Path, help="our benchmark program")
            command.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
            command.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA))
            command.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
            command.add_argument("--niter", nargs="+", type=int, default=list(NITERS))
        else:
            command.add_argument("--layers", type=int, default=2, help="32 for the whole model")
            command.add_argument("--rank", type=int, default=64 if name == "model" else 32)
            if name == "resize":
                command.add_argument("--before", type=int, default=128, help="the rank resized")
            command.add_argument("--check", type=int, default=10, help="matrices with an optimum")
            if name != "model":
                continue
            command.add_argument("--no-lowrank", dest="lowrank", action="store_false")
            command.add_argument(
                "--extract", nargs=argparse.REMAINDER, default=[], help="options for extract, last"
            )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limit_blas(options.threads)
    result = options.function(options)
    return result if options.function is not print_head else 0


def limit_blas(threads):
    """NumPy's and SciPy's own libraries, which torch.set_num_threads does not reach."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        needed = str(threads)
        if os.environ.get("OPENBLAS_NUM_THREADS") != needed:
            os.environ.update(OPENBLAS_NUM_THREADS=needed, OMP_NUM_THREADS=needed)
            os.execv(sys.executable, [sys.executable, *sys.argv])
    else:
        threadpool_limits(threads)


if __name__ == "__main__":
    sys.exit(main())
