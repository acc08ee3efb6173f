"""adapter_config.json and map_config.json with any content: an error of ours or success, never another exception."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mapconv
from mapconv.errors import AdapterError, MapconvError
from tests import examples
from tests.files import copy

FAST = settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 10**400, 2**63])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["(", "(?i)x", "q_proj", r"(.*)\1", "\\", "\0", "\ud800", "LORA", "../x", "a/b"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars.filter(lambda x: isinstance(x, str)), inner),
    max_leaves=8,
)
#: Fields of PEFT's LoraConfig, read or refused, and names that no version of it knows.
FIELDS = [
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha", "use_rslora",
    "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights", "target_modules", "exclude_modules", "bias",
    "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication",
    "trainable_token_indices", "target_parameters", "loftq_config", "eva_config", "peft_version", "auto_mapping",
    "enable_lora", "alora_invocation_tokens", "a_field_of_tomorrow",
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(lora, tmp_path_factory):
    return copy(lora, tmp_path_factory.mktemp("configs") / "lora")


@pytest.fixture(scope="module")
def sound(lora):
    return json.loads((lora / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def map_adapter(lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs") / "map"
    mapconv.upgrade(lora, folder)
    return folder


@FAST
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes(content, adapter):
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError):
        mapconv.inspect(adapter)


@FAST
@given(config=values)
def test_any_json(config, adapter):
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError):
        mapconv.inspect(adapter)


@FAST
@given(changes=st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3))
def test_any_values_of_known_fields(changes, adapter, sound, base, lora):
    (adapter / "adapter_config.json").write_text(json.dumps(sound | changes))
    for use in (
        lambda: mapconv.inspect(adapter),
        lambda: mapconv.inspect(adapter, base=base),
        lambda: mapconv.upgrade(adapter, adapter.parent / "out", dry_run=True),
        lambda: mapconv.merge(adapter, adapter.parent / "out", base=base, dry_run=True),
    ):
        try:
            use()
        except MapconvError as error:
            message = str(error)
        else:
            message = "it is accepted"
        assert message
    assert not (adapter.parent / "out").exists()


@FAST
@given(removed=st.sets(st.sampled_from(FIELDS)))
def test_missing_fields(removed, adapter, sound):
    """Old versions of PEFT lack most fields; only the method, and a rank that fits, cannot be done without."""
    config = {name: value for name, value in sound.items() if name not in removed}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if {"peft_type", "r"} & removed:
        with pytest.raises(AdapterError):
            mapconv.inspect(adapter)
    else:
        assert mapconv.inspect(adapter).modules == 14


@pytest.mark.parametrize("content", ["[" * 100_000, '{"r":' * 100_000, '{"r": ' + "9" * 10_000 + "}"])
def test_json_that_is_a_trap(content, adapter):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError):
        mapconv.inspect(adapter)


@pytest.mark.parametrize("name", ["target_modules", "layers_to_transform", "rank_pattern", "loftq_config"])
def test_huge_fields(name, adapter, sound, base):
    huge = {str(n): 4 for n in range(20_000)} if name.endswith(("pattern", "config")) else ["q"] * 200_000
    (adapter / "adapter_config.json").write_text(json.dumps(sound | {name: huge}))
    assert mapconv.inspect(adapter, base=base).modules == 14


@FAST
@given(
    field=st.sampled_from(["path", "direction", "rank", "alpha", "beta", "base_norm", "direction_norm", "error"]),
    value=values | st.sampled_from([math.nan, math.inf, "nan", 1e308, 5e-324]),
    number=st.integers(0, 13),
)
def test_any_values_in_a_map_module(field, value, number, map_adapter, base):
    """What is accepted is finite, and merges to weights that are."""
    path = map_adapter / "map_config.json"
    original = path.read_bytes()
    table = json.loads(original)
    table["modules"][number][field] = value
    path.write_text(json.dumps(table))
    try:
        modules = mapconv.formats.read_adapter(map_adapter).map_modules
    except AdapterError:
        modules = ()
    finally:
        path.write_bytes(original)
    for module in modules:
        assert all(map(math.isfinite, (module.alpha, module.beta, module.base_gain, module.update_gain)))


@FAST
@given(table=values | st.fixed_dictionaries({"format_version": st.just(1), "modules": values}))
def test_any_map_config(table, map_adapter):
    path = map_adapter / "map_config.json"
    original = path.read_bytes()
    path.write_text(json.dumps(table))
    try:
        with pytest.raises(AdapterError):
            mapconv.formats.read_adapter(map_adapter)
    finally:
        path.write_bytes(original)
