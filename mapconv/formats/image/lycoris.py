"""The files of LyCORIS: LoHa, LoKr, full differences, and LoCon, which is kohya's own form with a Tucker core.

A module's kind is in its parts; one file may hold several kinds (``lycoris/modules``). ``lycoris_`` is the prefix of
its wrapper, which SimpleTuner uses as well.
"""

from __future__ import annotations

from mapconv.formats.image import kohya
from mapconv.formats.image.keys import DENOISER, KeyTable, Prefix
from mapconv.formats.image.reading import ImageDialect

PREFIXES = (*kohya.PREFIXES, Prefix("lycoris_", DENOISER, flat=True))
_OWN = {
    ".hada_w1_a": "w1_a",
    ".hada_w1_b": "w1_b",
    ".hada_w2_a": "w2_a",
    ".hada_w2_b": "w2_b",
    ".hada_t1": "t1",
    ".hada_t2": "t2",
    ".lokr_w1": "kw1",
    ".lokr_w1_a": "kw1_a",
    ".lokr_w1_b": "kw1_b",
    ".lokr_w2": "kw2",
    ".lokr_w2_a": "kw2_a",
    ".lokr_w2_b": "kw2_b",
    ".lokr_t2": "kt2",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
}
ENDINGS = kohya.ENDINGS | _OWN

LYCORIS = ImageDialect("LyCORIS", KeyTable(PREFIXES, ENDINGS), frozenset(ENDINGS))
