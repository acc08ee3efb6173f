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

startTheme();
startFigures();
