"""What is said of merged tensors: how much of the update they hold, and whether their base is the right one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mapconv.adapter import ITEM_SIZES
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.commands.merge_preparation import Rounding
from mapconv.errors import BaseMismatchError
from mapconv.merging.merger import MergedTensor
from mapconv.merging.survival import DAMAGED, Survival, total
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.base_check import accepted_note, base_fault
from mapconv.wording import counted


@dataclass(frozen=True)
class PushedModel:
    """A merged model on the Hub, or with a dry run one to come (then without a commit).

    ``weights`` are its weights files, ``taken_over`` those of them that did not go through this machine, because the
    Hub had their bytes already; ``others`` is all else. ``changed`` is False where the branch had the same files.
    """

    repo_id: str
    weights: tuple[str, ...]
    taken_over: tuple[str, ...]
    others: tuple[str, ...]
    license: str | None = None
    url: str | None = None
    commit: str | None = None
    commit_url: str | None = None
    created: bool = False
    changed: bool = False


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote, or with ``dry_run`` what it would write; to the folder ``out`` or, ``pushed``, to the Hub."""

    out: Path | None
    base: Path
    method: str
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    merged: tuple[MergedTensor, ...]
    seconds: float
    dry_run: bool
    notes: tuple[str, ...] = ()
    pushed: PushedModel | None = None

    @property
    def survival(self) -> Survival:
        """What of the update survives in all changed tensors together."""
        return total(item.survival for item in self.merged)

    def to_dict(self) -> dict[str, Any]:
        table = asdict(self) | {"out": None if self.out is None else str(self.out), "base": str(self.base)}
        table["merged"] = [item.to_dict() for item in self.merged]
        table["survival"] = self.survival.to_dict()
        return table


def advice(merged: Sequence[MergedTensor], rounding: Rounding = "nearest") -> list[str]:
    """One line on what helps, where less of the update survives than a user would expect."""
    damaged = [item for item in merged if item.survival.projection < DAMAGED]
    if not damaged:
        return []
    worst = min(damaged, key=lambda item: item.survival.projection)
    in_codes = worst.dtype not in ITEM_SIZES
    helps = "--lift or --quantized dequantize keeps it in 16 bits" if in_codes else "--dtype float32 keeps all of it"
    helps += "" if rounding == "feedback" else ", --rounding feedback --data FILE more of what the layers put out"
    return [
        f"less than {DAMAGED:g} of the update survives rounding to {worst.dtype} in {counted(len(damaged), 'tensor')} "
        f"(least: {worst.survival.projection:.2f} in {worst.tensor}): {helps}"
    ]


def below(merged: Sequence[MergedTensor], least: float) -> list[str]:
    """The weights in codes of which less survives, from the worst on."""
    found = [item for item in merged if item.dtype not in ITEM_SIZES and item.survival.projection < least]
    return [item.tensor for item in sorted(found, key=lambda item: item.survival.projection)]


def lifted_note(lost: Sequence[str], least: float) -> str:
    more = "" if len(lost) == 1 else f" and {len(lost) - 1} more"
    return (
        f"less than {least:g} of the update would survive in {lost[0]}{more}, so {counted(len(lost), 'module')} left "
        "the codes for 16 bits"
    )


def saturation(merged: Sequence[MergedTensor]) -> list[str]:
    """How many values of merged weights lie beyond what their codes can stand for."""
    count = sum(item.saturated for item in merged)
    if not count:
        return []
    worst = max(merged, key=lambda item: item.saturated)
    tensors = counted(sum(item.saturated > 0 for item in merged), "tensor")
    return [
        f"{counted(count, 'value')} of {tensors} lie beyond the largest that {worst.dtype} reaches with its scales "
        f"(most: {worst.saturated:,} in {worst.tensor})"
    ]


def check_base(
    placed: Iterable[PlacedAdapter], merged: Sequence[MergedTensor], *, force: bool, so_far: bool = False
) -> list[str]:
    """Refuse a base whose weights are not those that a MAP adapter was made for: fingerprints come with the merge.

    With ``force`` such a base is accepted, and the note that says so returned. With ``so_far``, weights of which a
    tensor is still to be merged are left for later.
    """
    found: dict[tuple, Fingerprint] = defaultdict(Fingerprint)
    for tensor in merged:
        for identity, part in tensor.base.items():
            found[identity] += part
    there = {tensor.tensor for tensor in merged}
    strange = []
    for item in (item for adapter in placed for item in adapter.modules):
        if item.scalars is None:
            continue
        if so_far and not there.issuperset(piece.tensor.name for piece in item.weight.pieces):
            continue
        fault = base_fault(item.scalars, found[item.identity])
        if fault is None:
            continue
        if not force:
            raise BaseMismatchError(
                f"{item.weight.pieces[0].tensor.file}: {item.weight.name} {fault}: give that base with --base, or "
                "accept this one with --force."
            )
        strange.append(f"{item.weight.name} {fault}")
    return accepted_note(strange)
