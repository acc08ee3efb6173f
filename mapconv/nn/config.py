"""What to train as MAP: the configuration, its checks, and the values that training starts from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, cast, get_args

from mapconv.adapter import Direction
from mapconv.nn.updates import Units

#: The least ‖BA‖ that β is divided by where training starts at B = 0: the first steps are then those of a LoRA, with
#: gradients of the size that the later ones have. It is between 0.03 and 1, where a floor was found to do for what the
#: authors do by clipping; the value itself has not been tuned.
EPS = 0.1
#: β at the start as a share of ‖W0‖: near what a LoRA's update has at the end of a short training (a median of 6.6 %
#: on MiniLM, 0.5 to 2.3 % in the upper layers of a language model).
RELATIVE_BETA = 0.05


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
        direction: ``low-rank``: Δ = BA. ``dora``: Δ = T − W0 with T in DoRA's factors. A configuration of PEFT's
            (``LoHaConfig(r=8)``, …): Δ is that method's update, started as PEFT starts it; where that is not 0, β at
            the start is ‖Δ‖. Its ``target_modules`` count where ``targets`` is not given.
        init: of a low-rank direction. ``paper``: as the method's authors start: A Kaiming-uniform, B = 0. ``random``: A
            and B random, β = 0. Both start at the base model.
        beta: β at the start: a number, or ``relative``: ``RELATIVE_BETA`` of ‖W0‖. β moves little in training, so this
            is the size that the update will have, whatever the learning rate. None: 1 for ``paper``, 0 for ``random``.
        eps: the least value of ‖BA‖ that β is divided by; below it the update is a plain LoRA's of gain β/eps. None:
            ``EPS`` for ``paper``, 0 for ``random``. The authors have 1e-6, and clip gradients at a norm of 1: without
            that, the first gradient is some 1e5 times as large as all others, and Adam remembers it.
        units: what the trained scalars are held in. ``relative``: α/‖W0‖ and β/‖W0‖, of the size of 1, so that one
            learning rate serves them and the factors. ``absolute``: α and β themselves, as the authors train them; a
            rate of 1e-3 then moves a weight of norm 50 a fiftieth as far as in relative units.
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
    #: Of PEFT's, any configuration of a method whose layers add an update.
    direction: Direction | Any = "low-rank"
    init: Literal["paper", "random"] = "paper"
    beta: float | Literal["relative"] | None = None
    eps: float | None = None
    units: Units = "relative"
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
        if self.is_method:
            self._take_method()
        elif self.direction not in get_args(Direction):
            raise ValueError(
                f"direction is {self.direction!r}, expected one of {', '.join(get_args(Direction))}, or PEFT's "
                "configuration of a method"
            )
        if self.detach_norm and self.direction != "low-rank":
            raise ValueError("detach_norm belongs to the low-rank direction: dora's norms are always detached")
        self._check_start()
        if not self.targets:
            raise ValueError("targets names no layer")
        for name in ("targets", "exclude"):
            self._check_models(name)
        if self.layers is not None and not all(type(layer) is int and layer >= 0 for layer in self.layers):
            raise ValueError(f"layers is {self.layers!r}, expected layer numbers")

    @property
    def is_method(self) -> bool:
        """Whether the direction is another method's of PEFT."""
        return hasattr(self.direction, "peft_type")

    @property
    def base_model_name_or_path(self) -> str:
        """What PEFT's ``get_peft_model`` asks a configuration for first.

        Raises:
            TypeError: always, and with what to call instead.
        """
        raise TypeError(
            "get_peft_model knows the methods of PEFT's own list alone, and MAP is none of them: call "
            "mapconv.get_map_model(model, config)."
        )

    def _take_method(self) -> None:
        if self.rank != MapConfig.rank or self.init != "paper":
            raise ValueError("rank and init belong to the low-rank direction: PEFT's configuration says its own")
        targets = getattr(self.direction, "target_modules", None)
        if targets and self.targets == "all-linear":
            object.__setattr__(self, "targets", targets if isinstance(targets, str) else tuple(sorted(targets)))

    def _check_start(self) -> None:
        if self.init not in ("paper", "random"):
            raise ValueError(f"init is {self.init!r}, expected paper or random")
        if self.direction == "dora" and (self.init, self.beta, self.eps) != ("paper", None, None):
            raise ValueError("init, beta and eps belong to the low-rank direction: dora starts as DoRA does")
        if self.units not in get_args(Units):
            raise ValueError(f"units is {self.units!r}, expected one of {', '.join(get_args(Units))}")
        if self.direction == "dora" and self.units != "relative":
            raise ValueError("units belongs to the low-rank direction: dora's β is a share of ‖Δ‖, 0 at the start")
        if self.beta not in (None, "relative") and not _is_finite(self.beta):
            raise ValueError(f"beta is {self.beta!r}, expected a finite number, or relative")
        if self.eps is not None and not (_is_finite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps is {self.eps!r}, expected a finite number of 0 or more")
        if self.init == "paper" and self.direction != "dora" and (self.eps == 0 or self.beta == 0):
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


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
