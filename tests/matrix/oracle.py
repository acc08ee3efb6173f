"""The oracle: what stock PEFT computes with an adapter, in float64, and how far one rounding may move it.

The truth of a case is the forward pass of the *unmerged* model.  ``merge_and_unload`` equals it except where PEFT
merges wrongly (two ends of a tied embedding, replicated layers), and in one place PEFT's unmerged forward is wrong
(trained rows of a tied layer with a bias).  Each option says what to expect, and ``test_matrix.py`` holds PEFT to that.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open

from .bases import Bases, load_base
from .options import Option
from .tiny import Tiny

#: One rounding to float32: half a unit in the last place, relative.
ROUNDING = 2.0**-24


@dataclass(frozen=True, eq=False)
class Case:
    """An adapter on disk and what it must compute."""

    tiny: Tiny
    option: Option
    base: Path
    adapter: Path
    #: Logits of the live model before the adapter was saved.
    live: torch.Tensor
    #: What the adapter must compute: ``live``, unless PEFT's forward is known to be wrong.
    trained: torch.Tensor
    #: Logits of the base alone; None where the adapter's model has another vocabulary.
    untrained: torch.Tensor | None
    #: How far one rounding moves the logits, where the model that was trained computes as the one that is loaded.
    moved: float | None = None

    @property
    def uses_dora(self) -> bool:
        return bool(self.option.settings(self.tiny).get("use_dora"))


class Workshop:
    """Makes each case once; tests share it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bases = Bases(root / "bases")
        self._cases: dict[tuple[str, str], Case] = {}
        self._untrained = cache(lambda tiny, base: tiny.logits(load_base(tiny, base)))

    def case(self, tiny: Tiny, option: Option) -> Case:
        key = tiny.name, option.name
        if key not in self._cases:
            self._cases[key] = self._make(tiny, option)
        return self._cases[key]

    def _make(self, tiny: Tiny, option: Option) -> Case:
        base = self.bases.folder(tiny.name, option.base)
        adapter = self.root / "adapters" / f"{tiny.name}-{option.name}"
        model = load_base(tiny, base, vocab=option.vocab, seed=12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT explains at length that it saves embeddings; it is what we test
            peft_model = get_peft_model(model, LoraConfig(**option.settings(tiny)))
            randomise(peft_model, seed=13)
            peft_model.save_pretrained(adapter)
        live = truth = tiny.logits(peft_model)
        if option.merge(tiny) == "live-wrong":
            truth = tiny.logits(peft_model.merge_and_unload())
        case = Case(tiny, option, base, adapter, live, truth, None)
        if option.vocab is None:
            case = replace(case, untrained=self._untrained(tiny, base))
        if option.rewrite is not None:
            option.rewrite(tiny, adapter, base)
            if option.rewrite_is_source:
                truth = tiny.logits(load_adapter(case, adapter))
                case = replace(case, live=truth, trained=truth)
        elif truth is live and option.slack == 1:
            case = replace(case, moved=_moved(tiny, peft_model, live))
        return case


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Move every trainable parameter, as training would: factors, magnitudes, biases, heads, token rows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                if "lora_magnitude_vector" in name:
                    parameter.mul_(1 + 0.3 * torch.tanh(noise))
                else:
                    parameter.add_(0.15 * noise)


def load_adapter(case: Case, adapter: Path) -> torch.nn.Module:
    """The base with an adapter directory, loaded by stock PEFT, which must find and use every tensor of it."""
    return attach_whole(load_base(case.tiny, case.base, vocab=case.option.vocab), adapter)


def attach_whole(model: torch.nn.Module, adapter: Path) -> PeftModel:
    """A model with an adapter directory on it, by stock PEFT: no tensor of either may be without its counterpart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of is asserted below
        config = PeftConfig.from_pretrained(adapter)
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        peft_model = kind(model, config)
        report = peft_model.load_adapter(adapter, "default", is_trainable=False)
    trained = ("lora_", "modules_to_save", "trainable_tokens")
    missing = [key for key in report.missing_keys if any(part in key for part in trained)]
    assert not missing, f"missing adapter keys: {missing[:3]}"
    # PEFT saves a module twice where its embedding was resized as well, and has no use for the second copy itself.
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    copies = {key for key in stored if ".modules_to_save." in key and key.replace(".modules_to_save.", ".") in stored}
    # And it saves trained rows once for each end of a tied pair, of which it reads those of the embedding alone.
    rows = sorted(key for key in stored if ".token_adapter." in key)
    copies |= {key for key in rows if ".lm_head." in key and len(rows) > 1}
    unexpected = sorted(set(report.unexpected_keys) - copies)
    assert not unexpected, f"unexpected adapter keys: {unexpected[:3]}"
    return peft_model.eval()


@cache
def tolerance(case: Case) -> float:
    """How far logits may lie from the oracle's when every weight was rounded to float32.

    Measured on the model itself: each parameter is moved by up to one rounding, at random, and the largest change of a
    logit is taken as the amplification of this model.  A merged weight is not one rounding away but a few: A and B are
    summed over the rank (r + 1 products and sums), then scaled, added, and for DoRA divided by a norm and multiplied,
    so at most r + 6 roundings; and one random draw may fall short of the worst by a factor of about 3.  Floor: the
    models themselves compute norms and softmax in float32.
    """
    exact, moved = case.live, case.moved
    if moved is None:
        model = load_adapter(case, case.adapter) if case.option.rewrite is None else load_base(case.tiny, case.base)
        exact = case.tiny.logits(model)
        moved = _moved(case.tiny, model, exact)
    rank = case.option.settings(case.tiny)["r"]
    return case.option.slack * 3 * (rank + 6) * max(moved, ROUNDING * float(exact.abs().max()))


def _moved(tiny: Tiny, model: torch.nn.Module, exact: torch.Tensor) -> float:
    """The largest change of a logit when each parameter moves by up to one rounding; the model is changed in place."""
    generator = torch.Generator().manual_seed(14)
    with torch.no_grad():
        for parameter in model.parameters():
            shift = 2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1
            parameter.mul_(1 + ROUNDING * shift)
    return float((tiny.logits(model) - exact).abs().max())


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference of two logits."""
    assert left.shape == right.shape
    return float((left - right).abs().max())
