"""Two bases for one adapter: each adapted weight has its counterpart in the other, or is listed."""

from __future__ import annotations

from mapconv.errors import PlacementError
from mapconv.placement.adapters import PlacedAdapter

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
