"""A finetuned model beside the base that it began from: which tensors belong together, by names and shapes alone.

Nothing is read but headers. What differs between the two, and what then becomes of it, is decided on the values
(``refit.extraction``); ``placement.described`` then describes the result as an adapter of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mapconv.adapter import Module, TensorRef
from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.model_class import causal_class
from mapconv.placement.regions import StoredParameters
from mapconv.placement.skeleton import Kind, LiveModel, names_class
from mapconv.placement.weights import Piece, WeightView

#: At most this many faults are listed.
_LISTED = 5


@dataclass(frozen=True)
class MatrixPair:
    """A weight of a kind that PEFT has a LoRA for, in both models; ``module`` is what it becomes, without factors."""

    module: Module
    base: WeightView
    tuned: WeightView

    @property
    def path(self) -> str:
        return self.module.path


@dataclass(frozen=True)
class WholePair:
    """A parameter that only goes over as it is. ``base`` is None where the base has none of this shape.

    ``in_place``: it belongs into the base's own parameter, where all names that are tied to it see it.
    """

    parameter: str
    base: TensorRef | None
    tuned: TensorRef
    in_place: bool

    @property
    def path(self) -> str:
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Finetune:
    """Every tensor of a finetuned model with its counterpart.

    ``class_name`` is the finetuned model's class, None where only names are known; ``paths`` are all of its modules.
    """

    base: Checkpoint
    tuned: Checkpoint
    class_name: str | None
    config: Mapping[str, Any]
    paths: tuple[str, ...]
    matrices: tuple[MatrixPair, ...]
    wholes: tuple[WholePair, ...]
    notes: tuple[str, ...] = ()


def pair_finetune(
    base: Checkpoint,
    base_config: Mapping[str, Any],
    tuned: Checkpoint,
    tuned_config: Mapping[str, Any],
    is_target: Callable[[str], bool] | None,
) -> Finetune:
    """Put every tensor of two checkpoints together; ``is_target`` names what to refit (None: all but heads).

    Raises:
        PlacementError: two architectures, or tensors that only one of them has. UnsupportedError: a tensor in pieces.
    """
    one, two = (config.get("model_type") or config.get("_class_name") for config in (base_config, tuned_config))
    if one != two:
        raise PlacementError(
            f"{tuned.folder} has another architecture ({two}) than {base.folder} ({one}): give the model that it was "
            "finetuned from with --base."
        )
    if names_class(tuned_config) and names_class(base_config):
        return _ByClass(base, dict(base_config), tuned, dict(tuned_config), is_target).pairs()
    return _by_name(base, base_config, tuned, is_target)


class _ByClass:
    """Pairs by the parameters of the finetuned model's class, whatever either file calls them."""

    def __init__(
        self,
        base: Checkpoint,
        base_config: dict[str, Any],
        tuned: Checkpoint,
        tuned_config: dict[str, Any],
        is_target: Callable[[str], bool] | None,
    ) -> None:
        self._base, self._tuned, self._config, self._is_target = base, tuned, tuned_config, is_target
        named = [name for name in tuned_config.get("architectures") or [] if isinstance(name, str)]
        name = named[0] if named else causal_class(tuned_config)
        if name is None:
            raise PlacementError(f"{tuned.folder}/config.json names no class of transformers.")
        self._live, self._own = LiveModel(base_config, name), LiveModel(tuned_config, name)
        self._stored, self._trained = _located(self._live, base), _located(self._own, tuned)

    def pairs(self) -> Finetune:
        self._require_same_parameters()
        matrices, wholes = [], []
        for name, shared in self._tensors():
            pair = self._pair(name, shared)
            if isinstance(pair, MatrixPair):
                matrices.append(pair)
            else:
                wholes.append(pair)
        paths = tuple(path for path, _ in self._live.model.named_modules(remove_duplicate=False) if path)
        known, notes = self._own.shapes_or_buffers, ()
        foreign = [name for name in self._tuned.tensors if self._own.locate(name).parameter not in known]
        if foreign:
            more = ", …" * (len(foreign) > 1)
            notes = (f"left out, as {self._own.class_name} has no place for it: {foreign[0]}{more}",)
        name, config = self._live.class_name, self._config
        return Finetune(self._base, self._tuned, name, config, paths, tuple(matrices), tuple(wholes), notes)

    def _tensors(self) -> Iterator[tuple[str, bool]]:
        """(parameter, whether it shows under further names): those that are tied in both models are one tensor."""
        seen: set[str] = set()
        for name in self._live.shapes:
            if name in seen:
                continue
            tied = self._live.tied(name)
            seen.update(tied)
            if len({self._ref(self._own, self._trained, other) for other in tied} if len(tied) > 1 else tied) == 1:
                yield name, len(tied) > 1
            else:
                yield from ((other, False) for other in tied)

    def _pair(self, name: str, shared: bool) -> MatrixPair | WholePair:
        path, _, leaf = name.rpartition(".")
        kind = self._live.kind(path) if leaf == "weight" else None
        same = self._live.shapes[name] == self._own.shapes[name] and self._holds(self._live, self._stored, name)
        alone = len(self._live.tied(name)) == 1
        if kind is not None and same and alone and self._takes_lora(path, kind) and self._refits(path):
            shape = self._live.shapes[name]
            base = self._stored.weight(self._held(self._live, self._stored, name), kind)
            tuned = self._trained.weight(self._held(self._own, self._trained, name), kind)
            return MatrixPair(_module(path, kind, shape, self._first), base, tuned)
        ref = self._ref(self._own, self._trained, name)
        before = self._ref(self._live, self._stored, name) if same else None
        return WholePair(name, before, ref, in_place=shared)

    def _takes_lora(self, path: str, kind: Kind) -> bool:
        """Whether PEFT has a LoRA for the layer that mapconv can merge: not for a part of an nn.MultiheadAttention."""
        if kind == "conv":
            return self._live.groups(path) == 1
        inside = self._live.kind(path.rpartition(".")[0]) == "attention"
        return kind in ("linear", "transposed", "embedding") and not inside

    def _refits(self, path: str) -> bool:
        if self._is_target is not None:
            return self._is_target(path)
        prefix = self._live.model.base_model_prefix
        is_head = bool(prefix) and hasattr(self._live.model, prefix) and not path.startswith(f"{prefix}.")
        output = self._live.model.get_output_embeddings()
        return not is_head and (output is None or self._live.model.get_submodule(path) is not output)

    @property
    def _first(self) -> TensorRef:
        return next(iter(self._tuned.tensors.values()))

    def _holds(self, live: LiveModel, stored: StoredParameters, name: str) -> bool:
        return any(stored.holds(other) for other in live.tied(name))

    def _held(self, live: LiveModel, stored: StoredParameters, name: str) -> str:
        return next(other for other in (name, *live.tied(name)) if stored.holds(other))

    def _ref(self, live: LiveModel, stored: StoredParameters, name: str) -> TensorRef:
        held = self._held(live, stored, name)
        if not stored.is_whole(held):
            raise UnsupportedError(
                f"{stored.names(held)[0]}: a model file stores {held} in pieces or fused with others, and mapconv "
                "carries over only tensors that are stored as the model has them: save the model with a current "
                "transformers first, or leave it out with --exclude."
            )
        return stored.single(held)

    def _require_same_parameters(self) -> None:
        faults = [f"{name}: {self._base.folder} has it alone" for name in self._live.shapes.keys() - self._own.shapes]
        faults += [f"{name}: {self._tuned.folder} has it alone" for name in self._own.shapes.keys() - self._live.shapes]
        faults += [
            f"{name}: {self._tuned.folder} has no such tensor"
            for name in self._own.shapes
            if not self._holds(self._own, self._trained, name)
        ]
        for name in self._live.shapes.keys() & self._own.shapes.keys():
            one, two = self._live.shapes[name], self._own.shapes[name]
            if one != two and (one[1:] != two[1:] or not self._may_grow(name)):
                faults.append(f"{name}: {list(one)} in the base, {list(two)} in the finetune")
        _refuse(faults, self._base, self._tuned)

    def _may_grow(self, name: str) -> bool:
        """Whether the number of rows is a vocabulary's or that of a head's labels."""
        prefix = self._live.model.base_model_prefix
        return self._live.is_vocabulary(name) or not name.startswith(f"{prefix}.")


