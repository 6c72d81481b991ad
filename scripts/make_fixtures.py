#!/usr/bin/env python3
"""Writes fixtures/peft/: tiny models and adapters made by the real libraries.

Every base model is saved by transformers, every adapter by PEFT's own
`save_pretrained`, and every expected result comes twice:

* `expected.safetensors`      PEFT's `merge_and_unload`, base upcast to f32 and
                              the adapter loaded in f32;
* `expected_f64.safetensors`  W0 + s*B*A in NumPy f64, from the values as
                              stored (bf16 and f16 are widened exactly).

Both hold the target tensors only, named and oriented as in the base files.

    python3 scripts/make_fixtures.py            rewrite fixtures/peft
    python3 scripts/make_fixtures.py --check    regenerate elsewhere, compare

The versions are pinned in scripts/requirements.txt and recorded in case.json.
Two runs on one machine give the same bytes. Another CPU may round the trained
case differently, which is why the outputs are committed.
"""

import argparse
import filecmp
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Sets become JSON lists in hash order, so the order is pinned before anything
# else is imported; one thread keeps the sums of the trained case in one order.
PINNED = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
if any(os.environ.get(key) != value for key, value in PINNED.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PINNED})

import warnings

warnings.filterwarnings("ignore")

import numpy as np
import peft
import safetensors
import tokenizers
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SEED = 20260801
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
VERSIONS = {
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "peft": peft.__version__,
    "safetensors": safetensors.__version__,
    "tokenizers": tokenizers.__version__,
    "numpy": np.__version__,
}


# ---------------------------------------------------------------- tiny models


def llama(**overrides):
    settings = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    settings.update(overrides)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def gpt2(**overrides):
    settings = dict(
        n_embd=24,
        n_inner=40,
        n_layer=2,
        n_head=2,
        n_positions=32,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    settings.update(overrides)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))


def bert(model_class):
    return model_class(
        transformers.BertConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            max_position_embeddings=32,
        )
    )


def llava():
    text = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=64,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=63,
            image_seq_length=4,
            vision_feature_layer=-1,
        )
    )


def save_tokenizer(directory):
    """A word-level tokenizer of 96 entries with a chat template."""
    words = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i:02}" for i in range(92)]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<s>{{ message['role'] }} "
        "{{ message['content'] }}</s>{% endfor %}"
    )
    tokenizer.save_pretrained(directory)


# ------------------------------------------------------------------- helpers


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_tensors(directory):
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def randomise_b(model, deviation):
    """PEFT starts B at zero; a delta of zero would test nothing."""
    generator = torch.Generator().manual_seed(SEED)
    touched = 0
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name or "lora_embedding_B" in name:
            noise = torch.randn(parameter.shape, generator=generator) * deviation
            parameter.data.copy_(noise.to(parameter.dtype))
            touched += 1
    return touched


