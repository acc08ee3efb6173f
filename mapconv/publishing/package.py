"""What leaves this machine when a result is published: an allow-list of our own files, and no local path in them.

The folder is only read. Files that name a local path where transformers or mapconv keep one are sent in a rewritten
form; any other string that is not known to be public (``mapconv.metadata.public``) stops the push. All of this happens
before the first connection.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mapconv.checkpoint.filenames import MERGE_RECORD, MODEL_CONFIG
from mapconv.checkpoint.headers import read_tensor_file
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.model_config import read_model_config
from mapconv.checkpoint.sidecars import model_files, tokenizer_files
from mapconv.errors import AdapterError, HubError
from mapconv.fidelity.saved import read_report
from mapconv.files import LARGE, check_regular, read_bytes
from mapconv.formats import read_adapter
from mapconv.formats.mapdir import MAP_CONFIG_FILE, map_modules, read_record
from mapconv.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from mapconv.hub.reference import is_repo_id
from mapconv.jsonfile import read_object
from mapconv.metadata.card import CARD_FILE, PLOT_FILE, REPORT_FILE, CardFacts, adapter_form, write_card
from mapconv.metadata.public import first_private, is_hub_id
from mapconv.metadata.readme import Readme, check_card, merge_readmes, parse_readme

Kind = Literal["adapter", "merged"]
#: Tables of tokens, whose strings are data and no settings.
_TOKEN_TABLES = ("tokenizer.json", "vocab.json", "added_tokens.json", "chat_template.json")
#: Fields in which transformers and its tokenizers keep where a model was loaded from.
_NAME_FIELDS = ("_name_or_path", "name_or_path")
#: Fields in which they keep from which file a part was loaded, and which no loader reads.
_LOADED_FROM = ("special_tokens_map_file", "tokenizer_file")


@dataclass(frozen=True)
class Outgoing:
    """A file to send: as it lies in the folder (``content`` None), or with other bytes."""

    name: str
    path: Path
    nbytes: int
    content: bytes | None = None
    note: str = ""


@dataclass(frozen=True)
class Package:
    """Everything that a push sends, but for the README.md, which depends on what the Hub has already."""

    folder: Path
    kind: Kind
    base: str
    files: tuple[Outgoing, ...]
    facts: CardFacts
    own: Readme
    license: str | None
    left_behind: tuple[str, ...]

    @property
    def known(self) -> set[str]:
        """The Hub's names of all that this was made from."""
        return _known_names(self.facts.record)

    @property
    def source(self) -> str | None:
        """The Hub name of the adapter that this was made from."""
        return self.facts.source.get("name")

    def card(self, repo_id: str, remote: str | None = None) -> str:
        """The README.md to send, with the own text of both sides (``remote``: what the Hub has), checked.

        Raises:
            HubError: a field that the Hub would refuse, a path, or own text that was edited on both sides.
        """
        there = None if remote is None else parse_readme(remote, "README.md on the Hub")
        own = merge_readmes(self.own, there)
        text = write_card(self.facts, own, title=repo_id.rpartition("/")[2], repo_id=repo_id, license_=self.license)
        check_card(text, str(self.folder / CARD_FILE), {*self.known, repo_id})
        return text


