"""The oracle: what stock PEFT computes with an adapter, in float64, and how far one rounding may move it.

The truth of a case is the forward pass of the *unmerged* model.  ``merge_and_unload`` equals it except where PEFT
merges wrongly (two ends of a tied embedding, replicated layers), and in one place PEFT's unmerged forward is wrong
(trained rows of a tied layer with a bias).  Each option says what to expect, and ``test_matrix.py`` holds PEFT to that.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open

from .bases import Bases, load_base
from .options import Option
from .recipes import Settings
from .tiny import Tiny

#: One rounding to float32: half a unit in the last place, relative.
ROUNDING = 2.0**-24


@dataclass(frozen=True, eq=False)
class Trained:
    """An adapter as stock PEFT saved it, and what stock PEFT computes with it."""

    adapter: Path
    #: Logits of the live model before the adapter was saved, and of the one that PEFT merged the saved one into.
    live: torch.Tensor
    merged: torch.Tensor
    #: How far PEFT is from what it saved when it has loaded it again: the largest difference of a parameter or a logit.
    lost: float
    #: How far one rounding moves the logits.
    moved: float


@dataclass(frozen=True, eq=False)
class Case:
    """An adapter on disk and what it must compute."""

    tiny: Tiny
    option: Option
    base: Path
    adapter: Path
    #: The adapter before the rewrite, and before any doubt about PEFT's forward pass.
    source: Trained
    #: Logits of PEFT's own unmerged forward pass, which the truth is but where that is wrong.
    live: torch.Tensor
    #: What the adapter must compute, as far as one rounding moves it.
    trained: torch.Tensor
    moved: float
    #: Logits of the base alone; None where the adapter's model has another vocabulary.
    untrained: torch.Tensor | None

    @property
    def uses_dora(self) -> bool:
        return bool(self.option.settings(self.tiny).get("use_dora"))


class Workshop:
    """Makes each case once; tests share it, and options that rewrite one adapter share that."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bases = Bases(root / "bases")
        self._cases: dict[tuple[str, str], Case] = {}
        self._trained: dict[tuple[str, ...], Trained] = {}
        self._untrained = cache(lambda tiny, base: tiny.logits(load_base(tiny, base)))

    def case(self, tiny: Tiny, option: Option) -> Case:
        key = tiny.name, option.name
        if key not in self._cases:
            self._cases[key] = self._make(tiny, option)
        return self._cases[key]

    def _make(self, tiny: Tiny, option: Option) -> Case:
        base = self.bases.folder(tiny.name, option.base)
        source = self._train(tiny, option, base)
        adapter, live, moved = source.adapter, source.live, source.moved
        truth = source.merged if option.merge(tiny) == "live-wrong" else live
        if option.rewrite is not None:
            adapter = shutil.copytree(adapter, self.root / "rewritten" / f"{tiny.name}-{option.name}")
            option.rewrite(tiny, adapter, base)
            if option.rewrite_is_source:
                model = attach_whole(load_base(tiny, base), adapter)
                live = truth = tiny.logits(model)
                moved = _moved(tiny, model, truth)
        untrained = self._untrained(tiny, base) if option.vocab is None else None
        return Case(tiny, option, base, adapter, source, live, truth, moved, untrained)

    def _train(self, tiny: Tiny, option: Option, base: Path) -> Trained:
        settings = option.settings(tiny)
        key = tiny.name, option.base, str(option.vocab), json.dumps(settings)
        if key not in self._trained:
            adapter = self.root / "adapters" / f"{tiny.name}-{option.name}"
            self._trained[key] = _train(tiny, base, settings, option.vocab, adapter)
        return self._trained[key]


def _train(tiny: Tiny, base: Path, settings: Settings, vocab: int | None, adapter: Path) -> Trained:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT explains at length that it saves embeddings; it is what we test
        model = get_peft_model(load_base(tiny, base, vocab=vocab, seed=12), LoraConfig(**settings))
        randomise(model, seed=13)
        model.save_pretrained(adapter)
    live = exact = tiny.logits(model)
    # What PEFT makes of a base depends on the configuration alone, unless it changes the base or its vocabulary.
    if vocab is None and model.peft_config["default"].init_lora_weights is True and _is_saved(model, adapter):
        lost = _read_again(model, adapter)
    else:
        model = attach_whole(load_base(tiny, base, vocab=vocab), adapter)
        exact = tiny.logits(model)
        lost = distance(exact, live)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    moved = _moved(tiny, model, exact)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return Trained(adapter, live, tiny.logits_of_wide(model.merge_and_unload()), lost, moved)


def _is_saved(model: PeftModel, adapter: Path) -> bool:
    """Whether the saved configuration is the one that the model was made by."""
    mine, saved = (config.to_dict() for config in (model.peft_config["default"], PeftConfig.from_pretrained(adapter)))
    for config in (mine, saved):
        del config["inference_mode"], config["auto_mapping"]  # which say nothing of the layers
        config |= {key: sorted(value) for key, value in config.items() if isinstance(value, set)}
    return json.dumps(mine) == json.dumps(saved)


def _read_again(model: PeftModel, adapter: Path) -> float:
    """Let PEFT read an adapter's tensors from disk into the model that they came from; how far they are from before."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(torch.nan)  # which only reading takes away, and which is at no distance
    _read_whole(model, adapter)
    return float(torch.stack([(p - before[name]).abs().max() for name, p in model.named_parameters()]).max())


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


def load_adapter(case: Case, adapter: Path) -> PeftModel:
    """The base with an adapter directory, loaded by stock PEFT, which must find and use every tensor of it."""
    return attach_whole(load_base(case.tiny, case.base, vocab=case.option.vocab), adapter)


def attach_whole(model: torch.nn.Module, adapter: Path) -> PeftModel:
    """A model with an adapter directory on it, by stock PEFT: no tensor of either may be without its counterpart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of is asserted below
        config = PeftConfig.from_pretrained(adapter)
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        return _read_whole(kind(model, config), adapter)


def _read_whole(model: PeftModel, adapter: Path) -> PeftModel:
    """Read an adapter's tensors into a model that has its layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = model.load_adapter(adapter, "default", is_trainable=False)
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
    return model.eval()


def tolerance(case: Case) -> float:
    """How far logits may lie from the oracle's when every weight was rounded to float32.

    Measured on the model itself: each parameter is moved by up to one rounding, at random, and the largest change of a
    logit is taken as the amplification of this model.  A merged weight is not one rounding away but a few: A and B are
    summed over the rank (r + 1 products and sums), then scaled, added, and for DoRA divided by a norm and multiplied,
    so at most r + 6 roundings; and one random draw may fall short of the worst by a factor of about 3.  Floor: the
    models themselves compute norms and softmax in float32.
    """
    rank = case.option.settings(case.tiny)["r"]
    return case.option.slack * 3 * (rank + 6) * max(case.moved, ROUNDING * float(case.trained.abs().max()))


def _moved(tiny: Tiny, model: torch.nn.Module, exact: torch.Tensor) -> float:
    """The largest change of a logit when each parameter moves by up to one rounding; a wide model, changed in place."""
    generator = torch.Generator().manual_seed(14)
    with torch.no_grad():
        for parameter in model.parameters():
            shift = 2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1
            parameter.mul_(1 + ROUNDING * shift)
    return distance(tiny.logits_of_wide(model), exact)


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference of two logits."""
    assert left.shape == right.shape
    return float((left - right).abs().max())
