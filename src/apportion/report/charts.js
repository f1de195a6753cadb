"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const QUANTITIES = { count: "selections", mass: "routing mass", sensitivity: "sensitivity", rank: "planned rank" };
const METRICS = { exact_match: "exact match", loss: "loss", forgetting: "forgetting" };
const UNITS = { parameters: "trained parameters", flops: "adapter FLOPs per token" };
const SYMBOLS = [["circle", "●"], ["square", "■"], ["diamond", "◆"], ["triangle-up", "▲"], ["star", "★"]];
const TITLE = { standoff: 10, font: { size: 13 } };
const HINT = "Point at the chart, or focus it and press the arrow keys.";

const unique = (list) => [...new Set(list)];
const sum = (list) => list.reduce((total, value) => total + (value ?? 0), 0);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
// Plotly reads tags and entities in text: what comes from files must not be read so.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e7) ? value.toExponential(3) : value.toLocaleString("en", { maximumSignificantDigits: 5 });
}
const interval = (found) => `${number(found[0])} (${number(found[1])} to ${number(found[2])})`;

// What can be chosen: lists of [value, label, group].
const indexed = (list, label) => list.map((item, index) => [String(index), label(item), item.group ?? ""]);
const profileOf = (v) => data.profiles[v.model];
const modelChoices = () => indexed(data.profiles, (profile) => profile.name);
const taskOf = (v) => profileOf(v).tasks[v.task];
const taskChoices = (v) => indexed(profileOf(v).tasks, (task) => task.name);
function planChoices(v) {
  const fitting = data.plans.map((plan, index) => [String(index), plan.label, plan.group, plan])
    .filter(([, , , plan]) => plan.profiles.includes(Number(v.model)));
  return profileOf(v).tasks.length ? [...fitting, ["", "none", ""]] : fitting;
}
const quantityChoices = (names) => names.map((name) => [name, QUANTITIES[name], ""]);

// The charts. Each tells its choices, and for chosen values its figure: traces, layout, the cells that the arrow keys
// go through, and the same numbers as a table.
const CHARTS = {
  experts: {
    model: modelChoices,
    plan: planChoices,
    task: taskChoices,
    quantity: (v) => quantityChoices([...Object.keys(taskOf(v)?.grids ?? {}), ...(v.plan ? ["rank"] : [])]),
    colours: (v) => (v.quantity === "rank" ? [] : [["value", "by value", ""], ["share", "by share of the layer", ""]]),
    figure: expertFigure,
  },
  matrices: {
    model: modelChoices,
    plan: planChoices,
    task: taskChoices,
    quantity: (v) => quantityChoices([...(taskOf(v)?.matrices.length ? ["sensitivity"] : []), ...(v.plan ? ["rank"] : [])]),
    figure: matrixFigure,
  },
  coverage: {
    model: modelChoices,
    task: taskChoices,
    quantity: (v) => quantityChoices(Object.keys(taskOf(v).grids)),
    figure: coverageFigure,
  },
  overlap: {
    model: modelChoices,
    quantity: (v) => quantityChoices(["count", "mass", "sensitivity"].filter((name) => profileOf(v).tasks.every((task) => task.grids[name]))),
    k: (v) => ({ min: 1, max: Math.max(...profileOf(v).layers.map((layer) => layer.experts)), start: profileOf(v).layers[0].top_k }),
    figure: overlapFigure,
  },
  scores: {
    model: () => unique(data.scores.map((cell) => cell.model)).map((name) => [name, name, ""]),
    task: (v) => unique(scoresOf(v).map((cell) => cell.task)).map((name) => [name, name, ""]),
    metric: (v) => Object.keys(METRICS).filter((name) => scoresOf(v).some((cell) => cell.task === v.task && cell[name])).map((name) => [name, METRICS[name], ""]),
    figure: scoreFigure,
  },
};
const scoresOf = (v) => data.scores.filter((cell) => cell.model === v.model);

