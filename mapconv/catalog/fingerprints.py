"""What tells a resumed run that an entry's source, base and options are those of its output, without reading either.

Two marks of a source: a *stat mark* from the names, sizes and modification times of the files that a conversion reads,
which costs a microsecond a file; and its *content*, the SHA-256 that the result records as well. A source whose stat
mark differs (touched, copied, another clock) is hashed, and only other content makes the entry due again.

A base is known by the stat mark of all of its files: its gigabytes are not hashed, so a touched base makes its entries
due again. What comes from the Hub is known by its name and commit; a branch that moved since is not seen.
"""

from __future__ import annotations

import hashlib
import os
import re
from fnmatch import translate
from functools import lru_cache

import mapconv
from mapconv.catalog.entries import Entry
from mapconv.sidecars import TOKENIZER_FILES

#: The files of an adapter that its conversion reads.
_READ = re.compile(
    "|".join(
        map(translate, ("adapter_config.json", "adapter_model.*", "map_config.json", "README.md", *TOKENIZER_FILES))
    )
)


def mark(*parts: object) -> str:
    """A short name for these values, the same in every process."""
    text = "\0".join(map(str, parts))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def request_mark(entry: Entry) -> str:
    """What was asked for, and of which version of mapconv."""
    return mark(mapconv.__version__, entry.source, entry.base, entry.options.digest)


def done_mark(request: str, content: str, base: str | None) -> str:
    """The fingerprint of a finished entry; ``base`` as it was found when the adapter was converted."""
    return mark(request, content, base, None if base is None else base_mark(base))


def failed_mark(entry: Entry, stat: str) -> str:
    """The fingerprint of an entry that failed: a changed source, base or option makes it due again."""
    return mark(request_mark(entry), stat, None if entry.base is None else base_mark(entry.base))


def source_mark(source: str) -> str:
    """The stat mark of an adapter's folder; for what is no folder here, its name."""
    try:
        with os.scandir(source) as found:
            files = sorted((item.name, *_stat(item)) for item in found if _READ.match(item.name))
    except OSError:
        return mark("absent", source)
    return mark("folder", *files)


@lru_cache(maxsize=4096)
def base_mark(base: str) -> str:
    """The stat mark of a base model's folder; taken once a run, which also reads it as one."""
    try:
        with os.scandir(base) as found:
            files = sorted((item.name, *_stat(item)) for item in found if not item.name.startswith("."))
    except OSError:
        return mark("absent", base)
    return mark("folder", os.path.realpath(base), *files)


def _stat(item: os.DirEntry) -> tuple[int, int]:
    try:
        status = item.stat()
    except OSError:  # a link that leads nowhere
        return -1, -1
    return status.st_size, status.st_mtime_ns
