// What the page knows, and which parts of it changed since the last frame.

const KEPT_SECONDS = 600;
const COLUMNS = ["requests", "failures", "ttft_p50_ms", "ttft_p95_ms"];

export class Model {
  status = {};
  peers = new Map(); // peer ID -> row, in the node's order
  total = 0;
  decisions = new Map(); // key -> decision, the newest first
  traffic = { upto: 0 };
  /** What to draw anew: peer IDs, and the names of other parts. */
  dirtyPeers = new Set();
  dirty = new Set();
  #offset = 0; // the node's clock minus this page's, in seconds

  constructor(onStateChange) {
    this.onStateChange = onStateChange;
    for (const column of COLUMNS) this.traffic[column] = [];
  }

  /** Seconds on the node's clock. */
  get now() { return performance.now() / 1000 + this.#offset; }

  get selfId() { return this.status.peer_id; }

  take(name, body) {
    const take = { snapshot: this.#snapshot, status: this.#status, peers: this.#changes,
      decisions: this.#decide, traffic: this.#second }[name];
    if (take) take.call(this, body); // a newer node may tell of more
  }

  #snapshot(body) {
    this.#setClock(body.now);
    const before = this.peers;
    this.peers = new Map(body.peers.map((row) => [row.peer_id, row]));
    this.total = body.peers_total;
    this.#status(body.status);
    for (const row of body.peers) this.#note(before.get(row.peer_id), row);
    for (const id of before.keys()) this.dirtyPeers.add(id);
    this.decisions = new Map(body.decisions.map((each) => [each.key, each]));
    this.traffic = body.traffic;
    for (const part of ["order", "decisions", "traffic"]) this.dirty.add(part);
  }

  #status(body) {
    this.status = body;
    this.dirty.add("status");
  }

  #changes(body) {
    this.#setClock(body.now);
    this.total = body.total;
    for (const row of body.changed) {
      this.#note(this.peers.get(row.peer_id), row);
      this.peers.set(row.peer_id, row);
    }
    for (const id of body.gone) {
      this.peers.delete(id);
      this.dirtyPeers.add(id);
    }
    if (body.order) {
      this.peers = new Map(body.order.map((id) => [id, this.peers.get(id)]));
      this.dirty.add("order");
    }
  }

  #note(before, row) {
    this.dirtyPeers.add(row.peer_id);
    if (before && before.state !== row.state) this.onStateChange(before, row);
  }

  #decide(body) {
    const known = new Map([...this.decisions, ...body.changed.map((each) => [each.key, each])]);
    this.decisions = new Map(body.order.map((key) => [key, known.get(key)]));
    this.dirty.add("decisions");
  }

  #second(body) {
    const missed = body.upto - this.traffic.upto - 1;
    if (missed < 0) return; // the snapshot had it already
    for (const column of COLUMNS) {
      const values = this.traffic[column];
      for (let i = 0; i < Math.min(missed, KEPT_SECONDS); i += 1) values.push(null);
      values.push(...body[column]);
      if (values.length > KEPT_SECONDS) values.splice(0, values.length - KEPT_SECONDS);
    }
    this.traffic.upto = body.upto;
    this.dirty.add("traffic");
  }

  #setClock(now) { this.#offset = now - performance.now() / 1000; }
}
