"""A base that stays on the Hub: how many bytes move, and that no hole is ever read as zeros."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapconv.checkpoint.index import read_checkpoint
from mapconv.hub.ranges import join_spans
from tests.fake_hub import FakeHub
from tests.hub.conftest import error_of, files_of

WIDE = "lab/wide"
WEIGHTS = "adapter_model.safetensors"


def target_bytes(models, adapter) -> int:
    tensors = read_checkpoint(models.wide).tensors
    parts = {"wide-lora": ("q_proj", "v_proj"), "wide-more": ("q_proj", "v_proj", "o_proj")}[adapter]
    return sum(ref.nbytes for name, ref in tensors.items() if name.split(".")[-2] in parts)


def transferred(hub) -> int:
    """Bytes of weights that the server has sent, whole files and ranges alike."""
    return sum(request.sent for request in hub.log("GET", "/cdn/"))


def test_an_upgrade_moves_the_target_tensors_and_little_more(models, run, hub, tmp_path):
    hub.repo(WIDE, files_of(models.wide))
    assert len(list(models.wide.glob("*.safetensors"))) > 1
    run(hub, "upgrade", models.wide_lora, "-o", tmp_path / "out", "--base", WIDE, "--quiet")
    wanted = target_bytes(models, "wide-lora")
    assert wanted < transferred(hub) <= 1.1 * wanted
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (models.folder / "wide-lora-map" / WEIGHTS).read_bytes()
    assert not any("authorization" in map(str.lower, request.headers) for request in hub.log("GET", "/cdn/"))

    # The same base again: only what another adapter targets besides.
    before = transferred(hub)
    run(hub, "upgrade", models.wide_more, "-o", tmp_path / "more", "--base", WIDE, "--quiet")
    missing = target_bytes(models, "wide-more") - wanted
    assert missing <= transferred(hub) - before <= 1.1 * missing
    assert (tmp_path / "more" / WEIGHTS).read_bytes() == (models.folder / "wide-more-map" / WEIGHTS).read_bytes()

    before = transferred(hub)
    run(hub, "upgrade", models.wide_lora, "-o", tmp_path / "again", "--base", WIDE, "--quiet")
    assert transferred(hub) == before


def test_a_server_without_ranges_gives_the_whole_files(models, run, tmp_path):
    with FakeHub(tmp_path / "server", ranges=False) as hub:
        hub.repo(WIDE, files_of(models.wide))
        run(hub, "upgrade", models.wide_lora, "-o", tmp_path / "out", "--base", WIDE, "--quiet")
        assert (tmp_path / "out" / WEIGHTS).read_bytes() == (models.folder / "wide-lora-map" / WEIGHTS).read_bytes()


def test_whole_files_that_are_here_already_are_used(models, run, python, hub, tmp_path):
    hub.repo(WIDE, files_of(models.wide))
    code = f"from huggingface_hub import snapshot_download; snapshot_download({WIDE!r})"
    assert python(hub, code, home="home").returncode == 0
    before = transferred(hub)
    run(hub, "upgrade", models.wide_lora, "-o", tmp_path / "out", "--base", WIDE, "--quiet")
    assert transferred(hub) == before


@pytest.mark.parametrize("fault", [{"drop": True}, {"truncate": 300_000}, {"status": 503}], ids=["drop", "cut", "503"])
def test_an_interrupted_range_goes_on_from_the_last_byte(models, run, hub, tmp_path, fault):
    hub.repo(WIDE, files_of(models.wide))
    run(hub, "inspect", models.wide_lora, "--base", WIDE)  # the headers, which would come whole
    broken = hub.fault("GET", "/cdn/", times=2, **fault)
    run(hub, "upgrade", models.wide_lora, "-o", tmp_path / "out", "--base", WIDE, "--quiet")
    assert broken.times == 0
    assert transferred(hub) <= 1.1 * target_bytes(models, "wide-lora")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (models.folder / "wide-lora-map" / WEIGHTS).read_bytes()


def test_a_run_that_fails_midway_is_one_sentence_and_the_next_fetches_the_rest(models, run, hub, tmp_path):
    hub.repo(WIDE, files_of(models.wide))
    run(hub, "inspect", models.wide_lora, "--base", WIDE)
    headers = transferred(hub)
    dead = hub.fault("GET", "/cdn/", times=99, truncate=200_000)
    message = error_of(
        run(hub, "upgrade", models.wide_lora, "-o", tmp_path / "out", "--base", WIDE, "--quiet", status=1)
    )
    assert "cannot be reached" in message
    assert not (tmp_path / "out").exists()
    assert transferred(hub) > headers
    dead.times = 0
    run(hub, "upgrade", models.wide_lora, "-o", tmp_path / "out", "--base", WIDE, "--quiet")
    assert transferred(hub) <= 1.1 * target_bytes(models, "wide-lora")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (models.folder / "wide-lora-map" / WEIGHTS).read_bytes()


def test_a_killed_run_is_finished_by_the_next(models, run, start, hub, tmp_path):
    hub.repo(WIDE, files_of(models.wide))
    run(hub, "inspect", models.wide_lora, "--base", WIDE)
    held = hub.fault("GET", "/cdn/", hold=True)
    process = start(hub, "upgrade", models.wide_lora, "-o", tmp_path / "out", "--base", WIDE, "--quiet")
    assert held.reached.wait(60)
    process.kill()
    process.wait(30)
    held.release.set()
    run(hub, "upgrade", models.wide_lora, "-o", tmp_path / "out", "--base", WIDE, "--quiet")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (models.folder / "wide-lora-map" / WEIGHTS).read_bytes()


def test_a_tensor_that_nobody_asked_for_is_fetched_when_it_is_read(models, python, hub):
    hub.repo(WIDE, files_of(models.wide))
    done = python(hub, _READ, WIDE)
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    tensors = {name: tensor for file in models.wide.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found["part"] == hashlib.sha256(tensors["lm_head.weight"][100:200].numpy().tobytes()).hexdigest()
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        assert found[name] == hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()


def test_a_dry_run_moves_headers_alone(models, run, hub, tmp_path):
    hub.repo(WIDE, files_of(models.wide))
    run(hub, "upgrade", models.wide_lora, "-o", tmp_path / "out", "--base", WIDE, "--dry-run")
    shards = len(list(models.wide.glob("*.safetensors")))
    assert 0 < transferred(hub) <= shards * (64 << 10)


spans = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 500)).map(lambda pair: (pair[0], pair[0] + pair[1])))


@given(spans)
def test_joined_ranges_cover_what_was_asked_for_and_at_most_a_twentieth_more(wanted):
    joined = join_spans(wanted)
    asked = {byte for start, stop in wanted for byte in range(start, stop)}
    covered = [byte for start, stop in joined for byte in range(start, stop)]
    assert len(covered) == len(set(covered))
    assert asked <= set(covered)
    assert len(covered) - len(asked) <= sum(stop - start for start, stop in wanted) / 20


_READ = """
import hashlib, sys
from pathlib import Path
import torch
from mapconv.checkpoint.reader import TensorReader
from mapconv.hub.locate import open_base
checkpoint = open_base(sys.argv[1], None, None, Path("x"), fetch="ranges")
def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
with TensorReader(checkpoint.source) as reader:
    head = checkpoint.tensors["lm_head.weight"]
    print("part", digest(reader.read_rows(head, 100, 200, torch.empty(head.nbytes, dtype=torch.uint8))))
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        print(name, digest(reader.read(checkpoint.tensors[name])))
"""
