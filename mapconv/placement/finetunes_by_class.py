"""A finetune beside its base by the parameters of its class in transformers, whatever either file calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mapconv.adapter import Module, TensorRef
from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.finetunes import Finetune, MatrixPair, WholePair, require_alike
from mapconv.placement.finetunes_by_name import module_of
from mapconv.placement.model_class import causal_class
from mapconv.placement.regions import StoredParameters
from mapconv.placement.skeleton import Kind, LiveModel


class ByClass:
    """Pairs by the parameters of the finetuned model's class, whatever either file calls them."""

    def __init__(
        self,
        base: Checkpoint,
        base_config: dict[str, Any],
        tuned: Checkpoint,
        tuned_config: dict[str, Any],
        is_target: Callable[[str], bool] | None,
        is_excluded: Callable[[str], bool] | None,
        *,
        with_stacks: bool,
    ) -> None:
        self._base, self._tuned, self._config, self._is_target = base, tuned, tuned_config, is_target
        self._is_excluded, self._with_stacks = is_excluded, with_stacks
        named = [name for name in tuned_config.get("architectures") or [] if isinstance(name, str)]
        name = named[0] if named else causal_class(tuned_config)
        if name is None:
            raise PlacementError(f"{tuned.folder}/config.json names no class of transformers.")
        self._live, self._own = LiveModel(base_config, name), LiveModel(tuned_config, name)
        self._stored, self._trained = _located(self._live, base), _located(self._own, tuned)

    def pairs(self) -> Finetune:
        self._require_same_parameters()
        matrices, wholes, unseen = [], [], []
        for name, shared in self._tensors():
            found = self._matrices(name, shared)
            if found:
                matrices += found
            elif self._is_left(name):
                unseen.append(name)
            else:
                wholes.append(self._whole(name, shared))
        paths = tuple(path for path, _ in self._live.model.named_modules(remove_duplicate=False) if path)
        known, notes = self._own.shapes_or_buffers, []
        foreign = [name for name in self._tuned.tensors if self._own.locate(name).parameter not in known]
        if foreign:
            more = ", …" * (len(foreign) > 1)
            notes.append(f"left out, as {self._own.class_name} has no place for it: {foreign[0]}{more}")
        name, parameters = self._live.class_name, tuple(self._live.shapes)
        return Finetune(
            *(self._base, self._tuned, name, self._config, paths, parameters),
            *(tuple(matrices), tuple(wholes), tuple(unseen), tuple(notes)),
        )

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

    def _matrices(self, name: str, shared: bool) -> list[MatrixPair]:
        """A parameter as a weight, or all experts of a stack, that PEFT has a LoRA for; nothing for others."""
        path, _, leaf = name.rpartition(".")
        if not self._is_same(name) or len(self._live.tied(name)) > 1:
            return []
        if self._with_stacks and self._live.is_stack(name):
            return self._experts(name, path) if self._refits(path, name) else []
        kind = self._live.kind(path) if leaf == "weight" else None
        if kind is None or not self._takes_lora(path, kind) or not self._refits(path):
            return []
        base = self._stored.weight(self._held(self._live, self._stored, name), kind)
        tuned = self._trained.weight(self._held(self._own, self._trained, name), kind)
        return [MatrixPair(module_of(path, kind, self._live.shapes[name], self._first), base, tuned)]

    def _experts(self, name: str, path: str) -> list[MatrixPair]:
        turned, experts = self._live.stores_in_by_out(path), self._live.shapes[name][0]
        pairs = []
        for expert in range(experts):
            base, tuned = (s.expert(name, expert, transposed=turned) for s in (self._stored, self._trained))
            module = Module.without_factors(path, base.shape, self._first)
            pairs.append(MatrixPair(module, base, tuned, name, experts))
        return pairs

    def _whole(self, name: str, shared: bool) -> WholePair:
        ref = self._ref(self._own, self._trained, name)
        before = self._ref(self._live, self._stored, name) if self._is_same(name) else None
        return WholePair(name, before, ref, in_place=shared)

    def _is_same(self, name: str) -> bool:
        """Whether the base has the parameter in the same shape."""
        return self._live.shapes[name] == self._own.shapes[name] and self._holds(self._live, self._stored, name)

    def _is_left(self, name: str) -> bool:
        """Whether the user leaves to the base what could not be carried over."""
        path, rule = name.rpartition(".")[0], self._is_excluded
        untargeted = self._is_target is not None and len(self._live.shapes[name]) > 1
        if not untargeted and (rule is None or not (rule(name) or rule(path))):
            return False
        return not self._trained.is_whole(self._held(self._own, self._trained, name))

    def _takes_lora(self, path: str, kind: Kind) -> bool:
        """Whether PEFT has a LoRA for the layer that mapconv can merge: not for a part of an nn.MultiheadAttention."""
        if kind == "conv":
            return self._live.groups(path) == 1
        inside = self._live.kind(path.rpartition(".")[0]) == "attention"
        return kind in ("linear", "transposed", "embedding") and not inside

    def _refits(self, path: str, stack: str | None = None) -> bool:
        if self._is_target is not None:
            return self._is_target(path) or (stack is not None and self._is_target(stack))
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
                "transformers first, or leave it to the base with --exclude."
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
        require_alike(faults, self._base, self._tuned)

    def _may_grow(self, name: str) -> bool:
        """Whether the number of rows is a vocabulary's or that of a head's labels."""
        prefix = self._live.model.base_model_prefix
        return self._live.is_vocabulary(name) or not name.startswith(f"{prefix}.")


def _located(live: LiveModel, checkpoint: Checkpoint) -> StoredParameters:
    return StoredParameters({name: live.locate(name) for name in checkpoint.tensors}, checkpoint.tensors)
