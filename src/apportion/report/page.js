"use strict";
// One chart on the page: its controls, its figure, what the arrow keys point at, its table.
class Panel {
  constructor(section, kind) {
    Object.assign(this, { section, kind, values: {}, cursor: [0, -1] });
    const find = (selector) => section.querySelector(selector);
    Object.assign(this, { form: find(".controls"), box: find(".chart"), frame: find(".frame"), readout: find(".readout"), chips: find(".chips"), scale: find(".scale"), numbers: find(".numbers") });
    this.form.addEventListener("input", () => this.draw());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.box.addEventListener("keydown", (event) => this.step(event));
    this.box.addEventListener("blur", () => Plotly.Fx.unhover(this.box));
    this.numbers.addEventListener("toggle", () => this.fillTable());
    this.draw();
    this.box.on("plotly_hover", (event) => this.say(event.points[0].text));
  }

  choose() {
    for (const [name, choices] of Object.entries(this.kind)) {
      if (name === "figure") continue;
      const found = choices(this.values), control = this.form.elements[name];
      if (name === "k") this.values.k = this.slide(found, control);
      else this.values[name] = this.select(name, found, control);
    }
  }

  select(name, found, control) {
    if (!control) {
      control = document.createElement("select");
      control.name = name;
      this.form.append(labelled(name, control));
    }
    const kept = control.length ? control.value : null, signature = JSON.stringify(found.map((choice) => choice.slice(0, 3)));
    if (control.dataset.choices !== signature) {
      control.dataset.choices = signature;
      const groups = unique(found.map(([, , group]) => group)).map((group) => {
        const options = found.filter((choice) => choice[2] === group).map(([value, label]) => new Option(label, value));
        if (!group) return options;
        const made = document.createElement("optgroup");
        made.label = group;
        made.append(...options);
        return [made];
      });
      control.replaceChildren(...groups.flat());
      control.value = found.some(([value]) => value === kept) ? kept : (found[0]?.[0] ?? "");
      control.parentElement.hidden = found.length < 2;
      control.parentElement.style.display = found.length < 2 ? "none" : "";
    }
    return control.value;
  }

  slide({ min, max, start }, control) {
    if (!control) {
      control = Object.assign(document.createElement("input"), { type: "range", name: "k", min, max });
      control.value = start ?? 1;
      this.form.append(labelled("k", control));
    }
    control.max = max;
    control.parentElement.firstChild.textContent = `Experts a layer: k = ${control.value}`;
    return control.value;
  }

  draw(width) {
    this.choose();
    this.box.style.width = "";
    const figure = (this.figure = this.kind.figure(this.values, currentLook(), width ?? this.frame.clientWidth - 6));
    this.box.style.width = `${figure.layout.width}px`;
    Plotly.react(this.box, figure.traces, figure.layout, { displayModeBar: false, scrollZoom: false, doubleClick: false });
    this.box.setAttribute("aria-label", `Chart. ${figure.caption}`);
    this.readout.textContent = HINT;
    this.readout.classList.add("hint");
    this.drawChips(figure.chips);
    this.scale.hidden = !figure.scale;
    [...this.scale.querySelectorAll("span")].forEach((span, index) => (span.textContent = figure.scale?.[index] ?? ""));
    this.fillTable();
  }

  drawChips(chips) {
    this.chips.hidden = !chips;
    if (!chips) return;
    const buttons = [...this.chips.children];
    chips.forEach(([name, colour, , glyph], index) => {
      const button = buttons[index] ?? this.chips.appendChild(this.chip(name, glyph));
      button.firstChild.style.color = colour;
      button.setAttribute("aria-pressed", String(!hidden.has(name)));
    });
  }

  chip(name, glyph) {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.append(Object.assign(document.createElement("span"), { textContent: glyph, ariaHidden: "true" }), name);
    button.addEventListener("click", () => {
      if (!hidden.delete(name)) hidden.add(name);
      this.draw();
    });
    return button;
  }

  step(event) {
    const [rows, columns] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
    if (rows === undefined) return;
    event.preventDefault();
    const { cells } = this.figure, bound = (value, length) => Math.max(0, Math.min(length - 1, value));
    const row = bound(this.cursor[0] + rows, cells.length), column = bound(this.cursor[1] + columns, cells[row]?.length ?? 0);
    this.cursor = [row, column];
    const point = cells[row]?.[column];
    if (!point) return;
    const { text } = this.figure.traces[point.curveNumber], at = point.pointNumber;
    Plotly.Fx.hover(this.box, [Array.isArray(at) ? { curveNumber: point.curveNumber, xval: at[1], yval: at[0] } : point]);
    this.say(Array.isArray(at) ? text[at[0]][at[1]] : text[at]);
  }

  say(text) {
    const decoded = new DOMParser().parseFromString(text.replaceAll("<br>", "; "), "text/html");
    this.readout.textContent = decoded.body.textContent;
    this.readout.classList.remove("hint");
  }

  fillTable() {
    const { table, caption } = this.figure, place = this.numbers.querySelector(".scroll");
    if (!this.numbers.open) return;
    const made = document.createElement("table"), head = made.createTHead().insertRow(), body = made.createTBody();
    made.createCaption().textContent = caption;
    for (const name of table.head) head.append(Object.assign(document.createElement("th"), { scope: "col", textContent: name }));
    for (const cells of table.rows) {
      const row = body.insertRow();
      cells.forEach((cell, index) => row.append(Object.assign(document.createElement(index ? "td" : "th"), { textContent: cell, className: index ? "number" : "", ...(index ? {} : { scope: "row" }) })));
    }
    place.replaceChildren(made);
  }
}

function labelled(name, control) {
  const label = document.createElement("label");
  label.append(Object.assign(document.createElement("span"), { textContent: name }), control);
  return label;
}

function sortBy(table, column, header) {
  const rising = header.ariaSort !== "ascending", body = table.tBodies[0];
  const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [one, other] = [Number(key(a)), Number(key(b))];
    if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other) || key(a).localeCompare(key(b), "en", { numeric: true });
    return one - other;
  };
  const rows = [...body.rows].sort((a, b) => (rising ? compare(a, b) : compare(b, a)));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.ariaSort = rising ? "ascending" : "descending";
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => header.querySelector("button").addEventListener("click", () => sortBy(table, column, header)));
}
const panels = Object.entries(CHARTS).filter(([id]) => document.getElementById(id)).map(([id, kind]) => new Panel(document.getElementById(id), kind));
const redraw = (width) => panels.forEach((panel) => panel.draw(width));
const PRINT_WIDTH = 1000;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
matchMedia("print").addEventListener("change", (event) => redraw(event.matches ? PRINT_WIDTH : undefined));
let known = document.documentElement.clientWidth;
addEventListener("resize", () => {
  if (matchMedia("print").matches || document.documentElement.clientWidth === known) return;
  known = document.documentElement.clientWidth;
  redraw();
});
