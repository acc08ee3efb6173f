"""What a saved adapter records of where it came from: only what the model and the files that were loaded say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mapconv.adapter import Module
from mapconv.checkpoint.reader import SAFETENSORS_DTYPES
from mapconv.formats.config import names_parameter
from mapconv.hub.reference import is_repo_id
from mapconv.metadata.card import card_facts
from mapconv.metadata.provenance import map_record, recorded_name
from mapconv.nn.attaching import Attached
from mapconv.nn.bases import kind_of, matrix_shape
from mapconv.nn.layers import MapLayer
from mapconv.nn.stacks import MapParameterLayer
from mapconv.nn.updates import Update

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def live_base(model: nn.Module, attached: Attached) -> dict[str, Any]:
    """The record of the base: the one that was checked at loading, or what the model says of itself; null otherwise."""
    if attached.base is not None:
        return {key: attached.base.get(key) for key in ("name", "revision", "card")}
    name = getattr(model, "name_or_path", None)
    if name and Path(name).is_dir():
        folder = Path(name)
        name, revision = recorded_name(folder)
        return {"name": name, "revision": revision, "card": card_facts(folder)}
    if name and is_repo_id(name):
        return {"name": name, "revision": getattr(model.config, "_commit_hash", None), "card": {}}
    adapter = attached.adapter
    return {"name": adapter and adapter.base, "revision": adapter and adapter.revision, "card": {}}


def live_record(
    attached: Attached, base: Mapping[str, Any], entries: Sequence[dict[str, Any]], *, changed: bool
) -> dict[str, Any]:
    """The content of ``map_config.json``; an adapter that was only loaded keeps the source that it came with."""
    earlier = attached.adapter.map_config if attached.adapter else None
    source = attached.source if changed or earlier is None else earlier.get("source")
    data = None if earlier is None else earlier.get("data")
    return map_record(entries, base=base, source=source, options=attached.options, data=data)


def pattern_name(layer: MapLayer, module: Module, attached: Attached) -> str:
    """What PEFT looks a module's rank up by: its path, or the name of what ``target_parameters`` names."""
    if isinstance(layer, MapParameterLayer):
        return layer.target.parameter
    weight = f"{module.path}.weight"
    is_parameter = attached.adapter is not None and names_parameter(attached.adapter.settings, weight)
    return weight if is_parameter else module.path


def source_config(model: nn.Module, attached: Attached, layers: Sequence[MapLayer]) -> dict[str, Any]:
    """The ``adapter_config.json`` to start from: the loaded one, or one that names every layer."""
    if attached.adapter is not None:
        return dict(attached.adapter.config)
    name = type(model).__name__
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    kinds = {kind_of(layer.base_layer) for layer in layers}
    return {
        "task_type": task,
        "target_modules": list(attached.paths),
        "fan_in_fan_out": kinds == {"transposed"},
        "bias": "none",
    }


def is_respelled(attached: Attached, paths: Collection[str]) -> bool:
    """Whether modules go by other paths than the loaded file's targets say (those of another transformers)."""
    return attached.adapter is not None and any(module.path not in paths for module in attached.adapter.modules)


def base_facts(layer: MapLayer, update: Update, count: int) -> list[dict[str, Any]]:
    """What is recorded of the base tensor, for each of an update's weights."""
    weight = layer.owner._parameters[layer.parameter]
    is_parameter = isinstance(layer, MapParameterLayer)
    facts = {
        "base_tensor": layer.target.parameter if is_parameter else f"{layer.path}.weight",
        "base_dtype": SAFETENSORS_DTYPES[weight.dtype],
        "base_shape": list(layer.target.matrix_shape if is_parameter else matrix_shape(layer.base_layer)),
    }
    recorded = update.origin.base_facts if update.origin else [{}] * count
    return [{**facts, **own} for own in recorded]
