// The table of members: one row for each, kept by peer ID and changed cell by cell.

import { age, bytes, clean, el, milliseconds, reorder, setAttribute, setText, shortId, words } from "./dom.js";

const MAX_CHIPS = 7; // a row stays two lines; the rest is counted, and stands in the title
const MANY = 14; // rows that fill the table's part of a screen
const STATES = ["up", "draining", "suspect", "offline", "left"];

export class Members {
  #rows = new Map(); // peer ID -> what the row is made of
  #body = document.getElementById("members-body");
  #count = document.getElementById("members-count");
  #empty = document.getElementById("members-empty");
  #scroll = document.getElementById("members-scroll");
  #find = document.getElementById("find");
  #sort = null;
  #down = false;

  constructor(onArrange) {
    this.#find.addEventListener("input", onArrange);
    for (const heading of document.querySelectorAll("#members th[data-sort]")) {
      heading.querySelector("button").addEventListener("click", () => {
        this.#sortBy(heading);
        onArrange();
      });
    }
  }

  /** Draws the rows of `ids`; returns whether their order may have changed. */
  update(model, ids) {
    for (const id of ids) {
      const peer = model.peers.get(id);
      if (!peer) {
        this.#rows.delete(id);
        continue;
      }
      let row = this.#rows.get(id);
      if (!row) this.#rows.set(id, (row = makeRow()));
      fillRow(row, peer, id === model.selfId);
    }
    this.updateAges(model);
    this.arrange(model);
  }

