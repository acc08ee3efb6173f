"""What figures show is what the files say: numbers, places, colours and bins, without a browser."""

from __future__ import annotations

import html
import json
import math
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mapconv
from mapconv.reporting.charts import dots_figure, histogram, histogram_figure
from mapconv.reporting.heatmap import Measure, heat_map
from mapconv.reporting.layout import lay_out
from mapconv.reporting.numbers import number
from mapconv.reporting.scales import LEVELS, diverging, ramp, sequential, spanning
from mapconv.wording import count, gain, rough_percent, small
from tests import examples
from tests.reporting.samples import calibrate_records, data_of, save_adapter

floats = st.one_of(st.floats(), st.floats(1e-12, 1e12), st.just(0.0), st.none())


def figures(page: str) -> dict[str, str]:
    """The HTML of each heat map by its key."""
    return dict(re.findall(r'<figure[^>]* id="map-(\w+)">(.*?)</figure>', page, re.DOTALL))


def shown(figure: str) -> dict[tuple[str, str], str]:
    """The number on each cell of a map, by module type and layer."""
    layers = re.search(r'data-columns="([^"]*)"', figure)[1].split()
    types = re.findall(r'<b data-row="\d+" title="([^"]*)"', figure)
    cells = re.findall(r'data-at="(\d+),(\d+)" data-v="([^"]*)"', figure)
    return {(types[int(row)], layers[int(column)]): html.unescape(said) for row, column, said in cells}


def tabled(figure: str) -> dict[tuple[str, str], str]:
    """The same numbers from the table below the map."""
    table = re.search(r"<table.*?</table>", figure, re.DOTALL)[0]
    _, *types = re.findall(r'<th scope="col">(.*?)</th>', table)
    found = {}
    for row in re.findall(r'<tr><th scope="row">(.*?)</tr>', table):
        layer, _, cells = row.partition("</th>")
        for name, said in zip(types, re.findall(r"<td>(.*?)</td>", cells), strict=True):
            found[name, "-" if layer == "no layer" else layer] = html.unescape(said)
    return found


@pytest.fixture(scope="module")
def upgraded(dora, tmp_path_factory):
    """A real result, and the page of it after a calibration."""
    out = mapconv.upgrade(dora, tmp_path_factory.mktemp("upgraded") / "map").out
    calibrate_records(out)
    page = mapconv.report(out, out.parent / "map.html").out.read_text(encoding="utf-8")
    return json.loads((out / "map_config.json").read_text())["modules"], page


def test_maps_show_the_numbers_of_map_config(upgraded):
    modules, page = upgraded
    expected = {
        "gain": lambda m: gain(m["base_gain"]),
        "ratio": lambda m: small(m["beta"] / m["alpha"]),
        "change": lambda m: small(m["error"] - m["error_before"]),
        "error": lambda m: small(m["error"]),
        "output": lambda m: small(m["output_error"]),
        "rank": lambda m: count(m["rank"]),
    }
    assert figures(page).keys() == expected.keys()
    for key, said in expected.items():
        places = {(m["path"].rpartition(".")[2], m["path"].split(".")[2]): said(m) for m in modules}
        figure = figures(page)[key]
        if len(set(places.values())) == 1 and "data-columns" not in figure:  # one line says it
            assert f"{said(modules[0])} in all {len(modules)} modules." in figure
        else:
            assert shown(figure) == places


def test_the_update_by_layer_adds_up(upgraded):
    modules, page = upgraded
    figure = re.search(r'<figure[^>]* id="bars-shares">(.*?)</figure>', page, re.DOTALL)[1]
    said = dict(re.findall(r'<th scope="row">(\d+)</th><td>(.*?)</td>', figure))
    squares = dict.fromkeys(said, 0.0)
    for module in modules:
        squares[module["path"].split(".")[2]] += module["beta"] ** 2
    assert said == {layer: rough_percent(square / sum(squares.values())) for layer, square in squares.items()}
    heights = [float(height) for height in re.findall(r'<u style="height:([\d.]+)%', figure)]
    assert heights == pytest.approx([100 * square / max(squares.values()) for square in squares.values()], abs=0.01)