function expertFigure(v, look, width) {
  const profile = profileOf(v), task = taskOf(v), plan = data.plans[v.plan];
  const wide = Math.max(...profile.layers.map((layer) => layer.experts));
  const planned = profile.layers.map(() => new Map());
  for (const found of plan?.experts ?? []) planned[found.row].set(found.expert, found.rank);
  const values = profile.layers.map((layer, row) => Array.from({ length: wide }, (_, expert) =>
    expert >= layer.experts ? null : v.quantity === "rank" ? planned[row].get(expert) ?? 0 : task.grids[v.quantity][row][expert]));
  const share = (row, name, expert) => task.grids[name][row][expert] / (sum(task.grids[name][row]) || 1);
  const shown = v.colours === "share" ? values.map((cells, row) => cells.map((value, expert) => value === null ? null : share(row, v.quantity, expert))) : values;
  const text = profile.layers.map((layer, row) => Array.from({ length: layer.experts }, (_, expert) => [
    `layer ${layer.layer}, expert ${expert}`,
    ...Object.keys(task?.grids ?? {}).map((name) => `${QUANTITIES[name]} ${number(task.grids[name][row][expert])}, ${percent(share(row, name, expert))} of the layer`),
    ...(plan ? [planned[row].has(expert) ? `planned, rank ${planned[row].get(expert)}` : "not planned"] : []),
  ].join("<br>")));
  const named = v.colours === "share" ? `share of the layer's ${QUANTITIES[v.quantity]}` : QUANTITIES[v.quantity];
  const figure = heatFigure(look, Math.max(width, wide * 4 + 70), {
    z: shown, text, rows: profile.layers.map((layer) => String(layer.layer)), columns: Array.from({ length: wide }, (_, expert) => String(expert)),
    xTitle: "expert", yTitle: "layer", named, form: v.colours === "share" ? percent : number,
  });
  if (plan && v.quantity !== "rank") {
    const marks = plan.experts.map((found) => [found.expert, found.row]);
    figure.traces.push({
      type: "scatter", mode: "markers", x: marks.map(([x]) => x), y: marks.map(([, y]) => y), hoverinfo: "skip", showlegend: false,
      marker: { size: Math.max(3, Math.min(11, figure.cell * 0.5)), color: look.mark, line: { color: look.markEdge, width: figure.cell > 10 ? 1.5 : 0.5 } },
    });
  }
  const whose = [task?.name, plan && `planned experts of ${plan.label}${v.quantity === "rank" ? "" : " marked with a dot, * in the table"}`].filter(Boolean).join("; ");
  figure.caption = `${named}${whose ? `: ${whose}` : ""}`;
  figure.table = {
    head: ["layer", ...Array.from({ length: wide }, (_, expert) => `expert ${expert}`)],
    rows: shown.map((cells, row) => [profile.layers[row].layer, ...cells.map((value, expert) => number(value) + (v.quantity !== "rank" && planned[row].has(expert) ? " *" : ""))]),
  };
  return figure;
}

function matrixFigure(v, look, width) {
  const plan = data.plans[v.plan], task = taskOf(v);
  const cells = v.quantity === "rank" ? plan.matrices : task.matrices;
  const both = [...(task?.matrices ?? []), ...(plan?.matrices ?? [])];
  const rows = unique(both.map((cell) => cell.layer)).sort((a, b) => a - b), columns = unique(both.map((cell) => cell.name));
  if (!task) columns.sort();
  const key = (row, column) => `${row} ${column}`;
  const index = (list) => new Map((list ?? []).map((cell) => [key(cell.layer, cell.name), cell]));
  const shown = index(cells), measured = index(task?.matrices), ranks = index(plan?.matrices);
  const z = rows.map((row) => columns.map((column) => shown.get(key(row, column))?.sum ?? (v.quantity === "rank" ? 0 : null)));
  const text = rows.map((row) => columns.map((column) => {
    const norm = measured.get(key(row, column)), rank = ranks.get(key(row, column));
    const lines = [`layer ${row}, ${plain(column)}`];
    if (norm) lines.push(`sensitivity ${number(norm.sum)}${norm.sites > 1 ? ` in ${number(norm.sites)} matrices` : ""}`);
    if (plan) lines.push(rank ? `planned: ranks add up to ${number(rank.sum)} in ${number(rank.sites)} ${rank.sites > 1 ? "matrices" : "matrix"}` : "not planned");
    return lines.join("<br>");
  }));
  const named = v.quantity === "rank" ? "planned ranks, added up" : QUANTITIES[v.quantity];
  const figure = heatFigure(look, Math.max(width, columns.length * 26 + 70), {
    z, text, rows: rows.map(String), columns: columns.map((column) => plain(column)), xTitle: "", yTitle: "layer", named, form: number,
  });
  figure.caption = `${named}: ${[v.quantity === "rank" ? null : task?.name, plan?.label].filter(Boolean).join("; ")}`;
  figure.table = { head: ["layer", ...columns], rows: z.map((values, row) => [rows[row], ...values.map(number)]) };
  return figure;
}

