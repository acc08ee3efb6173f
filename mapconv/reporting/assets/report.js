"use strict";
// What a reader does with a report: theme, numbers under the pointer, and long tables. Texts go in as text only.

const page = document.documentElement;
const find = (selector, within = document) => within.querySelector(selector);

function make(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

// The theme: the system's, until the button says otherwise.

function remembered(theme) {
  try {
    if (theme) localStorage.setItem("mapconv-theme", theme);
    return localStorage.getItem("mapconv-theme");
  } catch {
    return theme ?? null; // storage may be forbidden for files
  }
}

function startTheme() {
  const button = find("#theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (page.dataset.theme ? page.dataset.theme === "dark" : system.matches);
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `${button.textContent} colours`);
  };
  const last = remembered();
  if (last === "light" || last === "dark") page.dataset.theme = last;
  button.addEventListener("click", () => {
    page.dataset.theme = isDark() ? "light" : "dark";
    remembered(page.dataset.theme);
    label();
  });
  system.addEventListener("change", label);
  button.hidden = false;
  label();
}

// Numbers under the pointer, the finger or the keyboard: every cell of a figure has data-at="row,column".

const tip = find("#tip");
let current = null;
let marked = []; // the cell, and its twins on the other maps

function tipOf(cell) {
  if (cell.dataset.tip !== undefined) return [cell.dataset.tip];
  const grid = cell.closest(".heat");
  const [row, column] = cell.dataset.at.split(",");
  const layer = grid.dataset.columns.split(" ")[column];
  const name = find(`[data-row="${row}"]`, grid).textContent;
  const list = make("dl");
  for (const twin of document.querySelectorAll(`.heat [data-at="${cell.dataset.at}"]`)) {
    const className = twin === cell ? "here" : "";
    list.append(
      make("dt", { className }, twin.closest(".heat").dataset.title),
      make("dd", { className }, twin.dataset.v),
    );
  }
  return [make("b", {}, `${name}, ${layer === "-" ? "no layer" : `layer ${layer}`}`), list];
}

