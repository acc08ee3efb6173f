"""How PEFT is told to make an adapter: functions from a tiny model to ``LoraConfig`` arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from .tiny import Tiny

Settings = dict[str, Any]
Verdict = Literal["sound", "wrong", "live-wrong"]

RANK, ALPHA = 4, 6
#: Rows that trained tokens replace, in an order that is not ascending: the saved rows follow the list.
TOKENS = [5, 3]
ROWS_ADDED = 4


def linear(tiny: Tiny) -> list[str]:
    return list(tiny.roles.get("linear") or tiny.roles["conv1d_transposed"])


def plain(tiny: Tiny) -> Settings:
    return {"target_modules": linear(tiny), "r": RANK, "lora_alpha": ALPHA}


def with_settings(**more: Any) -> Callable[[Tiny], Settings]:
    return lambda tiny: plain(tiny) | more


def needs(role: str, make: Callable[[Tiny, list[str]], Settings | None]) -> Callable[[Tiny], Settings | None]:
    """Settings that exist only for models with this role."""
    return lambda tiny: make(tiny, list(tiny.roles[role])) if role in tiny.roles else None


def on(role: str, **more: Any) -> Callable[[Tiny], Settings | None]:
    """LoRA on the layers of one role."""
    return needs(role, lambda tiny, names: plain(tiny) | {"target_modules": names} | more)


def saving(role: str, **more: Any) -> Callable[[Tiny], Settings | None]:
    """LoRA on the linear layers, and the layers of a role trained in full."""
    return needs(role, lambda tiny, names: plain(tiny) | {"modules_to_save": names} | more)


def tied_wrong(tiny: Tiny) -> Verdict:
    """PEFT adds the delta of one end to the tensor that both ends share (measured: up to 100 % off)."""
    return "wrong" if tiny.tied else "sound"


def patterns(tiny: Tiny) -> Settings:
    first, last = linear(tiny)[0], linear(tiny)[-1]
    # Two keys match layer 0's first target, and the first in the table wins. PEFT sorts the table when it saves it, so
    # the order here is alphabetical: in any other, PEFT itself cannot load what it saved.
    return plain(tiny) | {
        "use_rslora": True,
        "rank_pattern": {rf".*\.0\..*{first}": 2, first: 3},
        "alpha_pattern": {rf".*{first}": 5, last: 9},
    }


def tied_only(make: Callable[[Tiny], Settings | None]) -> Callable[[Tiny], Settings | None]:
    return lambda tiny: make(tiny) if tiny.tied else None


def token_ends(tiny: Tiny) -> Settings | None:
    if "head" not in tiny.roles or "embedding" not in tiny.roles:
        return None
    rows = {tiny.roles["embedding"][0]: TOKENS, tiny.roles["head"][0]: [7]}
    return plain(tiny) | {"trainable_token_indices": rows}


def experts(*parameters: str, **more: Any) -> Callable[[Tiny], Settings | None]:
    names = [f"experts.{name}" for name in parameters]
    return needs("experts", lambda tiny, _: plain(tiny) | {"r": 2, "target_parameters": names} | more)


def both_ends(tiny: Tiny) -> Settings | None:
    if "head" not in tiny.roles or "embedding" not in tiny.roles:
        return None
    return plain(tiny) | {"target_modules": [*tiny.roles["embedding"], *tiny.roles["head"]]}
