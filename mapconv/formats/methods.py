"""PEFT's methods besides LoRA: their names, the keys of their tensors, and why some of them have no merge.

A method whose merge is a fixed weight is merged by its own code in PEFT (``mapconv.tuners``), so that nothing of its
mathematics is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class MethodFacts:
    """What a reader must know of a method.

    ``prefix``: with it begins the part of a tensor's key that follows the module's path. ``rank``: the rank of a
    module's update at most, from the shapes of its tensors (by their key in the layer) and the configuration; None
    where it is as high as the weight's own. ``changes_bias``: its merge changes the layer's bias as well.
    ``reads_base``: PEFT derives a part of the layer from the base weight's values, which takes as long as an SVD.
    ``row_scales``: the tensor that its merge multiplies the weight's rows by and nothing else, where it is (out, 1).
    ``together``: tensors of a layer depend on the other layers that are adapted.
    """

    name: str
    prefix: str
    rank: Callable[[Shapes, Mapping[str, Any]], int] | None = None
    changes_bias: bool = False
    reads_base: bool = False
    together: bool = False
    row_scales: str | None = None


def _rows(key: str) -> Callable[[Shapes, Mapping[str, Any]], int]:
    return lambda shapes, config: shapes[key][0]


def _columns(key: str) -> Callable[[Shapes, Mapping[str, Any]], int]:
    return lambda shapes, config: shapes[key][1]


def _configured(shapes: Shapes, config: Mapping[str, Any]) -> int:
    return config["r"]


def _gralora(shapes: Shapes, config: Mapping[str, Any]) -> int:
    blocks, _, rank = shapes["gralora_A"]
    return blocks * rank + shapes.get("gralora_A_general.weight", (0,))[0]


def _miss(shapes: Shapes, config: Mapping[str, Any]) -> int:
    # Bat multiplies the weight by its blocks.
    return 0 if config.get("init_weights") == "bat" else shapes["miss_block"][0]


#: By ``peft_type``, every method whose merge is a fixed weight, and that PEFT merges.
METHODS: dict[str, MethodFacts] = {
    "ADALORA": MethodFacts("AdaLoRA", "lora_", _rows("lora_E")),
    "ADAMSS": MethodFacts("AdaMSS", "adamss_", _rows("adamss_newB"), changes_bias=True, reads_base=True),
    "BEFT": MethodFacts("BEFT", "beft_", _rows("beft_bias"), changes_bias=True),
    "BOFT": MethodFacts("BOFT", "boft_"),
    "C3A": MethodFacts("C3A", "c3a_"),
    "DEFT": MethodFacts("DEFT", "deft_", _columns("deft_P")),
    "DELORA": MethodFacts("DeLoRA", "delora_", _rows("delora_A")),
    "FOURIERFT": MethodFacts("FourierFT", "fourierft_"),
    "FROD": MethodFacts("FRoD", "frod_", reads_base=True, together=True),
    "GLORA": MethodFacts("GLoRA", "glora_", changes_bias=True),
    "GRALORA": MethodFacts("GraLoRA", "gralora_", _gralora),
    "HIRA": MethodFacts("HiRA", "hira_"),
    "HRA": MethodFacts("HRA", "hra_", _columns("hra_u")),
    "IA3": MethodFacts("IA3", "ia3_", changes_bias=True, row_scales="ia3_l"),
    "LOHA": MethodFacts("LoHa", "hada_"),
    "LOKR": MethodFacts("LoKr", "lokr_"),
    "MISS": MethodFacts("MiSS", "miss_", _miss),
    "OFT": MethodFacts("OFT", "oft_"),
    "OSF": MethodFacts("OSF", "osf_", reads_base=True),
    "PEANUT": MethodFacts("PEANuT", "peanut_"),
    "PSOFT": MethodFacts("PSOFT", "psoft_", _configured, reads_base=True),
    "PVERA": MethodFacts("PVeRA", "pvera_lambda_", _configured, together=True),
    "RANDLORA": MethodFacts("RandLoRA", "randlora_", together=True),
    "ROAD": MethodFacts("RoAd", "road_", changes_bias=True),
    "SHIRA": MethodFacts("SHiRA", "shira_"),
    "SUPERTUNING": MethodFacts("Supertuning", "supertuning_", reads_base=True),
    "TINYLORA": MethodFacts("TinyLoRA", "tinylora_", _configured, together=True),
    "UNILORA": MethodFacts("Uni-LoRA", "unilora_", _configured, together=True),
    "VBLORA": MethodFacts("VB-LoRA", "vblora_", _configured, together=True),
    "VERA": MethodFacts("VeRA", "vera_lambda_", _rows("vera_lambda_d"), together=True),
    "WAVEFT": MethodFacts("WaveFT", "waveft_"),
}
#: By ``peft_type``, those that are nothing but tensors in the place of the base's.
WHOLE_METHODS = {"LN_TUNING": "LN tuning", "TRAINABLE_TOKENS": "trainable tokens"}
_PROMPT = "it adds to the inputs or the cache of attention, and changes no weight"
#: By ``peft_type``, those that have no merge, each with the reason.
NO_FIXED_WEIGHT = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": "it adds attention to learned prompts behind a gate, and changes no weight",
    "LILY": "its router mixes factors by the input at run time, so it is not a fixed weight",
    "POLY": "its router mixes LoRAs by the task at run time, so it is not a fixed weight",
    "SHADOW": "it runs a second model beside the base",
    "XLORA": "its classifier mixes LoRAs by the input at run time, so it is not a fixed weight",
}
