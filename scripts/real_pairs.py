#!/usr/bin/env python3
"""The checking half of scripts/real_pairs.sh; run that instead.

Extracts adapters from the pairs that scripts/make_real_pairs.py made, merges them back, resizes,
measures and compares them with lora-cli, and holds every result against f64 arithmetic on the
files themselves. lora-cli's JSON is read for what only it can say (certificates, spectra,
similarities), in the functions under "lora-cli's reports" and nowhere else.

The optimum of a rank is that of Eckart and Young, from the f64 SVD in reference.json.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BertForPreTraining

from make_real_pairs import KNOWN_RANK, KNOWN_STRENGTHS, RANKS, known_deltas
from real_model import Clock, Table, read, relative, tensor_files

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Tolerances. Those of f32 arithmetic are a few times what was measured.
EXCESS = 1e-2  # over the optimal error: what extract promises
CERTIFICATE = 1e-6  # what a certificate may be short by: f32 factors, f64 sums in another order
MERGED = 5e-7  # ‖W' − (W0 + BA)‖ / ‖W'‖: chains of up to 64 products in f32
SPECTRUM = 1e-6  # |σ − NumPy's| / σ1
RESIZED = 1e-6  # over the optimal error of the product
KNOWN = 2e-5  # ‖BA − Δ‖ / ‖Δ‖ of the known adapter through f32 weights; rounding gives 6e-6
SIMILARITY = 1e-4  # |φ − NumPy's|
OUTPUT = 2e-5  # x·W + s·B(A·x) against x·(W + s·B·A): another order of sums, relative


# ------------------------------------------------------------------- lora-cli


class Cli:
    """Runs the binary; a failure is a failed check, never an exception."""

    def __init__(self, path, table):
        self.path, self.table = path, table

    def __call__(self, pair, command, *arguments):
        """The JSON report, and the seconds; None if it failed."""
        shown = [str(part) for part in (self.path, command, *arguments, "--json")]
        for path in arguments:
            if isinstance(path, Output):
                remove(path.path)
        start = time.monotonic()
        result = subprocess.run(shown, capture_output=True, text=True)
        self.seconds = time.monotonic() - start
        try:
            report = json.loads(result.stdout)
        except json.JSONDecodeError:
            report = None
        if result.returncode != 0 or report is None:
            message = (result.stderr.strip() or "no message").splitlines()
            print("   ", " ".join(shown), file=sys.stderr)
            print("\n".join(f"    {line}" for line in message[:20]), file=sys.stderr)
            self.table.fail(pair, command, f"exit status {result.returncode}: {message[0][:80]}")
            return None
        return report


class Output:
    """A path that the command writes: what an earlier run left there goes first."""

    def __init__(self, path):
        self.path = path

    def __str__(self):
        return str(self.path)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -------------------------------------------------------- lora-cli's reports


def certificates(report):
    """base tensor -> (residual ‖ΔW − BA‖_F, bound on its excess over the optimum)."""
    return {
        tensor["parameter"]: (tensor["residual"], tensor["gap_bound"])
        for tensor in report["tensors"]
    }


def printed_spectra(report):
    """base tensor -> singular values, largest first, as many as are printed."""
    return {
        tensor["parameter"]: np.array(tensor["singular_values"]) for tensor in report["tensors"]
    }


def printed_similarity(report):
    """tensor -> φ, whose element [i-1][j-1] is φ(A, B, i, j)."""
    return {tensor["parameter"]: np.array(tensor["phi"]) for tensor in report["tensors"]}


# -------------------------------------------------------------------- factors


def native_factors(path):
    """base tensor -> (s·B, A) in f64, of an adapter in our format.

    Beside its factors a module has the tensor `alpha`: the scale times the rank.
    """
    factors = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            module = key.removesuffix(".lora_A.weight")
            if module != key:
                a = file.get_tensor(key).double()
                b = file.get_tensor(f"{module}.lora_B.weight").double()
                factors[f"{module}.weight"] = scaled(b, file.get_tensor(f"{module}.alpha"), a), a
    return factors


def scaled(b, alpha, a):
    return b * (alpha.double().item() / a.shape[0])


def peft_factors(path):
    """The same of a PEFT directory with one rank and alpha, or with patterns of full names."""
    config = json.loads((path / "adapter_config.json").read_text())
    files, factors = tensor_files(path), {}
    for key in files:
        module = key.removesuffix(".lora_A.weight")
        if module == key:
            continue
        a, b = read(files, key).double(), read(files, f"{module}.lora_B.weight").double()
        module = module.removeprefix("base_model.model.")
        rank = pattern_value(config.get("rank_pattern"), module, config["r"])
        alpha = pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        assert a.shape[0] == rank, f"{module}: rank {a.shape[0]}, configured {rank}"
        factors[f"{module}.weight"] = b * (alpha / divisor), a
    return factors


def pattern_value(patterns, module, default):
    for key, value in (patterns or {}).items():
        if module == key.lstrip("^") or module.endswith("." + key):
            return value
    return default


def core(b, a):
    """Singular values and vectors of BA without forming it: QR of both, SVD of the small core."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    return qb @ u, s, vh @ qa.T


