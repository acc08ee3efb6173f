"""A finetuned model beside the base that it began from: which tensors belong together, by names and shapes alone.

Nothing is read but headers (``placement.pairing``). What differs between the two, and what then becomes of it, is
decided on the values (``refit.extraction``); ``placement.described`` then describes the result as an adapter of the
base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mapconv.adapter import Module, TensorRef
from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import PlacementError
from mapconv.placement.weights import WeightView

#: At most this many faults are listed.
_LISTED = 5


@dataclass(frozen=True)
class MatrixPair:
    """A weight of a kind that PEFT has a LoRA for, in both models; ``module`` is what it becomes, without factors.

    Of a stack of ``experts``, which come one after another, ``stack`` is the parameter that holds them, and ``module``
    the one that holds that.
    """

    module: Module
    base: WeightView
    tuned: WeightView
    stack: str | None = None
    experts: int = 1

    @property
    def path(self) -> str:
        return self.stack or self.module.path

    def is_named(self, rule: Callable[[str], bool]) -> bool:
        """Whether a rule of ``placement.selection`` names it; a stack goes by the name of its module as well."""
        return rule(self.path) or (self.stack is not None and rule(self.module.path))


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

    ``class_name`` is the finetuned model's class, None where only names are known; ``paths`` are all of its modules,
    ``parameters`` all of theirs. ``unseen`` are those that the user leaves to the base, and that could not be carried.
    """

    base: Checkpoint
    tuned: Checkpoint
    class_name: str | None
    config: Mapping[str, Any]
    paths: tuple[str, ...]
    parameters: tuple[str, ...]
    matrices: tuple[MatrixPair, ...]
    wholes: tuple[WholePair, ...]
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def require_alike(faults: list[str], base: Checkpoint, tuned: Checkpoint) -> None:
    if faults:
        listed = "\n".join(f"  {fault}" for fault in sorted(faults)[:_LISTED])
        more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise PlacementError(
            f"{tuned.folder} does not have the tensors of {base.folder}: is it the model that it was finetuned "
            f"from?\n{listed}{more}"
        )
