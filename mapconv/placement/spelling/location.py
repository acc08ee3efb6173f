"""Where the rows of a module's weight lie in the tensors of a base."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """``rows`` rows of a stored tensor from ``offset`` on; of a transposed one they are columns."""

    tensor: str
    offset: int
    rows: int
    transposed: bool = False


#: A weight as its rows follow one another.
Location = tuple[Segment, ...]


@dataclass(frozen=True)
class Reading:
    """One module that a key may mean: its full path in the naming that has the key, and where its weight lies."""

    path: str
    location: Location


def whole(name: str, shape: tuple[int, ...]) -> Location:
    """All of a stored tensor."""
    return (Segment(name, 0, shape[0] if shape else 1),)
