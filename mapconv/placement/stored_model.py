"""What a merged model starts from where the base's class is unknown: its tensors as they are stored, name by name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mapconv.adapter import Adapter, TensorRef, WholeTensor
from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.by_name import misfit_report, nearest
from mapconv.placement.by_shape import ShapePlacement
from mapconv.placement.spelling.components import components_of, spelling_of
from mapconv.placement.spelling.names import SpelledNames
from mapconv.placement.spelling.placing import SpelledPlacement
from mapconv.placement.target_model import BiasUpdate, Placed, TargetModel, files_with, vocabulary_sizes
from mapconv.placement.weights import PlacedModule

_Names = ShapePlacement | SpelledPlacement


def stored_target(checkpoint: Checkpoint, adapters: Sequence[Adapter], config: Mapping[str, Any]) -> Placed:
    """The target model of some adapters on a base that no class of transformers describes.

    Raises:
        PlacementError: a tensor that has no place by its exact name and shape. UnsupportedError: a change that only
            the model's class can express.
    """
    tensors, dtypes = dict(checkpoint.tensors), {}
    rows: dict[str, list[WholeTensor]] = defaultdict(list)
    biases: dict[str, list[BiasUpdate]] = defaultdict(list)
    ties = _Ties(checkpoint, config)
    placed: list[tuple[Adapter, tuple[PlacedModule, ...]]] = []
    for adapter in adapters:
        if adapter.settings.layer_replication:
            raise UnsupportedError(
                f"{adapter.path} repeats layers (layer_replication), and {checkpoint.folder} has no config.json of a "
                "transformers model that could say so: give such a base with --base."
            )
        names = _names(adapter, checkpoint, config)
        modules = names.modules()
        placed.append((adapter, modules))
        for item in modules:
            for piece in item.weight.pieces:
                ties.check(piece.tensor, rows_are_tokens=item.module.embedding)
        for name, update in _biases(modules, names):
            biases[name].append(update)
        for addition, name in names.additions() if isinstance(names, SpelledPlacement) else ():
            if addition.replaces:
                tensors[name] = replace(addition.tensor, name=name)
                dtypes[name] = checkpoint.tensors[name].dtype
            else:
                biases[name].append(BiasUpdate(addition.tensor, 1.0))
        for item, name in _whole(adapter, names):
            ties.check(checkpoint.tensors[name], rows_are_tokens=item.rows is not None)
            if item.rows is not None:
                rows[name].append(item)
                continue
            if tensors[name] is not checkpoint.tensors[name]:
                raise UnsupportedError(
                    f"{item.tensor.file} and {tensors[name].file} both replace {name}, and only one can be in the "
                    "merged model: merge them one by one."
                )
            tensors[name] = replace(item.tensor, name=name)
            dtypes[name] = checkpoint.tensors[name].dtype
    target = TargetModel(
        checkpoint=checkpoint,
        files=files_with(checkpoint, tensors),
        tensors=tensors,
        dtypes=dtypes,
        rows={name: tuple(items) for name, items in rows.items()},
        biases={name: tuple(items) for name, items in biases.items()},
        notes=tuple(ties.notes),
    )
    return target, tuple(placed)


def _names(adapter: Adapter, checkpoint: Checkpoint, config: Mapping[str, Any]) -> _Names:
    by_shape = ShapePlacement(adapter, checkpoint.tensors)
    if not adapter.is_spelled and all(by_shape.knows(module) for module in adapter.modules):
        return by_shape
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    names = SpelledNames(shapes, components_of(checkpoint, config))
    own_paths = not adapter.is_spelled
    if own_paths:
        # Made for the same model in another form: a folder of diffusers, a single file of its authors.
        modules = tuple(replace(module, spelling=spelling_of(module.path)) for module in adapter.modules)
        if not all(names.find(spelling_of(module.path)) for module in modules):
            return by_shape
        adapter = replace(adapter, modules=modules)
    return SpelledPlacement(adapter, checkpoint.tensors, names, keep=own_paths)


def _whole(adapter: Adapter, names: _Names) -> Iterator[tuple[WholeTensor, str]]:
    """Every tensor that the adapter replaces, or rows of, and the stored one that it belongs to."""
    misfits = []
    for item in adapter.whole:
        name = names.stored_name(item.parameter)
        ref = names.tensors.get(name)
        if ref is None:
            misfits.append(f"{item.tensor.name}: no tensor {name}{nearest(name, names.tensors)}")
        elif item.rows is None and item.tensor.shape != ref.shape:
            misfits.append(f"{item.tensor.name} is {list(item.tensor.shape)}, but {name} is {list(ref.shape)}")
        elif item.rows is not None and (item.tensor.shape[1:] != ref.shape[1:] or max(item.rows) >= ref.shape[0]):
            misfits.append(f"{item.tensor.name} is {list(item.tensor.shape)} for rows of {name} {list(ref.shape)}")
        else:
            yield item, name
    if misfits:
        raise PlacementError(misfit_report(misfits, len(adapter.modules) + len(adapter.whole)))


def _biases(
    modules: Sequence[PlacedModule], names: ShapePlacement | SpelledPlacement
) -> Iterator[tuple[str, BiasUpdate]]:
    """What each adapter's own biases (``lora_bias``) add to, by stored name."""
    for item in modules:
        if item.module.bias is None:
            continue
        name = names.stored_name(item.parameter.removesuffix("weight") + "bias")
        ref = names.tensors.get(name)
        if ref is None or ref.shape != item.module.bias.shape:
            raise UnsupportedError(
                f"{item.module.bias.name}: lora_bias adds to the bias of {item.module.path}, but the base has none, so "
                "that no merged model of its class can hold it."
            )
        yield name, BiasUpdate(item.module.bias, item.scaling)


class _Ties:
    """Whether a stored tensor may stand for another name as well, which only a class would tell for sure."""

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self._folder, self._config = checkpoint.folder, config
        self._vocabularies = vocabulary_sizes(config)
        self._like = Counter(ref.shape for ref in checkpoint.tensors.values())
        # safetensors' save_model notes the second name of a shared tensor in the header.
        metadata = (item for file in checkpoint.files for item in file.metadata.items())
        self._aliases = {name: other for other, name in metadata if other not in checkpoint.tensors}
        self.notes: dict[str, None] = {}

    def check(self, ref: TensorRef, *, rows_are_tokens: bool) -> None:
        """Refuse a change of one end of a tied pair; say where nothing tells whether there is one."""
        if ref.name in self._aliases:
            raise UnsupportedError(
                f"{ref.file}: {ref.name} is {self._aliases[ref.name]} as well, and the adapter changes one of the two: "
                "give a base that stores both, or one with the config.json of a transformers model."
            )
        both_stored = self._like[ref.shape] > 1 or self._config.get("tie_word_embeddings") is False
        if both_stored or not (rows_are_tokens or ref.shape[0] in self._vocabularies):
            return
        if self._vocabularies:
            raise UnsupportedError(
                f"{ref.file}: {ref.name} may be tied to the other embedding, and {self._folder}/config.json names no "
                "class of transformers that would tell: give a base whose config.json says tie_word_embeddings."
            )
        self.notes[
            f"{self._folder} has no config.json that would tell whether {ref.name} is tied to another layer, "
            "so it is taken for a tensor of its own"
        ] = None
