#!/usr/bin/env python3
"""Adapters of LyCORIS, sd-scripts and diffusers, and what the libraries merge them to.

    python3 scripts/make_kohya_fixtures.py [--check]

Needs scripts/requirements.txt, and of PyPI: lycoris-lora, einops, toml (scripts/requirements_kohya.txt).
Writes fixtures/kohya/base.safetensors, the layers of a small network in f32, and for every case a
directory with

    adapter.safetensors   what LyCORIS' `create_lycoris(...).state_dict()` holds, trained values drawn
                          from a seeded generator; module names flattened with `lora_unet_`
    merged.safetensors    the layers that changed, by LyCORIS' own changes (`get_weight`, `get_diff_weight`,
                          `get_merged_weight`)

A case whose name ends in `-closed` has, instead of the library's, the closed form in f64: LyCORIS'
`make_module_from_state_dict` reads a Tucker-decomposed LoKr with the wrong rank.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lycoris
from lycoris import LycorisNetwork, create_lycoris

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "kohya"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(12)
        self.to_q = nn.Linear(12, 10)
        self.to_out = nn.ModuleList([nn.Linear(10, 12, bias=False)])
        self.proj_in = nn.Conv2d(6, 12, 1)
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1)
        self.group_norm = nn.GroupNorm(2, 8)


class Network(nn.Module):
    """Names in which dots and underscores mix, as they do in a UNet."""

    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Block()])


# Arguments of create_lycoris.
CASES = {
    "locon": dict(algo="locon", linear_dim=4, linear_alpha=2, conv_dim=3, conv_alpha=1.5),
    "locon-tucker": dict(algo="locon", linear_dim=4, linear_alpha=1, use_tucker=True),
    "locon-dora": dict(algo="locon", linear_dim=4, linear_alpha=2, dora_wd=True),
    "locon-dora-in": dict(algo="locon", linear_dim=4, linear_alpha=2, dora_wd=True, wd_on_output=False),
    "loha": dict(algo="loha", linear_dim=3, linear_alpha=1),
    "loha-tucker": dict(algo="loha", linear_dim=3, linear_alpha=1, use_tucker=True),
    "loha-dora": dict(algo="loha", linear_dim=3, linear_alpha=1, dora_wd=True),
    "lokr": dict(algo="lokr", linear_dim=2, linear_alpha=1, factor=2),
    "lokr-full": dict(algo="lokr", linear_dim=1000, linear_alpha=1, factor=2, full_matrix=True),
    "lokr-both": dict(algo="lokr", linear_dim=1, linear_alpha=1, factor=2, decompose_both=True),
    "lokr-tucker-closed": dict(algo="lokr", linear_dim=1, linear_alpha=1, factor=2, use_tucker=True),
    "ia3": dict(algo="ia3"),
    "full": dict(algo="full", train_norm=True),
    "norm": dict(algo="locon", linear_dim=2, linear_alpha=1, train_norm=True),
}


def case(name, arguments):
    torch.manual_seed(1)
    network = Network()
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    base = {key: value.detach().clone() for key, value in network.state_dict().items()}
    torch.manual_seed(len(name) * 7919 + sum(name.encode()))
    LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["Network", "Block"]})
    preset = dict(preset="full")
    adapter = create_lycoris(network, 1.0, **(preset | arguments))
    adapter.apply_to()
    for key, value in adapter.named_parameters():
        # Magnitudes start at the norms and stay near them.
        if key.endswith("dora_scale"):
            value.data = value.data * (1 + 0.2 * torch.rand_like(value))
        else:
            value.data = value.data + torch.randn_like(value) * 0.1
    merged = dict(base)
    for module in adapter.loras:
        path = names(network)[id(module.org_module[0])]
        shape = base[f"{path}.weight"].shape
        if arguments["algo"] in ("loha", "lokr", "locon") and "Norm" not in type(module).__name__:
            # LyCORIS 4.1.3 merges LoHa and LoKr of a 1×1 convolution by adding a matrix to its
            # weight, which broadcasts, and its `get_diff_weight` of both has the scale twice. What
            # it trains with is `get_weight`.
            change = module.get_weight(shape) if hasattr(module, "get_weight") else module.get_diff_weight(1.0)[0]
            weight = base[f"{path}.weight"] + change.reshape(shape)
            bias = None
            if module.wd:
                weight = module.apply_weight_decompose(weight)
        else:
            weight, bias = module.get_merged_weight(1.0)
        merged[f"{path}.weight"] = weight.detach().reshape(shape)
        if bias is not None and f"{path}.bias" in base:
            merged[f"{path}.bias"] = bias.detach().reshape(base[f"{path}.bias"].shape)
    state = {}
    for key, value in adapter.state_dict().items():
        state[key.replace("lycoris_", "lora_unet_", 1)] = value.detach().clone().contiguous()
    if name.endswith("-closed"):
        closed_lokr(state, base, merged, network)
    return base, state, {key: value.contiguous() for key, value in merged.items()}


def names(network):
    return {id(module): path for path, module in network.named_modules()}


def closed_lokr(state, base, merged, network):
    """W + alpha/rank · kron(w1, w2) in f64, of every module."""
    paths = {"lora_unet_" + path.replace(".", "_"): path for path in names(network).values()}
    for stem in sorted({key.split(".")[0] for key in state}):
        of = {key.split(".", 1)[1]: value.double() for key, value in state.items() if key.split(".")[0] == stem}
        left = of["lokr_w1"] if "lokr_w1" in of else of["lokr_w1_a"] @ of["lokr_w1_b"]
        rank = None
        if "lokr_t2" in of:
            right = torch.einsum("ij...,ip,jr->pr...", of["lokr_t2"], of["lokr_w2_a"], of["lokr_w2_b"])
            rank = of["lokr_w2_b"].shape[0]
        elif "lokr_w2" in of:
            right = of["lokr_w2"]
        else:
            right = of["lokr_w2_a"] @ of["lokr_w2_b"]
            rank = of["lokr_w2_b"].shape[0]
        while left.dim() < right.dim():
            left = left.unsqueeze(-1)
        scale = of["alpha"].item() / rank if rank else 1.0
        key = f"{paths[stem]}.weight"
        delta = scale * torch.kron(left, right).reshape(base[key].shape)
        merged[key] = (base[key].double() + delta).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare with what is there")
    options = parser.parse_args()
    differs = []
    for name, arguments in CASES.items():
        base, state, merged = case(name, arguments)
        changed = {key: value for key, value in merged.items() if not torch.equal(value, base[key])}
        base = {key: value.contiguous() for key, value in base.items()}
        for file, tensors in (("base", base), (f"{name}/adapter", state), (f"{name}/merged", changed)):
            path = FIXTURES / f"{file}.safetensors"
            if options.check:
                found = load_file(path)
                if found.keys() != tensors.keys() or any(not torch.equal(found[k], tensors[k]) for k in tensors):
                    differs.append(str(path))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}
                save_file(tensors, path, metadata if file.endswith("adapter") else None)
        print(f"{name}: {len(state)} tensors, {len(changed)} changed")
    if differs:
        print("differs:", *differs, sep="\n  ")
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