def product_norm(b, a):
    """‖BA‖_F from the Gram matrices of the factors."""
    return math.sqrt(max(0.0, ((b.T @ b) * (a @ a.T)).sum().item()))


def tail(values, rank):
    return math.sqrt(math.fsum(float(v) ** 2 for v in values[rank:]))


# ---------------------------------------------------------------------- pairs


class Pair:
    def __init__(self, work, group, base, tuned, model):
        self.name = f"{group} {tuned}"
        self.base, self.tuned = work / group / base, work / group / tuned
        self.out = work / "out" / f"{group}-{tuned}"
        self.out.mkdir(parents=True, exist_ok=True)
        self.model = model
        pairs = json.loads((work / group / "reference.json").read_text())["pairs"]
        facts = next(p for p in pairs if p["base"] == base and p["tuned"] == tuned)
        self.tensors = facts["tensors"]
        self.base_files, self.tuned_files = tensor_files(self.base), tensor_files(self.tuned)

    def before(self, name):
        return read(self.base_files, name)

    def after(self, name):
        return read(self.tuned_files, self.tensors[name]["tuned_name"])

    def change(self, name):
        return self.after(name).double() - self.before(name).double()

    def adapter(self, rank, form="native"):
        return self.out / (f"r{rank}.safetensors" if form == "native" else f"r{rank}-{form}")


