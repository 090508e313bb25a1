"use strict";
// Computations on curves, without access to the page: tests run this file in Node.js.
const Curves = (() => {
  const SIZES = [[1e15, "P"], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]];

  // Exponential moving average, corrected for its start, as in TensorBoard.
  function smooth(values, weight) {
    let mean = 0, total = 0;
    return values.map(value => {
      mean = weight * mean + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return mean / total;
    });
  }

  // Index of the x that is nearest to a position; -1 without any. The xs ascend.
  function nearest(xs, at) {
    let low = 0, high = xs.length - 1;
    if (high < 0) return -1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < at) low = middle; else high = middle;
    }
    return at - xs[low] <= xs[high] - at ? low : high;
  }

  // Linear interpolation in a table [[x...], [y...]]; the last slope continues beyond its end.
  function interpolate(table, at) {
    const [xs, ys] = table;
    if (xs.length < 2) return NaN;
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= at) low = middle; else high = middle;
    }
    const slope = (ys[high] - ys[low]) / ((xs[high] - xs[low]) || 1);
    return ys[low] + slope * (at - xs[low]);
  }

  // The lines of a curve: `strong`, and `faint` with all kept values behind a smoothed or mean line.
  function lines(curve, weight, toX) {
    const raw = {x: curve.x.map(toX), y: curve.y};
    const center = curve.mx ? {x: curve.mx.map(toX), y: curve.my} : raw;
    if (weight > 0) return {strong: {x: center.x, y: smooth(center.y, weight)}, faint: raw};
    return curve.mx ? {strong: center, faint: raw} : {strong: raw, faint: null};
  }

  // Limits of the y axis for the values with xs from `from` to `to`; null without any.
  function limits(xs, columns, from, to, options) {
    let low = Infinity, high = -Infinity;
    for (const column of columns) {
      for (let i = 0; i < xs.length; i++) {
        const value = column[i];
        if (value == null || xs[i] < from || xs[i] > to || (options.log && value <= 0)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    if (low > high) return null;
    if (options.log) return [low / 1.15, high * 1.15];
    if (options.zero && low >= 0) return [0, high > 0 ? 1.1 * high : 1];
    const pad = low === high ? Math.abs(low) * 0.1 || 1 : 0.06 * (high - low);
    return [low - pad, high + pad];
  }

  // A number in a line of text: enough digits to compare runs.
  function number(value) {
    if (value == null || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(3);
    if (size >= 1e5) return tick(value, 4);
    if (Number.isInteger(value) || size >= 1e4) return Math.round(value).toLocaleString("en-US");
    return size >= 100 ? value.toFixed(1) : value.toPrecision(5);
  }

  // A label of an axis.
  function tick(value, digits = 3) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e18)) return shorten(value.toExponential(1));
    for (const [unit, letter] of SIZES) {
      if (size >= unit) return String(Number((value / unit).toPrecision(digits))) + letter;
    }
    return String(Number(value.toPrecision(digits)));
  }

  function shorten(text) {
    return text.replace(".0e", "e").replace("e+", "e");
  }

  // Labels of an axis, with as many digits as their distances need.
  function ticks(values) {
    const known = values.filter(value => value != null);
    const step = Math.min(...known.slice(1).map((value, i) => Math.abs(value - known[i])), Infinity);
    let digits = 3;
    const isOff = value => Math.abs(Number(value.toPrecision(digits)) - value) > step / 20;
    while (digits < 12 && known.some(isOff)) digits++;
    return values.map(value => value == null ? "" : tick(value, digits));
  }

  // The name of the fold that contains an iteration.
  function foldAt(folds, iteration) {
    const found = folds.find(fold => fold.first < iteration && iteration <= fold.last);
    return found ? found.name : "";
  }

  return {smooth, nearest, interpolate, lines, limits, number, tick, ticks, foldAt};
})();
if (typeof module !== "undefined") module.exports = Curves;