def pack(folder: Path, *, base_id: str | None = None, license_: str | None = None) -> Package:
    """Choose and rewrite the files of a MAP adapter or a merged model.

    Args:
        folder: what ``upgrade`` or ``merge`` wrote.
        base_id: the base model's Hub id; None takes what the result recorded, or its local base's own configuration.
        license_: for the card; None copies the source's or the base's.

    Raises:
        HubError: a local path that cannot be rewritten, or a symbolic link. AdapterError, CheckpointError: broken.
    """
    if base_id is not None and not is_repo_id(base_id):
        raise HubError(f"--base-id {base_id!r} is not a Hub id: give it as owner/name.")
    kind = _kind(folder)
    place = folder / (MAP_CONFIG_FILE if kind == "adapter" else MERGE_RECORD)
    record = read_record(place)
    base = _public_base(record["base"], base_id, folder)
    public = _public_record(record, base)
    names = _adapter_files(folder) if kind == "adapter" else _merged_files(folder)
    files = [_outgoing(folder, name, kind, base, public) for name in sorted(names)]
    modules = map_modules(record, place)
    config = _read_json(folder / CONFIG_FILE) if kind == "adapter" else read_model_config(folder)
    facts = CardFacts(
        kind=kind,
        base=base,
        base_revision=public["base"]["revision"],
        record=public,
        modules=modules,
        task=config.get("task_type") if kind == "adapter" else _task(config),
        form=adapter_form(config),
        report=read_report(folder),
    )
    plot = _plot(folder, modules)
    if plot is not None:
        files.append(plot)
        facts = replace(facts, has_plot=True)
    readme = folder / CARD_FILE
    own = parse_readme(_readme_text(readme), str(readme)) if readme.exists() else Readme()
    sent = {file.name for file in files} | {CARD_FILE, REPORT_FILE}
    return Package(folder, kind, base, tuple(files), facts, own, license_, _left_behind(folder, sent))


def _kind(folder: Path) -> Kind:
    if (folder / MAP_CONFIG_FILE).is_file():
        return "adapter"
    if (folder / MERGE_RECORD).is_file():
        return "merged"
    if (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder} is not a MAP adapter yet: run `mapconv upgrade {folder}` and push its result.")
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder: give what `mapconv upgrade` or `mapconv merge` wrote.")
    raise AdapterError(
        f"{folder} has neither {MAP_CONFIG_FILE} nor {MERGE_RECORD}: give what `mapconv upgrade` or `mapconv merge` "
        "wrote."
    )


def _adapter_files(folder: Path) -> list[str]:
    read_adapter(folder)  # whole and consistent, or the push stops here
    return [CONFIG_FILE, WEIGHTS_FILE, MAP_CONFIG_FILE, *(name.as_posix() for name in tokenizer_files(folder))]


def _merged_files(folder: Path) -> list[str]:
    checkpoint = read_checkpoint(folder)
    weights = [file.path.name for file in checkpoint.files]
    index = [checkpoint.index_file] if weights != [checkpoint.single_file] else []
    small = [name.as_posix() for name in (*tokenizer_files(folder), *model_files(folder))]
    return [MODEL_CONFIG, MERGE_RECORD, *weights, *index, *small]


def _outgoing(folder: Path, name: str, kind: Kind, base: str, record: Mapping[str, Any]) -> Outgoing:
    path = folder / name
    check_regular(path, HubError, folder=folder)
    known = _known_names(record)
    if name.endswith(".safetensors"):
        file = read_tensor_file(path)
        _refuse_private(path, {"__metadata__": file.metadata, "tensors": [ref.name for ref in file.tensors]}, known)
    if not name.endswith(".json") or name in _TOKEN_TABLES:
        return Outgoing(name, path, path.stat().st_size)
    table = _read_json(path)
    public = dict(record) if name in (MAP_CONFIG_FILE, MERGE_RECORD) else _public_json(table, base)
    if name == CONFIG_FILE:
        public["base_model_name_or_path"], public["revision"] = base, record["base"]["revision"]
    _refuse_private(path, public, known)
    if public == table:
        return Outgoing(name, path, path.stat().st_size)
    content = (json.dumps(public, indent=2, ensure_ascii=False, sort_keys=name == CONFIG_FILE) + "\n").encode()
    return Outgoing(name, path, len(content), content, "local names rewritten")


def _public_json(value: Any, base: str) -> Any:
    """The same settings with the base's Hub id wherever transformers keeps a path that a model was loaded from."""
    if isinstance(value, dict):
        return {
            key: base if key in _NAME_FIELDS and item and not is_hub_id(str(item)) else _public_json(item, base)
            for key, item in value.items()
            if key not in _LOADED_FROM
        }
    return [_public_json(item, base) for item in value] if isinstance(value, list) else value