const hottest = (row, k) => row.map((value, expert) => [value, expert]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, k).map(([, expert]) => expert);

function overlapFigure(v, look, width) {
  const k = Number(v.k), profile = profileOf(v), tasks = profile.tasks.slice(0, -1);
  const sets = tasks.map((task) => task.grids[v.quantity].map((row) => new Set(hottest(row, k))));
  const jaccard = (one, other) => sum(one.map((set, row) => {
    const common = [...set].filter((expert) => other[row].has(expert)).length;
    return common / (set.size + other[row].size - common);
  })) / one.length;
  const z = sets.map((one) => sets.map((other) => jaccard(one, other))), names = tasks.map((task) => plain(task.name));
  const figure = heatFigure(look, Math.min(width, 160 + 90 * tasks.length), {
    z, text: z.map((row, a) => row.map((value, b) => `${names[a]} and ${names[b]}<br>Jaccard index ${value.toFixed(3)}, ${k} experts per layer`)),
    rows: names, columns: names, xTitle: "", yTitle: "", named: "Jaccard index", top: 1, form: number, square: true,
  });
  Object.assign(figure.traces[0], { texttemplate: "%{z:.2f}", textfont: { size: 13 } });
  figure.caption = `Jaccard index of the ${k} experts with most ${QUANTITIES[v.quantity]}, mean over layers`;
  figure.table = { head: ["task", ...tasks.map((task) => task.name)], rows: z.map((row, a) => [tasks[a].name, ...row.map((value) => value.toFixed(3))]) };
  return figure;
}

function coverageFigure(v, look, width) {
  const profile = profileOf(v), grid = taskOf(v).grids[v.quantity], wide = Math.max(...profile.layers.map((layer) => layer.experts));
  const curves = grid.map((row) => {
    const sorted = [...row].sort((a, b) => b - a), total = sum(row) || 1;
    let taken = 0;
    return [0, ...sorted.map((value) => (taken += value) / total)];
  });
  const at = (curve, k) => curve[Math.min(k, curve.length - 1)];
  const ks = Array.from({ length: wide + 1 }, (_, k) => k), means = ks.map((k) => sum(curves.map((curve) => at(curve, k))) / curves.length);
  const say = (where, k, value) => `${where}: the ${k} hottest take ${percent(value)}`;
  const traces = curves.map((curve, row) => ({
    type: "scatter", mode: "lines", x: ks.slice(0, curve.length), y: curve, line: { color: look.c[0], width: 1 }, opacity: 0.4, hoverinfo: "text",
    text: curve.map((value, k) => say(`layer ${profile.layers[row].layer}`, k, value)),
  }));
  traces.push({ type: "scatter", mode: "lines", x: [0, wide], y: [0, 1], line: { color: look.muted, width: 1.5, dash: "dot" }, hoverinfo: "skip" });
  traces.push({ type: "scatter", mode: "lines", x: ks, y: means, line: { color: look.c[1], width: 3 }, hoverinfo: "text", text: ks.map((k) => say("mean", k, means[k])) });
  const layout = baseLayout(look, width, 380);
  Object.assign(layout.xaxis, { title: { ...TITLE, text: "k, experts kept in each layer" }, range: [0, wide], zeroline: false });
  Object.assign(layout.yaxis, { title: { ...TITLE, text: `share of ${QUANTITIES[v.quantity]}` }, range: [0, 1.02], zeroline: false, tickformat: ".0%" });
  return {
    traces, layout, caption: `share of ${QUANTITIES[v.quantity]} taken by the k hottest experts of a layer: ${taskOf(v).name}`,
    cells: [means.map((_, k) => ({ curveNumber: traces.length - 1, pointNumber: k }))],
    table: { head: ["k", "mean", ...profile.layers.map((layer) => `layer ${layer.layer}`)], rows: ks.slice(1).map((k) => [k, percent(means[k]), ...curves.map((curve) => percent(at(curve, k)))]) },
  };
}

