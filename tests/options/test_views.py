"""The command line, the functions and the catalog file say the same of every option, because all read its record."""

from __future__ import annotations

import inspect
import json
import types
import typing

import pytest

import mapconv
from mapconv.catalog.entries import STAGES
from mapconv.cli import cli
from mapconv.options.commands import COMMANDS
from mapconv.options.kinds import Choice, CountOrShare, Flag, Real, Size, Whole
from mapconv.options.records import Command, Option
from mapconv.options.rules import Requires

FUNCTIONS = {
    name: getattr(mapconv, {"catalog run": "convert_catalog"}.get(name, name))
    for name in COMMANDS
    if name not in ("catalog status", "demo", "env")
}


def alternatives(kind) -> list:
    """The parts of a union, with None among them where that is one."""
    return list(typing.get_args(kind)) if typing.get_origin(kind) in (typing.Union, types.UnionType) else [kind]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_the_parameters_of_its_record(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    options = {option.name: option for option in COMMANDS[name].options.values() if option.in_python}
    assert set(parameters) == set(options)
    types_of = typing.get_type_hints(FUNCTIONS[name])
    for option in options.values():
        default = parameters[option.name].default
        assert (default is inspect.Parameter.empty) == option.required, option.name
        assert option.required or default == option.default, option.name
        kinds = alternatives(types_of[option.name])
        assert (type(None) in kinds) == (not option.required and option.default is None), option.name
        if isinstance(option.kind, Choice) and option.kind.pattern is None:
            choices = [choice for kind in kinds for choice in typing.get_args(kind)]
            assert set(option.kind.choices) <= set(choices), option.name
        for kind, word in ((Flag, bool), (Whole, int), (Real, float), (Size, str), (CountOrShare, float)):
            assert not isinstance(option.kind, kind) or word in kinds, option.name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_of_its_record(name):
    command = cli
    for word in name.split():
        command = command.get_command(None, word)
    made = {parameter.name: parameter for parameter in command.params if parameter.name != "help"}
    assert list(made) == list(COMMANDS[name].options)
    for option in COMMANDS[name].options.values():
        if not option.positional:
            assert {option.flag, *([option.short] if option.short else [])} == set(made[option.name].opts)
            assert made[option.name].help.startswith(option.help)


@pytest.mark.parametrize("stage", STAGES)
def test_a_catalog_refuses_no_default_and_every_other_kind(stage):
    for option in COMMANDS[stage].options.values():
        if option.in_catalog and not option.required:
            assert option.read(option.default) == option.default
            for wrong in ({"a": 1}, *([] if isinstance(option.kind, Flag) else [True])):
                with pytest.raises(ValueError):  # noqa: PT011 - each kind has its own words
                    option.read(wrong)


RULES = [
    (["--rank", 4, "--tolerance", 0.1], {"rank": 4, "tolerance": 0.1}),
    (["--max-rank", 4], {"max_rank": 4}),
    (["--lora-compatible", "--direction", "dora"], {"lora_compatible": True, "direction": "dora"}),
    (["--samples", 4], {"samples": 4}),
    (["--sequence-length", 8], {"sequence_length": 8}),
    (["--statistics", "full"], {"statistics": "full"}),
    (["--calibrate", 4], {"calibrate": 4}),
    (["--data", "x", "--calibrate", 4, "--lora-compatible"], {"data": "x", "calibrate": 4, "lora_compatible": True}),
    (["--rank", 0], {"rank": 0}),
    (["--tolerance", 1], {"tolerance": 1}),
    (["--tolerance", "nan"], {"tolerance": float("nan")}),
    (["--direction", "up"], {"direction": "up"}),
    (["--device", "tpu"], {"device": "tpu"}),
]


@pytest.mark.parametrize(("words", "arguments"), RULES, ids=lambda value: " ".join(map(str, value)))
def test_all_three_refuse_the_same(words, arguments, run, tmp_path):
    assert run("upgrade", "source", *words).status == 2
    with pytest.raises(ValueError, match=r"expected|requires|cannot be used together"):
        mapconv.upgrade("source", **arguments)
    (tmp_path / "x").write_text("x")
    catalog = tmp_path / "catalog.jsonl"
    catalog.write_text(json.dumps({"source": "source", "upgrade": arguments}))
    refused = run("catalog", "run", catalog, "-o", tmp_path / "out")
    assert refused.status == 1
    assert "has 1 fault, nothing was converted" in refused.err


def test_a_device_of_several_is_taken_by_all():
    for name in ("upgrade", "calibrate", "verify"):
        assert COMMANDS[name].options["device"].read("cuda:1") == "cuda:1"


def test_a_rule_about_no_option_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="does not have"):
        Command("x", Option("a", Flag(), default=False), rules=(Requires("a", "b"),))
    with pytest.raises(ValueError, match="twice"):
        Command("x", Option("a", Flag()), Option("a", Flag()))
