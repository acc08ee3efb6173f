"""Follow adapters' whole tensors and the model's ties through the live model, to what a merged model starts from."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mapconv.adapter import Adapter, TensorRef, WholeTensor
from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.by_class import live_parameter, place_on_live_model
from mapconv.placement.model_class import in_names_of, trained_class
from mapconv.placement.regions import StoredParameters
from mapconv.placement.replication import replicate_config, replicated_checkpoint
from mapconv.placement.resizing import SIZE_FIELDS, resized_model
from mapconv.placement.skeleton import LiveModel, typed_model_config
from mapconv.placement.target_model import BiasUpdate, MergedBias, Placed, TargetModel, common_dtype, files_with
from mapconv.placement.weights import PlacedModule
from mapconv.wording import counted


def resolve_target(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Placed:
    """The target model of some adapters on a base, and each adapter in its names with the modules placed on it.

    Raises:
        MapconvError: a tensor that has no place, or a change that the model's class cannot express.
    """
    return _Resolution(checkpoint, adapters).run()


class _Resolution:
    """Follows the adapters' whole tensors and ties through the live model, step by step."""

    def __init__(self, checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
        base_config = typed_model_config(checkpoint.folder)
        layer_maps = {adapter.settings.layer_replication for adapter in adapters}
        if len(layer_maps) > 1:
            raise UnsupportedError("adapters with different layer_replication cannot be merged together.")
        layers = layer_maps.pop()
        self.config = copy.deepcopy(base_config)
        self.checkpoint = replicated_checkpoint(checkpoint, layers) if layers else checkpoint
        self.tensors = dict(self.checkpoint.tensors)
        self.dtypes: dict[str, str] = {}
        self.rows: dict[str, list[WholeTensor]] = defaultdict(list)
        self.biases: dict[str, list[BiasUpdate | MergedBias]] = defaultdict(list)
        self.notes: list[str] = []
        self._stored_state: tuple | None = None
        self.base_config = base_config
        if layers:
            replicate_config(self.config, layers)
        self.live = resized_model(trained_class(self.config, adapters, checkpoint.folder), self.config, adapters)
        self.adapters = [in_names_of(self.live, adapter) for adapter in adapters]
        # PEFT repeats the layers and keeps the ties itself: it takes the base with no more than the adapter's sizes.
        sized = {key: self.config[key] for key in SIZE_FIELDS if key in self.config}
        sized |= {key: value for key, value in self.config.items() if isinstance(value, dict)}
        self.source_config = {**base_config, **sized} if {**base_config, **sized} != base_config else None
        self.live_ties = self.live.ties_embeddings
        self.groups = {name: self.live.tied(name) for name in self.live.shapes}

    def run(self) -> Placed:
        self._drop_foreign_heads()
        self._replace_in_place()
        self._untie()
        self._replace_modules()
        placed = tuple(place_on_live_model(adapter, self.live, self._stored()) for adapter in self.adapters)
        self._collect_rows()
        self._collect_biases(placed)
        self._require_complete()
        target = TargetModel(
            checkpoint=self.checkpoint,
            files=files_with(self.checkpoint, self.tensors),
            tensors=self.tensors,
            dtypes=self.dtypes,
            rows={name: tuple(items) for name, items in self.rows.items()},
            biases={name: tuple(items) for name, items in self.biases.items()},
            config=self._final_config(),
            source_config=self.source_config,
            class_name=self.live.class_name,
            notes=tuple(self.notes),
        )
        return target, tuple(zip(self.adapters, placed, strict=True))

    def _stored(self) -> StoredParameters:
        """The present tensors by live parameter; made anew only where tensors or the model have changed since."""
        state = (self.live, dict(self.tensors))
        if self._stored_state != state:
            located = {name: self.live.locate(name) for name in self.tensors}
            self._stored_parameters, self._stored_state = StoredParameters(located, self.tensors), state
        return self._stored_parameters

    # Whole tensors

    def _drop_foreign_heads(self) -> None:
        """Leave out what the base's own head held when the merged model has another one."""
        if self.live.class_name in (self.base_config.get("architectures") or []):
            return
        known = self.live.shapes_or_buffers
        foreign = [name for name in self.tensors if self.live.locate(name).parameter not in known]
        for name in foreign:
            del self.tensors[name]
        if foreign:
            shown = foreign[0] + ", …" * (len(foreign) > 1)
            self.notes.append(f"{counted(len(foreign), 'tensor')} of the base's own head left out ({shown})")

    def _replace_in_place(self) -> None:
        """Tensors that PEFT writes into the base's parameter: they show under every name tied to it."""
        for item in self._whole(rows=False):
            if item.in_place:
                parameter = self._parameter(item)
                stored = self._stored()
                held = [name for name in self.live.tied(parameter) if stored.holds(name)]
                for name in held or [parameter]:
                    self._replace(name, item.tensor)

    def _replace_modules(self) -> None:
        """Modules of ``modules_to_save``: they belong to one name alone."""
        owners: dict[str, WholeTensor] = {}
        for item in self._whole(rows=False):
            if item.in_place:
                continue
            parameter = self._parameter(item)
            if parameter in owners:
                raise UnsupportedError(
                    f"{item.tensor.file} and {owners[parameter].tensor.file} both replace {parameter} "
                    "(modules_to_save), and only one can be in the merged model: merge them one by one."
                )
            owners[parameter] = item
            stored = self._stored()
            held = [name for name in (parameter, *self.live.tied(parameter)) if stored.holds(name)]
            self._replace(held[0] if held else parameter, item.tensor)

    def _replace(self, parameter: str, source: TensorRef) -> None:
        """Put a whole tensor in a parameter's place, under its stored name; pieces of it give way to the whole."""
        stored = self._stored()
        names = stored.names(parameter)
        if names and not stored.is_whole(parameter):
            if not stored.is_plain(parameter):
                raise UnsupportedError(f"{source.name}: the base stores {parameter} in a form that cannot be replaced.")
            self.dtypes[parameter] = self.tensors[names[0]].dtype
            for name in names:
                del self.tensors[name]
            names = []
        for name in names or [parameter]:
            self._put(name, source)

    def _put(self, name: str, source: TensorRef) -> None:
        previous = self.tensors.get(name)
        self.dtypes[name] = self.dtypes.get(name) or (previous.dtype if previous else common_dtype(self.checkpoint))
        self.tensors[name] = replace(source, name=name)

    def _parameter(self, item: WholeTensor) -> str:
        parameter = self.live.parameter_name(item.parameter)
        assert parameter is not None  # the class was chosen because it has all that the adapters name
        return parameter

    def _whole(self, *, rows: bool) -> list[WholeTensor]:
        return [item for adapter in self.adapters for item in adapter.whole if (item.rows is not None) == rows]

    # Ties

    def _untie(self) -> None:
        """Give each end of a tied pair its own tensor where the adapters change them differently.

        An update belongs to the name of the module it was trained on: the other end keeps the base's values, as it
        does in PEFT's live model (its in-place merge changes both).
        """
        content = self._content_by_name()
        groups = sorted({group for group in self.groups.values() if len(group) > 1})
        if all(len({content.get(name, ()) for name in group}) == 1 for group in groups):
            return
        stored = self._stored()
        self._untie_config()
        for group in groups:
            source = next((ref for name in group for ref in stored.names(name)), None)
            if source is None:
                continue
            # Both ends of a pair that still counts as tied must be there: transformers ties no two tensors that differ.
            split = len({content.get(name, ()) for name in group}) > 1
            for name in group:
                if not any(stored.holds(other) for other in ((name,) if split else self.live.tied(name))):
                    self.tensors[name] = replace(self.tensors[source], name=name)
                    if source in self.dtypes:
                        self.dtypes[name] = self.dtypes[source]
        self.notes.append("tied weights are written separately: the adapter changes only one of them")

    def _untie_config(self) -> None:
        """Say so in the configuration, unless the class reads another meaning into it (T5: no scaling of the logits).

        transformers itself ties no two tensors that are both there and differ.
        """
        config = copy.deepcopy(self.config)
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
        untied = LiveModel(config, self.live.class_name)
        if not untied.ties_embeddings:
            self.config, self.live = config, untied

    def _content_by_name(self) -> dict[str, tuple[Any, ...]]:
        """What the adapters do to each live name alone."""
        content: dict[str, tuple[Any, ...]] = {}
        for adapter in self.adapters:
            for module in adapter.modules:
                parameter = live_parameter(module.path, adapter, self.live)
                assert parameter is not None  # as in ``_parameter``
                content[parameter] = (*content.get(parameter, ()), (str(adapter.path), module.path))
            for item in adapter.whole:
                parameter = self._parameter(item)
                if item.rows is None and item.in_place:
                    continue
                # PEFT trains copies of both ends apart, unless it was told to keep them one.
                together = bool(adapter.config.get("ensure_weight_tying"))
                own = ("saved", None if together else item.tensor.name)
                if item.rows is not None:
                    own = ("rows", item.rows, item.tensor.name)
                for name in self._names_of(item, parameter):
                    content[name] = (*content.get(name, ()), own)
        return content

    def _names_of(self, item: WholeTensor, parameter: str) -> list[str]:
        """Trained rows show through every tied name that has none of its own."""
        if item.rows is None or not self.live_ties:
            return [parameter]
        others = {self._parameter(other) for other in self._whole(rows=True) if other is not item}
        return [name for name in self.groups[parameter] if name == parameter or name not in others]

    # Updates

    def _collect_rows(self) -> None:
        stored = self._stored()
        for item in self._whole(rows=True):
            parameter = self._parameter(item)
            for name in self._names_of(item, parameter):
                for tensor in stored.names(name):
                    if item not in self.rows[tensor]:
                        self._check_rows(item, self.tensors[tensor])
                        self.rows[tensor].append(item)

    def _check_rows(self, item: WholeTensor, ref: TensorRef) -> None:
        assert item.rows is not None  # only trained rows are collected
        if ref.shape[1:] != item.tensor.shape[1:] or max(item.rows) >= ref.shape[0]:
            raise PlacementError(
                f"{item.tensor.name} is {list(item.tensor.shape)} for rows of {ref.name} {list(ref.shape)}."
            )

    def _collect_biases(self, placed: Sequence[Sequence[PlacedModule]]) -> None:
        stored = self._stored()
        for item in (item for items in placed for item in items):
            if item.changes_bias and item.bias is not None:
                self.biases[item.bias.name].append(MergedBias(item))
            bias = item.module.bias
            if bias is None:
                continue
            parameter = item.parameter.removesuffix("weight") + "bias"
            names = stored.names(parameter)
            if parameter not in self.live.shapes or len(names) != 1:
                raise UnsupportedError(
                    f"{bias.name}: lora_bias adds to the bias of {item.module.path}, but the base has "
                    "none, so that no merged model of its class can hold it."
                )
            self.biases[names[0]].append(BiasUpdate(bias, item.scaling))

    # The result

    def _require_complete(self) -> None:
        """Every parameter of the class has a tensor, so that loading initialises nothing anew."""
        stored = self._stored()
        missing = [name for name in self.live.shapes if not any(stored.holds(other) for other in self.live.tied(name))]
        if missing:
            more = f" and {counted(len(missing) - 1, 'more tensor')}" if len(missing) > 1 else ","
            raise PlacementError(
                f"{self.live.class_name} needs {missing[0]}{more} that neither the base nor the adapter "
                "has: give the model that the adapter was trained on with --base."
            )

    def _final_config(self) -> dict[str, Any] | None:
        if self.config.get("architectures") != [self.live.class_name]:
            self.config["architectures"] = [self.live.class_name]
        return self.config if self.config != self.base_config else None