const hidden = new Set();
const columnOf = (cell) => (cell.budgeted ? cell.budget : Infinity);
const budgetText = (budget) => (budget === Infinity ? "none" : number(budget));

function scoreFigure(v, look, width) {
  const cells = scoresOf(v).filter((cell) => cell.task === v.task && cell[v.metric]);
  const contenders = unique(data.scores.map((cell) => cell.contender)), budgets = unique(cells.map(columnOf)).sort((a, b) => a - b);
  const shown = contenders.filter((name) => !hidden.has(name) && cells.some((cell) => cell.contender === name));
  const step = 0.8 / Math.max(shown.length, 1);
  const beside = new Map(budgets.map((budget) => [budget, shown.filter((name) => cells.some((cell) => cell.contender === name && columnOf(cell) === budget))]));
  const place = (cell) => {
    const names = beside.get(columnOf(cell));
    return budgets.indexOf(columnOf(cell)) + (names.indexOf(cell.contender) - (names.length - 1) / 2) * step;
  };
  const groups = shown.map((name) => cells.filter((cell) => cell.contender === name).sort((a, b) => a.budget - b.budget));
  const traces = groups.map((own, index) => {
    const [colour, symbol] = styleOf(look, contenders.indexOf(shown[index]));
    return {
      type: "scatter", mode: "lines+markers", name: plain(shown[index]), x: own.map(place), y: own.map((cell) => cell[v.metric][0]), hoverinfo: "text",
      error_y: { type: "data", symmetric: false, array: own.map((cell) => cell[v.metric][2] - cell[v.metric][0]), arrayminus: own.map((cell) => cell[v.metric][0] - cell[v.metric][1]), thickness: 1.5, width: 3 },
      marker: { size: 9, symbol, color: colour }, line: { color: colour, width: 1, dash: "dot" },
      text: own.map((cell) => `${plain(cell.contender)}, budget ${budgetText(columnOf(cell))}<br>${METRICS[v.metric]} ${interval(cell[v.metric])}<br>spent ${number(cell.spent)}, ${cell.seeds} seed${cell.seeds > 1 ? "s" : ""}`),
    };
  });
  const layout = baseLayout(look, Math.max(width, 40 + budgets.length * contenders.length * 13), 440);
  Object.assign(layout.xaxis, { title: { ...TITLE, text: `budget, ${UNITS[data.unit]}` }, tickvals: budgets.map((_, index) => index), ticktext: budgets.map(budgetText), range: [-0.5, budgets.length - 0.5], showgrid: false, zeroline: false });
  const before = cells[0]?.before[v.metric], known = typeof before === "number";
  const ends = [...groups.flat().flatMap((cell) => cell[v.metric]), ...(known ? [before] : [])], low = Math.min(...ends), high = Math.max(...ends), room = 0.08 * (high - low || 1);
  Object.assign(layout.yaxis, { title: { ...TITLE, text: METRICS[v.metric] }, range: [low - room, high + room], zeroline: v.metric === "forgetting" });
  layout.shapes = budgets.slice(1).map((_, index) => ({ type: "line", x0: index + 0.5, x1: index + 0.5, yref: "paper", y0: 0, y1: 1, line: { color: look.line, width: 1 } }));
  if (known) {
    layout.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: before, y1: before, line: { color: look.muted, width: 1.5, dash: "dash" } });
    layout.annotations = [{ xref: "paper", x: 1, xanchor: "right", y: before, yanchor: "bottom", text: "untrained", showarrow: false, font: { color: look.muted, size: 12 } }];
  }
  return {
    traces, layout, caption: `${METRICS[v.metric]} against budget: ${v.task}`, chips: contenders.map((name, index) => [name, ...styleOf(look, index)]),
    cells: groups.map((own, curveNumber) => own.map((_, pointNumber) => ({ curveNumber, pointNumber }))),
    table: { head: ["contender", "budget", "spent", "seeds", METRICS[v.metric]], rows: groups.flat().map((cell) => [cell.contender, budgetText(columnOf(cell)), number(cell.spent), cell.seeds, interval(cell[v.metric])]) },
  };
}

