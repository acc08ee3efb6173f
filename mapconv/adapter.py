"""Frozen records that every part of mapconv speaks: where tensors lie, and what an adapter says about them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mapconv.spelling import PEFT_DORA, AuthorsScalars, HeadRows, Rescaling, Spelling, TunerMethod
from mapconv.untrusted.patterns import PatternTable

Direction = Literal["low-rank", "dora"]

#: Bytes per element of every dtype that the safetensors format knows, by the format's own names.
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_LAYER = re.compile("[0-9]{1,6}")
_FLAT_NUMBER = re.compile("_[0-9]+(?:_|$)")
#: Scalars of a module that a MAP directory leaves out where there are none.
OPTIONAL_SCALARS = ("alpha_before", "beta_before", "error_before", "base_projection")


def layer_of(path: str) -> int | None:
    """The first number in a module's path, or None: 0 in ``model.layers.0.self_attn.q_proj``."""
    return next((int(part) for part in path.split(".") if _LAYER.fullmatch(part)), None)


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

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The tensors of the file whose bytes make the values: this one, but for a weight that is stored in codes."""
        return (self,)


@dataclass(frozen=True)
class Module:
    """One group of factors as the file has it; what weight it adapts is known once it is placed on a base.

    ``A`` is (rank, in) and ``B`` is (out, rank): for convolutions both carry the kernel's dimensions, for embeddings
    ``in`` counts the vocabulary, and for a stack of E experts ``A`` is (E·rank, in) and ``B`` is (out, rank·E).
    A layer of another ``method`` has tensors of its ``own`` instead, by their key within the layer. Its ``rank`` is
    that of the update at most (0: the weight's own), and its factors are no bytes of a file: they have the dtype and,
    once the module is placed, the dimensions of those that a conversion writes.
    A module with a ``spelling`` has the file's own key as its path until it is placed.
    Where the file holds the update in another way than by two factors, ``delta`` is it, (out, in), and the factors are
    computed ones that make the same. ``rescaling`` says what a ``magnitude`` means. ``interleaved`` rows are those of
    q or k in another order (the base has the heads). ``map_scalars`` are α and β over the update of another ``method``.
    """

    path: str
    rank: int
    scaling: float
    lora_A: TensorRef
    lora_B: TensorRef
    magnitude: TensorRef | None = None
    bias: TensorRef | None = None
    embedding: bool = False
    method: TunerMethod | None = None
    own: tuple[tuple[str, TensorRef], ...] = ()
    spelling: Spelling | None = None
    delta: TensorRef | None = None
    rescaling: Rescaling = PEFT_DORA
    interleaved: HeadRows | None = None
    map_scalars: tuple[float, float] | None = None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(out, in) of the weight that this module adapts, as a matrix: a convolution's kernel counts as inputs."""
        return self.lora_B.shape[0], math.prod(self.lora_A.shape[1:])

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        if self.method is not None:
            return tuple(ref for _, ref in self.own)
        update = (self.lora_A, self.lora_B) if self.delta is None else (self.delta,)
        refs = (ref for ref in (*update, self.magnitude, self.bias) if ref is not None)
        # What is computed counts as what it is stored in.
        return tuple(dict.fromkeys(stored for ref in refs for stored in ref.stored))

    @property
    def is_dense(self) -> bool:
        """Whether the update is of any rank, so that two factors of it save nothing; what is not known yet is not."""
        return (self.delta or self.method) is not None and (self.rank == 0 or 0 < min(self.weight_shape) <= self.rank)

    @property
    def has_factors(self) -> bool:
        """Whether the adapter changes this weight at all, see ``without_factors``."""
        return self.rank > 0 or self.method is not None

    @classmethod
    def without_factors(cls, path: str, shape: tuple[int, int], like: TensorRef) -> Module:
        """A weight (out, in) that the adapter leaves alone, as a module of rank 0: its factors are no bytes of a file.

        ``like`` is a factor of the same adapter, for the file and the dtype.
        """
        A = replace(like, name=f"{path}.lora_A.weight", shape=(0, shape[1]), start=0)
        B = replace(like, name=f"{path}.lora_B.weight", shape=(shape[0], 0), start=0)
        return cls(path, 0, 1.0, A, B)

    @property
    def module_type(self) -> str:
        """The last part of the path: ``q_proj`` in ``model.layers.0.self_attn.q_proj``."""
        if self.spelling is not None and self.spelling.flat:
            return next(part for part in reversed(_FLAT_NUMBER.split(self.path)) if part)
        return self.path.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        return layer_of(self.path)


@dataclass(frozen=True)
class Addition:
    """Values that an adapter of another dialect adds to a tensor without rank (a bias, a norm), or puts in its place.

    ``leaf`` is the last part of the tensor's name, after the module's.
    """

    path: str
    spelling: Spelling
    leaf: str
    tensor: TensorRef
    replaces: bool = False


@dataclass(frozen=True)
class WholeTensor:
    """Values that the adapter brings as they are: a tensor that replaces the base's, or some rows of one.

    ``parameter`` is the name in the live model. ``in_place`` values are written into the base's own parameter, so they
    show through every name that is tied to it; others (a module of ``modules_to_save``) belong to one name alone.
    """

    parameter: str
    tensor: TensorRef
    in_place: bool
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class MapModule:
    """The scalars of one weight in MAP form, ``W' = α·W0/‖W0‖ + β·Δ/‖Δ‖`` (``mapconv.algebra`` section 1).

    Each expert of a stacked tensor is a weight of its own, counted by ``expert``.
    ``error`` is ε = ‖T − W'‖ / ‖T − W0‖, measured on the factors that were written; T is the source's weight. It is
    None where it was not measured: after training, the distance from a source says nothing. ``output_error`` is the
    same of the layer's outputs, over the inputs that a refit with data saw; None without data. ``alpha_before``,
    ``beta_before`` and ``error_before`` are those of the closed form that a calibration began with. ``base_projection``
    is W0's projection on fixed random numbers (``algebra.fingerprint``); adapters of older versions have none.
    """

    path: str
    direction: Direction
    rank: int
    alpha: float
    beta: float
    base_norm: float
    direction_norm: float
    error: float | None
    expert: int | None = None
    output_error: float | None = None
    alpha_before: float | None = None
    beta_before: float | None = None
    error_before: float | None = None
    base_projection: float | None = None

    @property
    def base_gain(self) -> float:
        """a = α/‖W0‖: what the base weight is multiplied by."""
        return self.alpha / self.base_norm if self.base_norm else 1.0

    @property
    def update_gain(self) -> float:
        """b = β/‖Δ‖: what the stored direction is multiplied by; 0 where there is no direction."""
        return self.beta / self.direction_norm if self.direction_norm else 0.0

    @property
    def measured_error(self) -> float:
        """ε of a module that was converted or compared, which is where it is measured."""
        assert self.error is not None
        return self.error

    def to_dict(self) -> dict[str, Any]:
        # vars, not asdict: the fields are plain values, and a catalog makes millions of these.
        table = vars(self) | {"base_gain": self.base_gain, "update_gain": self.update_gain}
        return {name: value for name, value in table.items() if value is not None or name not in OPTIONAL_SCALARS}


@dataclass(frozen=True)
class LoraSettings:
    """The part of a configuration that decides what the tensors mean, and the base that they were made for.

    In dialects whose modules bring rank and scaling with them (``by_module``), nothing here speaks of either.
    """

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    initialization: str | None
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...]
    token_rows: Mapping[str, tuple[int, ...]]
    layer_replication: tuple[tuple[int, int], ...]
    base: str | None
    revision: str | None
    by_module: bool = False

    @classmethod
    def of_modules(cls, *, dora: bool, base: str | None = None) -> LoraSettings:
        """The settings of an adapter that has no configuration: each module says itself what it means."""
        ranks: PatternTable[int] = PatternTable({}, "rank_pattern")
        alphas: PatternTable[float] = PatternTable({}, "alpha_pattern")
        return cls(1, 1.0, False, dora, ranks, alphas, None, (), (), {}, (), base, None, by_module=True)

    def rank_of(self, path: str) -> int:
        return self.rank_pattern.get(path, self.rank)

    def scaling_of(self, path: str) -> float:
        """alpha/r, or alpha/√r for rsLoRA, with this module's own alpha and rank."""
        rank, alpha = self.rank_of(path), self.alpha_pattern.get(path, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: its method, its modules in a fixed order, and the configuration as it was written.

    What is extracted from a full finetune is described in the same way before it is written: its modules then have no
    factors yet, and ``path`` is the model's folder.
    """

    path: Path
    #: LoRA, DoRA, MAP, "full finetune", or the name of another method.
    method: str
    config: dict[str, Any]
    settings: LoraSettings
    modules: tuple[Module, ...]
    whole: tuple[WholeTensor, ...]
    #: Every tensor that is not a factor, by PEFT's key; a converted adapter carries all of them on.
    others: Mapping[str, TensorRef]
    base: str | None
    revision: str | None
    notes: tuple[str, ...] = ()
    map_modules: tuple[MapModule, ...] = ()
    map_config: dict[str, Any] | None = None
    authors_scalars: tuple[AuthorsScalars, ...] = ()
    #: The writer's name for the form of the files.
    dialect: str = "PEFT"
    additions: tuple[Addition, ...] = ()

    @property
    def is_spelled(self) -> bool:
        """Whether only the base's names tell which module is which."""
        return bool(self.additions) or any(module.spelling is not None for module in self.modules)

    @property
    def parameters(self) -> int:
        return sum(ref.numel for ref in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(ref.nbytes for ref in self.tensors)

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        factors = (ref for module in self.modules for ref in module.tensors)
        methods = {module.method: None for module in self.modules if module.method is not None}
        shared = (ref for method in methods for ref in method.shared.values())
        return (*factors, *shared, *self.others.values(), *(item.tensor for item in self.additions))
