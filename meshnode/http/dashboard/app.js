// The page put together: events change the model, and once a frame what changed is drawn.

import { bytes, clean, el, milliseconds, setText, words } from "./dom.js";
import { Charts, figures } from "./charts.js";
import { Decisions } from "./decisions.js";
import { Drain } from "./drain.js";
import { Join } from "./join.js";
import { Keys } from "./keys.js";
import { Links } from "./links.js";
import { Members } from "./members.js";
import { Model } from "./model.js";
import { follow } from "./stream.js";

const MAX_CHANGES = 30;
const MAX_MEASURES = 1000; // performance entries kept for whoever wants to know what a frame costs

const model = new Model(noteChange);
const keys = new Keys();
const charts = new Charts();
const decisions = new Decisions();
const links = new Links();
const join = new Join(keys);
const drain = new Drain(keys, model);
const members = new Members(() => members.arrange(model));
const byId = (id) => document.getElementById(id);

// Drawing

let frame = 0;
let measured = 0;

function draw() {
  frame = 0;
  const started = performance.now();
  const { dirty, dirtyPeers } = model;
  model.dirty = new Set();
  model.dirtyPeers = new Set();
  if (dirtyPeers.size || dirty.has("order")) {
    members.update(model, dirtyPeers);
    links.update(model);
  }
  if (dirty.has("status")) drawStatus();
  if (dirty.has("status") || dirtyPeers.size) drawTotals();
  if (dirty.has("decisions")) decisions.update(model);
  if (dirty.has("traffic")) drawTraffic();
  measured += 1;
  if (measured % MAX_MEASURES === 0) performance.clearMeasures("meshnode-update");
  performance.measure("meshnode-update", { start: started, detail: { peers: dirtyPeers.size } });
}

function drawSoon() {
  if (!frame) frame = requestAnimationFrame(draw);
}

function drawStatus() {
  const { status } = model;
  setText(byId("node-name"), clean(status.name) || "meshnode");
  setText(byId("node-line"), [`network ${clean(status.network)}${status.open ? " (open)" : ""}`, words(status.state),
    status.proxy ? `proxy ${status.proxy}` : "no proxy", `policy ${status.policy}`, `version ${status.version}`].join(" · "));
  document.title = `${clean(status.name)} · meshnode`;
  const missing = status.missing ?? [];
  byId("missing").hidden = missing.length === 0;
  setText(byId("missing"), missing.length ? `Not ready: ${missing.map(clean).join("; ")}` : "");
  join.update(model);
  drain.update();
}

function drawTotals() {
  let [online, free, total, flight, unknown] = [0, 0, 0, 0, 0];
  for (const peer of model.peers.values()) {
    if (!peer.online) continue;
    online += 1;
    flight += peer.in_flight ?? 0;
    if (typeof peer.available_vram === "number") free += peer.available_vram;
    else unknown += 1;
    total += peer.total_vram ?? 0;
  }
  const more = model.total > model.peers.size;
  setText(byId("tile-online"), String(more ? model.status.peers_online : online));
  setText(byId("tile-known"), `of ${model.total} known`);
  setText(byId("tile-vram"), free ? bytes(free) : "–");
  setText(byId("tile-vram-total"), total ? `of ${bytes(total)}${unknown ? `, ${unknown} unknown` : ""}` : "");
  setText(byId("tile-flight"), String(flight));
  setText(byId("tile-flight-own"), `${model.status.own_in_flight ?? 0} through this node`);
}

function drawTraffic() {
  charts.update(model.traffic);
  const { rate, requests, failures, ttft, slowest } = figures(model.traffic);
  setText(byId("tile-rate"), rate === null ? "–" : `${rate >= 10 ? rate.toFixed(0) : rate.toFixed(1)}/s`);
  setText(byId("tile-rate-more"), `${requests} in 10 minutes`);
  setText(byId("tile-ttft"), milliseconds(ttft));
  setText(byId("tile-ttft-more"), slowest === null ? "half of the answers" : `half; 95 % in ${milliseconds(slowest)}`);
  setText(byId("tile-failures"), String(failures));
  byId("tile-failures").classList.toggle("bad", failures > 0);
}

/** Writes into the log that a member changed its state; a screen reader reads it out. */
function noteChange(before, row) {
  const why = words(row.reason ?? row.down_reason ?? "");
  const text = `${clean(row.name)} was ${clean(before.state)}, is ${clean(row.state)}${why && row.state !== "up" ? `: ${why}` : ""}`;
  const time = new Date().toLocaleTimeString([], { hour12: false });
  byId("changes").prepend(el("li", {}, el("span", { class: "faint" }, time), el("span", { dir: "auto" }, text)));
  byId("changes-empty").hidden = true;
  while (byId("changes").childElementCount > MAX_CHANGES) byId("changes").lastChild.remove();
}

// Colours

const THEMES = ["auto", "dark", "light"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const said = { auto: "as the system has them", dark: "dark", light: "light" }[theme];
  byId("theme").setAttribute("aria-label", `Colours: ${said}`);
  setText(byId("theme"), `◐ ${theme}`);
  charts.repaint();
}

byId("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  localStorage.setItem("meshnode-theme", next);
  setTheme(next);
});
setTheme(THEMES.includes(localStorage.getItem("meshnode-theme")) ? localStorage.getItem("meshnode-theme") : "auto");
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.repaint());

// The node

function showConnection(state, seconds) {
  const pill = byId("connection");
  // While it is lost, each new try is not worth a word.
  if (state === "connecting" && pill.dataset.state === "lost") return;
  pill.dataset.state = state;
  setText(pill, { connecting: "connecting…", live: "live", lost: "not connected" }[state]);
  pill.title = seconds ? `next try in ${seconds.toFixed(1)} s` : "";
  document.body.classList.toggle("stale", state === "lost");
  if (state === "lost") drain.lost();
}

setInterval(() => {
  if (document.hidden || !model.selfId) return;
  members.updateAges(model);
  decisions.updateAges(model);
}, 1000);

follow("/api/events", () => keys.key, {
  event(name, body) {
    model.take(name, body);
    drawSoon();
  },
  state: showConnection,
  async locked() {
    const wrong = keys.key ? "That key is not this node's." : "";
    while (!(await keys.ask("This node tells nothing without its API key.", wrong)));
  },
});
