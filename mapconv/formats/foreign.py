"""Dialects that mapconv knows by their keys and does not read: named, with what their owner can do."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mapconv.adapter import Adapter
from mapconv.errors import UnsupportedError
from mapconv.formats.base import CONFIG_FILE, WEIGHTS_FILE, Found

_AS_PEFT = f"convert it to a PEFT folder ({CONFIG_FILE} and {WEIGHTS_FILE}) first"


@dataclass(frozen=True)
class ForeignDialect:
    """A dialect whose files have keys of a form that no other has."""

    name: str
    key: re.Pattern[str]
    advice: str

    def recognise(self, found: Found) -> bool:
        # A configuration beside PEFT's own keys is PEFT's, whatever it lacks.
        if found.header is None or (found.config is not None and peft_rank(found) is not None):
            return False
        return any(self.key.search(ref.name) for ref in found.header.tensors)

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        path = found.path if found.header is None else found.header.path
        raise UnsupportedError(f"{path} is {self.name}, which mapconv cannot read: {self.advice}.")


_PEFT_FACTOR = re.compile(r"^base_model\.model\..*\.lora_(?:embedding_)?A\b")


def peft_rank(found: Found) -> int | None:
    """The rank of the first factor under PEFT's own keys; None where there are none."""
    refs = () if found.header is None else found.header.tensors
    return next((ref.shape[0] for ref in refs if ref.shape and _PEFT_FACTOR.search(ref.name)), None)


class PeftWeights:
    """PEFT's own weights without their configuration."""

    def recognise(self, found: Found) -> bool:
        return found.config is None and peft_rank(found) is not None

    def read(self, found: Found, *, allow_pickle: bool = False) -> Adapter:
        path = found.path if found.header is None else found.header.path
        raise UnsupportedError(
            f"{path} has the keys of a PEFT adapter, but there is no {CONFIG_FILE} beside it, and so its "
            "scaling is unknown: get that file from the source of the weights (the factors' rank is "
            f"{peft_rank(found)}), and give the folder that holds both."
        )


#: The most telling first: a LyCORIS file has kohya's names, and some of its own.
FOREIGN = (
    PeftWeights(),
    ForeignDialect(
        "an adapter of MLX-LM",
        re.compile(r"\.lora_[ab]$"),
        "merge it with mlx_lm.fuse, or " + _AS_PEFT,
    ),
    ForeignDialect("a LoRA that is not a PEFT adapter", re.compile(r"lora_|\.lora\."), _AS_PEFT),
)
