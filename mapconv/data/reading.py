"""A data file as datasets: rows are tokenized, the held-out part is set aside, and what remains is packed or padded."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mapconv.data.blocks import IGNORED, Dataset, Tokens, stack
from mapconv.data.chat import ChatTemplate
from mapconv.data.rows import BadRow, Row, Rows, UnusableRowError, refuse_many
from mapconv.errors import DataError

#: What the training optimises: the distance to the source on any text, or the data's own labels.
Objective = Literal["distill", "task"]
#: Unless the caller says otherwise: a tenth is held out, and no more sequences than these.
HELD_OUT_SHARE, HELD_OUT_SEQUENCES = 0.1, 32


def read_dataset(
    rows: Rows,
    tokenizer: Any,
    *,
    length: int,
    samples: int | None = None,
    held_out: int | float | None = None,
    most_held_out: int = HELD_OUT_SEQUENCES,
    seed: int = 0,
    objective: Objective = "distill",
    classes: Mapping[str, int] | None = None,
) -> tuple[Dataset, Dataset]:
    """(training data, held-out data) of a file: whole documents or rows, or whole blocks of a single text.

    Args:
        rows: what ``read_rows`` found in the file.
        tokenizer: the model's.
        length: tokens of a sequence. Documents are packed into blocks of exactly this, chats and labelled texts are
            cut to it.
        samples: at most this many training sequences, the first ones; None for all.
        held_out: a number of sequences, or below 1 a share; None: a tenth, at most ``most_held_out`` sequences.
        seed: of the choice of what is held out.
        objective: ``task`` needs labels: a classifier's classes; for chats, the assistant's turns alone count.
        classes: for a classifier, its classes' numbers by name; None for a causal language model.

    Raises:
        DataError: the rows do not fit the model, or their tokens do not make one sequence for each part.
    """
    reader = _Reader(rows, tokenizer, length, objective, classes)
    units = reader.units()
    chosen = _held_out(units, reader, held_out, most_held_out, seed)
    parts = [[unit for unit, out in zip(units, chosen, strict=True) if out is side] for side in (False, True)]
    train, kept = (reader.sequences(part) for part in parts)
    if not train or not kept:
        raise reader.too_short(units)
    limit = _held_out_limit(held_out, most_held_out)
    return reader.dataset(train[:samples]), reader.dataset(kept[:limit])


def read_blocks(
    rows: Rows,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    classes: Mapping[str, int] | None = None,
) -> Dataset:
    """The first ``samples`` sequences of a file; a single shorter one if the text does not fill one.

    Raises:
        DataError: as ``read_dataset``; or fewer than two tokens, so that nothing can be predicted.
    """
    reader = _Reader(rows, tokenizer, length, "distill", classes)
    units = reader.units()
    sequences = reader.sequences(units) or [reader.packed([token for unit in units for token in unit.tokens])]
    tokens = max(len(sequence.tokens) for sequence in sequences)
    if tokens < 2:
        raise DataError(f"{rows.path} has {tokens} tokens, expected at least 2: give a longer text with --data.")
    return reader.dataset(sequences[:samples])


class _Reader:
    """Turns rows into units, of which each goes to one part as a whole, and units into sequences."""

    def __init__(
        self, rows: Rows, tokenizer: Any, length: int, objective: Objective, classes: Mapping[str, int] | None
    ) -> None:
        self._rows, self._tokenizer, self._length = rows, tokenizer, length
        self._objective, self._classes = objective, classes
        self._notes = list(rows.notes)
        self._tokens, self._single_text = 0, False
        self._refuse_misfits()
        # A classifier reads one text at a time, so its documents are not packed; a plain text has no documents.
        self.packs = rows.kind == "text" and (classes is None or rows.from_plain_text)

    def _refuse_misfits(self) -> None:
        kind, path, classes = self._rows.kind, self._rows.path, self._classes
        if kind == "labelled" and classes is None:
            raise DataError(
                f"{path} has labelled texts, which are for a classifier, and the model is a causal language model: "
                "give rows with text or messages."
            )
        if kind == "chat" and classes is not None:
            raise DataError(f"{path} has chats, and the model is a classifier: give rows with input and label.")
        if kind == "text" and classes is not None and self._objective == "task":
            raise DataError(f"{path} has no labels, which the task of a classifier needs: give input and label.")

    def units(self) -> list[Tokens]:
        """Documents, rows, or the blocks of a single text."""
        convert: dict[str, Callable[[Row], Tokens | None]] = {
            "text": self._document,
            "chat": self._chat_reader() if self._rows.kind == "chat" else self._document,
            "labelled": self._labelled,
        }
        units, bad, empty = [], list(self._rows.bad), 0
        for row in self._rows.rows:
            try:
                unit = convert[self._rows.kind](row)
            except UnusableRowError as reason:
                bad.append(BadRow(row.number, str(reason)))
                continue
            empty += unit is None
            units += [] if unit is None else [unit]
        total = len(self._rows.rows) + len(self._rows.bad)
        self._notes += refuse_many(self._rows.path, bad, total)
        self._count_cuts(units, empty)
        if not units:
            raise DataError(f"{self._rows.path}: no row has a token of the assistant within {self._length} tokens.")
        self._tokens = sum(len(unit.tokens) for unit in units)
        self._single_text = len(units) == 1
        if self.packs and self._single_text:
            return [self.packed(tokens) for tokens in self._blocks(units[0].tokens)] or units
        return units

    def sequences(self, units: Sequence[Tokens]) -> list[Tokens]:
        """Whole blocks of the units one after another, or the units as they are."""
        if not self.packs:
            return list(units)
        return [self.packed(tokens) for tokens in self._blocks([token for unit in units for token in unit.tokens])]

    def packed(self, tokens: Sequence[int]) -> Tokens:
        """A block of text: every token of it counts."""
        tokens = tuple(tokens)
        return Tokens(tokens, tokens if self._classes is None else IGNORED)

    def dataset(self, sequences: Sequence[Tokens]) -> Dataset:
        padding = next(
            (number for number in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id) if number is not None), 0
        )
        return stack(sequences, self._rows.kind, padding, self._notes)

    def weight(self, unit: Tokens) -> int:
        """What a unit counts when a share is held out: its tokens where they are packed, else one sequence."""
        return len(unit.tokens) if self.packs else 1

    @property
    def sequence_weight(self) -> int:
        return self._length if self.packs else 1

    def too_short(self, units: Sequence[Tokens]) -> DataError:
        path, total = self._rows.path, self._tokens
        if not self.packs:
            return DataError(f"{path} has {len(units)} usable rows: one to train on and one to hold out are needed.")
        # A single text is cut anywhere. Of documents, each goes to one side: the shortest one is always long enough.
        fits = total // 2 if self._single_text else min(map(self.weight, units))
        advice = f", or pass --sequence-length {fits}" if 2 <= fits < self._length else ""
        return DataError(
            f"{path} has {total} tokens, which do not make one sequence of {self._length} to train on and one to hold "
            f"out: give more text{advice}."
        )

    def _blocks(self, tokens: Sequence[int]) -> list[Sequence[int]]:
        stops = range(self._length, len(tokens) + 1, self._length)
        return [tokens[stop - self._length : stop] for stop in stops]

    def _document(self, row: Row) -> Tokens:
        # One call over a whole text; the tokenizer's warning about its model's length does not apply to blocks.
        if not self.packs:
            return self._single(row.content, IGNORED)
        tokens = self._tokenizer(row.content, add_special_tokens=False, verbose=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        # The end of a document is something to predict; that of a plain text is where the file happens to end.
        tokens = tokens if self._rows.from_plain_text or end is None else [*tokens, end]
        return self.packed(tokens)

    def _chat_reader(self) -> Callable[[Row], Tokens | None]:
        template = ChatTemplate(self._tokenizer)

        def read(row: Row) -> Tokens | None:
            if self._objective == "distill":
                tokens = template.tokens(row.content)
                labels = tokens
            else:
                tokens, mask = template.tokens_and_mask(row.content)
                labels = [token if mine else IGNORED for token, mine in zip(tokens, mask, strict=True)]
            cut = Tokens(tuple(tokens), tuple(labels))
            # The first token is predicted from nothing.
            counts = any(label != IGNORED for label in labels[1 : self._length])
            return cut if counts else None

        return read

    def _labelled(self, row: Row) -> Tokens:
        if row.label is None and self._objective == "distill":
            return self._single(row.content, IGNORED)
        names = self._classes or {}
        label = names.get(row.label) if isinstance(row.label, str) else row.label
        if type(label) is not int or label not in names.values():
            shown = ", ".join(names) if len(names) <= 8 else f"{len(names)} names"
            raise UnusableRowError(
                f"its label {row.label!r} is not one of the model's classes (0 to {len(names) - 1}, or {shown})"
            )
        return self._single(row.content, label)

    def _single(self, text: str, label: int) -> Tokens:
        return Tokens(tuple(self._tokenizer(text, verbose=False)["input_ids"]), label)

    def _count_cuts(self, units: list[Tokens], empty: int) -> None:
        """Cut rows to the sequence length, and say how many lost something."""
        if empty:
            self._notes.append(
                f"{self._rows.path.name}: {empty} chats have no token of the assistant within {self._length} tokens "
                "and were left out"
            )
        if self.packs:
            return
        long = sum(len(unit.tokens) > self._length for unit in units)
        if long:
            self._notes.append(f"{self._rows.path.name}: {long} of {len(units)} rows are cut to {self._length} tokens")
        units[:] = [
            Tokens(u.tokens[: self._length], u.labels if isinstance(u.labels, int) else u.labels[: self._length])
            for u in units
        ]


def _held_out(
    units: Sequence[Tokens], reader: _Reader, held_out: int | float | None, most: int, seed: int
) -> list[bool]:
    """Which units are held out: at random, until their weight is enough, always leaving one sequence to train on.

    Equal units go to the same side: a text that is in the file twice must not be trained on and held out.
    """
    groups: dict[Tokens, list[int]] = defaultdict(list)
    for index, unit in enumerate(units):
        groups[unit].append(index)
    weights = {unit: len(indices) * reader.weight(unit) for unit, indices in groups.items()}
    left, one = sum(weights.values()), reader.sequence_weight
    if held_out is None or held_out < 1:
        share = HELD_OUT_SHARE if held_out is None else held_out
        wanted = share * left
    else:
        wanted = float("inf")
    limit = _held_out_limit(held_out, most)
    wanted = max(one, wanted if limit is None else min(wanted, limit * one))
    order = list(groups)
    random.Random(seed).shuffle(order)
    chosen, taken = [False] * len(units), 0
    for unit in order:
        if taken >= wanted:
            break
        if left - weights[unit] < one:
            continue
        taken, left = taken + weights[unit], left - weights[unit]
        for index in groups[unit]:
            chosen[index] = True
    return chosen


def _held_out_limit(held_out: int | float | None, most: int) -> int | None:
    if held_out is None:
        return most
    return int(held_out) if held_out >= 1 else None
