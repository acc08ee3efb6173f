"""Sizes that follow an adapter's tensors: the vocabulary of a resized embedding, the labels of a trained head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mapconv.adapter import Adapter
from mapconv.errors import PlacementError
from mapconv.placement.skeleton import LiveModel

#: Configuration fields that say how many classes a head has; transformers derives ``num_labels`` from them.
_LABEL_FIELDS = ("id2label", "label2id", "num_labels")
#: Every field that this module may change.
SIZE_FIELDS = ("vocab_size", *_LABEL_FIELDS)


def resized_model(live: LiveModel, config: dict[str, Any], adapters: Sequence[Adapter]) -> LiveModel:
    """The same class with the vocabulary and the number of labels that the adapters' tensors have.

    ``config`` is changed in place.

    Raises:
        PlacementError: a tensor of another shape than its parameter, whatever the configuration says.
    """
    whole = [item for adapter in adapters for item in adapter.whole if item.rows is None]
    changed = False
    for item in whole:
        parameter = live.parameter_name(item.parameter)
        assert parameter is not None  # the class was chosen because it has all that the adapters name
        expected, found = live.shapes[parameter], item.tensor.shape
        if expected == found:
            continue
        if len(expected) != len(found) or expected[1:] != found[1:]:
            raise PlacementError(f"{item.tensor.name} is {list(found)}, but {parameter} is {list(expected)}.")
        changed = True
        if live.is_vocabulary(parameter):
            _set_everywhere(config, "vocab_size", expected[0], found[0])
        else:
            _set_labels(config, found[0])
    if not changed:
        return live
    resized = LiveModel(config, live.class_name)
    for item in whole:
        parameter = resized.parameter_name(item.parameter)
        assert parameter is not None  # the same class has the same names
        if resized.shapes[parameter] != item.tensor.shape:
            raise PlacementError(
                f"{item.tensor.name} is {list(item.tensor.shape)}, but {parameter} is "
                f"{list(resized.shapes[parameter])}, and no field of the configuration makes it fit."
            )
    return resized


def _set_labels(config: dict[str, Any], count: int) -> None:
    """Nameless labels: the adapter says how many there are, and no more."""
    for name in _LABEL_FIELDS:
        config.pop(name, None)
    config["id2label"] = {str(number): f"LABEL_{number}" for number in range(count)}
    config["label2id"] = {f"LABEL_{number}": number for number in range(count)}


def _set_everywhere(config: dict[str, Any], key: str, old: int, new: int) -> None:
    """Change a size here, or in the part of a composite configuration that has it."""
    if config.get(key) == old or not any(
        isinstance(value, dict) and value.get(key) == old for value in config.values()
    ):
        config[key] = new
    for value in config.values():
        if isinstance(value, dict) and value.get(key) == old:
            value[key] = new
