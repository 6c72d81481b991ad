#!/usr/bin/env python3
"""`lora-cli combine` beside PEFT's own functions of `peft.utils.merge_utils`.

    python3 scripts/check_combine_peft.py LORA_CLI

Two adapters of 96 × 80 are combined at full rank, so that factoring loses nothing but rounding, and
the product of the written factors is compared with

- ties and magnitude_prune: PEFT's function of the changes wᵢ·Δᵢ with weights of one (which for
  magnitude_prune is that of the Δᵢ with the weights);
- dare_linear: what it must be whatever the random numbers: without an element dropped by both
  adapters, w₁·Δ₁/d, w₂·Δ₂/d or their sum, in the shares that d gives;
- cat: Σ wᵢ·Δᵢ.

Exit status 1 if one of them differs by more than rounding. Needs torch, peft, safetensors.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

ROWS, COLS, RANK = 96, 80, 6
MODULE = "base_model.model.layers.0.q_proj"
WEIGHTS = (0.7, 0.4)
DENSITY = 0.3


def write(directory: Path, seed: int, alpha: int) -> torch.Tensor:
    """Writes an adapter and returns its change in f64."""
    torch.manual_seed(seed)
    a, b = torch.randn(RANK, COLS), torch.randn(ROWS, RANK)
    directory.mkdir()
    tensors = {f"{MODULE}.lora_A.weight": a, f"{MODULE}.lora_B.weight": b}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return b.double() @ a.double() * (alpha / RANK)


def combined(cli: str, root: Path, method: str, *options: str) -> torch.Tensor:
    """The change of what lora-cli makes of both."""
    output = root / f"out-{method}-{'-'.join(options)}"
    inputs = [f"{root / name}@{weight}" for name, weight in zip("ab", WEIGHTS)]
    command = [cli, "combine", *inputs, "--method", method, *options, "-q", "-o", str(output)]
    subprocess.run(command, check=True)
    tensors = load_file(output / "adapter_model.safetensors")
    config = json.loads((output / "adapter_config.json").read_text())
    a, b = (tensors[f"{MODULE}.lora_{name}.weight"].double() for name in "AB")
    return b @ a * (config["lora_alpha"] / config["r"])


def main() -> int:
    cli = sys.argv[1]
    failed = False

    def compare(name: str, found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5):
        nonlocal failed
        error = ((found - expected).norm() / expected.norm()).item()
        failed |= not error < bound
        print(f"{name:34} {error:.1e} {'' if error < bound else 'DIFFERS'}")

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        deltas = [write(root / "a", 1, 6), write(root / "b", 2, 9)]
        weighted = [weight * delta for weight, delta in zip(WEIGHTS, deltas)]
        ones, weights = torch.ones(2), torch.tensor(WEIGHTS, dtype=torch.float64)
        compare("cat", combined(cli, root, "cat"), sum(weighted), 1e-7)
        full = ["--density", str(DENSITY), "--rank", str(min(ROWS, COLS))]
        for election in ("total", "frequency"):
            found = combined(cli, root, "ties", "--election", election, *full)
            compare(
                f"ties, {election}",
                found,
                merge_utils.ties(weighted, ones, DENSITY, election),
            )
        expected = merge_utils.magnitude_prune(deltas, weights, DENSITY)
        compare("magnitude_prune", combined(cli, root, "magnitude_prune", *full), expected)

        found = combined(cli, root, "dare_linear", *full)
        first, second = (delta / DENSITY for delta in weighted)
        choices = torch.stack([torch.zeros_like(first), first, second, first + second])
        nearest = (choices - found).abs().min(dim=0)
        compare("dare_linear, nearest of four", found, found - nearest.values)
        shares = [(nearest.indices == index).double().mean().item() for index in range(4)]
        d = DENSITY
        ideal = [(1 - d) ** 2, d * (1 - d), d * (1 - d), d * d]
        for share, wanted in zip(shares, ideal):
            deviation = (wanted * (1 - wanted) / (ROWS * COLS)) ** 0.5
            failed |= not abs(share - wanted) < 5 * deviation
            print(f"  share {share:.4f}, expected {wanted:.4f} ± {deviation:.4f}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
