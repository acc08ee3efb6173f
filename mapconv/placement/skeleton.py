"""The model that transformers would build, on the meta device: its classes, shapes and ties, without any weights.

Files alone do not say whether a square weight is stored transposed, which names share one parameter, or how a
checkpoint's names map to the model's. The class does, and transformers' own conversion tables do.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from mapconv.checkpoint.filenames import MODEL_CONFIG
from mapconv.checkpoint.model_config import read_model_config
from mapconv.checkpoint.quantization import without_quantization
from mapconv.errors import CheckpointError
from mapconv.placement.numbering import NumberedNames, Region
from mapconv.runtime.models import model_class, quiet_libraries, refuse_code, translated

Kind = Literal["linear", "transposed", "conv", "embedding", "attention", "parameters"]

#: About three times those of the largest models; a class takes seconds to build as many.
_MOST_MODULES = 200_000


@dataclass(frozen=True)
class _Built:
    """What a class and a configuration determine by themselves."""

    model: Any
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, tuple[str, ...]]
    shapes_or_buffers: dict[str, tuple[int, ...]]
    modules: Mapping[str, torch.nn.Module]


class LiveModel:
    """One transformers class with one configuration, built without weights; ``model`` is shared and not to be changed.

    Which names a checkpoint has for its parameters is found for each instance anew: transformers' tables remember the
    spelling that they have met.
    """

    def __init__(self, config: dict[str, Any], class_name: str) -> None:
        """Build it, or take what was built before.

        Raises:
            CheckpointError: transformers has no such class, or cannot build it from this configuration.
        """
        with quiet_libraries(), translated(f"a {class_name}", CheckpointError):
            built = _build(json.dumps(config), class_name)
        self.class_name = class_name
        self.model, self.shapes, self._tied, self._modules = built.model, built.shapes, built.tied, built.modules
        #: Names of all that a checkpoint may hold for this model.
        self.shapes_or_buffers = built.shapes_or_buffers
        self._transforms: tuple[list, list] | None = None
        self._located: dict[str, Region] = {}
        self._of_another_class: set[str] = set()
        self._names: NumberedNames | None = None

    def tied(self, parameter: str) -> tuple[str, ...]:
        """All names of the parameter, its own included."""
        return self._tied.get(parameter, (parameter,))

    @property
    def ties_embeddings(self) -> bool:
        """What PEFT goes by when it lets trained rows show through tied names: the configuration's own word."""
        return self.model.config.to_dict().get("tie_word_embeddings", False) is True

    def kind(self, path: str) -> Kind | None:
        """How the module at ``path`` stores its weight; None where there is no such module."""
        module = self._modules.get(path)
        if module is None:
            return None
        from transformers.pytorch_utils import Conv1D

        if isinstance(module, torch.nn.Linear):
            return "linear"
        if isinstance(module, Conv1D):
            return "transposed"
        if isinstance(module, torch.nn.Embedding):
            return "embedding"
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            return "conv"
        if isinstance(module, torch.nn.MultiheadAttention):
            return "attention"
        return "parameters"

    def adaptable_paths(self) -> list[str]:
        """The modules that ``target_modules`` can name."""
        return [path for path in self._modules if self.kind(path) not in ("attention", "parameters")]

    def groups(self, path: str) -> int:
        """Groups of a convolution."""
        return getattr(self._modules[path], "groups", 1)

    def is_vocabulary(self, parameter: str) -> bool:
        """Whether the parameter's rows count the vocabulary: the input or output embedding, or the latter's bias."""
        ends = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        module = self._modules.get(parameter.rpartition(".")[0])
        return any(module is end for end in ends if end is not None) or any(
            name in self.tied(parameter) for name in self._names_of(ends)
        )

    def _names_of(self, modules: list[Any]) -> list[str]:
        return [
            f"{path}.weight"
            for path, module in self._modules.items()
            if any(module is m for m in modules if m is not None)
        ]

    def own_parameters(self, path: str) -> list[str]:
        """The parameters that the module at ``path`` itself holds, in the order in which PEFT wraps them."""
        return [name for name, _ in self._modules[path].named_parameters(recurse=False)]

    def is_stack(self, parameter: str) -> bool:
        """Whether the parameter is a stack of the weights of experts, one matrix each."""
        module, shape = self._modules.get(parameter.rpartition(".")[0]), self.shapes[parameter]
        return len(shape) == 3 and shape[0] > 1 and getattr(module, "num_experts", None) == shape[0]

    def stores_in_by_out(self, path: str) -> bool:
        """Whether the experts at ``path`` are stored as (experts, in, out)."""
        return bool(getattr(self._modules[path], "is_transposed", False))

    def locate(self, name: str) -> Region:
        """Where the values that a checkpoint calls ``name`` belong, by transformers' conversion tables."""
        if name not in self._located:
            self._located[name] = Region(name) if name in self.shapes else self._numbered_names().locate(name)
        return self._located[name]

    def _numbered_names(self) -> NumberedNames:
        if self._names is None:
            transforms = [item for kind in self._conversions() for item in kind]
            patterns = [pattern for item in transforms for pattern in item.source_patterns]
            self._names = NumberedNames(self._convert, patterns, self.shapes)
        return self._names

    def parameter_name(self, name: str) -> str | None:
        """The parameter that a checkpoint or an adapter calls ``name``; None where the model has no such parameter."""
        found = self.locate(name).parameter
        return found if found in self.shapes else None

    def respelling(self, name: str) -> Literal["none", "version", "class"]:
        """Why the model does not call a parameter ``name`` itself: an older version or another class spelled it so.

        Another class is one with or without this one's prefix: ``language_model.…`` is spelled as by a ``GemmaModel``
        that stands in this class as ``model``.
        """
        if name in self.shapes:
            return "none"
        self.locate(name)
        return "class" if name in self._of_another_class else "version"

    def _convert(self, name: str) -> Region:
        from transformers.core_model_loading import Concatenate, MergeModulelist, apply_renamings, rename_source_key

        renamings, converters = self._conversions()
        parameter, pattern = rename_source_key(name, renamings, converters)
        if parameter not in self.shapes_or_buffers:
            own_name = parameter
            parameter, pattern = rename_source_key(
                name, renamings, converters, self.model.base_model_prefix, self.shapes_or_buffers
            )
            if parameter != own_name:
                self._of_another_class.add(name)
        if pattern is None:
            return Region(parameter)
        converter = next(item for item in converters if pattern in item.source_patterns)
        number = _number_at_star(pattern, apply_renamings(name, renamings))
        part = converter.source_patterns.index(pattern)
        plain = len(converter.target_patterns) == 1 and all(
            isinstance(operation, MergeModulelist | Concatenate) for operation in converter.operations
        )
        return Region(parameter, number, part, len(converter.source_patterns), plain)

    def _conversions(self) -> tuple[list, list]:
        if self._transforms is None:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter

            transforms = get_model_conversion_mapping(self.model)
            converters = [item for item in transforms if isinstance(item, WeightConverter)]
            self._transforms = [item for item in transforms if not isinstance(item, WeightConverter)], converters
        return self._transforms


