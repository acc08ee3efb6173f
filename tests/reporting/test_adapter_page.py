"""An adapter's page in the browser: numbers under the pointer and the keyboard, themes, paper, a phone; its table."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

import mapconv
from mapconv.wording import gain, small
from tests.reporting.samples import save_adapter


def module_of(adapter, path):
    record = json.loads((adapter / "map_config.json").read_text())
    return next(module for module in record["modules"] if module["path"] == path)


def background(page, selector):
    return page.locator(selector).first.evaluate("node => getComputedStyle(node).backgroundColor")


def test_the_pointer_shows_a_modules_numbers_on_every_map(adapter, adapter_html, visit):
    page = visit(adapter_html)
    module = module_of(adapter, "model.layers.2.self_attn.v_proj")
    page.locator('#map-gain [data-at="1,2"]').hover()
    said = page.locator("#tip").inner_text()
    assert "v_proj, layer 2" in said
    assert page.locator("#tip .here").all_inner_texts() == ["α/‖W0‖", gain(module["base_gain"])]
    for number in (
        module["beta"] / module["alpha"],
        module["error"],
        module["error"] - module["error_before"],
        module["output_error"],
    ):
        assert small(number) in said
    # Beside a loaded processor the page may still be moving under the pointer, which takes the marks off again.
    page.locator('#map-gain [data-at="1,2"]').hover()
    page.wait_for_function("document.querySelectorAll('.cells .on').length === 6")
    assert page.locator(".heat").count() == 6
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()


def test_arrow_keys_go_from_cell_to_cell(adapter, adapter_html, visit):
    page = visit(adapter_html)
    page.locator("#theme").focus()
    for _ in range(8):  # the measurements against the source and the shares by layer come first
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#map-gain') !== null"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expected = gain(module_of(adapter, "model.layers.1.self_attn.v_proj")["base_gain"])
    assert page.locator("#tip .here").last.inner_text() == expected
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_a_finger_shows_the_numbers_too(adapter_html, visit):
    page = visit(adapter_html)
    page.locator('#map-error [data-at="0,0"]').dispatch_event("pointerdown")
    assert "q_proj, layer 0" in page.locator("#tip").inner_text()


def test_no_value_has_no_colour(adapter_html, visit):
    """Layer 3 has no module, q_proj none without a layer number, and lm_head none with one."""
    page = visit(adapter_html)
    for place in ("0,3", "0,6", "3,0"):
        cell = page.locator(f'#map-gain [data-at="{place}"]')
        assert cell.evaluate("node => getComputedStyle(node).backgroundColor") == "rgba(0, 0, 0, 0)"
        assert "repeating-linear-gradient" in cell.evaluate("node => getComputedStyle(node).backgroundImage")
    colored = page.locator('#map-gain [data-at="3,6"]')
    assert colored.evaluate("node => getComputedStyle(node).backgroundColor") != "rgba(0, 0, 0, 0)"
    assert "no value" in page.locator("#map-gain .legend").inner_text()


def test_the_table_sorts_filters_and_opens_a_module(adapter, adapter_html, visit):
    page = visit(adapter_html)
    modules = json.loads((adapter / "map_config.json").read_text())["modules"]
    table = page.locator("[data-table=modules]")
    first_cells = table.locator("tbody th")
    assert first_cells.all_inner_texts() == [module["path"] for module in modules]
    table.get_by_role("button", name="β/α").click()
    largest_first = sorted(modules, key=lambda module: -module["beta"] / module["alpha"])
    assert first_cells.all_inner_texts() == [module["path"] for module in largest_first]
    assert table.locator("thead [aria-sort=descending]").inner_text().startswith("β/α")
    table.get_by_role("button", name="β/α").click()
    assert first_cells.all_inner_texts() == [module["path"] for module in reversed(largest_first)]
    table.get_by_role("button", name="β/α").click()
    assert first_cells.all_inner_texts() == [module["path"] for module in modules]
    table.get_by_role("button", name="layer", exact=True).click()
    assert first_cells.all_inner_texts()[-1] == "lm_head"
    table.get_by_label("type").select_option("up_proj")
    assert first_cells.all_inner_texts() == ["model.layers.0.mlp.up_proj"]
    assert table.locator("output").inner_text() == "1 of 12 modules"
    table.get_by_label("type").select_option("all")
    table.get_by_label("Filter modules").fill("layers.4.")
    assert first_cells.count() == 2
    first_cells.first.get_by_role("button").click()
    said = page.get_by_role("dialog").inner_text()
    assert str(module_of(adapter, "model.layers.4.self_attn.q_proj")["alpha"]) in said
    page.get_by_role("button", name="Close").click()
    assert page.get_by_role("dialog").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_by_the_system_and_by_the_button(scheme, adapter_html, visit):
    page = visit(adapter_html, scheme=scheme)
    before = [background(page, "body"), background(page, '#map-error [data-at="0,0"]')]
    assert (before[0] == "rgb(20, 22, 26)") == (scheme == "dark")
    page.locator("#theme").click()
    after = [background(page, "body"), background(page, '#map-error [data-at="0,0"]')]
    assert all(a != b for a, b in zip(before, after, strict=True))
    page.reload()
    assert background(page, "body") == after[0]


def test_a_phone_scrolls_down_alone(adapter_html, visit):
    page = visit(adapter_html, width=360, height=740)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_paper_is_light_and_has_every_row(tmp_path, visit):
    paths = [f"model.layers.{layer}.mlp.{name}" for layer in range(60) for name in ("up_proj", "down_proj")]
    page = visit(mapconv.report(save_adapter(tmp_path / "deep", paths), tmp_path / "deep.html").out, scheme="dark")
    assert page.locator("tbody th button").count() < 60
    page.emulate_media(media="print")
    page.wait_for_function("document.querySelectorAll('tbody th button').length === 120")
    assert background(page, "body") == "rgb(255, 255, 255)"
    assert page.locator("#theme").is_hidden()
    assert page.locator(".tools").is_hidden()
    assert page.locator(".rows").evaluate("node => node.scrollHeight <= node.clientHeight + 1")


def test_names_and_roles_for_those_who_do_not_see(adapter_html, visit):
    page = visit(adapter_html)
    unnamed = """[...document.querySelectorAll('button, input, select, [tabindex="0"]')].filter(node =>
        !node.hidden && !(node.getAttribute('aria-label') || node.innerText || node.labels?.length
        || node.querySelector('caption'))).map(node => node.outerHTML.slice(0, 80))"""
    assert page.evaluate(unnamed) == []
    assert page.evaluate("[...document.querySelectorAll('table')].filter(node => !node.caption).length") == 0
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(node => Number(node.tagName[1]))")
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(scheme, adapter_html, visit):
    """A contrast of 4.5 (WCAG AA) for every text on the page, against the nearest painted background."""
    page = visit(adapter_html, scheme=scheme)
    weak = """() => {
      const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
      const light = (color) => {
        const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = color.slice(0, 3).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ground = (node) => {
        for (; node; node = node.parentElement) {
          const color = parse(getComputedStyle(node).backgroundColor);
          if (color.length === 3 || color[3] === 1) return color;
        }
      };
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      const found = [];
      while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('script')) continue;
        const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        if (contrast < 4.5) found.push(`${walker.currentNode.data.slice(0, 30)} ${contrast}`);
      }
      return found;
    }"""
    assert page.evaluate(weak) == []