def forward(model, vocabulary):
    """Logits (or hidden states) in f32, on token ids that need no tokenizer."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, vocabulary - 5, (3, 24), generator=generator)
    with torch.no_grad():
        out = model.eval()(input_ids=ids)
    return out.prediction_logits if "prediction_logits" in out else out.logits


def load_model(pair, path):
    return pair.model.from_pretrained(path, dtype=torch.float32)


# --------------------------------------------------------------------- checks


def extract(pair, cli, table, rank):
    """At one rank, in both formats: the error of the factors, and of the weights merged back."""
    label = f"{pair.name} r{rank}"
    native = pair.adapter(rank)
    report = cli(label, "extract", pair.base, pair.tuned, "-o", Output(native), "--rank", rank)
    seconds = cli.seconds
    peft = pair.adapter(rank, "peft")
    arguments = ("-o", Output(peft), "--rank", rank, "--to", "peft")
    if report is None or cli(label, "extract", pair.base, pair.tuned, *arguments) is None:
        return None
    factors, other, printed = native_factors(native), peft_factors(peft), certificates(report)

    differ = sum(
        not torch.allclose(factors[n][0] @ factors[n][1], other[n][0] @ other[n][1], rtol=1e-6)
        for n in factors.keys() & other.keys()
    )
    table.check(label, "PEFT factors unlike ours", differ + len(factors.keys() ^ other.keys()), 0)

    excess, short, wrong, errors, wanted = [], [], [], [], []
    for name, (b, a) in factors.items():
        facts, delta = pair.tensors[name], pair.change(name)
        residual = (delta - b @ a).norm().item()
        told, bound = printed[name]
        wrong.append(abs(told - residual) / facts["delta_norm"])
        if "residual" in facts:
            best = facts["residual"][str(rank)]
            floor = 1e-6 * facts["delta_norm"]  # below it, f32 factors say nothing
            over = (residual - best) / max(best, floor)
            excess.append(over)
            short.append(over - bound)
            errors.append(residual / facts["delta_norm"])
            wanted.append(best / facts["delta_norm"])
    note = f"mean error {mean(errors):.4f}, optimum {mean(wanted):.4f}, {seconds:.2f} s"
    table.check(label, f"excess over NumPy, {len(excess)} tensors", max(excess), EXCESS, note)
    table.check(label, "excess beyond its certificate", max(short), CERTIFICATE)
    table.check(label, "printed residual, rel to the change", max(wrong), CERTIFICATE)
    table.check(label, "rank above what was asked", over_rank(factors, rank), 0)

    merged = pair.out / f"r{rank}-merged"
    arguments = (pair.base, native, "-o", Output(merged), "--dtype", "f32")
    if cli(label, "merge", *arguments) is not None:
        files, rounding, touched = tensor_files(merged), [], 0
        for name in pair.base_files:
            result, before = read(files, name), pair.before(name)
            if name in factors:
                b, a = factors[name]
                error = (result.double() - before.double() - b @ a).norm()
                rounding.append((error / result.double().norm()).item())
            else:
                touched += not torch.equal(result, before.to(result.dtype))
        table.check(label, "merged back, beyond one rounding", max(rounding), MERGED)
        table.check(label, "other tensors changed", touched, 0)
    return mean(errors)


def mean(values):
    return sum(values) / len(values) if values else math.nan


def over_rank(factors, rank):
    return sum(a.shape[0] > rank for _, a in factors.values())


def outputs(pair, cli, table, rank):
    """PeftModel on the PEFT directory gives the outputs of the merged model."""
    label = f"{pair.name} r{rank}"
    merged, peft = pair.out / f"r{rank}-merged", pair.adapter(rank, "peft")
    if not merged.exists() or not peft.exists():
        return
    vocabulary = json.loads((pair.base / "config.json").read_text())["vocab_size"]
    ours = forward(load_model(pair, merged), vocabulary)
    model = load_model(pair, pair.base)
    plain = forward(model, vocabulary)
    live = forward(PeftModel.from_pretrained(model, peft), vocabulary)
    table.check(label, "outputs against PEFT live, rel", relative(ours, live), OUTPUT)
    table.at_least(label, "effect of the adapter, rel", relative(ours, plain), 100 * OUTPUT)


def full(pair, cli, table, rank):
    """`--full norms,biases,embeddings`: those are the tuned model's bits."""
    label = f"{pair.name} r{rank} full"
    adapter, merged = pair.adapter(rank, "full.safetensors"), pair.out / f"r{rank}-full-merged"
    arguments = ("-o", Output(adapter), "--rank", rank, "--full", "norms,biases,embeddings")
    if cli(label, "extract", pair.base, pair.tuned, *arguments) is None:
        return
    if cli(label, "merge", pair.base, adapter, "-o", Output(merged)) is None:
        return
    factors, files = native_factors(adapter), tensor_files(merged)
    unlike, replaced, beyond = [], 0, []
    for name in pair.tensors:
        result, after, before = read(files, name), pair.after(name), pair.before(name)
        if name in factors:
            b, a = factors[name]
            exact = before.double() + b @ a
            beyond.append(((result.double() - exact).norm() / exact.norm()).item())
        elif not torch.equal(result, after.to(result.dtype)):
            unlike.append(name)
        else:
            replaced += not torch.equal(after.to(before.dtype), before)
    note = f"{replaced} tensors replaced" + (f"; {', '.join(unlike[:3])}" if unlike else "")
    table.check(label, "tensors unlike the tuned model's", len(unlike), 0, note)
    one_rounding = {torch.float32: MERGED, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    tolerance = one_rounding[pair.before(next(iter(factors))).dtype]
    table.check(label, "low-rank part, beyond one rounding", max(beyond), tolerance)


def what_it_is_worth(pair, ranks, table_rows):
    """How far the outputs are from the tuned model's: by rank, and with norms and biases."""
    vocabulary = json.loads((pair.base / "config.json").read_text())["vocab_size"]
    tuned = hidden(pair, pair.tuned, vocabulary)
    for label, path in [
        ("base", pair.base),
        *((f"rank {rank}", pair.out / f"r{rank}-merged") for rank in ranks),
        ("rank 16 and norms, biases, embeddings", pair.out / "r16-full-merged"),
    ]:
        if path.exists():
            found = hidden(pair, path, vocabulary)
            distance = ((found - tuned).norm() / tuned.norm()).item()
            table_rows.append((pair.name, label, distance))


def hidden(pair, path, vocabulary):
    """The body's last hidden states: what a base and a tune with other heads have in common."""
    model = load_model(pair, path)
    body = getattr(model, "bert", None) or model.model
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, vocabulary - 5, (3, 24), generator=generator)
    with torch.no_grad():
        return body.eval()(input_ids=ids).last_hidden_state


