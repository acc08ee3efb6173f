"""What a refusal looks like: exit status 1, one sentence on stderr, nothing on stdout, nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.files import listing

PREFIX = "mapconv: error: "


@contextmanager
def nothing_written(*folders: Path) -> Iterator[None]:
    """No file under these folders appears, vanishes or changes, staging folders included."""
    before = [listing(folder) for folder in folders]
    yield
    assert [listing(folder) for folder in folders] == before


def assert_refused(result, *words: object) -> None:
    """One sentence that holds ``words``; further lines can only be a list of misfits, indented."""
    assert result.status == 1, result
    assert result.out == ""
    sentence, *details = result.err.splitlines()
    assert sentence.startswith(PREFIX), result.err
    assert all(line.startswith("  ") for line in details), result.err
    assert sentence.endswith((":", "?") if details else "."), sentence
    assert "bug in mapconv" not in sentence
    for word in words:
        assert str(word) in result.err, (word, result.err)