def _public_base(record: Mapping[str, Any], base_id: str | None, folder: Path) -> str:
    """The base's Hub id: as given, as recorded, or as the local base's own configuration says it."""
    name = record.get("name") or ""
    if base_id is not None:
        return base_id
    if not Path(name).exists() and is_repo_id("/".join(name.split("/")[:2])):
        return "/".join(name.split("/")[:2])
    for place, key in ((MODEL_CONFIG, "_name_or_path"), (CONFIG_FILE, "base_model_name_or_path")):
        try:
            found = read_object(Path(name) / place, HubError).get(key)
        except (OSError, HubError):
            continue
        if isinstance(found, str) and is_hub_id(found):
            return found
    raise HubError(
        f"{folder} was made on the base model in {name}, a folder of this machine: say with --base-id owner/name which "
        "model that is on the Hub."
    )


def _public_record(record: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The provenance with Hub names only: a local source keeps its fingerprint and loses its path."""
    known = record["base"]
    same = str(known.get("name")).split("/")[:2] == base.split("/")[:2] or os.path.isabs(str(known.get("name")))
    revision = known.get("revision") if same else None
    public = dict(record) | {"base": dict(known) | {"name": base, "revision": revision}}
    more = [_public_source(source) for source in record.get("more_sources") or []]
    public |= {"source": _public_source(record.get("source") or {})}
    return public | {"more_sources": more} if "more_sources" in record else public


def _public_source(source: Mapping[str, Any]) -> dict[str, Any]:
    on_hub = source.get("revision") and is_repo_id("/".join(str(source.get("name")).split("/")[:2]))
    public = dict(source) if on_hub else dict(source) | {"name": None, "revision": None}
    return public | {"source": _public_source(source["source"])} if isinstance(source.get("source"), dict) else public


def _plot(folder: Path, modules: tuple) -> Outgoing | None:
    """The card's picture, where matplotlib is installed (the extra ``report``); the card's table needs none."""
    if find_spec("matplotlib") is None:
        return None
    from mapconv.publishing.picture import scalars_png

    content = scalars_png(modules) if modules else None
    return None if content is None else Outgoing(PLOT_FILE, folder / PLOT_FILE, len(content), content, "drawn")


def _left_behind(folder: Path, sent: set[str]) -> tuple[str, ...]:
    """What lies in the folder and stays there, so that the user sees it; a folder is named once."""
    tops = {name.partition("/")[0] for name in sent}
    return tuple(sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in tops))


def _task(config: Mapping[str, Any]) -> str | None:
    """The task type, in PEFT's words, of a model by the name of its class."""
    architecture = next(iter(config.get("architectures") or []), "")
    endings = {
        "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }  # fmt: skip
    return next((task for ending, task in endings.items() if architecture.endswith(ending)), None)


def _readme_text(path: Path) -> str:
    try:
        return read_bytes(path, HubError).decode()
    except UnicodeDecodeError as error:
        raise HubError(f"{path} is not UTF-8 text (byte {error.start}): convert it, and push again.") from None


def _known_names(record: Mapping[str, Any]) -> set[str]:
    """The Hub's names of a public record: the base's, and of each source and what that was made from."""
    names = {record["base"]["name"]}
    waiting = [record.get("source"), *(record.get("more_sources") or [])]
    while waiting:
        source = waiting.pop()
        if isinstance(source, dict):
            names.add(source.get("name"))
            waiting.append(source.get("source"))
    return {name for name in names if isinstance(name, str)}


def _refuse_private(path: Path, table: Any, known: set[str]) -> None:
    private = first_private(table, known)
    if private is not None:
        raise HubError(
            f"{path}: {private[0]} is {private[1]!r}, which may name a place on this machine: remove it, or replace it "
            "with a name on the Hub or a URL, and push again."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, AdapterError, advice="make the folder again", limit=LARGE)
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: make the folder again.") from None
