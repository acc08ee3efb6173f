"""Which modules the user names, in PEFT's own terms: ``target_modules`` and ``exclude_modules``."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from mapconv.errors import PlacementError
from mapconv.untrusted.patterns import require_bounded

#: What makes a text an expression, rather than a name with its dots.
_EXPRESSION = re.compile(r"[*+?()\[\]{}|\\^$]")


def module_rule(named: str | Sequence[str], option: str) -> Callable[[str], bool]:
    """Whether a module's path is among those named, as PEFT decides it.

    A list, or a text with commas, has ends of paths (``q_proj``, ``layers.0.mlp.down_proj``); a text with the signs of
    an expression is one, which the whole path has to match.

    Raises:
        MapconvError: no regular expression, or one that may take for ever; ``option`` is named.
    """
    if isinstance(named, str) and _EXPRESSION.search(named):

        def matches(path: str) -> bool:
            require_bounded(named, path, option)
            return re.fullmatch(named, path) is not None

        return matches
    names = [part.strip() for part in named.split(",")] if isinstance(named, str) else list(named)
    names = [name for name in names if name]
    return lambda path: any(path == name or path.endswith(f".{name}") for name in names)


def require_some(rule: Callable[[str], bool], paths: Iterable[str], option: str, named: object) -> None:
    """Refuse a selection that selects nothing: it was misspelled.

    Raises:
        PlacementError: with some of the names that there are.
    """
    known = list(paths)
    if not any(map(rule, known)):
        leaves = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in known))
        raise PlacementError(f"{option} {named} names no module that differs: those are {leaves[:200]}.")


def shortened(paths: Collection[str], all_paths: Iterable[str]) -> list[str]:
    """Names that select exactly ``paths``: the last part where every path that ends with it is wanted.

    PEFT takes an end of ``target_modules`` at a dot, but one of ``modules_to_save`` anywhere: both hold here.
    """
    wanted, known = set(paths), list(all_paths)
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    whole = {
        leaf for leaf in leaves if not leaf.isdecimal() and wanted.issuperset(p for p in known if p.endswith(leaf))
    }
    return list(dict.fromkeys(leaf if (leaf := path.rpartition(".")[2]) in whole else path for path in paths))
