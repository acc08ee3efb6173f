"""The adapters of NeMo: ``model_weights.ckpt``, a pickle, with ``model_config.yaml`` (an unpacked ``.nemo`` archive).

``….adapter_layer.lora_kqv_adapter.linear_in.weight`` (r, in) and ``linear_out.weight`` (out, r), scaled by alpha/r. The
fused adapter is added to the output of Megatron's fused layer, whose rows are, for each group of heads with one key,
those of its queries, the key and the value (the model's forward pass; NeMo's script for canonical adapters cuts q, k
and v as blocks, which is the same for one group alone). The first half of the feed-forward's is the gate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, Module, TensorRef
from mapconv.checkpoint.derived import picked_rows, rows_of
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.base import Found, adapter_of
from mapconv.formats.pickle import read_pickle
from mapconv.formats.yaml_settings import read_settings
from mapconv.untrusted.schema import COUNT, NULL, NUMBER, TEXT

_WEIGHTS, _CONFIG = "model_weights.ckpt", "model_config.yaml"
_KEY = re.compile(
    r"model\.(?:module\.)?decoder\.layers\.(?P<layer>[0-9]{1,5})\.(?P<name>[A-Za-z0-9_.]+?)\.linear_(?P<part>in|out)\.weight"
)
_NAMES = {
    "self_attention.adapter_layer.lora_dense_attention_adapter": "self_attn.o_proj",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter": "self_attn.q_proj",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.k_adapter": "self_attn.k_proj",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.v_adapter": "self_attn.v_proj",
    "mlp.adapter_layer.lora_unfused_hto4h_adapter.gate_adapter": "mlp.gate_proj",
    "mlp.adapter_layer.lora_unfused_hto4h_adapter.up_adapter": "mlp.up_proj",
    "mlp.adapter_layer.lora_4htoh_adapter": "mlp.down_proj",
}
_QKV = "self_attention.adapter_layer.lora_kqv_adapter"
_GATE_UP = "mlp.adapter_layer.lora_hto4h_adapter"
_SCHEMA = {
    "num_attention_heads": COUNT,
    "hidden_size": COUNT,
    **dict.fromkeys(("num_query_groups", "kv_channels", "tensor_model_parallel_size"), (COUNT, NULL)),
    "pipeline_model_parallel_size": (COUNT, NULL),
    "activation": (TEXT, NULL),
    "peft": {"lora_tuning": {"adapter_dim": (COUNT, NULL), "alpha": (NUMBER, NULL)}},
}


class NemoAdapter:
    """The dialect that NeMo's LoRA tuning writes."""

    def recognise(self, found: Found) -> bool:
        return found.path.suffix == ".nemo" or (found.path / _WEIGHTS).is_file()

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        if not found.path.is_dir():
            raise AdapterError(f"{found.path} is an archive: unpack it (tar -xf), and give the folder with {_WEIGHTS}.")
        file, config = found.path / _WEIGHTS, read_settings(found.path / _CONFIG, _SCHEMA)
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if (config.get(name) or 1) > 1:
                raise UnsupportedError(f"{found.path / _CONFIG}: {name} is {config[name]}: save the adapter with 1.")
        if config.get("megatron_legacy"):
            raise UnsupportedError(f"{found.path / _CONFIG} says megatron_legacy, whose order of rows is another.")
        parts: dict[tuple[int, str], dict[str, TensorRef]] = defaultdict(dict)
        for ref in read_pickle(file, allow_pickle=allow_pickle):
            match = _KEY.fullmatch(ref.name)
            if match is None or match["name"] not in (*_NAMES, _QKV, _GATE_UP):
                raise UnsupportedError(f"{file}: {ref.name} is not a LoRA of NeMo as mapconv knows them.")
            parts[int(match["layer"]), match["name"]][match["part"]] = ref
        modules = [
            module for (layer, name), own in parts.items() for module in _modules(file, layer, name, own, config)
        ]
        return adapter_of(found.path, modules, "NeMo")


def _modules(
    file: Path, layer: int, name: str, parts: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> Iterator[Module]:
    """transformers' modules that one of NeMo's is."""
    known = next(iter(parts.values()))
    if set(parts) != {"in", "out"}:
        raise AdapterError(f"{file}: {known.name} has no counterpart (linear_in and linear_out): it is incomplete.")
    A, B = parts["in"], parts["out"]
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
        raise AdapterError(f"{file}: {A.name} is {list(A.shape)} and {B.name} is {list(B.shape)}: no factors.")
    tuning = config["peft"]["lora_tuning"]
    rank, alpha = A.shape[0], tuning.get("alpha")
    scaling = 1.0 if alpha is None else alpha / rank
    for path, rows in _split(file, name, B, config):
        yield Module(f"model.layers.{layer}.{path}", rank, scaling, A, rows)


def _split(file: Path, name: str, B: TensorRef, config: Mapping[str, Any]) -> Iterator[tuple[str, TensorRef]]:
    """(the name in a layer, its rows of the second factor)."""
    if name in _NAMES:
        yield _NAMES[name], B
    elif name == _GATE_UP:
        if "glu" not in str(config.get("activation")):
            raise UnsupportedError(
                f"{file.parent / _CONFIG}: activation is not a gated one, for which mapconv has no names."
            )
        half = B.shape[0] // 2
        yield "mlp.gate_proj", rows_of(B, 0, half)
        yield "mlp.up_proj", rows_of(B, half, 2 * half)
    else:
        heads = config["num_attention_heads"]
        groups = config.get("num_query_groups") or heads
        size = config.get("kv_channels") or config["hidden_size"] // max(1, heads)
        if not groups or heads % groups or B.shape[0] != (heads + 2 * groups) * size:
            raise AdapterError(
                f"{file}: {B.name} is {list(B.shape)}, expected {(heads + 2 * groups) * size} rows for "
                f"{heads} heads in {groups} groups (by {_CONFIG})."
            )
        blocks = heads // groups + 2
        for part, own in (
            ("q", range(blocks - 2)),
            ("k", range(blocks - 2, blocks - 1)),
            ("v", range(blocks - 1, blocks)),
        ):
            rows = [
                (group * blocks + block) * size + row for group in range(groups) for block in own for row in range(size)
            ]
            yield f"self_attn.{part}_proj", picked_rows(B, rows)
