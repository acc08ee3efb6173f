"""A README.md with a part that mapconv writes and parts that are the user's own.

    ---                     metadata: ours where we know better, the user's other keys kept
    ---
    the user's own text
    <!-- mapconv:begin own=1f0c… … -->
    what mapconv writes, again at each push
    <!-- mapconv:end -->
    the user's own text

``own`` is a hash of the user's text at the time of writing: it tells whether somebody has edited that text since, on
the Hub's pages or in the local file, and which of the two to keep.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mapconv.errors import HubError
from mapconv.files import read_bytes
from mapconv.metadata.public import first_private
from mapconv.untrusted import yamltext

_FRONT = re.compile(
    r"\A\ufeff?\s*---[ \t]*\r?\n(?P<yaml>.*?)(?:^|\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE
)
#: Bounded, as a file may hold the beginning of this tens of thousands of times.
_BEGIN = re.compile(r"<!-- mapconv:begin own=(?P<own>\w{0,64})[^>\n]{0,200}-->")
_END = "<!-- mapconv:end -->"
#: The results of large benchmarks are a few hundred kilobytes.
_LONGEST_FRONT = 1 << 21
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class Readme:
    """The parts of a README.md; ``recorded`` is the own text's hash when the block was written, None without one."""

    metadata: dict[str, Any] = field(default_factory=dict)
    before: str = ""
    after: str = ""
    recorded: str | None = None

    @property
    def own(self) -> tuple[str, str]:
        return self.before, self.after

    @property
    def own_hash(self) -> str:
        text = "\0".join(self.own)
        return hashlib.sha256(text.encode()).hexdigest()[:12] if text != "\0" else "none"


def read_readme(path: Path) -> Readme:
    """The parts of a file; an empty one where there is none that can be read."""
    try:
        return parse_readme(read_bytes(path, HubError).decode(), str(path.parent))
    except (OSError, UnicodeDecodeError, HubError):
        return Readme()


def parse_readme(text: str, where: str) -> Readme:
    """Take a README.md apart; text without our block is the user's own, and comes after it.

    Raises:
        HubError: its metadata is not a YAML table.
    """
    front = _FRONT.match(text)
    metadata = _read_yaml(front["yaml"], where) if front else {}
    body = text[front.end() :] if front else text
    begin = _BEGIN.search(body)
    end = -1 if begin is None else body.find(_END, begin.end())
    if begin is None or end < 0:
        return Readme(metadata, "", body.strip("\r\n"))
    after = body[end + len(_END) :]
    return Readme(metadata, body[: begin.start()].strip("\r\n"), after.strip("\r\n"), begin["own"])


def merge_readmes(local: Readme, remote: Readme | None) -> Readme:
    """The own text to keep: the side that was edited since the last push; metadata of both, the local file's first.

    Raises:
        HubError: both sides were edited, so that keeping one would lose the other.
    """
    if remote is None:
        return local
    metadata = remote.metadata | local.metadata
    tags = [*_list(local.metadata.get("tags")), *_list(remote.metadata.get("tags"))]
    if tags:
        metadata["tags"] = list(dict.fromkeys(tags))
    untouched_there = remote.recorded == remote.own_hash
    untouched_here = remote.recorded == local.own_hash
    if local.own == remote.own or local.own == ("", "") or (untouched_here and not untouched_there):
        return Readme(metadata, *remote.own)
    if remote.own == ("", "") or untouched_there:
        return Readme(metadata, *local.own)
    raise HubError(
        "README.md was edited on the Hub and in the local folder: copy what the Hub's README.md has outside of "
        "mapconv's block into the local one, or remove the local text, and push again."
    )


def compose(data: Mapping[str, Any], block: str, own: Readme) -> str:
    """The README.md with ``data`` as its metadata and ``block`` between the user's own texts."""
    from huggingface_hub import ModelCardData

    front = f"---\n{ModelCardData(**data, ignore_metadata_errors=True).to_yaml()}\n---"
    begin = (
        f"<!-- mapconv:begin own={own.own_hash} (written again by each `mapconv push`: put your own text outside) -->"
    )
    parts = [front, own.before, f"{begin}\n\n{block.strip()}\n\n{_END}", own.after]
    return "\n\n".join(part for part in parts if part) + "\n"


def check_card(text: str, where: str = "README.md", known: Collection[str] = ()) -> None:
    """Refuse a card that the Hub would refuse, or whose metadata is not known to be public, before anything is sent.

    Args:
        text: the whole README.md.
        where: what to call it.
        known: ids of the Hub that are public wherever they stand.

    Raises:
        HubError: with the field that is wrong.
    """
    from mapconv.hub.reference import is_repo_id

    data = parse_readme(text, where).metadata
    for key in ("library_name", "pipeline_tag", "base_model_relation", "license_name", "license_link"):
        if key in data and (not isinstance(data[key], str) or not data[key]):
            raise HubError(f"{where}: {key} is {data[key]!r} in the metadata, expected a word.")
    for key in ("tags", "datasets", "language"):
        if not all(isinstance(item, str) and item.strip() for item in _list(data.get(key))):
            raise HubError(f"{where}: {key} is {data[key]!r} in the metadata, expected a list of words.")
    license_ = data.get("license")
    if license_ is not None and not all(isinstance(x, str) and _LICENSE.fullmatch(x) for x in _list(license_)):
        raise HubError(
            f"{where}: license is {license_!r} in the metadata, expected an identifier of the Hub such as apache-2.0."
        )
    for base in _list(data.get("base_model")):
        if not isinstance(base, str) or not is_repo_id(base):
            raise HubError(
                f"{where}: base_model is {base!r} in the metadata, expected a Hub id (owner/name): --base-id."
            )
    private = first_private(data, known)
    if private is not None:
        raise HubError(
            f"{where}: {private[0]} is {private[1]!r} in the metadata, which may name a place on this machine: remove "
            "it, or replace it with a name on the Hub or a URL."
        )


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        loader, node = yamltext.parse(text, longest=_LONGEST_FRONT)
        data = {} if node is None else yamltext.construct(loader, node)
    except yamltext.YamlError as error:
        raise HubError(
            f"{where}: the metadata between the --- lines, line {error.line}: {error}: correct it."
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise HubError(f"{where}: the metadata between the --- lines is {type(data).__name__}, expected a table.")
    return {str(key): value for key, value in data.items()}


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
