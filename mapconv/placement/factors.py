"""Load one weight's factors into memory, and refuse those that would poison it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch

from mapconv.adapter import Module, TensorRef
from mapconv.algebra.increments import Increment, ProductIncrement, RowIncrement
from mapconv.algebra.initializations import initial_factors
from mapconv.algebra.norms import all_finite
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.placement.weights import PlacedModule, read_weight

#: A stack of experts is read once for all its weights: the files interleave two or three such stacks.
_KEPT_STACKS = 4


@dataclass(frozen=True)
class Factors:
    """A (r, in), B (out, r) without the scaling, and the DoRA magnitude (out,) or None; all float32."""

    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None


class FactorLoader:
    """Loads factors as matrices, whatever the layer; safe to call from several threads."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._stacks: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
        self._lock = Lock()

    def load(self, placed: PlacedModule) -> Factors:
        """The factors of one weight; those of an initialization that changed the base are undone (W − s·B0A0).

        Raises:
            AdapterError: a tensor that holds NaN or infinity.
        """
        module = placed.module
        require_factors([module])
        A, B = self._pair(module) if placed.experts == 1 else self._of_stack(placed)
        if placed.initialization is not None:
            base = read_weight(placed.weight, self._reader, torch.empty(placed.weight.numel))
            B0, A0 = initial_factors(placed.initialization, base, placed.rank, placed.scaling)
            A, B = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
        magnitude = None if module.magnitude is None else self.vector(module.magnitude)
        return Factors(A, B, magnitude)

    def increment(self, placed: PlacedModule) -> tuple[Increment, torch.Tensor | None]:
        """Δ without the scaling, and the DoRA magnitude: by its factors, or by rows where the file has it so.

        Raises:
            AdapterError: a tensor that holds NaN or infinity; rows say so when they are read.
        """
        module, delta = placed.module, placed.module.delta
        if delta is None:
            factors = self.load(placed)
            return ProductIncrement(factors.A, factors.B), factors.magnitude
        magnitude = None if module.magnitude is None else self.vector(module.magnitude)
        return RowIncrement(lambda start, stop: self._rows(delta, start, stop), 0, delta.shape[0]), magnitude

    def _rows(self, ref: TensorRef, start: int, stop: int) -> torch.Tensor:
        buffer = torch.empty(8 * (stop - start) * ref.shape[1], dtype=torch.uint8)
        rows = self._reader.read_rows(ref, start, stop, buffer).float()
        _require_finite([rows], [ref])
        return rows

    def load_all(self, items: Sequence[PlacedModule]) -> list[Factors]:
        """The factors of several weights, in as few reads as their places in the file allow.

        Raises:
            AdapterError: a tensor that holds NaN or infinity.
        """
        if not all(self.is_simple(item) for item in items):
            return [self.load(item) for item in items]
        refs = [ref for item in items for ref in (item.module.lora_A, item.module.lora_B)]
        matrices: list[torch.Tensor] = []
        for run, flat in self._reader.read_runs(refs):
            wide = flat.float()
            parts = wide.split([ref.numel for ref in run])
            if not all_finite(wide):
                _require_finite(parts, run)
            matrices += [part.view(ref.shape[0], -1) for part, ref in zip(parts, run, strict=True)]
        return [Factors(A, B, None) for A, B in zip(matrices[::2], matrices[1::2], strict=True)]

    @staticmethod
    def is_simple(item: PlacedModule) -> bool:
        """Whether the factors are two tensors of the file as they are, and nothing else."""
        module = item.module
        stored = module.lora_A.stored == (module.lora_A,) and module.lora_B.stored == (module.lora_B,)
        own = module.magnitude is not None or module.method is not None
        return item.experts == 1 and item.initialization is None and not own and stored

    def vector(self, ref: TensorRef) -> torch.Tensor:
        return self._finite(ref).reshape(-1)

    def _pair(self, module: Module) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) as matrices: a convolution's kernel counts as inputs."""
        return self._finite(module.lora_A).flatten(1), self._finite(module.lora_B).flatten(1)

    def _of_stack(self, placed: PlacedModule) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's factors: A holds the experts one after another, B has them side by side, fastest."""
        A, B = self._stack(placed.module)
        rank, experts = placed.rank, placed.experts
        assert placed.expert is not None  # a stack is placed expert by expert
        start = placed.expert * rank
        return A[start : start + rank], B.view(B.shape[0], rank, experts)[:, :, placed.expert].contiguous()

    def _stack(self, module: Module) -> tuple[torch.Tensor, torch.Tensor]:
        key = (module.lora_A.file, module.path)
        with self._lock:
            if key not in self._stacks:
                self._stacks[key] = self._pair(module)
                while len(self._stacks) > _KEPT_STACKS:
                    self._stacks.popitem(last=False)
            self._stacks.move_to_end(key)
            return self._stacks[key]

    def _finite(self, ref: TensorRef) -> torch.Tensor:
        tensor = self._reader.read(ref).float()
        _require_finite([tensor], [ref])
        return tensor


def _require_finite(tensors: Sequence[torch.Tensor], refs: Sequence[TensorRef]) -> None:
    for tensor, ref in zip(tensors, refs, strict=True):
        if not all_finite(tensor):
            raise AdapterError(f"{ref.file}: tensor {ref.name} holds NaN or infinity: the training run diverged.")


def require_factors(modules: Iterable[Module]) -> None:
    """Refuse layers of another method than LoRA, which only ``merge``, ``upgrade`` and ``verify`` know how to build.

    Raises:
        UnsupportedError: with the way to get factors.
    """
    for module in modules:
        if module.method is not None:
            raise UnsupportedError(
                f"{module.method.file.parent} is of the method {module.method.name}, which has no factors for this "
                "to work on: convert it with `mapconv upgrade`, and take the result."
            )
