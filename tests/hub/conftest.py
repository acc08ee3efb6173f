"""Tiny models and adapters, a fake Hub, and the command line in a subprocess of its own home."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from mapconv.cli import main
from mapconv.hub import faults
from tests.fake_hub import READ_TOKEN, WRITE_TOKEN, FakeHub
from tests.forked import ROOT, Process, draw_once

BASE_ID = "lab/tiny-llama"
#: A repository that a MAP adapter without a tokenizer was pushed to.
ADAPTER_FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "map_config.json", "scalars.png", ".gitattributes",
}  # fmt: skip
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\ndatasets: [lab/words]\npipeline_tag: text-generation\n---\n# Tiny\n"


@pytest.fixture(scope="session")
def models(forked, tmp_path_factory) -> SimpleNamespace:
    """A two-layer Llama with a tokenizer, a LoRA and a DoRA on it, and what mapconv makes of them."""
    folder = tmp_path_factory.mktemp("models")
    made = forked.run(_MAKE, ["make", str(folder)], _environment(), tmp_path_factory.mktemp("made") / "process")
    assert made.returncode == 0, made.stderr
    return SimpleNamespace(folder=folder, **{path.name.replace("-", "_"): path for path in folder.iterdir()})


@pytest.fixture
def hub(tmp_path) -> Iterator[FakeHub]:
    with FakeHub(tmp_path / "server") as server:
        yield server


@pytest.fixture
def xet_hub(tmp_path) -> Iterator[FakeHub]:
    with FakeHub(tmp_path / "server", xet=True) as server:
        yield server


@pytest.fixture
def start(forked, tmp_path) -> Iterator[Callable[..., Process]]:
    """Start ``mapconv ARGUMENTS`` and return the process; whatever still runs at the end is killed."""
    started: list[Process] = []

    def call(hub: FakeHub, *arguments: object, home: str = "home", stdin: str = os.devnull) -> Process:
        folder = tmp_path / "started" / str(len(started))
        words = ["mapconv", *map(str, arguments)]
        started.append(forked.start(QUICK, words, _environment(hub.environment(tmp_path / home)), folder, stdin))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def python(forked, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run Python code as a client of a fake Hub, in a process and (``home``) a Hub cache of its own."""
    numbers = count()

    def call(hub: FakeHub, code: str, *arguments: object, home: str = "other", token: str | None = WRITE_TOKEN, **more):
        env = _environment(hub.environment(tmp_path / home, token) | more)
        folder = tmp_path / "processes" / str(next(numbers))
        return forked.run(code, ["python", *map(str, arguments)], env, folder)

    return call


@pytest.fixture
def here(environment, forked, tmp_path, capsys) -> Callable[..., subprocess.CompletedProcess]:
    """Run ``mapconv ARGUMENTS`` in this process, in a Hub cache of its own (``home``), with waits cut short."""

    def call(hub: FakeHub, *arguments: object, home: str, token: str | None = WRITE_TOKEN, **more: str):
        words, status = ["mapconv", *map(str, arguments)], 0
        with pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
            patch.setattr("sys.argv", words)
            patch.setattr("sys.stdin", nothing)
            patch.setattr(faults, "FIRST_WAIT", 0.01)
            if find_spec("matplotlib"):
                patch.setattr("mapconv.publishing.picture.scalars_png", draw_once(forked.pictures))
            patch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
            limit = float(more.get("TEST_REQUEST_TIMEOUT", 30))
            patch.setattr(faults, "REQUEST_TIMEOUT", limit)
            capsys.readouterr()
            with environment.entered(hub.environment(tmp_path / home, token) | more):
                constants.HF_HUB_DOWNLOAD_TIMEOUT = limit
                try:
                    main()
                except SystemExit as stop:
                    status = stop.code
        return subprocess.CompletedProcess(words, status, *capsys.readouterr())

    return call


@pytest.fixture
def run(python, here) -> Callable[..., subprocess.CompletedProcess]:
    """Run ``mapconv ARGUMENTS`` against a fake Hub, with waits cut short, and search its output for tokens.

    In this process, but for a Hub with Xet: that client reads its environment once a process.
    """

    def call(hub: FakeHub, *arguments: object, status: int | None = 0, home: str = "home", **more):
        done = (partial(python, hub, QUICK) if hub.xet else partial(here, hub))(*arguments, home=home, **more)
        for secret in (WRITE_TOKEN, READ_TOKEN):
            assert secret not in done.stdout + done.stderr
        if status is not None:
            assert done.returncode == status, done.stdout + done.stderr
        return done

    return call


def error_of(done: subprocess.CompletedProcess) -> str:
    """The one sentence that a failed command says."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("mapconv: error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0].removeprefix("mapconv: error: ")


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def adapter_files(folder: Path, base: str, **more: object) -> dict[str, bytes]:
    """The files of an adapter as somebody publishes it: its configuration names the base by its Hub id."""
    config = json.loads((folder / "adapter_config.json").read_bytes()) | {"base_model_name_or_path": base} | more
    return files_of(folder) | {"adapter_config.json": json.dumps(config).encode()}


def json_of(data: bytes) -> dict:
    return json.loads(data)


def _environment(own: dict[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return dict(own or os.environ) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


#: The command line with waits that a test can afford; the number of attempts stays.
QUICK = """
import os
from mapconv.hub import faults
faults.FIRST_WAIT = 0.01
faults.REQUEST_TIMEOUT = float(os.environ.get("TEST_REQUEST_TIMEOUT", 30))
from mapconv.cli import main
main()
"""

_MAKE = f"""
import sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
import mapconv

folder = Path(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=300, max_position_embeddings=512)
LlamaForCausalLM(config).save_pretrained(folder / "base")
vocabulary = {{"<unk>": 0}} | {{chr(code): number for number, code in enumerate(range(32, 127), 1)}}
tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "base")
(folder / "base" / "README.md").write_text({CARD!r})
for name, use_dora in (("lora", False), ("dora", True)):
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    settings = LoraConfig(r=4, lora_alpha=8, use_dora=use_dora, target_modules=["q_proj", "v_proj"],
                          task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / name)
    mapconv.upgrade(folder / name)
mapconv.merge(folder / "dora-map", folder / "merged")
wide = LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, vocab_size=300)
LlamaForCausalLM(wide).save_pretrained(folder / "wide", max_shard_size="8MB")
for name, targets in (("wide-lora", ["q_proj", "v_proj"]), ("wide-more", ["q_proj", "v_proj", "o_proj"])):
    settings = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(folder / "wide"), settings).save_pretrained(folder / name)
    mapconv.upgrade(folder / name)
"""
