"""Another environment for this process, as if its libraries had been imported under that one.

The Hub's client reads its environment when it is imported. Here it is imported under an environment of marks, and
whoever enters another environment puts its values wherever a mark is: ``tests/hub/test_forked.py`` finds no mark left.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

#: What the environment says while libraries are imported, and no path or address in a process at work may.
MARK = "environment-of-the-server"
_MARKS = {"HF_HOME": f"/{MARK}/home", "HF_ENDPOINT": f"http://{MARK}.invalid"}


@contextlib.contextmanager
def marked_environment() -> Iterator[None]:
    """Put the marks into the environment, for as long as the libraries that read it are imported."""
    own = {name: os.environ.get(name) for name in _MARKS}
    os.environ.update(_MARKS)
    yield
    for name, value in own.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


class ReadEnvironment:
    """Where libraries keep what they read of the environment; made under the marks, when all is imported."""

    def __init__(self) -> None:
        from huggingface_hub import hf_api

        self._places = [*_places(list(sys.modules)), (hf_api.api, "endpoint", hf_api.api.endpoint)]

    def enter(self, values: Mapping[str, str]) -> None:
        """Make ``values`` this process's environment."""
        from huggingface_hub import constants

        os.environ.clear()
        os.environ.update(values)
        importlib.reload(constants)
        for owner, name, value in self._places:
            if name in vars(constants):
                value = getattr(constants, name)
            else:
                kind = type(value)
                for mark, new in ((_MARKS["HF_HOME"], constants.HF_HOME), (_MARKS["HF_ENDPOINT"], constants.ENDPOINT)):
                    value = kind(str(value).replace(mark, new)) if mark in str(value) else value
            setattr(owner, name, value)

    def forget(self) -> None:
        """Stay in the environment that was entered last."""
        self._places.clear()

    @contextlib.contextmanager
    def entered(self, values: Mapping[str, str]) -> Iterator[None]:
        """Enter it, and come back. What the client remembers of a Hub goes with it."""
        own, known = dict(os.environ), set(sys.modules)
        self.enter(values)
        try:
            yield
        finally:
            self._places += _places(sys.modules.keys() - known)
            self.enter(own)
            _forget_the_hub()


def _places(names: Iterable[str]) -> Iterator[tuple[ModuleType | object, str, Any]]:
    """In these modules: constants of the client that they import by name, and marks, with the value under the marks."""
    from huggingface_hub import constants

    for module in map(sys.modules.get, names):
        if module is constants or not isinstance(module, ModuleType) or module.__name__ == __name__:
            continue
        for name, value in list(vars(module).items()):
            marked = issubclass(type(value), str | Path) and MARK in str(value)
            copied = name.isupper() and module.__name__.startswith("huggingface_hub") and name in vars(constants)
            if marked or (copied and value is getattr(constants, name)):
                yield module, name, value


def _forget_the_hub() -> None:
    from huggingface_hub.utils import close_session

    close_session()
    if cache := sys.modules.get("huggingface_hub._tree_cache"):
        cache._IN_MEMORY_TREE_CACHE.clear()
