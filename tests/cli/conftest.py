"""The commands load a few models many times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _loaded_once() -> Iterator[None]:
    from tests.loading import loaded_once  # transformers, which the process that hands out the tests need not have

    with loaded_once():
        yield
