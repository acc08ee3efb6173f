"""Adapters that have no factors of LoRA: of another method of PEFT's, or of whole tensors alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig, VeraConfig, get_peft_model

from tests.cli.refusals import assert_refused, nothing_written
from tests.models import load_base


@pytest.fixture(scope="module")
def norms(models: Path, base: Path) -> Path:
    return _save(base, models / "norms", LNTuningConfig(target_modules=["input_layernorm"]))


@pytest.fixture(scope="module")
def vera(models: Path, base: Path) -> Path:
    return _save(base, models / "vera", VeraConfig(r=4, target_modules=["q_proj"]))


def _save(base: Path, out: Path, config) -> Path:
    torch.manual_seed(0)
    model = get_peft_model(load_base(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return out


def test_no_server_is_said_to_load_them(run, norms, vera):
    for source, why in [(vera, "VeRA"), (norms, "adapts no layer by factors")]:
        result = run("export", source, "--for", "vllm", "--check")
        assert result.status == 1, result.err
        assert why in result.out


def test_what_an_upgrade_would_do_is_known_before_and_after_placing(run, base, norms, vera):
    for words in [(), ("--base", base)]:
        result = run("inspect", vera, *words)
        assert "exact: α and β follow from norms" in result.out
    shown = run("inspect", norms)
    assert "whole tensors" in shown.out
    assert "scaling" not in shown.out  # there is no module that a table could have


def test_whole_tensors_alone_are_nothing_to_refit(run, base, norms, tmp_path):
    out = tmp_path / "out"
    for words in [
        ("upgrade", norms, "--base", base, "-o", out),
        ("rebase", norms, "--base", base, "--onto", base, "-o", out),
        ("export", norms, "--base", base, "--for", "vllm", "-o", out),
        ("combine", norms, norms, "--base", base, "-o", out),
    ]:
        with nothing_written(tmp_path):
            assert_refused(run(*words), "whole tensors")


def test_another_method_is_combined_after_an_upgrade(run, base, vera, tmp_path):
    with nothing_written(tmp_path):
        refused = run("combine", vera, vera, "--base", base, "-o", tmp_path / "out")
        assert_refused(refused, "mapconv upgrade --rank N", "model.layers.0.self_attn.q_proj")
