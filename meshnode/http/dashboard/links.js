// A picture of this node's own links. It knows no other node's, and says so.

import { clean, milliseconds, setText, shortId, svg } from "./dom.js";
import { linkWord } from "./members.js";

const SIZE = { width: 460, height: 320 };
const MAX_LABELS = 14; // more names would lie on each other
const MAX_FAR = 300;

export class Links {
  #place = document.getElementById("links-picture");
  #text = document.getElementById("links-text");
  #drawn = "";

  update(model) {
    const others = [...model.peers.values()].filter((peer) => peer.peer_id !== model.selfId);
    const near = others.filter((peer) => peer.connected).sort(byId);
    const far = others.filter((peer) => !peer.connected && peer.online).sort(byId);
    const labelled = near.length <= MAX_LABELS;
    const key = JSON.stringify([
      near.map((peer) => [peer.peer_id, peer.state, peer.path, labelled ? [peer.name, roughly(peer.rtt_ms)] : 0]),
      far.map((peer) => [peer.peer_id, peer.state]), model.status.name,
    ]);
    if (key === this.#drawn) return;
    this.#drawn = key;
    const text = describe(near, far);
    setText(this.#text, text);
    this.#place.replaceChildren(draw(model, near, far.slice(0, MAX_FAR), labelled, text));
  }
}

function byId(a, b) { return a.peer_id < b.peer_id ? -1 : 1; }

/** A round trip coarse enough that the picture is not drawn anew for every ping. */
function roughly(rtt) {
  if (typeof rtt !== "number") return null;
  const step = 10 ** Math.floor(Math.log10(Math.max(rtt, 0.1)));
  return Math.round(rtt / step) * step;
}

function describe(near, far) {
  const relayed = near.filter((peer) => peer.path === "relayed").length;
  const linked = `${near.length} link${near.length === 1 ? "" : "s"}${relayed ? `, ${relayed} of them relayed` : ""}.`;
  const rest = far.length ? ` ${far.length} more member${far.length === 1 ? " is" : "s are"} online without a link to this node: reached on demand, heard of through others.` : "";
  return `${linked}${rest} Which links other nodes have among themselves is not known here.`;
}

function draw(model, near, far, labelled, text) {
  const { width, height } = SIZE;
  const [cx, cy] = [width / 2, height / 2];
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": text });
  const ring = (count, i, rx, ry) => {
    const turn = (i / count) * 2 * Math.PI - Math.PI / 2;
    return [cx + rx * Math.cos(turn), cy + ry * Math.sin(turn)];
  };
  const lines = svg("g");
  const dots = svg("g");
  const [rx, ry] = far.length ? [118, 92] : [160, 112];
  near.forEach((peer, i) => {
    const [x, y] = ring(near.length, i, rx, ry);
    lines.append(svg("line", { x1: cx, y1: cy, x2: x, y2: y, class: linkWord(peer, false) }));
    const title = svg("title", {}, `${clean(peer.name)} ${shortId(peer.peer_id)}: ${clean(peer.state)}, ${linkWord(peer, false)}, ${milliseconds(peer.rtt_ms)}`);
    dots.append(svg("circle", { cx: x, cy: y, r: labelled ? 8 : 5, "data-state": clean(peer.state) }, title));
    if (!labelled) return;
    const side = Math.abs(x - cx) < 25 ? "middle" : x > cx ? "start" : "end";
    const lx = x + { middle: 0, start: 13, end: -13 }[side];
    const ly = side !== "middle" ? y - 1 : y < cy ? y - 25 : y + 21;
    const name = [...clean(peer.name)].slice(0, 12).join("");
    const anchor = { x: lx, "text-anchor": side };
    dots.append(svg("text", { ...anchor, y: ly }, name || shortId(peer.peer_id)));
    const rtt = roughly(peer.rtt_ms);
    if (rtt !== null) dots.append(svg("text", { ...anchor, y: ly + 12, class: "small" }, `≈ ${milliseconds(rtt)}`));
  });
  far.forEach((peer, i) => {
    const [x, y] = ring(far.length, i, 215, 148);
    const title = svg("title", {}, `${clean(peer.name)} ${shortId(peer.peer_id)}: ${clean(peer.state)}, no link`);
    dots.append(svg("circle", { cx: x, cy: y, r: far.length > 60 ? 2.5 : 4, class: "far", "data-state": clean(peer.state) }, title));
  });
  const self = svg("circle", { cx, cy, r: 11, class: "self" }, svg("title", {}, `${clean(model.status.name)}: this node`));
  picture.append(lines, dots, self);
  return picture;
}
