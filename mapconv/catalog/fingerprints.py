"""What tells a resumed run that an entry's source, base and options are those of its output, without reading either.

A source is known by a *stat signature*, the sizes and modification times of its configuration and its weights, which
costs microseconds; and by its *content*, the SHA-256 of both, which the result records as well. A source whose stat
signature differs (touched, copied, another clock) is hashed, and only other content makes the entry due again. What is
copied beside them (a tokenizer, a card's licence) is not watched: delete the output to have it made again.

A base is known by the stat signature of all of its files: its gigabytes are not hashed, so a touched base makes its
entries due again. What comes from the Hub is known by its name and commit, and a text given as `data` by its path: a
branch that moved since, or a text that was edited, is not seen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache

from mapconv.catalog.entries import Entry
from mapconv.version import __version__


def digest(*parts: object) -> str:
    """A short name for these values, the same in every process."""
    text = "\0".join(map(str, parts))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def done_fingerprint(entry: Entry, contents: Sequence[str], base: str | None) -> str:
    """The fingerprint of a finished entry; ``base`` as it was found when the sources were converted."""
    found = None if base is None else base_signature(base)
    return digest(__version__, *entry.sources, entry.base, entry.options.digest, *contents, base, found)


def failed_fingerprint(entry: Entry, stats: Sequence[str]) -> str:
    """The fingerprint of an entry that failed: a changed source, base or option makes it due again."""
    found = None if entry.base is None else base_signature(entry.base)
    return digest(__version__, *entry.sources, entry.base, entry.options.digest, *stats, found)


def source_signatures(entry: Entry) -> tuple[str, ...]:
    """The stat signature of each of an entry's sources."""
    return tuple(source_signature(source) for source in entry.sources)


def source_signature(source: str) -> str:
    """The stat signature of an adapter's or a model's folder or file; for what is neither here, that it is none."""
    if os.path.isfile(source):
        return _stat(source)
    weights = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
    config, found = _stat(f"{source}/adapter_config.json"), [_stat(f"{source}/{name}") for name in weights]
    if not config and not any(found) and os.path.exists(f"{source}/config.json"):
        return base_signature(source)
    return f"{config}/{next(filter(None, found), '')}"


@lru_cache(maxsize=4096)
def base_signature(base: str) -> str:
    """The stat signature of a base model's folder; taken once a run, which also reads it as one."""
    try:
        names = sorted(name for name in os.listdir(base) if not name.startswith("."))
    except OSError:
        return digest("absent", base)
    return digest("folder", os.path.realpath(base), *((name, _stat(os.path.join(base, name))) for name in names))


def _stat(path: str) -> str:
    """Size and modification time, or nothing for what is not there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{status.st_size}@{status.st_mtime_ns}"