@lru_cache(maxsize=8)  # the adapters of a catalog share their base
def _build(config: str, class_name: str) -> _Built:
    """Build a class from a configuration, as JSON, on the meta device."""
    import transformers
    from transformers.initialization import no_init_weights

    settings = json.loads(config)
    refuse_code(settings, Path("config.json"))
    typed = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    # Drawing weights takes most of the time of building a class, although on this device it draws none.
    with torch.device("meta"), no_init_weights(), _bounded_modules(class_name):
        model = model_class(class_name)(typed)
        model.tie_weights()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        groups[id(parameter)].append(name)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return _Built(
        model,
        shapes,
        {name: tuple(group) for group in groups.values() for name in group},
        shapes | {name: tuple(buffer.shape) for name, buffer in model.named_buffers()},
        dict(model.named_modules(remove_duplicate=False)),
    )


@contextmanager
def _bounded_modules(class_name: str) -> Iterator[None]:
    """Stop a configuration whose counts, each of them possible, multiply to a model that no machine could build."""
    count = 0

    def add(*_: object) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise CheckpointError(
                f"{class_name} with this configuration has more than {_MOST_MODULES:,} modules: correct config.json."
            )

    hook = register_module_module_registration_hook(add)
    try:
        yield
    finally:
        hook.remove()


def knows_type(config: Mapping[str, Any]) -> bool:
    """Whether transformers has classes for the configuration's ``model_type``."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return False
    with quiet_libraries():
        # The table itself is public; transformers only imports it into that module.
        from transformers.models.auto.configuration_auto import (
            CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
        )
    return model_type in CONFIG_MAPPING_NAMES


def names_class(config: Mapping[str, Any]) -> bool:
    """Whether the configuration is that of a class in transformers, not of code that the base brings along."""
    if not knows_type(config):
        return False
    with quiet_libraries():
        import transformers
    architectures = config.get("architectures") or []
    return not architectures or any(isinstance(n, str) and hasattr(transformers, n) for n in architectures)


def typed_model_config(folder: Path) -> dict[str, Any]:
    """The base model's ``config.json``, which must say the model's type, as that of the plain model if quantized.

    Raises:
        CheckpointError: absent, or without a model_type.
    """
    try:
        config = read_model_config(folder)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MODEL_CONFIG}, which this adapter needs to be placed.") from None
    if config.get("model_type") is None:
        raise CheckpointError(f"{folder / MODEL_CONFIG} names no model_type, which this adapter needs to be placed.")
    return without_quantization(config)


def _number_at_star(pattern: str, name: str) -> int | None:
    """The number that stands where a pattern has its star: 3 in ``experts.3.w1.weight`` for ``experts.*.w1.weight``."""
    if "*" not in pattern:
        return None
    before, after = (re.escape(part) for part in pattern.split("*", 1))
    match = re.search(rf"{before}(\d+){after}", name)
    return int(match[1]) if match else None