def test_one_layer_has_no_shares(tmp_path):
    adapter = save_adapter(tmp_path / "one", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"])
    assert 'id="bars-shares"' not in mapconv.report(adapter, tmp_path / "one.html").out.read_text(encoding="utf-8")


def test_the_table_below_a_map_has_the_maps_numbers(upgraded, adapter_html):
    for page in (upgraded[1], adapter_html.read_text(encoding="utf-8")):
        maps = [figure for figure in figures(page).values() if "data-columns" in figure]
        assert len(maps) >= 3
        for figure in maps:
            cells = shown(figure)
            assert len(cells) >= 14
            assert tabled(figure) == {place: said.replace("no value", "–") for place, said in cells.items()}


def test_the_modules_table_has_every_number_exactly(upgraded):
    modules, page = upgraded
    table = data_of(page)["modules"]
    keys = [column["key"] for column in table["columns"]]
    columns = {
        "gain": "base_gain", "before": "error_before", "error": "error", "output": "output_error", "alpha": "alpha",
        "beta": "beta", "base_norm": "base_norm", "direction_norm": "direction_norm", "update_gain": "update_gain",
        "rank": "rank",
    }  # fmt: skip
    for key, name in columns.items():
        assert [row[keys.index(key)][0] for row in table["rows"]] == [module[name] for module in modules]
    assert [row[keys.index("path")] for row in table["rows"]] == [module["path"] for module in modules]
    assert "expert" not in keys


def test_the_verdict_stands_before_the_maps(adapter_html):
    page = adapter_html.read_text(encoding="utf-8")
    assert re.search(r"<strong>(Very good|Good|Fair|Poor|Bad): ", page)
    assert page.index('id="fidelity"') < page.index('id="maps"')


def test_kl_of_all_four_models(adapter_html):
    figure = re.search(r'<figure[^>]* id="dots-calibration">.*?</figure>', adapter_html.read_text(), re.DOTALL)[0]
    rows = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', figure))
    assert rows == {"base": "0.6171", "source": "0", "closed form": "2.0e-04", "calibrated": "1.1e-04"}
    places = [float(left) for left in re.findall(r"left:([\d.]+)%\"></u>", figure)]
    assert len(places) == 3  # 0 has no place on a logarithmic axis
    base, closed, calibrated = places
    assert (base - closed) / (closed - calibrated) == pytest.approx(
        math.log(0.6171 / 2e-4) / math.log(2 / 1.1), rel=1e-2
    )


def test_types_that_end_alike_are_told_apart():
    layout = lay_out(
        ["encoder.layers.0.self_attn.q", "decoder.layers.0.self_attn.q", "decoder.layers.1.cross_attn.q", "lm_head"]
    )
    assert layout.types == ("encoder.layers.*.self_attn.q", "decoder.layers.*.self_attn.q", "cross_attn.q", "lm_head")
    assert layout.layers == (0, 1, None)
    assert layout.members == {(0, 0): (0,), (1, 0): (1,), (2, 1): (2,), (3, 2): (3,)}


@settings(max_examples=examples(30))
@given(st.lists(st.sampled_from(["a", "b", "0", "7", "31", "999999", "layers"]), min_size=1, max_size=5), st.data())
def test_every_module_has_one_place(parts, data):
    paths = [".".join(data.draw(st.permutations(parts))) for _ in range(4)]
    layout = lay_out(paths)
    places = sorted(member for found in layout.members.values() for member in found)
    assert places == [0, 1, 2, 3]
    assert len(set(layout.types)) == len(layout.types)
    assert len(layout.layers) < 100


def test_experts_of_a_layer_share_a_cell_that_says_so():
    layout = lay_out([f"layers.0.experts.{n}.up" for n in range(3)])
    measure = Measure("error", "ε", "", (0.1, 0.3, 0.2), sequential([0.1, 0.3]), small, "largest")
    assert measure.said_at(layout.members[0, 0]) == "0.3000 (largest of 3: 0.1000 … 0.3000)"
    assert Measure("gain", "", "", (0.1, 0.3, 0.2), sequential([0.3]), small).at((0, 1, 2)) == 0.2


def test_a_map_of_one_value_is_one_line():
    layout = lay_out(["layers.0.up", "layers.1.up"])
    figure = str(heat_map(Measure("rank", "rank", "", (8.0, 8.0), sequential([8.0]), small), layout))
    assert "in all 2 modules." in figure
    assert "data-at" not in figure
    figure = str(heat_map(Measure("error", "ε", "", (0.1, 0.3), spanning([0.1, 0.3]), small), layout))
    assert "The colours run from 0.1000, the faintest, to 0.3000, the strongest." in figure


def test_what_is_not_finite_is_said_and_has_no_colour():
    measure = Measure("error", "ε", "", (math.nan, math.inf, None), sequential([]), small)
    assert [measure.at((n,)) for n in range(3)] == [None, None, None]
    assert [measure.said_at((n,)) for n in range(3)] == ["NaN", "∞", "–"]


@given(st.lists(floats, max_size=40))
def test_every_number_is_in_one_bin(values):
    found = histogram(values)
    finite = [value for value in values if value is not None and math.isfinite(value)]
    assert found.absent == len(values) - len(finite)
    assert sum(bar.count for bar in found.bins) + found.zeros == len(finite)
    assert found.zeros == 0 or found.logarithmic or not found.bins
    assert all(low.high == high.low for low, high in pairwise(found.bins))
    for bar in found.bins:
        inside = [value for value in finite if bar.low <= value < bar.high]
        assert bar is found.bins[-1] or bar is found.bins[0] or bar.count == len(inside)
    assert len(found.bins) < 700  # one a decade, from the smallest float to the largest


@settings(max_examples=examples(40))
@given(st.lists(floats, max_size=6))
def test_any_numbers_can_be_drawn_within_the_figure(values):
    drawn = histogram_figure("k", "t", "", values, small, "entries")
    drawn += dots_figure("k", "t", "", [(str(n), value, "") for n, value in enumerate(values)], small)
    places = [float(place) for place in re.findall(r"(?:left|height):([^%;\"]+)%", drawn)]
    assert all(0 <= place <= 100 for place in places)
    scale = diverging([value for value in values if value is not None and math.isfinite(value)], 1.0)
    assert all(0 <= scale.level(value) < LEVELS for value in values if value is not None and math.isfinite(value))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_palettes_are_ordered_by_lightness_alone(theme):
    """Who sees no colour reads the same order: that is what makes them safe for every kind of colour vision."""

    def lightness(color: str) -> float:
        r, g, b = (part / 255 for part in bytes.fromhex(color[1:]))
        return 0.2126 * r**2.2 + 0.7152 * g**2.2 + 0.0722 * b**2.2

    sign = -1 if theme == "light" else 1
    steps = [lightness(color) for color in ramp("s", theme)]
    assert all(sign * (after - before) > 0 for before, after in pairwise(steps))
    sides = [lightness(color) for color in ramp("d", theme)]
    middle = LEVELS // 2
    assert all(sign * (after - before) > 0 for before, after in pairwise(sides[middle:]))
    assert all(sign * (after - before) < 0 for before, after in pairwise(sides[: middle + 1]))


def test_scales():
    assert [diverging([0.9, 1.05], 1.0).level(value) for value in (0.9, 1.0, 1.1)] == [0, LEVELS // 2, LEVELS - 1]
    assert diverging([1.0], 1.0).level(1.0) == LEVELS // 2
    assert diverging([1 + 1e-9], 1.0, least=1e-4).level(1 + 1e-9) == LEVELS // 2
    assert sequential([0.1, 1.0]).ticks == (0.0, 0.5, 1.0)
    assert sequential([0.6, 1.0]).low == 0.6
    assert sequential([0.999, 1.0]).low == 0.9
    assert sequential([16.0, 16.0]).ticks == (16.0,)
    assert spanning([0.4, None, math.nan, 0.1]).ticks == (0.1, 0.25, 0.4)


@pytest.mark.parametrize(("found", "taken"), [(True, None), ("1", None), (7, 7.0), (10**400, math.inf)])
def test_numbers_of_a_file(found, taken):
    assert number(found) == taken
