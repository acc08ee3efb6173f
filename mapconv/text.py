"""Text for measuring and for training: a user's file, or one that ships with the package, as blocks of tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mapconv.errors import DataError
from mapconv.models import load_tokenizer


@dataclass(frozen=True)
class TextSample:
    """Blocks of token ids, all of one length, and what a result records of them."""

    blocks: list[list[int]]
    record: dict[str, Any]


def read_sample(path: Path, tokenizer: Path, *, samples: int, length: int) -> TextSample:
    """The first ``samples`` blocks of ``length`` tokens of a text file, by the tokenizer in a model's folder.

    Raises:
        DataError: as ``read_text`` and ``load_tokenizer``; or the text does not fill one block.
    """
    text = read_text(path)
    blocks = token_blocks(load_tokenizer(tokenizer), text, samples=samples, length=length)
    if len(blocks[0]) < length:
        raise DataError(
            f"{path} has {len(blocks[0])} tokens, fewer than one sequence of {length}: give a longer text, or "
            f"--sequence-length {len(blocks[0])}."
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    record = {
        "name": path.name,
        "fingerprint": f"sha256:{digest}",
        "samples": len(blocks),
        "sequence_length": length,
    }
    return TextSample(blocks, record)


def read_text(path: Path | None) -> str:
    """The text of a UTF-8 file, or the package's own sample.

    Raises:
        DataError: absent, empty, or not UTF-8.
    """
    if path is None:
        return packaged_text("sample.txt")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or give another file.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a text file with --data.") from None
    if not text.strip():
        raise DataError(f"{path} is empty: give a file with text.")
    return text


def packaged_text(name: str) -> str:
    """A text that ships with mapconv."""
    return files("mapconv").joinpath("texts", name).read_text(encoding="utf-8")


def token_blocks(tokenizer: Any, text: str, *, samples: int, length: int) -> list[list[int]]:
    """The first ``samples`` blocks of ``length`` tokens; one shorter block if the text does not fill even one.

    Raises:
        DataError: fewer than two tokens, so that nothing can be predicted.
    """
    # One call over the whole text; the tokenizer's warning about its model's length does not apply to blocks.
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < 2:
        raise DataError(f"the text has {len(tokens)} tokens, expected at least 2: give a longer one with --data.")
    blocks = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    full = [block for block in blocks if len(block) == length]
    return full[:samples] or [tokens]
