#!/usr/bin/env python3
"""Makes pairs of a model and its full fine-tune, and what exact arithmetic says of them.

    python3 scripts/make_real_pairs.py WORK_DIR

`scripts/real_pairs.sh` calls this and says where the packages in WORK_DIR/packages come from.
Three pairs, each in a directory of its own; what is already there is not made again:

rxnfp    a BERT of 6.9M parameters, published as pretrained and fine-tuned (legacy pickles, f32).
         `pretrained` has its tied masked-word head; `finetuned` lacks the prefix `bert.` and every
         head; `finetuned-10k` has the prefix and a classifier that is not in the base.
smollm2  SmolLM2-135M in bf16, and a full fine-tune trained here on Python's own reference manual,
         in f32 from the bf16 weights: `base`, `tuned-f32`, and the same rounded, `tuned-bf16`.
known    SmolLM2 and the same plus an adapter of rank 8 on every linear layer: `base-f32`,
         `merged-f32`, `base-bf16`, `merged-bf16`, and the PEFT directory `adapter`. The singular
         values of each delta halve every two ranks; the deltas of the layers span 3 % of the
         weight's norm down to 0.1 %, so that in bf16 the rounding hides some of them.

`reference.json` beside each pair has, for every floating-point tensor of both models, norms of base
and change in f64, and for the matrices in `spectra` the singular values of the change (f64 SVD)
and the least error that any matrix of rank 4, 16 or 64 can have (Eckart and Young).
"""

import json
import math
import shutil
import sys
import time
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_model import LLAMA_LINEAR, Clock, Making, base_smollm2, package, read, size, tensor_files

SEED = 20261123
RANKS = (4, 16, 64)

# Training of the SmolLM2 pair.
STEPS, SEQUENCES, TOKENS, RATE, WARMUP = 40, 4, 96, 1e-4, 5

# The known adapter: rank, alpha (so a scale of 2), and the layers' strengths ‖ΔW‖/‖W0‖.
KNOWN_RANK, KNOWN_ALPHA = 8, 16
KNOWN_STRENGTHS = [2.0**-e for e in (5, 6, 7, 8, 9, 10)]

# Matrices with a stored spectrum: all of rxnfp; of SmolLM2 those of five layers.
SMOLLM2_LAYERS = (0, 7, 14, 22, 29)


# ----------------------------------------------------------------------- rxnfp


def rxnfp(work, out, source):
    """One of the package's checkpoints: torch's legacy pickle to safetensors, names untouched."""
    root = f"rxnfp/models/transformers/{source}"
    with zipfile.ZipFile(package(work, "rxnfp")) as wheel:
        for name in ("config.json", "vocab.txt", "pytorch_model.bin"):
            (out / name).write_bytes(wheel.read(f"{root}/{name}"))
    pickle = out / "pytorch_model.bin"
    state = torch.load(pickle, map_location="cpu", weights_only=True)
    # A tied head is one storage under two names; both are stored here.
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in state.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    pickle.unlink()


# --------------------------------------------------------------------- smollm2


def token_rows(base):
    """Python's reference manual as the interpreter carries it, cut into rows of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids = torch.tensor(tokenizer(text[:400_000])["input_ids"])
    rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    return rows[order]


def tune(base, out_f32, out_bf16):
    """AdamW over every parameter, in f32."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.9, 0.95),
    )
    rows, losses = token_rows(base), []
    for step in range(STEPS):
        warm = min(1, (step + 1) / WARMUP)
        rate = RATE * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = rows[step * SEQUENCES : (step + 1) * SEQUENCES]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(out_f32)
    model.to(torch.bfloat16).save_pretrained(out_bf16)
    for out in (out_f32, out_bf16):
        copy_tokenizer(base, out)
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    return f"loss {first:.3f} -> {last:.3f} (means of five)"


def copy_tokenizer(base, out):
    for path in base.glob("*token*"):
        shutil.copy(path, out)


# ----------------------------------------------------------------------- known


def known_adapter(weights, out):
    """A PEFT directory; the deltas' singular values are chosen, their vectors random."""
    generator = torch.Generator().manual_seed(SEED)
    decay = 2.0 ** (-torch.arange(KNOWN_RANK, dtype=torch.float64) / 2)
    tensors = {}
    for name, weight in weights.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        rows, columns = weight.shape
        left, right = (
            torch.linalg.qr(torch.randn(n, KNOWN_RANK, generator=generator).double())[0]
            for n in (rows, columns)
        )
        strength = KNOWN_STRENGTHS[layer % len(KNOWN_STRENGTHS)] * weight.double().norm()
        root = (decay / decay.norm() * strength * KNOWN_RANK / KNOWN_ALPHA).sqrt()
        prefix = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{prefix}.lora_A.weight"] = (root[:, None] * right.T).float().contiguous()
        tensors[f"{prefix}.lora_B.weight"] = (left * root).float().contiguous()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": KNOWN_RANK,
        "lora_alpha": KNOWN_ALPHA,
        "target_modules": LLAMA_LINEAR,
        "bias": "none",
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def known_deltas(adapter):
    """base tensor name -> s·B·A in f64."""
    files = tensor_files(adapter)
    for key in files:
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            a, b = read(files, key), read(files, f"{module}.lora_B.weight")
            delta = KNOWN_ALPHA / KNOWN_RANK * (b.double() @ a.double())
            yield module.removeprefix("base_model.model.") + ".weight", delta


def write_model(tensors, source, dtype, out):
    """The tensors under `source`'s configuration, in another dtype."""
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_tokenizer(source, out)