def known_rank(pair, cli, table, exact):
    """`--rank auto` on the adapter of known rank; through bf16 it is reported, not checked."""
    label = f"{pair.name} auto"
    adapter = pair.out / "auto.safetensors"
    arguments = ("-o", Output(adapter), "--rank", "auto")
    if cli(label, "extract", pair.base, pair.tuned, *arguments) is None:
        return
    factors, wanted = native_factors(adapter), dict(known_deltas(pair.base.parent / "adapter"))
    ranks, errors = {}, []
    for name, delta in wanted.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        strength = KNOWN_STRENGTHS[layer % len(KNOWN_STRENGTHS)]
        b, a = factors.get(name, (delta[:, :0], delta[:0]))
        ranks.setdefault(strength, Counter())[a.shape[0]] += 1
        errors.append(((b @ a - delta).norm() / delta.norm()).item())
    if exact:
        missed = sum(n for found in ranks.values() for r, n in found.items() if r != KNOWN_RANK)
        table.check(label, f"tensors of {len(wanted)} not of rank {KNOWN_RANK}", missed, 0)
        table.check(label, "‖BA − Δ‖/‖Δ‖", max(errors), KNOWN)
    else:
        # What no method can do: tell singular values from rounding noise above them.
        oracle = {}
        for name, facts in pair.tensors.items():
            if "rounding_spectral_norm" in facts:
                layer = int(name.split(".layers.")[1].split(".")[0])
                strength = KNOWN_STRENGTHS[layer % len(KNOWN_STRENGTHS)]
                above = sum(
                    v > facts["rounding_spectral_norm"] for v in facts["wanted_singular_values"]
                )
                oracle.setdefault(strength, Counter())[above] += 1
        print(f"\n{label}: ranks found (known rank {KNOWN_RANK}), by ‖ΔW‖/‖W0‖")
        for strength, found in sorted(ranks.items(), reverse=True):
            above = counts(oracle.get(strength, {}))
            print(f"  {100 * strength:6.3f} %  {counts(found)}; above the rounding: {above}")
        print(f"  ‖BA − Δ‖/‖Δ‖ {min(errors):.2g} to {max(errors):.2g}\n")


def counts(counter):
    return ", ".join(f"rank {rank} × {n}" for rank, n in sorted(counter.items())) or "-"


def resize(pair, cli, table, source, rank):
    """To a lower rank: the truncation of the product of the factors, from its factored SVD."""
    label = f"{pair.name} r{source}→{rank}"
    adapter, out = pair.adapter(source), pair.out / f"r{source}-to-r{rank}.safetensors"
    if not adapter.exists():
        return
    if cli(label, "resize", adapter, "-o", Output(out), "--rank", rank) is None:
        return
    before, after = native_factors(adapter), native_factors(out)
    table.check(label, "modules lost", len(before.keys() - after.keys()), 0)
    excess, apart = [], []
    for name in before.keys() & after.keys():
        (b, a), (c, d) = before[name], after[name]
        u, s, vh = core(b, a)
        residual = product_norm(torch.cat([b, -c], 1), torch.cat([a, d], 0))
        best = tail(s, rank)
        excess.append((residual - best) / max(best, 1e-6 * tail(s, 0)))
        # The truncation itself is only determined as far as the values around the cut differ.
        if len(s) > rank:
            gap = ((s[rank - 1] - s[rank]) / s[rank - 1]).item()
            left = torch.cat([u[:, :rank] * s[:rank], -c], 1)
            distance = product_norm(left, torch.cat([vh[:rank], d], 0)) / tail(s, 0)
            apart.append(distance * gap)
    table.check(label, "excess over the truncation", max(excess), RESIZED, f"{cli.seconds:.2f} s")
    table.check(label, "‖CD − truncation‖/‖BA‖ · gap", max(apart, default=0), RESIZED)
    table.check(label, "rank above what was asked", over_rank(after, rank), 0)


