"""Which strings of a configuration or a card may leave this machine: those that are known to be public.

A path has too many spellings to be told by its looks (``..\\x``, ``~me/x``, ``//server/x``, ``--data /home/x``), so
the question is turned round. A string without a separator names no place. One that has a separator is public where its
field holds content of the model (a label, a chat template) or a pattern of module names; as an id of the Hub where its
field holds one, or the push itself names it; as a URL of a public host; and as a markup token such as ``</s>``. Any
other is refused. Names of fields are held to the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

#: Fields of which all below is content of the model, which its weights or its tokenizer's table make public anyway.
_CONTENT = {
    "added_tokens_decoder", "additional_special_tokens", "chat_template", "extra_special_tokens", "id2label",
    "label2id", "task_specific_params", "text",
}  # fmt: skip
#: Fields that hold ids of the Hub.
_HUB_IDS = {
    "_name_or_path", "auto_map", "base_model", "base_model_name_or_path", "datasets", "model_name_or_path",
    "name_or_path", "source_datasets", "tokenizer_name_or_path",
}  # fmt: skip
#: Fields that hold regular expressions for names of modules.
_PATTERNS = {
    "alpha_pattern", "exclude_modules", "ignore", "layers_pattern", "modules_to_not_convert", "modules_to_save",
    "rank_pattern", "target_modules", "target_parameters", "targets",
}  # fmt: skip
_SEPARATOR = re.compile(r"[/\\]|(?<![\w~])~\w")
_WORDS = re.compile(r"[\s,;\"'`()=]+")
_URL = re.compile(r"https?://(?P<host>[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,})(?::\d+)?(?:[/?#]\S*)?")
#: Endings of hosts that exist in one house alone.
_PRIVATE_HOSTS = {"corp", "home", "internal", "intranet", "lan", "local", "localdomain", "localhost", "test"}
_MARKUP = re.compile(r"[<\[{]\|?/?[\w|:.-]*/?\|?[>\]}]|//?")
#: A code file of a repository, as ``auto_map`` names its classes.
_REMOTE_CLASS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)--[\w.]+")
_ESCAPES = re.compile(r"\\[.dDwWsSbBAZ\[\](){}^$|+*?-]")

Place = tuple[str, ...]


def first_private(table: Any, known: Collection[str] = ()) -> tuple[str, str] | None:
    """(place, string) of the first string below a JSON or YAML value that is not known to be public, or None.

    Args:
        table: the value.
        known: ids of the Hub that are public wherever they stand.
    """
    for place, text in _strings(table):
        if not _is_public(place, text, known):
            return ".".join(place), text
    return None


def is_public(text: str, known: Collection[str] = ()) -> bool:
    """Whether a string is public in any field."""
    return _is_public((), text, known)


def _strings(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every string, the names of fields included; a name stands in the place of what it names."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield (*place, "(name)"), key
            yield from _strings(item, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _strings(item, (*place, str(number)))


def _is_public(place: Place, text: str, known: Collection[str]) -> bool:
    if _SEPARATOR.search(text) is None or any(key in _CONTENT or key.endswith("_token") for key in place):
        return True
    if any(key in _PATTERNS for key in place):
        return _SEPARATOR.search(_ESCAPES.sub("", text)) is None
    if any(key in _HUB_IDS for key in place):
        remote = _REMOTE_CLASS.fullmatch(text)
        if is_hub_id(remote["repo"] if remote else text):
            return True
    return all(_is_public_word(word, known) for word in _WORDS.split(text))


def is_hub_id(text: str) -> bool:
    """Whether the Hub allows this name, and nothing on this machine has it."""
    from mapconv.hub.reference import is_repo_id

    return is_repo_id(text) and not Path(text).exists()


def _is_public_word(word: str, known: Collection[str]) -> bool:
    if _SEPARATOR.search(word) is None or _MARKUP.fullmatch(word):
        return True
    # A tag such as base_model:adapter:owner/name has words of the Hub before the id.
    if any(word == name or re.fullmatch(r"(?:[\w-]+:)+", word.removesuffix(name)) for name in known):
        return True
    url = _URL.fullmatch(word)
    return url is not None and url["host"].rpartition(".")[2].lower() not in _PRIVATE_HOSTS
