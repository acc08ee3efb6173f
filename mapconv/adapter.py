"""Frozen records that every part of mapconv speaks: where tensors lie, and what an adapter says about them."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Direction = Literal["low-rank", "dora"]

#: Bytes per element of every dtype that the safetensors format knows, by the format's own names.
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_LAYER = re.compile("[0-9]{1,6}")


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies on disk: a file and a byte range, never the values."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_SIZES[self.dtype]

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True)
class Module:
    """One adapted weight as the source says it, with the names of its tensors.

    The weight it stands for is ``W0 + scaling * B @ A``, and with a ``magnitude`` vector (DoRA) each row of that is
    rescaled to the length the vector gives.  ``A`` is (rank, in), ``B`` is (out, rank).
    """

    path: str
    rank: int
    scaling: float
    lora_A: TensorRef
    lora_B: TensorRef
    magnitude: TensorRef | None = None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(out, in) of the weight that this module adapts."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        refs = (self.lora_A, self.lora_B, self.magnitude)
        return tuple(ref for ref in refs if ref is not None)

    @property
    def module_type(self) -> str:
        """The last part of the path: ``q_proj`` in ``model.layers.0.self_attn.q_proj``."""
        return self.path.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The first number in the path, or None: 0 in ``model.layers.0.self_attn.q_proj``."""
        return next((int(part) for part in self.path.split(".") if _LAYER.fullmatch(part)), None)


@dataclass(frozen=True)
class MapModule:
    """The scalars of one weight in MAP form, ``W' = α·W0/‖W0‖ + β·Δ/‖Δ‖`` (MATH.md equation 1, arXiv 2505.23094).

    ``error`` is ε = ‖T − W'‖ / ‖T − W0‖, measured on the factors that were written; T is the source's weight.
    """

    path: str
    direction: Direction
    rank: int
    alpha: float
    beta: float
    base_norm: float
    direction_norm: float
    error: float

    @property
    def base_gain(self) -> float:
        """a = α/‖W0‖: what the base weight is multiplied by."""
        return self.alpha / self.base_norm if self.base_norm else 1.0

    @property
    def update_gain(self) -> float:
        """b = β/‖Δ‖: what the stored direction is multiplied by; 0 where there is no direction."""
        return self.beta / self.direction_norm if self.direction_norm else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"base_gain": self.base_gain, "update_gain": self.update_gain}


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: its method, its modules in a fixed order, and the configuration as it was written."""

    path: Path
    method: Literal["LoRA", "DoRA", "MAP"]
    config: dict[str, Any]
    modules: tuple[Module, ...]
    base: str | None
    revision: str | None
    notes: tuple[str, ...] = ()
    map_modules: tuple[MapModule, ...] = ()
    map_config: dict[str, Any] | None = None

    @property
    def parameters(self) -> int:
        return sum(ref.numel for module in self.modules for ref in module.tensors)

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for module in self.modules for ref in module.tensors)