def train(model, steps=80):
    """A toy task: continue a counting sequence with a fixed stride."""
    generator = torch.Generator().manual_seed(SEED)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3)
    model.train()
    losses = []
    for _ in range(steps):
        start = torch.randint(0, 92, (8, 1), generator=generator)
        ids = 4 + (start + 3 * torch.arange(16)) % 92
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return {"steps": steps, "first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4)}


def rename_keys(path, rename):
    tensors = load_file(path)
    save_file({rename(name): t for name, t in tensors.items()}, path, metadata={"format": "pt"})


def set_name(model, name):
    """What PEFT records as base_model_name_or_path, instead of a local path."""
    model.name_or_path = name
    model.config._name_or_path = name


def cast_adapter(model, dtype):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def lora_layers(model):
    """(module path relative to the base model, PEFT layer) of every LoRA layer."""
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            yield name, module


def make_case(
    out,
    name,
    *,
    exercised,
    build,
    config,
    base_dtype=torch.float32,
    adapter_dtype=torch.float32,
    adapter_class=None,
    shard_size=None,
    trained=False,
    deviation=0.05,
    tokenizer=False,
    keep_card=False,
    save_embedding_layers="auto",
    base_name=lambda module: module,
    adapter_name=lambda module: module,
    after_save=None,
    notes=(),
):
    """Builds, saves, merges and checks one case.

    `base_name` and `adapter_name` map a module path as PEFT knows it to its
    path in the base and adapter files, where they differ; `after_save(base,
    adapter)` edits saved files by hand.
    """
    case = out / name
    base, adapter = case / "base", case / "adapter"
    torch.manual_seed(SEED)
    model = build().to(base_dtype).eval()
    reload_class = adapter_class or type(model)
    model.save_pretrained(base, **({"max_shard_size": shard_size} if shard_size else {}))
    if tokenizer:
        save_tokenizer(base)

    model = reload_class.from_pretrained(base, dtype=base_dtype).eval()
    set_name(model, f"lora-fixtures/{name}")
    model = get_peft_model(model, config)
    training = train(model) if trained else None
    if not trained:
        assert randomise_b(model, deviation)
    cast_adapter(model, adapter_dtype)
    model.save_pretrained(adapter, save_embedding_layers=save_embedding_layers)
    if not keep_card:
        (adapter / "README.md").unlink()

    wide = reload_class.from_pretrained(base, dtype=torch.float32).eval()
    wide = PeftModel.from_pretrained(wide, adapter)
    layers = [
        {
            "module": path,
            "rank": layer.r["default"],
            "alpha": layer.lora_alpha["default"],
            "scale": layer.scaling["default"],
            "transposed": bool(layer.fan_in_fan_out),
        }
        for path, layer in lora_layers(wide)
    ]
    merged = wide.merge_and_unload().state_dict()
    if after_save:
        after_save(base, adapter)

    stored_base, stored_adapter = read_tensors(base), read_tensors(adapter)
    expected, closed, targets, used = {}, {}, [], set()
    for layer in layers:
        path = layer["module"]
        target = base_name(path) + ".weight"
        prefix = "base_model.model." + adapter_name(path)
        a = stored_adapter[f"{prefix}.lora_A.weight"].double().numpy()
        b = stored_adapter[f"{prefix}.lora_B.weight"].double().numpy()
        used |= {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"}
        assert a.shape[0] == layer["rank"] == b.shape[1]
        delta = layer["scale"] * (b @ a)
        delta = delta.T if layer["transposed"] else delta
        weight = stored_base[target].double().numpy()
        expected[target] = merged[f"{path}.weight"].contiguous()
        assert expected[target].dtype == torch.float32
        closed[target] = np.ascontiguousarray(weight + delta)
        difference = np.abs(expected[target].double().numpy() - closed[target]).max()
        assert difference < 2e-7 * max(1.0, np.abs(closed[target]).max()), (target, difference)
        targets.append(
            {
                "tensor": target,
                "adapter_prefix": prefix,
                "shape": list(weight.shape),
                "rank": layer["rank"],
                "alpha": layer["alpha"],
                "scale": layer["scale"],
                "transposed": layer["transposed"],
                "delta_over_weight": float(f"{np.linalg.norm(delta) / np.linalg.norm(weight):.4g}"),
                "peft_f32_minus_f64_max": float(f"{difference:.3g}"),
            }
        )
        assert np.linalg.norm(delta) > 1e-3 * np.linalg.norm(weight), target
    targets.sort(key=lambda target: target["tensor"])
    save_file(expected, case / "expected.safetensors")
    save_numpy(closed, case / "expected_f64.safetensors")

    saved_config = json.loads((adapter / "adapter_config.json").read_text())
    facts = {
        "case": name,
        "exercises": exercised,
        "base_class": type(build()).__name__,
        "adapter_class": reload_class.__name__,
        "base_dtype": NAMES[base_dtype],
        "adapter_dtype": NAMES[adapter_dtype],
        "saved_fan_in_fan_out": saved_config["fan_in_fan_out"],
        "adapter_keys_beyond_lora": sorted(set(stored_adapter) - used),
        "notes": list(notes),
        "seed": SEED,
        "versions": VERSIONS,
        "targets": targets,
    }
    if training:
        facts["training"] = training
    write_json(case / "case.json", facts)


# --------------------------------------------------------------------- cases

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = ATTENTION + ["gate_proj", "up_proj", "down_proj"]


def mergeable_cases(out):
    make_case(
        out,
        "llama-vanilla",
        exercised="bf16 base, f32 adapter, every linear layer, GQA (k and v are not square), "
        "really trained; a base directory with tokenizer, chat template and generation config",
        build=lambda: llama(initializer_range=0.1),
        config=LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"),
        base_dtype=torch.bfloat16,
        trained=True,
        tokenizer=True,
        keep_card=True,
    )
    make_case(
        out,
        "llama-rslora",
        exercised="use_rslora: scale = alpha/sqrt(r), not a power of two; rank_pattern and "
        "alpha_pattern enter under the root per layer",
        build=lambda: llama(hidden_size=24, intermediate_size=40, num_hidden_layers=2),
        config=LoraConfig(
            r=6,
            lora_alpha=10,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"v_proj": 3},
            alpha_pattern={"down_proj": 7},
            task_type="CAUSAL_LM",
        ),
        base_dtype=torch.bfloat16,
    )
    make_case(
        out,
        "llama-patterns",
        exercised="rank_pattern and alpha_pattern: plain suffix, full path with ^, regex, "
        "first match wins in file order, the two tables are looked up independently, "
        "a fractional alpha, and keys that match nothing",
        build=lambda: llama(hidden_size=24, intermediate_size=40),
        config=LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=ALL_LINEAR,
            rank_pattern={
                r".*layers\.1.*v_proj": 5,
                "^model.layers.0.self_attn.q_proj": 3,
                "^model.layers.1.self_attn.k_proj": 6,
                "^q_proj": 9,
                "base_model.model.model.layers.0.mlp.up_proj": 10,
                "k_proj": 2,
                "proj": 7,
                "self_attn.k_proj": 12,
            },
            alpha_pattern={
                "^model.layers.1.self_attn.q_proj": 2.5,
                "layers.0.self_attn.o_proj": 1,
                r"mlp\.(gate|up)_proj": 24,
                "q_proj": 3,
                "self_attn": 11,
                "v_proj": 10,
            },
            task_type="CAUSAL_LM",
        ),
        base_dtype=torch.bfloat16,
        notes=[
            "Match nothing: rank_pattern '^q_proj', 'proj' and 'base_model.model.model.layers.0."
            "mlp.up_proj'; alpha_pattern 'self_attn'.",
            "Always shadowed: rank_pattern 'self_attn.k_proj', as 'k_proj' comes first.",
            "PEFT sorts the keys of adapter_config.json, nested tables too, so the order of "
            "patterns at training is lost. Here both orders are the same; where they differ, PEFT "
            "itself cannot load its own adapter (rank) or scales it wrongly (alpha).",
        ],
    )
    make_case(
        out,
        "llama-sharded",
        exercised="base of several shards with an index; f16 base, bf16 adapter",
        build=lambda: llama(hidden_size=24, intermediate_size=40),
        config=LoraConfig(
            r=5, lora_alpha=10, target_modules=["q_proj", "v_proj", "up_proj"],
            task_type="CAUSAL_LM",
        ),
        base_dtype=torch.float16,
        adapter_dtype=torch.bfloat16,
        shard_size="10KB",
    )
    make_case(
        out,
        "llama-f32",
        exercised="f32 base, f16 adapter",
        build=lambda: llama(hidden_size=24, intermediate_size=40, num_hidden_layers=1),
        config=LoraConfig(
            r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
        adapter_dtype=torch.float16,
    )
    make_case(
        out,
        "llama-bf16-bf16",
        exercised="bf16 base, bf16 adapter, and a small delta (about 1 % of the weight), so most "
        "sums lie within a few ulps of the base",
        deviation=0.0008,
        build=lambda: llama(hidden_size=24, intermediate_size=40, num_hidden_layers=1),
        config=LoraConfig(r=3, lora_alpha=5, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"),
        base_dtype=torch.bfloat16,
        adapter_dtype=torch.bfloat16,
    )
    make_case(
        out,
        "llama-tied",
        exercised="tie_word_embeddings: the base has no lm_head.weight; LoRA on attention only; "
        "target_modules is a string (regex)",
        build=lambda: llama(hidden_size=24, intermediate_size=40, tie_word_embeddings=True),
        config=LoraConfig(
            r=4, lora_alpha=6, target_modules=r".*\.self_attn\.(q|v)_proj", task_type="CAUSAL_LM"
        ),
        base_dtype=torch.bfloat16,
    )
    make_case(
        out,
        "gpt2",
        exercised="Conv1D: weights are stored (in, out), so the delta is added transposed; "
        "c_attn, both c_proj and c_fc",
        build=gpt2,
        config=LoraConfig(
            r=4, lora_alpha=12, target_modules=["c_attn", "c_proj", "c_fc"], task_type="CAUSAL_LM"
        ),
        notes=["The config asked for fan_in_fan_out=false; PEFT corrected it when it met Conv1D."],
    )
    make_case(
        out,
        "gpt2-cproj-only",
        exercised="only attn.c_proj, which is square: no shape tells that it is transposed",
        build=gpt2,
        config=LoraConfig(
            r=3, lora_alpha=9, target_modules=["attn.c_proj"], task_type="CAUSAL_LM"
        ),
        base_dtype=torch.bfloat16,
    )
    for name, embedding in (("gpt2-mixed", False), ("gpt2-mixed-saved-head", "auto")):
        make_case(
            out,
            name,
            exercised="Conv1D (c_attn, attn.c_proj) and Linear (lm_head, untied) in one adapter: "
            "the single saved fan_in_fan_out cannot be right for both"
            + (
                ""
                if embedding is False
                else "; PEFT's default also saves a copy of the base head as "
                "lm_head.base_layer.weight"
            ),
            build=lambda: gpt2(tie_word_embeddings=False, n_layer=1),
            config=LoraConfig(
                r=2, lora_alpha=5, target_modules=["c_attn", "attn.c_proj", "lm_head"],
                task_type="CAUSAL_LM",
            ),
            base_dtype=torch.bfloat16,
            save_embedding_layers=embedding,
        )
    make_case(
        out,
        "bert-prefix",
        exercised="adapter made on BertModel (encoder.layer...), base saved from BertForMaskedLM "
        "(bert.encoder.layer...)",
        build=lambda: bert(transformers.BertForMaskedLM),
        adapter_class=transformers.BertModel,
        config=LoraConfig(
            r=4, lora_alpha=8, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"
        ),
        base_name=lambda module: "bert." + module,
    )
    make_case(
        out,
        "bert-prefix-extra",
        exercised="the other way round: adapter made on BertForMaskedLM (bert.encoder.layer...), "
        "base saved from BertModel (encoder.layer...)",
        build=lambda: bert(transformers.BertModel),
        adapter_class=transformers.BertForMaskedLM,
        config=LoraConfig(r=4, lora_alpha=8, target_modules=["query", "output.dense"]),
        base_name=lambda module: module.removeprefix("bert."),
    )

    vlm_config = LoraConfig(
        r=4, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|v_proj)"
    )

    def on_disk(module):
        return module.replace("model.language_model.", "language_model.model.")

    make_case(
        out,
        "llava",
        exercised="transformers keeps model.language_model.layers... in memory and writes "
        "language_model.model.layers... to disk; PEFT saves the names of memory",
        build=llava,
        config=vlm_config,
        base_dtype=torch.bfloat16,
        base_name=on_disk,
        notes=["Nothing here is renamed by hand."],
    )

    def to_other_generation(base, adapter):
        def in_memory(name):
            if name == "language_model.lm_head.weight":
                return "lm_head.weight"
            if name.startswith("language_model.model."):
                return name.replace("language_model.model.", "model.language_model.")
            return "model." + name

        def legacy(name):
            return name.replace("model.language_model.", "language_model.model.")

        rename_keys(base / "model.safetensors", in_memory)
        rename_keys(adapter / "adapter_model.safetensors", legacy)

    make_case(
        out,
        "llava-legacy-adapter",
        exercised="adapter keyed language_model.model.layers... (transformers before 4.52), "
        "base keyed model.language_model.layers...",
        build=llava,
        config=vlm_config,
        base_dtype=torch.bfloat16,
        adapter_name=on_disk,
        after_save=to_other_generation,
        notes=[
            "Both files' keys were renamed by hand after saving, the values are as saved."
        ],
    )


# --------------------------------------------------------- unsupported adapters


class ConvNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


class AttentionNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x)[0]


