"""Placement on the largest public shapes, from names and shapes alone: no weight exists, so none can be read.

The times are printed (``pytest -s``), not asserted: a shared machine proves nothing about speed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import mapconv
from mapconv.placement.adapters import place_adapter

from .dialects import CONFIG, PREFIX, WEIGHTS
from .headers import write_header_only

Shapes = dict[str, tuple[int, ...]]

#: Llama 3.1 405B.
LLAMA_405B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
#: Qwen3 235B A22B.
QWEN3_235B = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
RANK = 8


def attention(config: dict, layer: int) -> Shapes:
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    return {f"model.layers.{layer}.self_attn.{name}": shape for name, shape in shapes.items()}


def mlp(hidden: int, width: int, path: str) -> Shapes:
    return {
        f"{path}.gate_proj": (width, hidden),
        f"{path}.up_proj": (width, hidden),
        f"{path}.down_proj": (hidden, width),
    }


def linears(config: dict) -> Shapes:
    """Every linear weight of the model, experts one by one, by module path."""
    shapes: Shapes = {}
    for layer in range(config["num_hidden_layers"]):
        shapes |= attention(config, layer)
        path = f"model.layers.{layer}.mlp"
        if "num_experts" not in config:
            shapes |= mlp(config["hidden_size"], config["intermediate_size"], path)
        for expert in range(config.get("num_experts", 0)):
            shapes |= mlp(config["hidden_size"], config["moe_intermediate_size"], f"{path}.experts.{expert}")
    return shapes


def write_base(folder: Path, config: dict) -> Path:
    """The checkpoint in version 4's spelling, in 8 shards."""
    folder.mkdir()
    hidden = config["hidden_size"]
    shapes = {f"{path}.weight": shape for path, shape in linears(config).items()}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (config["vocab_size"], hidden))
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
        if "num_experts" in config:
            shapes[f"model.layers.{layer}.mlp.gate.weight"] = (config["num_experts"], hidden)
            for norm in ("q_norm", "k_norm"):
                shapes[f"model.layers.{layer}.self_attn.{norm}.weight"] = (config["head_dim"],)
    names, weight_map = list(shapes), {}
    for shard in range(8):
        file = f"model-{shard + 1:05}-of-00008.safetensors"
        part = {name: shapes[name] for name in names[shard::8]}
        write_header_only(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, modules: Shapes, **settings) -> Path:
    """An adapter with these (out, in) shapes, by path; ranks are taken from ``RANK``."""
    folder.mkdir()
    tensors: Shapes = {}
    for path, (height, width) in modules.items():
        experts = settings["experts"] if ".experts" in path else 1
        tensors[f"{PREFIX}{path}.lora_A.weight"] = (experts * RANK, width)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = (height, experts * RANK)
    write_header_only(folder / WEIGHTS, tensors, "F32")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": settings["target_modules"]}
    config |= {"target_parameters": settings.get("target_parameters"), "task_type": "CAUSAL_LM"}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_405_billion_parameters(tmp_path, capsys):
    base = write_base(tmp_path / "base", LLAMA_405B)
    modules = linears(LLAMA_405B)
    adapter = write_adapter(
        tmp_path / "adapter", modules, target_modules=sorted({p.rpartition(".")[2] for p in modules})
    )
    started = time.perf_counter()
    placed = place_adapter(adapter, base)
    report(capsys, "405B", len(placed.modules), started)
    landed = {item.module.path: (item.weight.name, item.weight.shape) for item in placed.modules}
    assert landed == {path: (f"{path}.weight", shape) for path, shape in modules.items()}
    assert mapconv.upgrade(adapter, base=base, dry_run=True).plan.modules == 126 * 7


def test_128_experts_in_94_layers(tmp_path, capsys):
    base = write_base(tmp_path / "base", QWEN3_235B)
    hidden, width, modules = QWEN3_235B["hidden_size"], QWEN3_235B["moe_intermediate_size"], {}
    for layer in range(QWEN3_235B["num_hidden_layers"]):
        modules |= attention(QWEN3_235B, layer)
        experts = f"model.layers.{layer}.mlp.experts"
        modules |= {f"{experts}.base_layer": (2 * width, hidden), experts: (hidden, width)}
    adapter = write_adapter(
        tmp_path / "adapter",
        modules,
        experts=QWEN3_235B["num_experts"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    started = time.perf_counter()
    placed = place_adapter(adapter, base)
    report(capsys, "94 layers × 128 experts", len(placed.modules), started)
    # One MAP for each attention weight, and two for each expert: gate with up, and down.
    assert len(placed.modules) == 94 * (4 + 128 * 2)
    used = [piece.tensor.name for item in placed.modules for piece in item.weight.pieces]
    assert sorted(used) == sorted(f"{path}.weight" for path in linears(QWEN3_235B))


@pytest.mark.parametrize("fault", ["shape", "name"])
def test_one_misfit_among_a_thousand_is_found(fault, tmp_path):
    base = write_base(tmp_path / "base", LLAMA_405B)
    modules = linears(LLAMA_405B)
    victim = "model.layers.77.mlp.up_proj"
    shape = modules.pop(victim)
    wrong = {"shape": {victim: shape[::-1]}, "name": {victim.replace("77", "126"): shape}}[fault]
    adapter = write_adapter(tmp_path / "adapter", modules | wrong, target_modules=["q_proj", "up_proj"])
    with pytest.raises(mapconv.MapconvError, match=next(iter(wrong)).replace(".", r"\.")):
        place_adapter(adapter, base)


def report(capsys: pytest.CaptureFixture, what: str, modules: int, started: float) -> None:
    with capsys.disabled():
        print(f"\nplacement on {what}: {modules:,} weights in {time.perf_counter() - started:.2f} s")
