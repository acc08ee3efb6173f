"""MAP as a trainable method: a configuration, the layers that it names, and the state that training starts from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from mapconv.adapter import Direction
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.formats.peft import natural_order
from mapconv.nn.attaching import Attached, adaptable, attach, check_model, has_adapters, state_of
from mapconv.nn.bases import base_fingerprint, is_grouped, kind_of, matrix_shape, row_squares, values_of
from mapconv.nn.checkpoints import serve_trainers
from mapconv.nn.updates import DoraUpdate, Update

#: The least ‖BA‖ that β is divided by where training starts at B = 0: the first steps are then those of a LoRA, with
#: gradients of the size that the later ones have. It is between 0.03 and 1, where a floor was found to do for what the
#: authors do by clipping; the value itself has not been tuned.
EPS = 0.1
#: β at the start as a share of ‖W0‖: near what a LoRA's update has at the end of a short training (a median of 6.6 %
#: on MiniLM, 0.5 to 2.3 % in the upper layers of a language model).
RELATIVE_BETA = 0.05
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


#: What PEFT's LoraConfig calls the same.
_PEFT_NAMES = {
    "r": "rank",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
}


class _PeftNames(type):
    """Lets a class be called with PEFT's names for its arguments, which its users know."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        for theirs, ours in _PEFT_NAMES.items():
            if theirs in settings:
                if ours in settings:
                    raise ValueError(f"{theirs} and {ours} are the same: give one of them")
                settings[ours] = settings.pop(theirs)
        known = [field.name for field in fields(cast(Any, cls))]  # MapConfig, a dataclass
        for name in settings.keys() - set(known):
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"
            raise TypeError(f"MapConfig has no setting {name!r}: {hint}")
        return super().__call__(*args, **settings)


