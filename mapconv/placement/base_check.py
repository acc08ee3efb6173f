"""Whether a weight is the one that a MAP adapter was made for, by the fingerprint that the adapter records of it."""

from __future__ import annotations

from collections.abc import Sequence

from mapconv.adapter import MapModule
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.wording import counted

#: In parts of ‖W0‖. Fingerprints of the same values agree far better than this; those of others do not.
TOLERANCE = 1e-9


def base_fault(
    scalars: MapModule, found: Fingerprint, *, norm_tolerance: float = TOLERANCE, tolerance: float = TOLERANCE
) -> str | None:
    """What is wrong with a weight, to be put after its name, or None.

    Args:
        scalars: of the module that adapts it; an adapter of an older mapconv records the norm alone.
        found: the weight's fingerprint.
        norm_tolerance: relative difference of the norms that rounding explains.
        tolerance: difference of the projections that rounding explains, in parts of ‖W0‖.
    """
    norm, expected = found.norm, scalars.base_norm
    longest = max(norm, expected)
    if abs(norm - expected) > norm_tolerance * longest:
        return f"has norm {norm:.9g}, but the MAP adapter was made for a base where it is {expected:.9g}"
    projection = scalars.base_projection
    if projection is not None and abs(found.projection - projection) > tolerance * longest:
        return (
            "has the norm of the weight that the MAP adapter was made for, but not its values (other signs, or "
            f"another order): their random projection is {found.projection:.9g}, expected {projection:.9g}"
        )
    return None


def accepted_note(faults: Sequence[str]) -> list[str]:
    """That ``--force`` accepted weights of another base, each named with its ``base_fault``; nothing where none was."""
    if not faults:
        return []
    return [f"accepted with --force: {counted(len(faults), 'weight')} of another base; {faults[0]}"]
