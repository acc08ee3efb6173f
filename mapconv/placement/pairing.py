"""Two models side by side: each weight that matters has its counterpart in the other, or is listed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import PlacementError
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.finetunes import Finetune
from mapconv.placement.finetunes_by_class import ByClass
from mapconv.placement.finetunes_by_name import by_name
from mapconv.placement.skeleton import names_class

#: At most this many differences are listed.
_LISTED = 5


def pair_bases(trained: PlacedAdapter, served: PlacedAdapter) -> None:
    """Check that every adapted weight has its counterpart of the same shape in the other base.

    Raises:
        PlacementError: with the list of those that have not.
    """
    own = {item.key: item for item in trained.modules}
    other = {item.key: item for item in served.modules}
    faults = [f"{path}: only one of the bases has it" for path, _ in own.keys() ^ other.keys()]
    faults += [
        f"{key[0]}: {list(own[key].weight.shape)} and {list(other[key].weight.shape)}"
        for key in own.keys() & other.keys()
        if own[key].weight.shape != other[key].weight.shape
    ]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in sorted(faults)[:_LISTED])
        more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise PlacementError(
            f"{served.target.folder} has other layers than {trained.target.folder}, which the adapter was trained on:\n"
            f"{listed}{more}"
        )


def pair_finetune(
    base: Checkpoint,
    base_config: Mapping[str, Any],
    tuned: Checkpoint,
    tuned_config: Mapping[str, Any],
    is_target: Callable[[str], bool] | None,
    is_excluded: Callable[[str], bool] | None = None,
    *,
    with_stacks: bool = True,
) -> Finetune:
    """Put every tensor of two checkpoints together.

    Args:
        base, base_config, tuned, tuned_config: both models' headers and configurations.
        is_target: names what to refit; None: all but heads.
        is_excluded: names what is left to the base, which then need not be of a form that can be carried over.
        with_stacks: refit stacks of experts, which only a plain LoRA of PEFT's can hold; else carry them whole.

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
        models = base, dict(base_config), tuned, dict(tuned_config)
        return ByClass(*models, is_target, is_excluded, with_stacks=with_stacks).pairs()
    return by_name(base, base_config, tuned, is_target)
