// Long tables: sorted and filtered here; a row exists while it is in view.

const textOf = (cell) => (Array.isArray(cell) ? cell[1] : (cell.text ?? cell));
const words = new Intl.Collator(undefined, { numeric: true });

function compare(a, b, descending) {
  if (!Array.isArray(a)) return (descending ? -1 : 1) * words.compare(textOf(a), textOf(b));
  if (a[0] === null || b[0] === null) return (a[0] === null) - (b[0] === null); // without a number: last, either way
  return descending ? b[0] - a[0] : a[0] - b[0];
}

class LongTable {
  constructor(place, { noun, columns, rows }) {
    Object.assign(this, { noun, columns, rows, filters: new Map(), sorted: null, descending: false, onPaper: false });
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
    const tools = make("div", { className: "tools" }, this.labelled(`Filter ${this.noun}`, search));
    for (const column of this.shown.filter(({ kind }) => kind === "choice")) {
      const values = [...new Set(this.rows.map((row) => textOf(row[column.index])))].sort(words.compare);
      if (values.length < 2) continue;
      const select = make("select", { name: column.key }, make("option", { value: "*" }, "all"));
      for (const value of values) select.append(make("option", { value: `=${value}` }, value || "–"));
      select.addEventListener("change", () => this.filter(column.key, select.value));
      tools.append(this.labelled(column.label, select));
    }
    tools.append(this.count);
    this.selects = () => tools.querySelectorAll("select");
    this.search = search;
    return tools;
  }

  labelled(label, control) {
    control.id = `${this.noun}-${label}`.replaceAll(" ", "-");
    return make("div", {}, make("label", { htmlFor: control.id }, label), control);
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

  /** Rows in view and a few beyond; two empty rows stand for all others. On paper all of them. */
  render() {
    const everything = this.onPaper;
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
      list.append(make("div", {}, make("dt", {}, label), make("dd", {}, linkOf(cell), allDigits(cell))));
    });
    const title = make("h2", { id: "details-title", tabIndex: -1, autofocus: true }, textOf(this.rows[index][0]));
    const close = make("form", { method: "dialog" }, make("button", {}, "Close"));
    const dialog = find("#details");
    dialog.replaceChildren(title, list, close);
    dialog.showModal();
  }
}

function linkOf(cell) {
  return cell.href ? make("a", { href: cell.href }, cell.text) : textOf(cell);
}

/** The number itself, where its spelling leaves digits out. */
function allDigits(cell) {
  if (!Array.isArray(cell) || cell[0] === null) return "";
  return Number(cell[1].replaceAll(",", "")) === cell[0] ? "" : ` (${cell[0]})`;
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
    for (const table of Object.values(tables)) {
      table.onPaper = matches;
      table.render();
    }
    if (matches) for (const failure of document.querySelectorAll(".failure")) failure.open = true;
  });
}

startTables();
