"""What a merge settles before it writes: which adapters on which base, and the plan of what comes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mapconv.checkpoint.codecs import storages
from mapconv.checkpoint.filenames import ADAPTER_FILES
from mapconv.checkpoint.index import Checkpoint
from mapconv.checkpoint.unchanged import FileSignature, signatures_of
from mapconv.hub.locate import Fetch
from mapconv.hub.reference import HubReference, shown
from mapconv.merging.merger import MergedTensor, survival_record
from mapconv.merging.plan import MergePlan, plan_merge
from mapconv.metadata.provenance import merge_record
from mapconv.options.merging import SCALES
from mapconv.placement.adapters import PlacedAdapter, place_adapters
from mapconv.placement.kept_codes import keep_codes
from mapconv.placement.selection import module_rule
from mapconv.refit.plan import Dtype
from mapconv.spelling import Rescaling
from mapconv.wording import counted

#: What becomes of weights that the base stores in codes.
Quantized = Literal["dequantize", "copy", "keep"]
Scales = Literal["keep", "recompute"]
Rounding = Literal["nearest", "feedback"]


@dataclass(frozen=True)
class MergeWish:
    """What a user asked a merge for, as far as it decides the bytes of the weights."""

    sources: Sequence[Path]
    weights: Sequence[float] | None
    dtype: Dtype
    max_shard_size: int | None
    quantized: Quantized
    scales: Scales | None
    lift: str | Sequence[str] | None
    dora: Rescaling
    allow_pickle: bool

    @property
    def in_codes(self) -> bool:
        return self.quantized != "dequantize"

    @property
    def recompute(self) -> bool:
        return (self.scales or SCALES.fallback) == "recompute"


@dataclass(frozen=True)
class Preparation:
    """Adapters on a base, and what a merge will write of them."""

    wish: MergeWish
    #: Before it was settled which weights stay in codes.
    as_placed: tuple[PlacedAdapter, ...]
    placed: tuple[PlacedAdapter, ...]
    plan: MergePlan
    signatures: Mapping[Path, FileSignature]

    @property
    def notes(self) -> list[str]:
        adapters = [note for item in self.placed for note in item.adapter.notes]
        target = self.plan.target
        return [*adapters, *target.notes, *quantization_notes(target.checkpoint, self.wish.quantized)]

    @property
    def facts(self) -> dict[str, Any]:
        """What a result says of them."""
        return {
            "base": self.plan.target.folder,
            "method": " + ".join(item.adapter.method for item in self.placed),
            "files": tuple(file.name for file in self.plan.files),
            "tensors": sum(len(file.tensors) for file in self.plan.files),
            "nbytes": self.plan.nbytes,
        }

    def lifting(self, modules: Sequence[str]) -> Preparation:
        """The same merge, with these modules out of the codes besides those that are."""
        named = {*self.plan.target.lifted, *modules}
        placed = keep_codes(self.as_placed, rewrite=True, lift=named.__contains__)
        return replace(self, placed=placed, plan=_plan(self.wish, placed))

    def record(
        self, merged: Sequence[MergedTensor], rounding: Rounding = "nearest", data: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The content of ``map_merge.json``; ``data`` describes the text that values were rounded by."""
        record = merge_record(self.placed, self.wish.weights) | {"survival": survival_record(merged)}
        record["rounding"] = {"method": rounding, "data": data}
        if self.plan.target.encoded:
            kept = {"kept": len(self.plan.target.encoded), "scales": self.wish.scales or SCALES.fallback}
            record["quantized"] = kept | {"lifted": list(self.plan.target.lifted)}
        return record


def prepare(
    wish: MergeWish, base: str | Path | HubReference | None, *, fetch: Fetch, root: Path | None = None
) -> Preparation:
    """Place the adapters, and plan what a merge writes; ``fetch`` and ``root`` as of ``place_adapters``.

    Raises:
        MapconvError: of the kind that fits; nothing has been written.
    """
    signatures = signatures_of(wish.sources, ADAPTER_FILES)
    as_placed = placed = place_adapters(
        wish.sources, base, allow_pickle=wish.allow_pickle, fetch=fetch, root=root, dora=wish.dora
    )
    if wish.in_codes:
        rule = None if wish.lift is None else module_rule(wish.lift, "--lift")
        placed = keep_codes(as_placed, rewrite=wish.quantized == "keep", lift=rule)
    plan = _plan(wish, placed)
    return Preparation(wish, as_placed, placed, plan, signatures | plan.target.checkpoint.signatures)


def _plan(wish: MergeWish, placed: Sequence[PlacedAdapter]) -> MergePlan:
    return plan_merge(placed, weights=wish.weights, dtype=wish.dtype, max_shard_size=wish.max_shard_size)


def quantization_notes(checkpoint: Checkpoint, quantized: Quantized = "dequantize") -> list[str]:
    """What the base is quantized as, and what becomes of that; nothing for a plain base."""
    found = ", ".join(f"{counted(count, 'weight')} as {label}" for label, count in storages(checkpoint).items())
    what = {
        "dequantize": "which are written as the values that the codes stand for",
        "copy": "which are copied as they are",
        "keep": "which are copied as they are, or merged and written in the same storage",
    }[quantized]
    return [f"{shown(checkpoint.folder)} is quantized ({found}), {what}"] if found else []