def _located(live: LiveModel, checkpoint: Checkpoint) -> StoredParameters:
    return StoredParameters({name: live.locate(name) for name in checkpoint.tensors}, checkpoint.tensors)


def _by_name(
    base: Checkpoint, config: Mapping[str, Any], tuned: Checkpoint, is_target: Callable[[str], bool] | None
) -> Finetune:
    """Pairs of equal names, where no class tells more: a matrix is taken for a linear layer, unless it looks up rows.

    Raises:
        PlacementError: names or shapes that differ.
    """
    faults = [f"{name}: {tuned.folder} has no such tensor" for name in base.tensors.keys() - tuned.tensors.keys()]
    faults += [f"{name}: {base.folder} has no such tensor" for name in tuned.tensors.keys() - base.tensors.keys()]
    faults += [
        f"{name}: {list(ref.shape)} in the base, {list(tuned.tensors[name].shape)} in the finetune"
        for name, ref in base.tensors.items()
        if name in tuned.tensors and tuned.tensors[name].shape != ref.shape
    ]
    _refuse(faults, base, tuned)
    matrices, wholes = [], []
    for name, ref in base.tensors.items():
        path, other = name.removesuffix(".weight"), tuned.tensors[name]
        dense = len(ref.shape) == 2 or (len(ref.shape) > 2 and ref.shape[1] > 1)
        looked_up = "embed" in path.rpartition(".")[2].lower() and len(ref.shape) == 2
        if path != name and dense and not looked_up and (is_target is None or is_target(path)):
            kind = "linear" if len(ref.shape) == 2 else "conv"
            module = _module(path, kind, ref.shape, other)
            matrices.append(MatrixPair(module, _view(ref, module), _view(other, module)))
        else:
            wholes.append(WholePair(name, ref, other, in_place=True))
    paths = tuple(dict.fromkeys(name.rpartition(".")[0] for name in base.tensors))
    return Finetune(base, tuned, None, config, paths, tuple(matrices), tuple(wholes))


def _module(path: str, kind: str, shape: tuple[int, ...], like: TensorRef) -> Module:
    """A module of rank 0 whose factors have the shapes that PEFT gives them for a layer of this kind."""
    if kind == "conv":
        plain = Module.without_factors(path, (shape[0], 1), like)
        A = replace(plain.lora_A, shape=(0, *shape[1:]))
        return replace(plain, lora_A=A, lora_B=replace(plain.lora_B, shape=(shape[0], 0, *(1 for _ in shape[2:]))))
    height, width = (shape[0], shape[1]) if kind == "linear" else (shape[1], shape[0])
    return replace(Module.without_factors(path, (height, width), like), embedding=kind == "embedding")


def _view(ref: TensorRef, module: Module) -> WeightView:
    return WeightView(module.weight_shape, (Piece(ref, 0, ref.shape[0]),))


def _refuse(faults: list[str], base: Checkpoint, tuned: Checkpoint) -> None:
    if faults:
        listed = "\n".join(f"  {fault}" for fault in sorted(faults)[:_LISTED])
        more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise PlacementError(
            f"{tuned.folder} does not have the tensors of {base.folder}: is it the model that it was finetuned "
            f"from?\n{listed}{more}"
        )
