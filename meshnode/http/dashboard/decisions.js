// Why requests went where they did: each decision with its candidates, to be unfolded.

import { age, bytes, clean, el, milliseconds, reorder, setAttribute, setText, shortId, words } from "./dom.js";

// How each tier reads to people.
const TIERS = {
  only: "nobody else could",
  in_flight: "fewest requests in flight",
  last_used: "longest not used",
  vram: "most free VRAM",
  first_listed: "a full tie: the first listed",
  random: "the dice",
  target: "the target that was asked for",
  loaded: "has the model loaded",
  prefix: "served this prompt's beginning last",
  session: "served this session last",
  least_cached: "least cached so far",
};
const FINE = new Set(["complete", "ok", "client_gone", "released"]);

export class Decisions {
  #items = new Map(); // key -> { li, shown }
  #list = document.getElementById("decisions");
  #empty = document.getElementById("decisions-empty");

  update(model) {
    for (const key of this.#items.keys()) if (!model.decisions.has(key)) this.#items.delete(key);
    for (const [key, decision] of model.decisions) {
      let item = this.#items.get(key);
      if (!item) this.#items.set(key, (item = makeItem()));
      if (item.decision !== decision) fillItem(item, decision);
    }
    reorder(this.#list, [...model.decisions.keys()].map((key) => this.#items.get(key).li));
    this.#empty.hidden = model.decisions.size > 0;
    this.updateAges(model);
  }

  updateAges(model) {
    for (const { ago, decision } of this.#items.values()) setText(ago, `${age(model.now - decision.at)} ago`);
  }
}

function makeItem() {
  const item = {
    ago: el("span", { class: "faint" }),
    what: el("span", { class: "what" }),
    outcome: el("span", { class: "outcome" }),
    why: el("span", { class: "why faint" }),
    inner: el("div", { class: "inner" }),
    decision: null,
  };
  const details = el("details", {}, el("summary", {}, item.ago, item.what, item.outcome, item.why), item.inner);
  details.addEventListener("toggle", () => { if (details.open) fillTable(item); });
  item.details = details;
  item.li = el("li", {}, details);
  return item;
}

function fillItem(item, decision) {
  item.decision = decision;
  const names = new Map((decision.candidates ?? []).map((row) => [row.peer_id, clean(row.name)]));
  const picked = decision.picked ? names.get(decision.picked) || shortId(decision.picked) : "nobody";
  const asked = [decision.service_id, decision.model].filter(Boolean).map(clean).join(" · ");
  item.what.replaceChildren(el("bdi", {}, asked), " → ", el("strong", {}, el("bdi", {}, picked)));
  setAttribute(item.what, "title", `${asked} → ${picked}`);
  setText(item.why, why(decision));
  const open = decision.outcome === null || decision.outcome === undefined;
  setText(item.outcome, open ? "in flight" : outcome(decision));
  item.outcome.className = `outcome ${open || FINE.has(decision.outcome) ? "faint" : "bad"}`;
  if (item.details.open) fillTable(item);
}

function why(decision) {
  const parts = [TIERS[decision.tier] ?? words(decision.tier)];
  parts.push(`of ${decision.candidates_total} candidate${decision.candidates_total === 1 ? "" : "s"}`);
  if (decision.attempt > 1) parts.push(`attempt ${decision.attempt}`);
  if (typeof decision.match_ratio === "number" && decision.match_ratio > 0) {
    parts.push(`${Math.round(decision.match_ratio * 100)} % of the prompt known`);
  }
  return parts.join(", ");
}

function outcome(decision) {
  const took = typeof decision.duration_s === "number" ? ` after ${milliseconds(decision.duration_s * 1000)}` : "";
  return words(decision.outcome) + took;
}

function fillTable(item) {
  const { decision } = item;
  const candidates = decision.candidates ?? [];
  // Only where a model was asked for is there anything to say of it.
  const warm = candidates.some((row) => typeof row.loaded === "boolean" || typeof row.match_ratio === "number");
  const head = ["Candidate", "In flight", "from here", "from others", "Free VRAM", ...(warm ? ["Loaded", "Prompt known"] : []), "Not picked because"];
  const rows = candidates.map((row) =>
    el("tr", { class: row.peer_id === decision.picked ? "picked" : null },
      el("td", { title: clean(row.peer_id) }, el("bdi", {}, clean(row.name) || shortId(row.peer_id))),
      el("td", { class: "number" }, String(row.in_flight)),
      el("td", { class: "number" }, String(row.own_in_flight)),
      el("td", { class: "number" }, String(row.others_in_flight)),
      el("td", { class: "number" }, bytes(row.available_vram)),
      ...(warm ? [el("td", {}, row.loaded ? "yes" : "no"), el("td", { class: "number" }, typeof row.match_ratio === "number" ? `${Math.round(row.match_ratio * 100)} %` : "–")] : []),
      el("td", {}, row.excluded ? words(row.excluded) : "")));
  const left = decision.candidates_total - rows.length;
  const more = left > 0 ? [el("p", { class: "faint" }, `and ${left} more, in /api/decisions`)] : [];
  item.inner.replaceChildren(
    el("table", {},
      el("thead", {}, el("tr", {}, ...head.map((text, i) => el("th", { scope: "col", class: i > 0 && i < 5 ? "number" : null }, text)))),
      el("tbody", {}, ...rows)),
    ...more);
}