def known(work):
    root, base = work / "known", work / "smollm2" / "base"
    files = tensor_files(base)
    tensors = {name: read(files, name) for name in files}
    if not (root / "adapter").exists():
        with Making(root / "adapter") as out:
            linear = {
                name: tensor
                for name, tensor in tensors.items()
                if name.removesuffix(".weight").rpartition(".")[2] in LLAMA_LINEAR
            }
            known_adapter(linear, out)
    merged = dict(tensors)
    for name, delta in known_deltas(root / "adapter"):
        merged[name] = tensors[name].double() + delta
    for label, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        for kind, values in (("base", tensors), ("merged", merged)):
            path = root / f"{kind}-{label}"
            if not path.exists():
                with Making(path) as out:
                    write_model(values, base, dtype, out)


# ------------------------------------------------------------------- reference


def singular_values(matrix):
    """In f64, largest first; of the orientation that LAPACK is faster with."""
    matrix = matrix.double().numpy()
    return np.linalg.svd(
        matrix.T if matrix.shape[0] < matrix.shape[1] else matrix, compute_uv=False
    )


def reference(base, tuned, has_spectrum, rename=lambda name: name, wanted=None):
    """name in the base -> exact facts of tuned - base; `rename` leads from base to tuned names."""
    base_files, tuned_files = tensor_files(base), tensor_files(tuned)
    report = {}
    for name in sorted(base_files):
        other = rename(name)
        if other not in tuned_files:
            continue
        before, after = read(base_files, name).double(), read(tuned_files, other).double()
        if before.shape != after.shape:
            continue
        delta = after - before
        facts = {
            "tuned_name": other,
            "shape": list(before.shape),
            "base_norm": before.norm().item(),
            "delta_norm": delta.norm().item(),
        }
        if before.ndim == 2 and has_spectrum(name):
            values = singular_values(delta)
            tails = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1])
            facts["singular_values"] = values.tolist()
            facts["residual"] = {
                str(rank): float(tails[rank]) if rank < len(values) else 0.0 for rank in RANKS
            }
        if wanted and name in wanted:
            # What the output's dtype made of the adapter: the noise that hides it.
            noise = delta - wanted[name]
            facts["wanted_norm"] = wanted[name].norm().item()
            facts["rounding_norm"] = noise.norm().item()
            if "singular_values" in facts:
                wanted_values = singular_values(wanted[name])[:KNOWN_RANK]
                facts["wanted_singular_values"] = wanted_values.tolist()
                facts["rounding_spectral_norm"] = float(singular_values(noise)[0])
        report[name] = facts
    return {
        "base": base.name,
        "tuned": tuned.name,
        "only_in_base": sorted(n for n in base_files if rename(n) not in tuned_files),
        "only_in_tuned": sorted(set(tuned_files) - {rename(n) for n in base_files}),
        "tensors": report,
    }


def smollm2_layer(name):
    return any(f".layers.{layer}." in name for layer in SMOLLM2_LAYERS)


def write_references(work, clock):
    def everything(_):
        return True

    def rxnfp_pairs(root):
        yield reference(
            root / "pretrained", root / "finetuned", everything, lambda n: n.removeprefix("bert.")
        )
        yield reference(root / "pretrained", root / "finetuned-10k", everything)

    def smollm2_pairs(root):
        yield reference(root / "base", root / "tuned-bf16", smollm2_layer)
        yield reference(root / "base", root / "tuned-f32", smollm2_layer)

    def known_pairs(root):
        deltas = dict(known_deltas(root / "adapter"))
        for label in ("f32", "bf16"):
            yield reference(
                root / f"base-{label}", root / f"merged-{label}", smollm2_layer, wanted=deltas
            )

    for name, pairs in (("rxnfp", rxnfp_pairs), ("smollm2", smollm2_pairs), ("known", known_pairs)):
        path, start = work / name / "reference.json", time.monotonic()
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({"ranks": RANKS, "pairs": list(pairs(work / name))}))
            partial.rename(path)
        clock(f"reference {name}", start, f"{path.stat().st_size / 1e6:.1f} MB")


# ------------------------------------------------------------------------ main


def prepare(work, clock):
    print("pairs")
    for label, source in (
        ("pretrained", "bert_pretrained"),
        ("finetuned", "bert_ft"),
        ("finetuned-10k", "bert_ft_10k_25s"),
    ):
        path, start = work / "rxnfp" / label, time.monotonic()
        if not path.exists():
            with Making(path) as out:
                rxnfp(work, out, source)
        clock(f"rxnfp {label}", start, size(path))

    root, start = work / "smollm2", time.monotonic()
    if not (root / "base").exists():
        with Making(root / "base") as out:
            base_smollm2(work, out)
    clock("smollm2 base", start, size(root / "base"))
    start, note = time.monotonic(), ""
    if not (root / "tuned-f32").exists():  # the last to get its name
        with Making(root / "tuned-f32") as f32, Making(root / "tuned-bf16") as bf16:
            note = tune(root / "base", f32, bf16)
    clock("smollm2 full fine-tune", start, note)

    start = time.monotonic()
    if not (work / "known" / "merged-bf16").exists():
        known(work)
    clock("known rank", start, size(work / "known"))
    write_references(work, clock)


def main():
    if len(sys.argv) != 2:
        print(__doc__.split("\n\n")[1].strip(), file=sys.stderr)
        return 2
    prepare(Path(sys.argv[1]), Clock())
    return 0


if __name__ == "__main__":
    sys.exit(main())
