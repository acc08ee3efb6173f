"""Token sequences as tensors: packed blocks of text, or padded rows of chats and labelled texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mapconv.data.rows import Kind

#: A label that does not count, as transformers' losses know it.
IGNORED = -100
#: Sequences that run together where their number is free: more would only take more memory.
BATCH = 8


@dataclass(frozen=True, eq=False)
class Dataset:
    """N sequences.

    input_ids and attention_mask are (N, length) int64; padding is on the right. labels are (N, length), the token
    itself where it counts (a model shifts them), else ``IGNORED``; for a classifier (N,), the class, or ``IGNORED``
    where none is known.
    """

    kind: Kind
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        return int(self.attention_mask.sum())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that a model sees: another file, tokenizer, length, split or objective changes it."""
        digest = hashlib.sha256()
        for values in (self.input_ids, self.attention_mask, self.labels):
            digest.update(f"{tuple(values.shape)}\n".encode())
            digest.update(values.contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def rows(self) -> list[list[int]]:
        """Each sequence without its padding."""
        lengths = self.attention_mask.sum(1).tolist()
        return [ids[:length] for ids, length in zip(self.input_ids.tolist(), lengths, strict=True)]

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Some sequences, cut to the longest of them."""
        chosen = torch.as_tensor(indices)
        mask = self.attention_mask[chosen]
        longest = int(mask.sum(1).max())
        labels = self.labels[chosen]
        batch = {
            "input_ids": self.input_ids[chosen, :longest],
            "attention_mask": mask[:, :longest],
            "labels": labels[:, :longest] if labels.dim() == 2 else labels,
        }
        return {name: values.to(device) for name, values in batch.items()}

    def first(self, count: int) -> Dataset:
        return Dataset(self.kind, self.input_ids[:count], self.attention_mask[:count], self.labels[:count], self.notes)

    def last(self, count: int) -> Dataset:
        ids, mask, labels = (values[-count:] for values in (self.input_ids, self.attention_mask, self.labels))
        return Dataset(self.kind, ids, mask, labels, self.notes)


@dataclass(frozen=True)
class Tokens:
    """One sequence before it is padded: its tokens, and its labels or its class."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...] | int


def stack(sequences: Sequence[Tokens], kind: Kind, padding: int, notes: Sequence[str] = ()) -> Dataset:
    """Sequences as tensors, padded on the right to the longest."""
    longest = max((len(sequence.tokens) for sequence in sequences), default=0)
    input_ids = torch.full((len(sequences), longest), padding)
    mask = torch.zeros_like(input_ids)
    classes = all(isinstance(sequence.labels, int) for sequence in sequences)
    labels = torch.full((len(sequences),) if classes else (len(sequences), longest), IGNORED)
    for row, sequence in enumerate(sequences):
        length = len(sequence.tokens)
        input_ids[row, :length] = torch.tensor(sequence.tokens)
        mask[row, :length] = 1
        if classes:
            labels[row] = torch.tensor(sequence.labels)
        else:
            labels[row, :length] = torch.tensor(sequence.labels)
    return Dataset(kind, input_ids, mask, labels, tuple(notes))


def batches_of(rows: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """Sequences of equal length together, so that no batch needs padding, which would count as inputs."""
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [group[i : i + size] for _, group in sorted(by_length.items()) for i in range(0, len(group), size)]
