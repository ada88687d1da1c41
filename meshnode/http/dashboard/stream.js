// The node's events over fetch, which unlike EventSource can show the API key and see heartbeats.

const SILENCE = 16_000; // ms; the node says something at least every 5 s
const FIRST_PAUSE = 400; // ms
const LONGEST_PAUSE = 8_000; // ms

/** Splits a text stream into server-sent events; keeps what is not whole yet. */
export class EventParser {
  #rest = "";

  feed(text) {
    const events = [];
    const blocks = (this.#rest + text).split("\n\n");
    this.#rest = blocks.pop();
    for (const block of blocks) {
      let name = "message";
      const data = [];
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        else if (line.startsWith("data: ")) data.push(line.slice(6));
      }
      if (data.length) events.push({ name, body: JSON.parse(data.join("\n")) });
    }
    return events;
  }
}

/**
 * Follows the node for ever, through its restarts.
 *
 * on.event(name, body), on.state("connecting" | "live" | "lost", seconds until the next try),
 * on.locked() is awaited when the node wants its key, and getKey() returns the key or null.
 */
export async function follow(url, getKey, on) {
  let pause = FIRST_PAUSE;
  for (;;) {
    on.state("connecting", 0);
    const outcome = await readOnce(url, getKey, (name, body) => {
      pause = FIRST_PAUSE;
      if (name !== "dropped") on.event(name, body);
      if (name === "snapshot") on.state("live", 0);
    });
    if (outcome === "locked") {
      on.state("lost", 0);
      await on.locked();
      continue;
    }
    // Pages that lost the same node must not all come back at the same moment.
    const wait = pause * (0.75 + Math.random() / 2);
    on.state("lost", wait / 1000);
    await rest(wait);
    pause = Math.min(pause * 1.7, LONGEST_PAUSE);
  }
}

async function readOnce(url, getKey, onEvent) {
  const abort = new AbortController();
  let alarm = setTimeout(() => abort.abort(), SILENCE);
  try {
    const key = getKey();
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const answer = await fetch(url, { headers, cache: "no-store", signal: abort.signal });
    if (answer.status === 401) return "locked";
    if (!answer.ok || !answer.body) return "failed";
    const parser = new EventParser();
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return "ended";
      clearTimeout(alarm);
      alarm = setTimeout(() => abort.abort(), SILENCE);
      for (const { name, body } of parser.feed(value)) onEvent(name, body);
    }
  } catch {
    return "failed"; // the node is gone, or silent: what follows is the same
  } finally {
    clearTimeout(alarm);
    abort.abort();
  }
}

function rest(wait) {
  return new Promise((resolve) => {
    const done = () => { clearTimeout(timer); removeEventListener("online", done); resolve(); };
    const timer = setTimeout(done, wait);
    addEventListener("online", done);
  });
}