@dataclass(frozen=True)
class MapConfig(metaclass=_PeftNames):
    """What to train; PEFT's names (``r``, ``target_modules``, …) are taken too.

    Args:
        rank: of every update.
        targets: ``all-linear`` (every linear layer but the output head), a list of names that a layer's path ends in,
            or a regular expression that matches whole paths; as PEFT's ``target_modules``.
        direction: ``low-rank``: Δ = BA. ``dora``: Δ = T − W0 with T in DoRA's factors.
        init: of a low-rank direction. ``paper``: as the method's authors start: A Kaiming-uniform, B = 0. ``random``: A
            and B random, β = 0. Both start at the base model.
        beta: β at the start: a number, or ``relative``: ``RELATIVE_BETA`` of ‖W0‖. β moves little in training, so this
            is the size that the update will have, whatever the learning rate. None: 1 for ``paper``, 0 for ``random``.
        eps: the least value of ‖BA‖ that β is divided by; below it the update is a plain LoRA's of gain β/eps. None:
            ``EPS`` for ``paper``, 0 for ``random``. The authors have 1e-6, and clip gradients at a norm of 1: without
            that, the first gradient is some 1e5 times as large as all others, and Adam remembers it.
        frozen: scalars that are not trained: ``alpha``, ``beta``.
        detach_norm: send no gradient through ‖BA‖ (low-rank).
        exclude: names or a regular expression of layers to leave out.
        layers: numbers of the layers to adapt (the first number in a path); None: all.
        seed: of the initial factors.

    Raises:
        ValueError: a value that has no meaning.
    """

    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    direction: Direction = "low-rank"
    init: Literal["paper", "random"] = "paper"
    beta: float | Literal["relative"] | None = None
    eps: float | None = None
    frozen: tuple[str, ...] = ()
    detach_norm: bool = False
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "layers", "frozen"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}, expected a whole number above 0")
        if self.direction not in get_args(Direction):
            raise ValueError(f"direction is {self.direction!r}, expected one of {', '.join(get_args(Direction))}")
        if self.detach_norm and self.direction == "dora":
            raise ValueError("detach_norm belongs to the low-rank direction: dora's norms are always detached")
        self._check_start()
        if not self.targets:
            raise ValueError("targets names no layer")
        for name in ("targets", "exclude"):
            self._check_models(name)
        if self.layers is not None and not all(type(layer) is int and layer >= 0 for layer in self.layers):
            raise ValueError(f"layers is {self.layers!r}, expected layer numbers")

    def _check_start(self) -> None:
        if self.init not in ("paper", "random"):
            raise ValueError(f"init is {self.init!r}, expected paper or random")
        if self.direction == "dora" and (self.init, self.beta, self.eps) != ("paper", None, None):
            raise ValueError("init, beta and eps belong to the low-rank direction: dora starts as DoRA does")
        if self.beta not in (None, "relative") and not _is_finite(self.beta):
            raise ValueError(f"beta is {self.beta!r}, expected a finite number, or relative")
        if self.eps is not None and not (_is_finite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps is {self.eps!r}, expected a finite number of 0 or more")
        if self.init == "paper" and self.direction == "low-rank" and (self.eps == 0 or self.beta == 0):
            raise ValueError(
                "with B = 0 and eps or beta at 0 no gradient would ever reach the factors: give init='random'"
            )
        strange = set(self.frozen) - {"alpha", "beta"}
        if isinstance(self.frozen, str) or strange:
            raise ValueError(f"frozen is {self.frozen!r}, expected a list of alpha and beta")

    def _check_models(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{name} is {value!r}, which is not a regular expression ({error})") from None
        elif not all(isinstance(item, str) and item for item in value):
            raise ValueError(f"{name} is {value!r}, expected names of layers")

    @property
    def floor(self) -> float:
        """The least ‖BA‖ that β is divided by."""
        return self.eps if self.eps is not None else EPS if self.init == "paper" else 0.0

    def start(self, base_norm: float) -> float:
        """β at the start, of a weight with the norm ``base_norm``."""
        if self.beta == "relative":
            return RELATIVE_BETA * base_norm
        return float(self.beta) if self.beta is not None else 1.0 if self.init == "paper" else 0.0


def get_map_model(model: nn.Module, config: MapConfig, *, name: str = "default") -> nn.Module:
    """Attach fresh, trainable MAP updates to ``model`` in place, and freeze everything else.

    Training starts from the base model itself, with α = ‖W0‖. For the direction ``low-rank``, ``init="paper"`` is the
    start of MAP's authors: A Kaiming-uniform, B = 0, β = 1, and a floor under ‖BA‖, below which W' = W0 + (β/eps)·BA.
    ``init="random"`` has random A and B and β = 0: β gets a gradient at once, A and B as soon as β ≠ 0. For ``dora``,
    as DoRA itself: random A, B = 0, magnitudes ‖W0‖_row.

    The parameters are named ``<layer>.updates.<name>.A``, ``.B``, ``.relative_alpha``, ``.relative_beta`` and, for
    ``dora``, ``.magnitude``. Do not apply weight decay to the scalars: it would pull the base weight itself to zero.
    Train with any loop, ``transformers.Trainer`` or TRL's, then call ``save_adapter``. The model's ``save_pretrained``,
    which trainers call, writes a MAP directory while an adapter is attached.

    Args:
        model: a model in memory; PEFT's or another adapter's layers must not be on it.
        config: what to train.
        name: what to call the adapter.

    Returns:
        The same model.

    Raises:
        MapconvError: no layer matches, or one that does cannot be adapted; the model is then as it was.
    """
    check_model(model, name)
    if has_adapters(model) and state_of(model).replicated is not None:
        raise UnsupportedError(
            "the model runs with the repeated layers of another adapter (layer_replication): detach it first."
        )
    layers = _targets(model, config)
    updates = {}
    generator = torch.Generator().manual_seed(config.seed)
    for path, layer in layers.items():
        if is_grouped(layer):
            raise UnsupportedError(f"{path} is a convolution with groups > 1, which PEFT refuses to merge: exclude it.")
        updates[path] = _fresh(layer, path, config, generator)
    attach(model, name, updates, Attached(None, tuple(updates), asdict(config)), "all")
    for update in updates.values():
        for scalar in config.frozen:
            getattr(update, f"relative_{scalar}").requires_grad_(False)
    serve_trainers(model)
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many of a model's parameters are trained, in PEFT's words."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained, total = sum(count for count, trains in counts if trains), sum(count for count, _ in counts)
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / max(1, total):.4f}")


def _fresh(layer: nn.Module, path: str, config: MapConfig, generator: torch.Generator) -> Update:
    height, width = matrix_shape(layer)
    found = base_fingerprint(layer, path)
    if not math.isfinite(found.square):
        raise PlacementError(f"{path}: the model's weight holds NaN or infinity.")
    A = torch.empty(config.rank, width)
    if config.direction == "dora":
        A.normal_(std=width**-0.5, generator=generator)
        with values_of(layer, path) as weight:
            magnitude = row_squares(weight).sqrt().float().cpu()
        B = torch.zeros(height, config.rank)
        update = DoraUpdate(A, B, magnitude, relative_alpha=1.0, relative_beta=1.0, base_norm=found.norm)
    else:
        B = torch.zeros(height, config.rank)
        if config.init == "paper":
            # Kaiming's uniform distribution with a = √5, as LoRA has it.
            A.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        else:
            A.normal_(std=width**-0.5, generator=generator)
            B.normal_(std=height**-0.5, generator=generator)
        beta = config.start(found.norm) / (found.norm or 1.0)
        scalars = {"relative_alpha": 1.0, "relative_beta": beta, "base_norm": found.norm}
        update = Update(A, B, **scalars, detach_norm=config.detach_norm, floor=config.floor)
    update.base_projection = found.projection
    return update


def _targets(model: nn.Module, config: MapConfig) -> Mapping[str, nn.Module]:
    """The layers to adapt by path."""
    candidates = adaptable(model)
    heads = _output_heads(model)
    found = {}
    for path, layer in candidates.items():
        if config.targets == "all-linear":
            chosen = kind_of(layer) in ("linear", "transposed") and not any(layer is head for head in heads)
        else:
            chosen = _matches(config.targets, path)
        if chosen and not _matches(config.exclude, path) and _in_layers(path, config.layers):
            found[path] = layer
    if not found:
        raise PlacementError(
            f"no layer of this {type(model).__name__} matches targets={config.targets!r}: its layers end in "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in candidates})[:12])}."
        )
    if not isinstance(config.targets, str):
        idle = [target for target in config.targets if not any(_matches((target,), path) for path in candidates)]
        if idle:
            raise PlacementError(f"targets names {', '.join(map(repr, idle))}, which no layer's path ends in.")
    # In the order in which a file of them is read.
    return dict(sorted(found.items(), key=lambda item: natural_order(item[0])))


def _matches(names: str | tuple[str, ...], path: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _in_layers(path: str, layers: tuple[int, ...] | None) -> bool:
    number = _LAYER.search(path)
    return layers is None or (number is not None and int(number[1]) in layers)


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """What ``all-linear`` leaves out, as PEFT does: the output embedding, or a classifier's head."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(output, "base_layer", output)
    heads = [] if head is None else [head]
    if type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")):
        prefix = getattr(model, "base_model_prefix", "")
        heads += [layer for path, layer in adaptable(model).items() if not path.startswith(f"{prefix}.")]
    return heads


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