function styleOf(look, index) {
  return [look.c[index % look.c.length], ...SYMBOLS[index % SYMBOLS.length]];
}

function heatFigure(look, width, { z, text, rows, columns, xTitle, yTitle, named, top, form, square }) {
  const longest = (list) => Math.max(...list.map((name) => name.length)) * 7;
  const left = longest(rows) + (yTitle ? 45 : 20), right = 12, cell = (width - left - right) / columns.length;
  const slanted = !xTitle && longest(columns) > cell - 8;
  const height = square ? cell : Math.max(9, Math.min(30, cell, 720 / rows.length));
  const bottom = xTitle ? 48 : slanted ? longest(columns) * 0.75 + 20 : 28;
  const layout = baseLayout(look, width, Math.round(height * rows.length + bottom + 6));
  layout.margin = { l: left, r: right, t: 6, b: bottom };
  const ticks = (list, room) => {
    const step = Math.max(1, Math.ceil(list.length / Math.max(1, Math.floor(room))));
    return { tickvals: list.map((_, index) => index).filter((index) => index % step === 0), ticktext: list.filter((_, index) => index % step === 0) };
  };
  const plainAxis = { automargin: false, showgrid: false, zeroline: false };
  Object.assign(layout.xaxis, plainAxis, { title: { ...TITLE, text: xTitle }, range: [-0.5, columns.length - 0.5], ...ticks(columns, xTitle ? (cell * columns.length) / 30 : Infinity), tickangle: slanted ? -45 : 0 });
  Object.assign(layout.yaxis, plainAxis, { title: { ...TITLE, text: yTitle }, range: [rows.length - 0.5, -0.5], ...ticks(rows, (height * rows.length) / 16) });
  const highest = top ?? Math.max(...z.flat().map((value) => value ?? 0));
  return {
    cell: Math.min(cell, height), layout, scale: [named, form(0), form(highest)],
    cells: z.map((row, y) => row.map((_, x) => (text[y][x] ? { curveNumber: 0, pointNumber: [y, x] } : null))),
    traces: [{
      type: "heatmap", z, text, x: columns.map((_, index) => index), y: rows.map((_, index) => index), hoverinfo: "text", hoverongaps: false, colorscale: look.heat, showscale: false,
      zmin: 0, zmax: highest || 1, xgap: cell > 12 ? 2 : cell > 7 ? 1 : 0, ygap: height > 12 ? 2 : height > 8 ? 1 : 0,
    }],
  };
}

function baseLayout(look, width, height) {
  const axis = () => ({ color: look.muted, gridcolor: look.line, linecolor: look.line, zerolinecolor: look.strongLine, automargin: true, fixedrange: true, ticks: "" });
  return {
    width, height, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: look.font, color: look.text, size: 13 }, margin: { l: 10, r: 10, t: 10, b: 10 },
    xaxis: axis(), yaxis: axis(), showlegend: false, hovermode: "closest", dragmode: false, hoverlabel: { bgcolor: look.card, bordercolor: look.strongLine, font: { color: look.text, family: look.font, size: 13 }, align: "left" },
  };
}

function currentLook() {
  const style = getComputedStyle(document.documentElement), read = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    text: read("text"), muted: read("muted"), line: read("line"), strongLine: read("strong-line"), card: read("card"), mark: read("mark"), markEdge: read("mark-edge"),
    heat: [0, 1, 2, 3, 4].map((step) => [step / 4, read(`heat-${step}`)]), c: [0, 1, 2, 3, 4, 5, 6].map((index) => read(`c${index}`)), font: getComputedStyle(document.body).fontFamily,
  };
}
