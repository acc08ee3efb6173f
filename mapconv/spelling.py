"""What a file's tensors leave to be told: which module a key names, how rows are ordered, what magnitudes are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
class HeadRows:
    """The rows of q or k in the order of another program, (half, 2) in each head for (2, half).

    ``heads`` says which number of heads counts. A program that orders them so for some models alone has their types in
    ``types``, and in ``plain_types`` those whose rows it leaves as they are; without ``types`` it is all of them.
    """

    heads: Literal["q", "k"]
    types: frozenset[str] = frozenset()
    plain_types: frozenset[str] = frozenset()


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


@dataclass(frozen=True, eq=False)
class TunerMethod:
    """A method of PEFT's besides LoRA (``formats.methods``), with what all layers of one adapter share.

    ``name`` is the method's own, such as LoHa; ``config`` the adapter's, in ``file``; ``shared`` where the tensors lie
    that belong to no one layer (VeRA's projections, a vector bank), by the key that PEFT saves them under.
    ``changes_bias``: a merge changes the biases of the adapted layers as well.
    """

    name: str
    config: Mapping[str, Any]
    file: Path
    shared: Mapping[str, Any]
    changes_bias: bool = False


@dataclass(frozen=True)
class AuthorsScalars:
    """α and β of one module as MAP's authors store them: absolute, over norms that are at least ``eps``.

    ``factor`` is the name of the module's A in its file, which says whose they are wherever the module is placed.
    """

    factor: str
    alpha: float
    beta: float
    eps: float