def spectrum(pair, cli, table):
    report = cli(pair.name, "spectrum", pair.base, pair.tuned)
    if report is None:
        return
    seconds, printed, worst, compared = cli.seconds, printed_spectra(report), 0.0, 0
    missing = []
    for name, facts in pair.tensors.items():
        if "singular_values" not in facts or not facts["singular_values"][0]:
            continue
        if name not in printed:
            missing.append(name)
            continue
        values, found = np.array(facts["singular_values"]), printed[name]
        error = np.abs(found - values[: len(found)]).max() / values[0]
        worst, compared = max(worst, error), compared + 1
    note = f"{compared} tensors, {seconds:.2f} s"
    if missing:
        note += f"; not printed: {len(missing)}, {missing[0]}"
    table.check(pair.name, "singular values against NumPy", worst, SPECTRUM, note)
    table.at_least(pair.name, "spectra compared", compared, 35)


def similarity(first, second, cli, table, rank):
    """φ(A, B, i, j) = ‖U_A[:i]ᵀ U_B[:j]‖²_F / min(i, j), of the adapters' right-singular vectors."""
    label = f"{first.name} / {second.name} r{rank}"
    if not first.adapter(rank).exists() or not second.adapter(rank).exists():
        return
    report = cli(label, "compare", first.adapter(rank), second.adapter(rank))
    if report is None:
        return
    printed = printed_similarity(report)
    a, b = native_factors(first.adapter(rank)), native_factors(second.adapter(rank))
    worst = 0.0
    for name in a.keys() & b.keys():
        va, vb = core(*a[name])[2][:rank], core(*b[name])[2][:rank]
        overlap = (va @ vb.T).square().cumsum(0).cumsum(1).numpy()
        rows, columns = overlap.shape
        phi = overlap / np.minimum(np.arange(1, rows + 1)[:, None], np.arange(1, columns + 1))
        found = printed[name]
        worst = max(worst, np.abs(found - phi[: found.shape[0], : found.shape[1]]).max())
    table.check(label, f"φ against NumPy, {len(printed)} tensors", worst, SIMILARITY)


# ----------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--cli", type=Path, required=True)
    arguments = parser.parse_args()
    if not os.access(arguments.cli, os.X_OK):
        print(f"real_pairs.py: no executable lora-cli at '{arguments.cli}'", file=sys.stderr)
        return 2
    work, table, clock, worth = arguments.work, Table(), Clock(), []
    cli = Cli(arguments.cli, table)
    print("extract")

    def pair(*names, model):
        return Pair(work, *names, model)

    pairs = [
        pair("rxnfp", "pretrained", "finetuned", model=BertForPreTraining),
        pair("rxnfp", "pretrained", "finetuned-10k", model=BertForPreTraining),
        pair("smollm2", "base", "tuned-bf16", model=AutoModelForCausalLM),
        pair("smollm2", "base", "tuned-f32", model=AutoModelForCausalLM),
    ]
    for each in pairs:
        start = time.monotonic()
        errors = [extract(each, cli, table, rank) for rank in RANKS]
        if None not in errors:
            falls = min(a - b for a, b in itertools.pairwise(errors))
            table.at_least(each.name, "the error falls with every rank by", falls, 1e-3)
        outputs(each, cli, table, 16)
        full(each, cli, table, 16)
        what_it_is_worth(each, RANKS, worth)
        resize(each, cli, table, 64, 16)
        spectrum(each, cli, table)
        for path in each.out.glob("*-merged"):
            shutil.rmtree(path)
        clock(each.name, start)
    similarity(pairs[0], pairs[1], cli, table, 16)

    for label in ("f32", "bf16"):
        start = time.monotonic()
        each = pair("known", f"base-{label}", f"merged-{label}", model=AutoModelForCausalLM)
        known_rank(each, cli, table, exact=label == "f32")
        clock(each.name, start)

    print()
    table.print()
    if worth:
        print("\ndistance of the last hidden states from the tuned model's, rel")
        for name, label, distance in worth:
            print(f"  {name:<22} {label:<40} {distance:.4f}")
    print(f"\n{len(table.rows)} checks, {table.failed} failed")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
