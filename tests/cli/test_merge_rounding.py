"""``merge --rounding feedback``: what it writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

import mapconv
from mapconv.algebra.feedback import neighbours
from tests.files import read_tensors
from tests.models import kl, load_adapted, load_base, merged_by_peft, save_adapter

TEXT = "the cat sat on a mat, and the dog (a big one) ran to it: why? nobody knows.\n" * 200


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_every_weight_is_within_a_step_and_the_model_closer(method, half_base, request, text, tmp_path):
    adapter = request.getfixturevalue(method)
    fed = mapconv.merge(adapter, tmp_path / "fed", base=half_base, rounding="feedback", data=text, samples=16)
    plain = mapconv.merge(adapter, tmp_path / "plain", base=half_base)
    exact, stored, before = merged_by_peft(half_base, adapter), read_tensors(fed.out), read_tensors(half_base)
    for name, wanted in exact.items():
        if "_proj" not in name:
            assert torch.equal(stored[name], before[name])
            continue
        near, other = neighbours(wanted.float(), torch.bfloat16)
        found = stored[name].float()
        # A float32 result lands on the other side of a value of the grid with a chance of about 2^-24 / 2^-9.
        assert ((found == near) | (found == other)).float().mean() >= 0.999
        assert (found != near).any()
    tokens = AutoTokenizer.from_pretrained(half_base)(TEXT[:500], return_tensors="pt").input_ids
    with torch.inference_mode():
        source, far, close = (
            model(tokens).logits.log_softmax(-1)
            for model in (load_adapted(half_base, adapter), *(load_base(r.out) for r in (plain, fed)))
        )
    assert kl(source, close) < 0.7 * kl(source, far)
    record = json.loads((fed.out / "map_merge.json").read_text())["rounding"]
    assert (record["method"], record["data"]["name"], record["data"]["sequences"]) == ("feedback", "text.txt", 16)
    assert [item.tensor for item in fed.merged] == [item.tensor for item in plain.merged]


def test_nearest_is_the_default_and_the_same_bytes(half_base, lora, tmp_path):
    first = mapconv.merge(lora, tmp_path / "a", base=half_base)
    second = mapconv.merge(lora, tmp_path / "b", base=half_base, rounding="nearest")
    assert (first.out / "model.safetensors").read_bytes() == (second.out / "model.safetensors").read_bytes()


def test_embeddings_are_rounded_to_nearest(half_base, text, tmp_path):
    adapter = save_adapter(half_base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    fed = mapconv.merge(adapter, tmp_path / "fed", base=half_base, rounding="feedback", data=text, samples=4)
    plain = mapconv.merge(adapter, tmp_path / "plain", base=half_base)
    left, right = read_tensors(fed.out), read_tensors(plain.out)
    differing = {name for name in left if not torch.equal(left[name], right[name])}
    assert differing == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    (said,) = [note for note in fed.notes if "rounded to nearest" in note]
    assert "1 merged tensor (first: model.embed_tokens.weight)" in said


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--rounding", "feedback"], 2, "--rounding feedback requires --data"),
        (["--rounding", "feedback", "--data", "text.txt", "--dtype", "float32"], 2, "nothing to do with --dtype"),
        (["--rounding", "feedback", "--data", "text.txt", "--weights", "0.5"], 2, "merges one adapter"),
        (["--rounding", "feedback", "--data", "text.txt", "ADAPTER"], 2, "merges one adapter"),
        (["--rounding", "feedback", "--data", "empty.txt"], 1, "empty.txt"),
        (["--data", "text.txt"], 2, "or --rounding feedback"),
        (["--rounding", "feedback", "--data", "text.txt", "--base", "BASE"], 1, "written in 32 bits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(words, status, said, run, half_base, base, lora, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    words = [{"ADAPTER": lora, "BASE": base}.get(word, word) for word in words]
    words = words if "--base" in words else [*words, "--base", half_base]
    done = run("merge", lora, *words, "-o", "out")
    assert (done.status, said in done.err) == (status, True), done.err
    assert not (tmp_path / "out").exists()
