"""The benchmark that trains LoRA, DoRA and LoMAP: its data do not leak, and its tables say what the runs say."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
from claim import Runs
from claim_table import best_learning_rate, markdown, next_learning_rate, paired, verdict
from claim_tasks import PARTS, split_ratings, split_topics

sys.path.pop(0)


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def paragraphs(texts: list[str]) -> set[str]:
    return {words(paragraph) for text in texts for paragraph in text.split("\n\n")} - {""}


def test_no_paragraph_of_the_documentation_is_in_two_parts():
    parts = {part: paragraphs(texts) for part, texts in split_topics(topics).items()}
    assert all(len(parts[part]) > 20 for part in PARTS)
    assert not parts["train"] & parts["test"]
    assert not parts["train"] & parts["validation"]
    assert not parts["validation"] & parts["test"]
    # Were whole topics all that is held out, the test would be in the training text: topics quote each other.
    names = sorted(topics)
    held_out = [topics[name] for number, name in enumerate(names) if number % 10 in (8, 9)]
    others = [topics[name] for number, name in enumerate(names) if number % 10 not in (4, 8, 9)]
    assert paragraphs(held_out) & paragraphs(others)


def test_topics_are_held_out_whole():
    made_up = {f"topic{i:02}": f"Heading {i}\n\nshared text\n\nends {i}" for i in range(20)}
    parts = split_topics(made_up)
    assert parts["test"] == [made_up[f"topic{i:02}"] for i in (8, 9, 18, 19)]
    assert parts["validation"] == [f"Heading {i}\n\nends {i}" for i in (4, 14)]
    assert len(parts["train"]) == 14
    assert not any("shared" in text for text in parts["train"])


def test_no_sentence_is_in_two_parts_and_labels_are_the_sign_of_the_rating():
    rows = [(f"Film number {i}.", (-1) ** i * (0.5 + i % 3)) for i in range(300)]
    copies = [(f"film  number {i}", rating) for i, (_, rating) in enumerate(rows[:100])]
    neutral = [(f"Neither {i}", 0.4 * (-1) ** i) for i in range(50)]
    parts = split_ratings(rows + copies + neutral, validation=40, test=60)
    found = {part: [words(text) for text, _ in parts[part]] for part in PARTS}
    assert {part: len(found[part]) for part in PARTS} == {"train": 200, "validation": 40, "test": 60}
    everything = [text for part in PARTS for text in found[part]]
    assert len(set(everything)) == 300
    assert all(label == 1 - int(text.split()[-1].rstrip(".")) % 2 for part in PARTS for text, label in parts[part])
    assert parts == split_ratings(rows + copies + neutral, validation=40, test=60)
    assert all(0.3 < sum(label for _, label in parts[part]) / len(parts[part]) < 0.7 for part in PARTS)


LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def follow(losses: dict[float, float], grid: tuple[float, ...]) -> dict[float, float]:
    tried: dict[float, float] = {}
    while (rate := next_learning_rate(tried, grid, LADDER)) is not None:
        tried[rate] = losses[rate]
    return tried


@pytest.mark.parametrize(
    ("losses", "tried", "best"),
    [
        ((5, 4, 3, 4, 9), {3e-4, 1e-3, 3e-3}, 1e-3),
        ((5, 6, 4, 3, 9), {3e-4, 1e-3, 3e-3, 1e-2}, 3e-3),
        ((1, 2, 3, 4, 5), {1e-4, 3e-4, 1e-3, 3e-3}, 1e-4),  # the ladder ends there
        ((5, 4, 3, math.nan, math.inf), {3e-4, 1e-3, 3e-3}, 1e-3),
    ],
)
def test_the_learning_rate_is_searched_until_the_best_is_not_at_an_edge(losses, tried, best):
    found = follow(dict(zip(LADDER, losses, strict=True)), grid=(3e-4, 1e-3, 3e-3))
    assert set(found) == tried
    assert best_learning_rate(found) == best


def run(method: str, seed: int, loss: float, parameters: int = 10) -> dict:
    return {"method": method, "seed": seed, "test": {"loss": loss}, "parameters": parameters, "seconds": float(seed)}


RUNS = [run("base", 1, 3.0, 0)] + [
    run(method, seed, loss)
    for method, losses in {"LoRA": (1.0, 2.0, 3.0), "LoMAP": (0.9, 1.8, 2.7)}.items()
    for seed, loss in enumerate(losses, 1)
]


def test_differences_are_paired_by_seed():
    difference = paired([*RUNS[:-1], run("LoMAP", 4, 9.0), RUNS[-1]], "LoMAP", "LoRA", "loss")
    assert difference == pytest.approx({"mean": -0.2, "deviation": 0.1, "width": 4.30 * 0.1 / 3**0.5, "seeds": 3})
    assert paired(RUNS[:2] + RUNS[4:], "LoMAP", "LoRA", "loss") is None
    # The deviation of each method is 1 and 0.9: unpaired, the same difference would drown.
    assert verdict(difference, "loss") == "better by 2.0 deviations, within the 95 % interval"
    assert verdict(difference | {"width": 0.19}, "loss") == "better by 2.0 deviations, beyond the 95 % interval"
    assert verdict(difference | {"mean": 0.05}, "loss") == "worse by 0.5 deviations, within the 95 % interval"
    assert verdict(difference, "accuracy") == "worse by 2.0 deviations, within the 95 % interval"


def test_the_table_shows_means_and_deviations():
    table = markdown("made-up", RUNS, {"LoRA": 1e-3, "LoMAP": 3e-3}, ("base", "LoRA", "DoRA", "LoMAP"))
    assert "| base (1 seeds) | 0 | – | 3.0000 | 1.00 |" in table
    assert "| LoRA (3 seeds) | 10 | 0.001 | 2.0000 ± 1.0000 | 2.00 |" in table
    assert "| LoMAP (3 seeds) | 10 | 0.003 | 1.8000 ± 0.9000 | 2.00 |" in table
    assert "| LoMAP − LoRA | -0.2000 ± 0.1000 | loss better by 2.0 deviations, within" in table
    assert "DoRA" not in table


class MadeUpTask:
    """A task with a model of one weight, which counts its trainings."""

    name, steps, batch, targets = "made-up", 2, 1, ("layer",)
    trained: list[int]

    def __init__(self):
        self.trained = []

    def model(self, seed):
        self.trained.append(seed)
        return torch.nn.Sequential(torch.nn.Linear(1, 1))

    def head(self, model):
        return list(model.parameters())

    def batches(self, seed):
        return [torch.full((1, 1), float(seed))] * self.steps

    def loss(self, model, batch):
        return model(batch).square().mean()

    def scores(self, model, part):
        return {"loss": self.loss(model, self.batches(1)[0]).item()}


def test_a_run_is_made_once_and_again_where_its_settings_differ(tmp_path):
    task = MadeUpTask()
    first = Runs(tmp_path / "runs.jsonl").get(task, "base", 0.0, 3, "test")
    again = Runs(tmp_path / "runs.jsonl").get(task, "base", 0.0, 3, "test")
    assert first == again == json.loads((tmp_path / "runs.jsonl").read_text())
    assert task.trained == [3]
    assert first["test"]["loss"] != Runs(tmp_path / "runs.jsonl").get(task, "base", 0.0, 4, "test")["test"]["loss"]
    task.steps = 3
    Runs(tmp_path / "runs.jsonl").get(task, "base", 0.0, 3, "test")
    assert task.trained == [3, 4, 3]