function showTip(cell, x, y) {
  if (current !== cell) {
    hideTip();
    current = cell;
    marked = cell.closest(".heat") ? [...document.querySelectorAll(`.heat [data-at="${cell.dataset.at}"]`)] : [cell];
    for (const node of marked) node.classList.add("on");
    tip.replaceChildren(...tipOf(cell));
    tip.hidden = false;
  }
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, x + 14), innerWidth - width - 8);
  const below = y + 18 + height < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? y + 18 : Math.max(8, y - height - 14)}px`;
}

function hideTip() {
  for (const node of marked) node.classList.remove("on");
  marked = [];
  current = null;
  tip.hidden = true;
}

function showAt(cell) {
  cell.scrollIntoView({ block: "nearest", inline: "nearest" });
  const box = cell.getBoundingClientRect();
  showTip(cell, box.left + box.width / 2, box.bottom - 8);
}

function startFigures() {
  let keyboard = false;
  const cellAt = (target) => (target instanceof Element ? target.closest(".cells [data-at]") : null);
  for (const kind of ["pointermove", "pointerdown"]) {
    document.addEventListener(kind, (event) => {
      const cell = cellAt(event.target);
      if (cell) showTip(cell, event.clientX, event.clientY);
      else if (current) hideTip();
    });
  }
  document.addEventListener("scroll", () => keyboard || hideTip(), { capture: true, passive: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  for (const grid of document.querySelectorAll(".cells")) {
    grid.addEventListener("focus", () => {
      if (!grid.matches(":focus-visible")) return;
      keyboard = true;
      const first = find("[data-at]", grid);
      if (first) showAt(first);
    });
    grid.addEventListener("blur", () => {
      keyboard = false;
      hideTip();
    });
    grid.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      keyboard = true;
      const here = current && grid.contains(current) ? current : find("[data-at]", grid);
      const at = here.dataset.at.split(",").map((part, axis) => Number(part) + step[axis]);
      showAt(find(`[data-at="${at}"]`, grid) ?? here);
    });
  }
}

// Long tables.

const textOf = (cell) => (Array.isArray(cell) ? cell[1] : (cell.text ?? cell));
const words = new Intl.Collator(undefined, { numeric: true });

function compare(a, b, descending) {
  if (!Array.isArray(a)) return (descending ? -1 : 1) * words.compare(textOf(a), textOf(b));
  if (a[0] === null || b[0] === null) return (a[0] === null) - (b[0] === null); // without a number: last, either way
  return descending ? b[0] - a[0] : a[0] - b[0];
}

class LongTable {
  constructor(place, { noun, columns, rows }) {
    Object.assign(this, { noun, columns, rows, filters: new Map(), sorted: null, descending: false });
    this.shown = columns.map((column, index) => ({ ...column, index })).filter((column) => !column.hidden);
    this.words = rows.map((row) => row.map(textOf).join("\n").toLowerCase());
    this.body = make("tbody");
    this.count = make("output");
    this.head = make("tr");
    for (const column of this.shown) this.head.append(this.heading(column));
    const group = make("colgroup");
    for (const { width } of this.shown) group.append(make("col", { style: `width:${width}ch` }));
    const total = this.shown.reduce((sum, { width }) => sum + width, 0);
    const caption = make("caption", {}, `All ${noun}`);
    this.table = make("table", { style: `min-width:${total}ch` }, caption, group, make("thead", {}, this.head), this.body);
    this.box = make("div", { className: "rows", tabIndex: 0, role: "region", "aria-label": `Table of ${noun}` }, this.table);
    place.replaceChildren(this.tools(), this.box);
    this.box.addEventListener("scroll", () => this.later(), { passive: true });
    new ResizeObserver(() => this.later()).observe(this.box);
    this.refresh();
  }

  heading(column) {
    const button = make("button", { type: "button" }, column.label);
    button.addEventListener("click", () => {
      // Numbers are most often looked at from the largest on; a third press gives the first order back.
      const first = column.kind === "number";
      if (this.sorted !== column) [this.sorted, this.descending] = [column, first];
      else if (this.descending === first) this.descending = !first;
      else this.sorted = null;
      this.refresh();
    });
    return make("th", { scope: "col", className: column.kind === "number" ? "" : "words" }, button);
  }

  tools() {
    const search = make("input", { type: "search", placeholder: "any text" });
    search.addEventListener("input", () => this.filter("", search.value));
    const tools = make("div", { className: "tools" }, make("label", {}, `Filter ${this.noun}`, search));
    for (const column of this.shown.filter(({ kind }) => kind === "choice")) {
      const values = [...new Set(this.rows.map((row) => textOf(row[column.index])))].sort(words.compare);
      if (values.length < 2) continue;
      const select = make("select", { name: column.key }, make("option", { value: "*" }, "all"));
      for (const value of values) select.append(make("option", { value: `=${value}` }, value || "–"));
      select.addEventListener("change", () => this.filter(column.key, select.value));
      tools.append(make("label", {}, column.label, select));
    }
    tools.append(this.count);
    this.selects = () => tools.querySelectorAll("select");
    this.search = search;
    return tools;
  }

  filter(key, value) {
    this.filters.set(key, value);
    this.refresh();
  }

  /** Show the rows whose column has this value, and nothing else filtered. */
  choose(key, value) {
    this.filters.clear();
    this.search.value = "";
    for (const select of this.selects()) select.value = select.name === key ? `=${value}` : "*";
    this.filter(key, `=${value}`);
    this.box.scrollIntoView({ block: "center" });
    this.box.focus({ preventScroll: true });
  }

  refresh() {
    const wanted = (this.filters.get("") ?? "").trim().toLowerCase();
    const chosen = this.shown.filter(({ key }) => (this.filters.get(key) ?? "*") !== "*");
    this.order = [...this.rows.keys()].filter(
      (index) =>
        this.words[index].includes(wanted) &&
        chosen.every(({ key, index: cell }) => `=${textOf(this.rows[index][cell])}` === this.filters.get(key)),
    );
    if (this.sorted) {
      const cell = this.sorted.index;
      this.order.sort((a, b) => compare(this.rows[a][cell], this.rows[b][cell], this.descending) || a - b);
    }
    [...this.head.children].forEach((heading, number) => {
      const direction = this.descending ? "descending" : "ascending";
      heading.setAttribute("aria-sort", this.shown[number] === this.sorted ? direction : "none");
    });
    this.count.textContent = `${this.order.length.toLocaleString("en")} of ${this.rows.length.toLocaleString("en")} ${this.noun}`;
    this.table.setAttribute("aria-rowcount", this.order.length + 1);
    this.box.scrollTop = 0;
    this.render();
  }

  later() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      this.render();
    });
  }

  /** Rows in view and a few beyond; two empty rows stand for all others. Everything, where it is printed. */
  render(everything = false) {
    const height = this.rowHeight ?? 34;
    const spare = 12;
    const from = everything ? 0 : Math.max(0, Math.floor(this.box.scrollTop / height) - spare);
    const to = everything ? this.order.length : from + Math.ceil(this.box.clientHeight / height) + 2 * spare;
    const space = (rows) => make("tr", { className: "space", "aria-hidden": "true" }, make("td", { colSpan: this.shown.length, style: `height:${rows * height}px` }));
    const focused = document.activeElement?.closest?.("[data-row-index]")?.dataset.rowIndex;
    const rows = this.order.slice(from, to).map((index, number) => this.row(index, from + number));
    const after = this.order.length - from - rows.length;
    this.body.replaceChildren(...(from ? [space(from)] : []), ...rows, ...(after > 0 ? [space(after)] : []));
    if (focused !== undefined) find(`[data-row-index="${focused}"] button`, this.body)?.focus({ preventScroll: true });
    this.rowHeight ??= rows[0]?.getBoundingClientRect().height || undefined;
  }

  row(index, position) {
    const row = make("tr", { "aria-rowindex": position + 2, "data-row-index": index });
    this.shown.forEach((column, number) => {
      const cell = this.rows[index][column.index];
      const className = column.kind === "number" ? "" : `words ${column.key === "status" && textOf(cell) !== "done" ? "failed" : ""}`;
      if (number === 0) {
        const button = make("button", { type: "button", title: textOf(cell) }, textOf(cell));
        button.addEventListener("click", () => this.details(index));
        row.append(make("th", { scope: "row", className }, button));
      } else {
        row.append(make("td", { className, title: column.kind === "number" ? "" : textOf(cell) }, linkOf(cell)));
      }
    });
    return row;
  }

  details(index) {
    const list = make("dl", { className: "facts" });
    this.columns.forEach(({ label }, column) => {
      const cell = this.rows[index][column];
      if (textOf(cell) === "") return;
      // All the digits that there are, where the spelling leaves some out.
      const exact = Array.isArray(cell) && cell[0] !== null ? ` (${cell[0]})` : "";
      const value = make("dd", {}, linkOf(cell), Number(cell[0]) === Number(cell[1]) ? "" : exact);
      list.append(make("div", {}, make("dt", {}, label), value));
    });
    const title = make("h2", { id: "details-title" }, textOf(this.rows[index][0]));
    const close = make("form", { method: "dialog" }, make("button", {}, "Close"));
    const dialog = find("#details");
    dialog.replaceChildren(title, list, close);
    dialog.showModal();
  }
}

function linkOf(cell) {
  return cell.href ? make("a", { href: cell.href }, cell.text) : textOf(cell);
}

function startTables() {
  const data = JSON.parse(find("#data").textContent);
  const tables = {};
  for (const place of document.querySelectorAll("[data-table]")) {
    tables[place.dataset.table] = new LongTable(place, data[place.dataset.table]);
  }
  for (const button of document.querySelectorAll("[data-find]")) {
    button.addEventListener("click", () => tables[button.dataset.find].choose(button.dataset.column, button.dataset.value));
  }
  matchMedia("print").addEventListener("change", ({ matches }) => {
    for (const table of Object.values(tables)) table.render(matches);
    if (matches) for (const failure of document.querySelectorAll(".failure")) failure.open = true;
  });
}

startTheme();
startFigures();
startTables();
