"""What the files of another dialect leave to be told: which module a key names, and what a DoRA's magnitudes are of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What a DoRA has a magnitude for each of, and what its magnitudes are divided by.
Axis = Literal["out", "in"]
Norm = Literal["merged", "base"]


@dataclass(frozen=True)
class Spelling:
    """How the file of another dialect names a module, where the base's own names must tell which one it means.

    ``components`` are the parts of a pipeline that it may be in (``denoiser``, ``text_encoder``, ``text_encoder_2`` …).
    In a ``flat`` name underscores stand for the dots between the parts of a path as well as for themselves.
    """

    components: tuple[str, ...]
    name: str
    flat: bool


@dataclass(frozen=True)
class Rescaling:
    """What a DoRA's magnitudes are the norms of.

    ``axis``: there is one for each output (``out``, as PEFT has it), for each input (``in``), or None where the file
    does not tell. ``norm``: they are divided by the norm of the merged weight, or of the ``base`` weight alone.
    """

    axis: Axis | None = "out"
    norm: Norm = "merged"

    @property
    def is_peft(self) -> bool:
        """Whether PEFT computes the same from the same tensors."""
        return self.axis == "out" and self.norm == "merged"


PEFT_DORA = Rescaling()