def small_llama(**overrides):
    return llama(
        **{
            **dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=20,
                   num_attention_heads=2, num_key_value_heads=1),
            **overrides,
        }
    )


def small_mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=16, num_local_experts=3, num_experts_per_tok=2,
        )
    )


def unsupported_cases(out):
    causal = {"task_type": "CAUSAL_LM"}
    query = {"target_modules": ["q_proj"], **causal}
    lora = {"r": 2, "lora_alpha": 4, **query}
    with_bias = lambda: small_llama(attention_bias=True)
    kasa = getattr(peft, "KasaConfig", None)
    table = [
        # directory, feature the refusal names, model, config, note
        ("dora", "DoRA", small_llama, LoraConfig(**lora, use_dora=True), ""),
        ("lora-bias", "lora_bias", with_bias, LoraConfig(**lora, lora_bias=True), ""),
        ("bias-all", "bias=all", with_bias, LoraConfig(**lora, bias="all"), ""),
        ("bias-lora-only", "bias=lora_only", with_bias, LoraConfig(**lora, bias="lora_only"), ""),
        ("modules-to-save", "modules_to_save", small_llama,
         LoraConfig(**lora, modules_to_save=["lm_head"]), ""),
        ("trainable-token-indices", "trainable_token_indices", small_llama,
         LoraConfig(**lora, trainable_token_indices=[1, 3]), ""),
        ("embedding", "embedding LoRA", small_llama,
         LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens", "q_proj"], **causal), ""),
        ("conv2d", "convolution LoRA", ConvNet,
         LoraConfig(r=2, lora_alpha=4, target_modules=["conv", "head"]), ""),
        ("multihead-attention", "MultiheadAttention LoRA", AttentionNet,
         LoraConfig(r=2, lora_alpha=4, target_modules=["mha"]), ""),
        ("pissa", "init_lora_weights=pissa", small_llama,
         LoraConfig(**lora, init_lora_weights="pissa"),
         "the base was changed at initialisation; A and B are not a delta to the stored base"),
        ("olora", "init_lora_weights=olora", small_llama,
         LoraConfig(**lora, init_lora_weights="olora"),
         "the base was changed at initialisation; A and B are not a delta to the stored base"),
        ("target-parameters", "target_parameters", small_mixtral,
         LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"],
                    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                    **causal), ""),
        ("layer-replication", "layer_replication",
         lambda: small_llama(num_hidden_layers=2),
         LoraConfig(**lora, layer_replication=[[0, 2], [1, 2]]), ""),
        ("alora", "alora_invocation_tokens", small_llama,
         LoraConfig(**lora, alora_invocation_tokens=[5, 6]), ""),
        ("adalora", "ADALORA", small_llama,
         peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, **query), ""),
        ("ia3", "IA3", small_llama,
         peft.IA3Config(target_modules=["k_proj", "down_proj"],
                        feedforward_modules=["down_proj"], **causal), ""),
        ("loha", "LOHA", small_llama, peft.LoHaConfig(r=2, alpha=4, **query), ""),
        ("lokr", "LOKR", small_llama, peft.LoKrConfig(r=2, alpha=4, **query), ""),
        ("vera", "VERA", small_llama, peft.VeraConfig(r=4, **query), ""),
        ("prompt-tuning", "PROMPT_TUNING", small_llama,
         peft.PromptTuningConfig(num_virtual_tokens=4, **causal), ""),
        ("non-default-name", "no adapter at the top level", small_llama, LoraConfig(**lora),
         "saved under the adapter name 'style', so the files lie in style/; merging style/ itself "
         "is supported"),
    ]
    if kasa:
        table.append(("kasa", "kasa_config", small_llama,
                      LoraConfig(**lora, kasa_config=kasa()), ""))
    if hasattr(peft.tuners.lora.config, "BdLoraConfig"):
        table.append(("bdlora", "use_bdlora", small_llama,
                      LoraConfig(**lora, use_bdlora=peft.tuners.lora.config.BdLoraConfig(
                          target_modules_bd_b=["q_proj"], nblocks=2)), ""))
    index = []
    for directory, feature, build, config, note in sorted(table, key=lambda row: row[0]):
        torch.manual_seed(SEED)
        model = build().eval()
        if hasattr(model, "config"):
            set_name(model, f"lora-fixtures/unsupported/{directory}")
        adapter_name = "style" if directory == "non-default-name" else "default"
        model = get_peft_model(model, config, adapter_name=adapter_name)
        randomise_b(model, 0.05)
        model.save_pretrained(out / directory)
        (out / directory / "README.md").unlink()
        files = out / directory / (adapter_name if adapter_name != "default" else "")
        saved = json.loads((files / "adapter_config.json").read_text())
        plain = LoraConfig().to_dict()
        index.append(
            {
                "directory": directory,
                "feature": feature,
                "peft_type": saved["peft_type"],
                "config": {
                    key: saved[key]
                    for key in sorted(saved)
                    if saved["peft_type"] == "LORA"
                    and saved[key] != plain[key]
                    and key not in ("r", "lora_alpha", "target_modules", "task_type",
                                    "auto_mapping", "base_model_name_or_path",
                                    "inference_mode")
                },
                "tensors": {k: list(v.shape) for k, v in sorted(read_tensors(files).items())},
                "note": note,
            }
        )
    write_json(out / "cases.json", {"seed": SEED, "versions": VERSIONS, "adapters": index})


# ----------------------------------------------------------------------- main


def generate(out):
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    mergeable_cases(out)
    unsupported_cases(out / "unsupported")
    for path in out.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


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
    parser.add_argument("--out", type=Path, default=ROOT / "fixtures" / "peft")
    parser.add_argument("--check", action="store_true", help="compare, write nothing there")
    arguments = parser.parse_args()
    if not arguments.check:
        generate(arguments.out)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch) / "peft")
        return 0 if compare(arguments.out, Path(scratch) / "peft") else 1


if __name__ == "__main__":
    sys.exit(main())
