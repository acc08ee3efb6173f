"""Which class of transformers adapters were trained on: their keys say, and the configurations hint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter
from mapconv.errors import CheckpointError, PlacementError
from mapconv.formats.peft import KEY_PREFIX
from mapconv.placement.by_class import live_parameter
from mapconv.placement.by_name import misfit_report, nearest
from mapconv.placement.skeleton import LiveModel
from mapconv.runtime.models import quiet_libraries

#: PEFT's task names, and the transformers class that they stand for.
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def trained_class(config: dict[str, Any], adapters: Sequence[Adapter], folder: Path) -> LiveModel:
    """The class whose names the adapters' keys spell: the likeliest of those that have them all.

    A task is a hint, no more: retrievers (FEATURE_EXTRACTION) are trained on whole generating models as well.

    Raises:
        PlacementError: no class takes all of the adapters' tensors.
    """
    names = list(dict.fromkeys(class_candidates(config, adapters[0].config)))
    if not names:
        raise PlacementError(f"{folder}/config.json names no architecture to place the adapter on.")
    misfits: list[str] = []
    best: tuple[tuple[int, bool], LiveModel] | None = None
    for name in names:
        try:
            live = LiveModel(config, name)
        except CheckpointError as error:
            misfits.append(str(error))
            continue
        unplaced = _unplaced(live, adapters)
        if unplaced:
            misfits = unplaced if len(misfits) < 2 else misfits
            continue
        respelled = _respellings(live, adapters)
        if best is None or respelled < best[0]:
            best = respelled, live
        if respelled == (0, False):
            break
    if best is None:
        total = sum(len(adapter.modules) + len(adapter.whole) for adapter in adapters)
        raise PlacementError(misfit_report(misfits, total))
    return best[1]


def class_candidates(config: dict[str, Any], adapter_config: dict[str, Any]) -> Iterable[str]:
    """Class names that an adapter may have been trained on, the likeliest first."""
    mapping = adapter_config.get("auto_mapping")
    if isinstance(mapping, dict) and isinstance(mapping.get("base_model_class"), str):
        yield mapping["base_model_class"]
    task = TASKS.get(str(adapter_config.get("task_type")))
    architectures = config.get("architectures") or []
    own = [name for name in architectures if isinstance(name, str)]
    # A model made for the adapter's task keeps its own class; so does a vision-language model under "CAUSAL_LM".
    has_head = task not in (None, "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    by_task = [_class_of_task(config, name) for name in (task, "AutoModel") if name]
    yield from filter(None, (by_task[0], *own, by_task[-1]) if has_head else (*own, *by_task))


def causal_class(config: dict[str, Any]) -> str | None:
    """The class of a causal language model of this type, None where transformers has none."""
    return _class_of_task(config, "AutoModelForCausalLM")


def in_names_of(live: LiveModel, adapter: Adapter) -> Adapter:
    """The adapter with the keys of its whole tensors as ``live`` spells them, under which stock PEFT finds them."""
    spelled: dict[str, tuple[str, str]] = {}
    for item in adapter.whole:
        old, new = (name.rpartition(".")[0] for name in (item.parameter, live.parameter_name(item.parameter) or ""))
        spelled[item.tensor.name] = f"{KEY_PREFIX}{old}.", f"{KEY_PREFIX}{new}."
    others = {
        key.replace(*spelled[ref.name], 1) if ref.name in spelled else key: ref for key, ref in adapter.others.items()
    }
    return replace(adapter, others=others)


def _unplaced(live: LiveModel, adapters: Sequence[Adapter]) -> list[str]:
    """What has no parameter in a live model."""
    misfits = []
    for adapter in adapters:
        for module in adapter.modules:
            if live_parameter(module.path, adapter, live) is None:
                misfits.append(
                    f"{module.path}: {live.class_name} has no such weight{nearest(module.path, live.shapes)}"
                )
        for item in adapter.whole:
            if live.parameter_name(item.parameter) is None:
                near = nearest(item.parameter, live.shapes)
                misfits.append(f"{item.tensor.name}: {live.class_name} has no parameter {item.parameter}{near}")
    return misfits


def _respellings(live: LiveModel, adapters: Sequence[Adapter]) -> tuple[int, bool]:
    """How many names another class spelled, and whether an older version of this one spelled any."""
    names = [item.parameter for adapter in adapters for item in adapter.whole]
    for module in (module for adapter in adapters for module in adapter.modules):
        path = module.path.replace(".base_layer", "")
        names += [f"{path}.weight"] if live.kind(path) is None else []
    reasons = [live.respelling(name) for name in names]
    return reasons.count("class"), "version" in reasons


def _class_of_task(config: dict[str, Any], task: str) -> str | None:
    with quiet_libraries():
        from transformers.models.auto import modeling_auto

        mapping = {
            "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
            "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
            "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
        }[task]
    name = mapping.get(config["model_type"])
    return name if isinstance(name, str) else None
