// Three small charts of the last ten minutes, drawn by uPlot.

import { milliseconds, setText } from "./dom.js";

/* global uPlot */
const SECONDS = 600;
const X = Array.from({ length: SECONDS }, (_, i) => i - SECONDS + 1); // seconds, 0 is now
const MANY = 5; // seconds over which a rate is taken: a single second jumps about

function colour(name) {
  return () => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export class Charts {
  #charts = [];
  #data = null;

  constructor() {
    this.#charts = [
      this.#make("requests", [["req/s", "--accent"]], (v) => rate(v[0]), (v) => String(v)),
      this.#make("ttft", [["half below", "--accent"], ["95 % below", "--warn"]],
        (v) => `half ${milliseconds(v[0])}, 95 % ${milliseconds(v[1])}`, shortMilliseconds),
      this.#make("failures", [["failed/s", "--bad"]], (v) => rate(v[0]), (v) => String(v)),
    ];
    const observer = new ResizeObserver(() => this.#resize());
    for (const chart of this.#charts) observer.observe(chart.place);
  }

  update(traffic) {
    this.#data = [
      [X, padded(traffic.requests)],
      [X, padded(traffic.ttft_p50_ms), padded(traffic.ttft_p95_ms)],
      [X, padded(traffic.failures)],
    ];
    this.#charts.forEach((chart, i) => {
      chart.plot.setData(this.#data[i]);
      this.#say(chart, null);
    });
  }

  /** Draws again in the colours of the theme that holds now. */
  repaint() {
    for (const chart of this.#charts) chart.plot.redraw();
  }

  #make(name, series, describe, tick) {
    const place = document.getElementById(`chart-${name}`);
    const chart = { place, describe, text: document.getElementById(`chart-${name}-text`) };
    const grid = { stroke: colour("--line"), width: 1 };
    const axis = { stroke: colour("--faint"), grid, ticks: { show: false }, font: "11px system-ui" };
    chart.plot = new uPlot({
      width: 300,
      height: 150,
      legend: { show: false },
      cursor: { y: false, points: { size: 6 } },
      scales: { x: { time: false, range: [1 - SECONDS, 0] }, y: { range: (_, min, max) => [0, max > 0 ? max * 1.15 : 1] } },
      axes: [
        { ...axis, size: 26, values: (_, ticks) => ticks.map((t) => (t === 0 ? "now" : `−${Math.round(-t / 60)} min`)),
          splits: () => [-600, -480, -360, -240, -120, 0] },
        { ...axis, size: 46, values: (_, ticks) => ticks.map(tick) },
      ],
      series: [{}, ...series.map(([label, ink]) => (
        { label, stroke: colour(ink), width: 1.5, spanGaps: false, points: { show: true, size: 4, filter: lonely } }))],
      hooks: { setCursor: [(plot) => this.#say(chart, plot.cursor.idx)] },
    }, [X, ...series.map(() => padded([]))], place);
    return chart;
  }

  #say(chart, index) {
    const data = this.#data?.[this.#charts.indexOf(chart)];
    if (!data) return;
    if (index === null || index === undefined) {
      const last = data.slice(1).map(lastOf);
      setText(chart.text, last.every((value) => value === null) ? "" : chart.describe(last));
    } else {
      const ago = -X[index];
      setText(chart.text, `${chart.describe(data.slice(1).map((column) => column[index]))}, ${ago} s ago`);
    }
  }

  #resize() {
    for (const { plot, place } of this.#charts) {
      const width = Math.floor(place.clientWidth);
      if (width > 0 && width !== plot.width) plot.setSize({ width, height: 150 });
    }
  }
}

/** The sums and typical values that the tiles show. */
export function figures(traffic) {
  const lately = traffic.requests.slice(-MANY).filter((value) => value !== null);
  const times = traffic.ttft_p50_ms.filter((value) => value !== null);
  return {
    rate: lately.length ? sum(lately) / lately.length : null,
    requests: sum(traffic.requests),
    failures: sum(traffic.failures),
    ttft: times.length ? times.at(-1) : null,
    slowest: lastOf(traffic.ttft_p95_ms),
  };
}

/** The points that no line reaches, because the seconds beside them are unknown. */
function lonely(plot, series) {
  const values = plot.data[series];
  return values.flatMap((value, i) =>
    (value !== null && (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null ? [i] : []));
}

function padded(values) {
  return values.length >= SECONDS ? values : [...Array(SECONDS - values.length).fill(null), ...values];
}

function sum(values) { return values.reduce((total, value) => total + (value ?? 0), 0); }

function lastOf(values) {
  for (let i = values.length - 1; i >= 0; i -= 1) if (values[i] !== null) return values[i];
  return null;
}

function rate(value) { return value === null || value === undefined ? "–" : `${value} in this second`; }

function shortMilliseconds(value) { return value >= 1000 ? `${value / 1000} s` : `${value} ms`; }
