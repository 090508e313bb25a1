"use strict";
// The interactive report: charts by uPlot, controls, marks. Its data is the JSON of #report-data.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const runs = data.runs, several = runs.length > 1;
  const state = {axis: "iteration", weight: 0, marked: 0, hiddenKinds: new Set(), view: [0, 1]};
  const charts = [];
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];
  const ON_AXIS = new Set(["restart", "checkpoint"]);
  const QUIET = new Set(["checkpoint"]);

  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = index => css(`--c${index % 8}`);
  const kindColor = kind => css(`--mark-${kind.replace(" ", "-")}`) || css("--ink");

  // Texts are set as text, never as HTML: names of runs and folds are not trusted.
  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "text") made.textContent = value;
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  const toX = run => iteration => state.axis === "tokens"
    ? Curves.interpolate(run.tokens, iteration) : iteration;

  function fullView() {
    const ends = runs.map(run => toX(run)(Math.max(1, run.iteration)));
    return [0, 1.01 * Math.max(...ends.filter(Number.isFinite), 1)];  // with room for the last point
  }

  class Chart {
    constructor(panel, index) {
      this.panel = panel;
      this.log = panel.log;
      this.isFirst = index === 0;
      this.hidden = new Set();
      this.plot = null;
      this.readout = element("p", {class: "readout"});
      this.chips = element("div", {class: "chips"});
      this.box = element("div", {class: "chart"});
      const toggle = element("button", {
        type: "button", class: "toggle", text: "log", "aria-pressed": String(this.log),
        title: "logarithmic y axis",
        onclick: () => {
          this.log = !this.log;
          toggle.setAttribute("aria-pressed", String(this.log));
          this.build();
        },
      });
      const unit = panel.unit ? element("span", {class: "unit", text: panel.unit}) : "";
      this.section = element("section", {class: this.isFirst ? "panel first" : "panel"},
        element("header", {}, element("h2", {text: panel.title}), unit, toggle),
        this.readout, this.box, this.chips);
      for (const [id, , curve] of this.members()) {
        if (several && this.isFirst && curve.style === "points") this.hidden.add(id);
      }
    }

    // The curves of the panel: [id, run, description, color, dash].
    members() {
      const found = [];
      runs.forEach((run, r) => this.panel.curves.forEach((curve, c) => {
        if (!run.curves[curve.key]) return;
        const isLine = curve.style === "line" || curve.style === "marked";
        const dash = several && isLine ? DASHES[c % 4] : [];
        const tone = curve.style === "dotted" ? 7 : several ? r : c;
        found.push([`${r} ${curve.key}`, run, curve, tone, dash]);
      }));
      return found;
    }

    label(run, curve) {
      if (!several) return curve.label;
      return this.panel.curves.length === 1 ? run.name : `${run.name}: ${curve.label}`;
    }

    build() {
      if (this.plot) this.plot.destroy();
      this.shown = [];
      const tables = [], series = [{}];
      for (const [id, run, curve, colorIndex, dash] of this.members()) {
        const weight = this.panel.smooth && curve.style === "line" ? state.weight : 0;
        const {strong, faint} = Curves.lines(run.curves[curve.key], weight, toX(run));
        const show = !this.hidden.has(id);
        if (faint) this.add(tables, series, faint, colorIndex, {show, alpha: 0.3, width: 1});
        this.shown.push({id, run, curve, colorIndex, dash, line: strong});
        this.add(tables, series, strong, colorIndex,
                 this.style(curve, show, dash, strong, () => color(colorIndex)));
      }
      this.plot = new uPlot(this.options(series), uPlot.join(tables), this.box);
      this.plot.setScale("x", {min: state.view[0], max: state.view[1]});
      this.makeChips();
      this.describe(null);
    }

    add(tables, series, line, colorIndex, options) {
      const y = this.log ? line.y.map(value => value > 0 ? value : null) : line.y;
      tables.push([line.x, y]);
      series.push({stroke: () => color(colorIndex), spanGaps: true, points: {show: false},
                   ...options});
    }

    style(curve, show, dash, line, stroke) {
      const points = {show: true, size: 6, stroke, width: 1.5};
      const fill = {points: {...points, fill: () => css("--paper")}};
      if (curve.style === "points") return {show, ...fill, paths: () => null};
      if (curve.style === "marked") return {show, ...fill, width: 1.5, dash};
      if (curve.style === "dotted") return {show, width: 1, dash: [2, 3], alpha: 0.8};
      return {show, width: 1.6, dash, points: line.x.length < 3 ? points : {show: false}};
    }

    options(series) {
      const axis = {
        stroke: () => css("--soft"), font: "12px system-ui, sans-serif",
        grid: {stroke: () => css("--grid"), width: 1},
        ticks: {stroke: () => css("--grid"), width: 1, size: 4},
      };
      return {
        width: this.width(), height: this.height(), legend: {show: false}, series,
        padding: [8, 14, 0, 0],
        scales: {
          // uPlot asks for the limits of x first, and stores them after those of y.
          x: {time: false, range: (_, low, high) => (this.seen = [low, high])},
          y: {distr: this.log ? 3 : 1, range: plot => this.limits(plot)},
        },
        axes: [
          {...axis, space: 64, size: 30, values: (_, values) => Curves.ticks(values)},
          {...axis, space: 34, values: (_, values) => Curves.ticks(values),
           size: (_, values) => 14 + 7 * Math.max(2, ...(values || []).map(v => v.length))},
        ],
        cursor: {
          sync: {key: "report", filters: {pub: type => type === "mousemove" || type === "mouseleave"}},
          drag: {x: true, y: false, dist: 5},
          bind: {dblclick: () => () => { setView(fullView()); return null; }},
          y: false, points: {size: 7, fill: (plot, index) => plot.series[index].stroke(plot, index)},
        },
        hooks: {
          drawClear: [shadeFolds],
          draw: this.isFirst ? [nameFolds, drawMarks] : [drawMarks],
          setCursor: [plot => this.describe(plot.cursor.left >= 0
            ? plot.posToVal(plot.cursor.left, "x") : null)],
          setScale: [(plot, key) => {
            if (key === "x") setView([plot.scales.x.min, plot.scales.x.max]);
          }],
        },
      };
    }

    limits(plot) {
      const columns = plot.data.slice(1).filter((_, i) => plot.series[i + 1].show);
      const options = {log: this.log, zero: this.panel.zero};
      let [from, to] = this.seen;
      const points = plot.data[0].length;
      const isWhole = from <= 0 && this.panel.trim && !this.log && points >= 200;
      if (isWhole) from = plot.data[0][Math.floor(points / 50)];
      return Curves.limits(plot.data[0], columns, from, to, options)
        || (this.log ? [1, 10] : [0, 1]);
    }

    width() { return Math.max(200, this.box.clientWidth); }

    height() {
      const narrow = this.width() < 480;
      return this.isFirst ? (narrow ? 260 : 360) : (narrow ? 200 : 230);
    }

    resize() {
      if (this.plot && this.plot.width !== this.width()) {
        this.plot.setSize({width: this.width(), height: this.height()});
      }
    }

    makeChips() {
      this.values = new Map();
      this.chips.replaceChildren(...this.shown.map(({id, run, curve, colorIndex, dash}) => {
        const value = element("span", {class: "value"});
        this.values.set(id, value);
        const swatch = element("span", {
          class: `swatch ${dash.length ? "dashed" : ""} ${curve.style}`,
        });
        swatch.style.setProperty("--color", `var(--c${colorIndex % 8})`);
        return element("button", {
          type: "button", class: "chip", "aria-pressed": String(!this.hidden.has(id)),
          title: "show or hide",
          onclick: () => {
            if (!this.hidden.delete(id)) this.hidden.add(id);
            this.build();
          },
        }, swatch, element("span", {text: this.label(run, curve)}), value);
      }));
    }

    // Show the values at a position of the x axis, or the last values for null.
    describe(at) {
      for (const {id, run, curve, line} of this.shown) {
        const value = at === null ? run.curves[curve.key].y.at(-1)
          : line.y[Curves.nearest(line.x, at)];
        this.values.get(id).textContent = Curves.number(value);
      }
      this.readout.textContent = at === null ? "" : positionText(at, this.plot);
    }
  }

  function positionText(at, plot) {
    const run = runs[state.marked];
    const [table, inverse] = [run.tokens, [run.tokens[1], run.tokens[0]]];
    const byTokens = state.axis === "tokens";
    const iteration = Math.round(byTokens ? Curves.interpolate(inverse, at) : at);
    const parts = [];
    if (Number.isFinite(iteration)) parts.push(`iteration ${iteration.toLocaleString("en-US")}`);
    const tokens = byTokens ? at : table.length ? Curves.interpolate(table, at) : NaN;
    if (Number.isFinite(tokens)) parts.push(`${Curves.number(tokens)} tokens`);
    const fold = Curves.foldAt(run.folds, iteration);
    if (fold) parts.push(fold);
    let best = null, distance = 7;
    for (const [kind, where, text] of shownMarks(run)) {
      const away = Math.abs(plot.valToPos(toX(run)(where), "x") - plot.cursor.left);
      if (away < distance || (away === distance && !QUIET.has(kind))) {
        [best, distance] = [`${kind} at ${where.toLocaleString("en-US")}${text ? ": " + text : ""}`, away];
      }
    }
    if (best) parts.push(best);
    return parts.join(" · ");
  }

  const shownMarks = run => run.marks.filter(([kind]) => !state.hiddenKinds.has(kind));

  // Call a function with the name and the edges of each fold, within the plotting area.
  function eachFold(plot, draw) {
    const run = runs[state.marked], {ctx, bbox} = plot, x = toX(run);
    if (run.folds.length < 2) return;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    run.folds.forEach((fold, index) => {
      const [left, right] = [fold.first, fold.last].map(at => plot.valToPos(x(at), "x", true));
      draw(fold.name, left, right, index);
    });
    ctx.restore();
  }

  function shadeFolds(plot) {
    const {ctx, bbox} = plot;
    eachFold(plot, (_, left, right, index) => {
      ctx.fillStyle = css("--fold");
      if (index % 2) ctx.fillRect(left, bbox.top, right - left, bbox.height);
    });
  }

  // Write the names of folds where there is room.
  function nameFolds(plot) {
    const {ctx, bbox} = plot, ratio = devicePixelRatio;
    eachFold(plot, (name, left, right) => {
      ctx.font = `${11 * ratio}px system-ui, sans-serif`;
      [ctx.textBaseline, ctx.textAlign] = ["top", "left"];
      const start = Math.max(left, bbox.left) + 4 * ratio;
      const room = Math.min(right, bbox.left + bbox.width) - start - 2 * ratio;
      if (room < 24 * ratio) return;
      let length = name.length;
      const text = () => length === name.length ? name : `${name.slice(0, length)}…`;
      while (length > 0 && ctx.measureText(text()).width > room) length--;
      ctx.fillStyle = css("--soft");
      if (length > 1) ctx.fillText(text(), start, bbox.top + 4 * ratio);
    });
  }

  // A line for each event; restarts and checkpoints are triangles on the x axis.
  function drawMarks(plot) {
    const run = runs[state.marked], {ctx, bbox} = plot, ratio = devicePixelRatio;
    const bottom = bbox.top + bbox.height;
    ctx.save();
    for (const [kind, where] of shownMarks(run)) {
      const at = plot.valToPos(toX(run)(where), "x", true);
      if (!(at >= bbox.left - 1 && at <= bbox.left + bbox.width + 1)) continue;
      ctx.fillStyle = ctx.strokeStyle = kindColor(kind);
      ctx.lineWidth = ratio;
      ctx.beginPath();
      if (ON_AXIS.has(kind)) {
        const size = (kind === "restart" ? 5 : 3.5) * ratio;
        ctx.moveTo(at, bottom - 2 * size);
        ctx.lineTo(at - size, bottom);
        ctx.lineTo(at + size, bottom);
        ctx.fill();
      } else {
        ctx.globalAlpha = 0.75;
        ctx.setLineDash([4 * ratio, 3 * ratio]);
        ctx.moveTo(at, bbox.top);
        ctx.lineTo(at, bottom);
        ctx.stroke();
        ctx.setLineDash([]);
        ctx.globalAlpha = 1;
      }
    }
    ctx.restore();
  }

  const redrawAll = () => charts.forEach(chart => chart.plot.redraw(false));
  const buildAll = () => charts.forEach(chart => chart.build());

  // Show the same part of the x axis in all charts.
  function setView([low, high]) {
    const [from, to] = state.view, tolerance = 1e-9 * (to - from);
    if (Math.abs(low - from) <= tolerance && Math.abs(high - to) <= tolerance) return;
    state.view = [low, high];
    charts.forEach(({plot}) => plot && plot.setScale("x", {min: low, max: high}));
    document.getElementById("zoom").value = low === 0 && high === fullView()[1] ? "1" : "";
  }

  function select(label, options, onchange, id) {
    const made = element("select", {onchange: event => onchange(event.target.value)},
      ...options.map(([value, text]) => element("option", {value, text})));
    if (id) made.id = id;
    return element("label", {}, element("span", {text: label}), made);
  }

  function smoothing() {
    const shown = element("output", {text: "0"});
    const range = element("input", {type: "range", min: 0, max: 0.99, step: 0.01, value: 0,
      oninput: () => {
        state.weight = Number(range.value);
        shown.textContent = range.value;
        buildAll();
      }});
    return element("label", {title: "weight of the exponential moving average"},
      element("span", {text: "smoothing"}), range, shown);
  }

  function markToggles() {
    const {counts} = runs[state.marked];
    return Object.entries(counts).map(([kind, count]) => {
      const swatch = element("span", {class: ON_AXIS.has(kind) ? "triangle" : "swatch mark"});
      swatch.style.setProperty("--color", `var(--mark-${kind.replace(" ", "-")}, var(--ink))`);
      const button = element("button", {
        type: "button", class: "chip", "aria-pressed": String(!state.hiddenKinds.has(kind)),
        onclick: () => {
          if (!state.hiddenKinds.delete(kind)) state.hiddenKinds.add(kind);
          button.setAttribute("aria-pressed", String(!state.hiddenKinds.has(kind)));
          redrawAll();
        },
      }, swatch, element("span", {text: `${kind}${count === 1 ? "" : "s"}`}),
      element("span", {class: "value", text: count.toLocaleString("en-US")}));
      return button;
    });
  }

  function controls() {
    const marks = element("div", {class: "chips"}, ...markToggles());
    const axes = [["iteration", "iterations"]];
    if (runs.some(run => run.tokens.length)) axes.push(["tokens", "tokens"]);
    const parts = [
      select("x axis", axes, value => {
        state.axis = value;
        state.view = fullView();
        buildAll();
      }),
      select("zoom", [["1", "all"], ["", "part"], ["0.5", "last half"], ["0.1", "last tenth"],
                      ["0.01", "last hundredth"]], value => {
        const [low, high] = fullView();
        if (value) setView([high - Number(value) * (high - low), high]);
        document.getElementById("zoom").value = value;
      }, "zoom"),
      smoothing(),
    ];
    if (several) {
      parts.push(select("folds and events of", runs.map((run, index) => [index, run.name]), value => {
        state.marked = Number(value);
        marks.replaceChildren(...markToggles());
        redrawAll();
      }));
    }
    return element("div", {class: "controls"}, ...parts, marks,
      element("p", {class: "hint",
        text: "Drag to zoom, double-click to reset, click a name to show or hide a curve."}));
  }

  const place = document.getElementById("charts");
  state.view = fullView();
  data.panels.forEach((panel, index) => charts.push(new Chart(panel, index)));
  place.append(controls(), element("div", {class: "grid"}, ...charts.map(chart => chart.section)));
  buildAll();
  new ResizeObserver(() => charts.forEach(chart => chart.resize())).observe(place);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", buildAll);
})();