  /** Shows the rows that match, in order. */
  arrange(model) {
    const wanted = this.#find.value.trim().toLowerCase();
    let peers = [...model.peers.values()];
    if (wanted) peers = peers.filter((peer) => this.#rows.get(peer.peer_id).text.includes(wanted));
    if (this.#sort) {
      const worth = SORTS[this.#sort];
      const sign = this.#down ? -1 : 1;
      peers.sort((a, b) => sign * compare(worth(a), worth(b)) || compare(a.peer_id, b.peer_id));
    }
    reorder(this.#body, peers.map((peer) => this.#rows.get(peer.peer_id).row));
    // A height of its own keeps what changes in it from moving the rest of the page.
    this.#scroll.classList.toggle("many", peers.length > MANY);
    const more = model.total > model.peers.size ? `; ${model.total - model.peers.size} more: meshnode peers` : "";
    setText(this.#count, wanted ? `${peers.length} of ${model.peers.size}` : `${model.peers.size} known${more}`);
    this.#empty.hidden = peers.length > 0 || model.peers.size === 0;
  }

  updateAges(model) {
    const now = model.now;
    for (const [id, row] of this.#rows) {
      const peer = model.peers.get(id);
      if (peer) setText(row.age, id === model.selfId ? "" : seen(now - peer.seen_at));
    }
  }

  #sortBy(heading) {
    const key = heading.dataset.sort;
    const biggestFirst = key !== "name" && key !== "state" && key !== "rtt";
    if (this.#sort !== key) [this.#sort, this.#down] = [key, biggestFirst];
    else if (this.#down === biggestFirst) this.#down = !this.#down;
    else this.#sort = null; // the third time: the node's own order again
    for (const each of document.querySelectorAll("#members th[data-sort]")) {
      const on = each.dataset.sort === this.#sort;
      setAttribute(each, "aria-sort", on ? (this.#down ? "descending" : "ascending") : null);
    }
  }
}

const SORTS = {
  name: (peer) => clean(peer.name).toLowerCase(),
  state: (peer) => STATES.indexOf(peer.state),
  vram: (peer) => peer.available_vram ?? -1,
  flight: (peer) => peer.in_flight ?? 0,
  rtt: (peer) => peer.rtt_ms ?? Infinity,
};

function compare(a, b) { return a < b ? -1 : a > b ? 1 : 0; }

function makeRow() {
  const made = {
    name: el("bdi", { class: "name" }),
    id: el("code", { class: "id faint" }),
    here: el("span", { class: "tag" }, "this node"),
    state: el("span", { class: "state" }),
    reason: el("span", { class: "reason faint" }),
    age: el("span", { class: "faint" }),
    vram: el("span"),
    bar: el("div", { class: "bar", role: "meter", "aria-label": "VRAM in use", "aria-valuemin": "0" }, el("i")),
    flight: el("td", { role: "cell", class: "number", "data-label": "In flight" }),
    rtt: el("td", { role: "cell", class: "number", "data-label": "Round trip" }),
    path: el("td", { role: "cell", "data-label": "Link" }),
    chips: el("div", { class: "chips" }),
    chipsKey: "",
    text: "",
  };
  made.row = el("tr", { role: "row" },
    el("td", { role: "cell", class: "cell-name" }, made.name, made.id, made.here),
    el("td", { role: "cell", class: "cell-state" }, made.state, made.reason, made.age),
    el("td", { role: "cell", class: "cell-vram" }, made.vram, made.bar),
    made.flight, made.rtt, made.path,
    el("td", { role: "cell", class: "cell-models" }, made.chips));
  return made;
}

function fillRow(row, peer, isSelf) {
  const name = clean(peer.name) || "(no name)";
  setText(row.name, name);
  setAttribute(row.name, "title", name);
  setText(row.id, shortId(peer.peer_id));
  setAttribute(row.id, "title", clean(peer.peer_id));
  row.here.hidden = !isSelf;
  row.row.className = isSelf ? "is-self" : peer.online ? "" : "is-out";
  setText(row.state, clean(peer.state));
  setAttribute(row.state, "data-state", clean(peer.state));
  const reason = peer.online && peer.state === "up" ? "" : words(peer.reason ?? peer.down_reason ?? "");
  setText(row.reason, reason);
  setAttribute(row.reason, "title", reason || null);
  fillVram(row, peer);
  setText(row.flight, String(peer.in_flight ?? 0));
  setText(row.rtt, isSelf ? "–" : milliseconds(peer.rtt_ms));
  setText(row.path, linkWord(peer, isSelf));
  fillChips(row, peer);
  row.text = [name, peer.peer_id, peer.state, row.path.textContent, row.chipsKey].join(" ").toLowerCase();
}

/** A sighting's age, coarse: two hundred rows must not change every second. */
function seen(seconds) {
  if (seconds < 10) return "seen just now";
  return `seen ${age(seconds < 120 ? Math.floor(seconds / 10) * 10 : seconds)} ago`;
}

/** How this node reaches the peer. */
export function linkWord(peer, isSelf) {
  if (isSelf) return "–";
  if (!peer.connected) return "no link";
  return peer.path === "relayed" ? "relayed" : "direct";
}

function fillVram(row, peer) {
  const { available_vram: free, total_vram: total } = peer;
  const text = typeof free !== "number" ? "–" : total ? `${bytes(free)} of ${bytes(total)}` : bytes(free);
  setText(row.vram, text);
  row.bar.hidden = !total || typeof free !== "number";
  if (row.bar.hidden) return;
  const used = Math.min(1, Math.max(0, 1 - free / total));
  setAttribute(row.bar, "aria-valuemax", "100");
  setAttribute(row.bar, "aria-valuenow", Math.round(used * 100));
  setAttribute(row.bar, "aria-valuetext", `${bytes(free)} free of ${bytes(total)}`);
  setAttribute(row.bar, "title", `${Math.round(used * 100)} % in use`);
  setAttribute(row.bar, "data-level", used > 0.9 ? "high" : "normal");
  row.bar.firstChild.style.transform = `scaleX(${used.toFixed(3)})`;
}

function fillChips(row, peer) {
  const chips = [];
  for (const service of peer.services ?? []) {
    const down = service.healthy === false;
    chips.push([clean(service.service_id), down ? "service down" : "service", down ? "not healthy" : "service"]);
    const loaded = new Set(service.loaded ?? []);
    const models = [...loaded, ...(service.models ?? []).filter((model) => !loaded.has(model))];
    for (const model of models) {
      chips.push([clean(model), loaded.has(model) ? "loaded" : "", loaded.has(model) ? "loaded now" : "offered"]);
    }
  }
  const key = JSON.stringify(chips);
  if (key === row.chipsKey) return;
  row.chipsKey = key;
  const shown = chips.slice(0, MAX_CHIPS).map(([text, kind, meaning]) =>
    el("bdi", { class: `chip ${kind}`, title: `${text} (${meaning})` }, text));
  if (chips.length > MAX_CHIPS) {
    const rest = chips.slice(MAX_CHIPS).map(([text]) => text);
    shown.push(el("span", { class: "chip", title: rest.slice(0, 40).join(", ") }, `+${rest.length}`));
  }
  row.chips.replaceChildren(...shown);
}
