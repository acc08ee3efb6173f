"""Adapters of the matrix attached to live models, against stock PEFT's unmerged forward pass in float64."""

from __future__ import annotations

import pytest
import torch

from mapconv.errors import UnsupportedError
from mapconv.nn import detach, load_adapter, merge_adapter, save_adapter, set_adapter
from tests.matrix.bases import load_base
from tests.matrix.conftest import _quiet_and_single_threaded, workshop  # noqa: F401 (fixtures)
from tests.matrix.options import combinations
from tests.matrix.oracle import distance, tolerance
from tests.matrix.oracle import load_adapter as load_with_peft

#: One or two of each kind of layer and each option that means something at run time.
CASES = {
    "lora": ("llama", "gpt2", "t5"),
    "dora": ("gpt2", "qwen3"),
    "conv-lora": ("vit",),
    "conv-dora": ("vit",),
    "embedding-lora": ("gemma3", "bert"),
    "embedding-dora": ("gpt2",),
    "head-lora": ("llama-tied",),
    "both-ends-lora": ("gemma",),
    "patterns-dora": ("bert-classifier",),
    "lora-bias": ("gpt2",),
    "bias-all": ("bert",),
    "bias-all-dora": ("vit",),
    "save-classifier": ("distilbert-classifier", "gpt2-classifier"),
    "save-head": ("gpt2",),
    "save-embedding": ("llama-tied",),
    "save-embedding-tying": ("llama-tied",),
    "save-norms": ("llama",),
    "tokens": ("llama-tied", "t5"),
    "tokens-dora": ("gpt2",),
    "tokens-both-ends": ("gemma",),
    "resized-tokens": ("llama-tied",),
    "pissa": ("gpt2",),
    "olora-dora": ("llama",),
    "name-in-keys": ("llama",),
    "v4-names": ("vit", "llava"),
    "experts-two": ("mixtral", "gpt-oss"),
    "experts-patterns": ("qwen3-moe",),
    "router": ("mixtral",),
    "experts-bias": ("gpt-oss",),
    "replication": ("llama-tied", "bert", "mixtral"),
    "replication-dora": ("llama",),
}
CHOSEN = [(tiny, option) for tiny, option in combinations() if tiny.name in CASES.get(option.name, ())]


def test_every_case_is_one_of_the_matrix():
    assert len(CHOSEN) == sum(map(len, CASES.values()))


@pytest.mark.parametrize(("tiny", "option"), CHOSEN, ids=[f"{option.name}-{tiny.name}" for tiny, option in CHOSEN])
def test_live_model_computes_what_the_adapter_does(tiny, option, workshop, tmp_path):  # noqa: F811
    case = workshop.case(tiny, option)
    model = load_base(tiny, case.base, vocab=option.vocab)
    modules = dict(model.named_modules())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_adapter(model, case.adapter, **option.extra)
    save_adapter(model, tmp_path / "map")

    # Names of transformers 4 are written as those of the model at hand, so PEFT reads what it could not read before.
    assert distance(tiny.logits(load_with_peft(case, tmp_path / "map")), case.live) <= tolerance(case)
    model = model.double()
    assert distance(tiny.logits(model), case.trained) <= tolerance(case)
    merge_adapter(model)
    assert distance(tiny.logits(model), case.trained) <= tolerance(case)
    detach(model)
    again = dict(model.named_modules())
    assert again.keys() == modules.keys()
    assert all(again[name] is modules[name] for name in again)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in after)


REFUSED = [(t, o) for t, o in combinations() if (t.name, o.name) in {("mixtral", "experts-v4")}]


@pytest.mark.parametrize(("tiny", "option"), REFUSED, ids=["experts"])
def test_what_no_layer_can_run_is_refused(tiny, option, workshop):  # noqa: F811
    case = workshop.case(tiny, option)
    model = load_base(tiny, case.base)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedError, match="mapconv merge"):
        load_adapter(model, case.adapter)
    assert [name for name, _ in model.named_modules()] == names
    with pytest.raises(Exception, match="no MAP adapter"):
        set_adapter(model, None)
