// The API key: asked for in a dialog when the node wants it, and kept in this tab alone.
//
// The one that lets the page read at all outlasts a reload; one that was asked for to change
// something, or to tell the token, is in this page's memory and nowhere else.

const PLACE = "meshnode-api-key";
const TIMEOUT = 10_000; // ms; the node answers within some of them
const KEPT_IN_TAB = "It is kept in this tab until the tab is closed.";
const KEPT_IN_MEMORY = "This page forgets it when it is reloaded or closed.";

export class Keys {
  #dialog = document.getElementById("key-dialog");
  #why = document.getElementById("key-why");
  #input = document.getElementById("key-input");
  #wrong = document.getElementById("key-wrong");
  #kept = document.getElementById("key-kept");
  #inMemory = null;

  constructor() {
    document.getElementById("key-cancel").addEventListener("click", () => this.#dialog.close(""));
    document.getElementById("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#dialog.close(this.#input.value.trim());
    });
  }

  get key() { return this.#inMemory ?? sessionStorage.getItem(PLACE); }

  /** Asks a person for the key that opens the page; returns whether one was given. */
  async ask(why, wrong = "") {
    const given = await this.#askFor(why, wrong, KEPT_IN_TAB);
    if (given) {
      this.#inMemory = null;
      sessionStorage.setItem(PLACE, given);
    }
    return Boolean(given);
  }

  /**
   * What the node answers at `url`: whether it did so, and its text, or what went wrong for people.
   * Asks for the key as often as it takes; null when the person gives up.
   */
  async fetchWithKey(url, why, method = "GET") {
    let wrong = "";
    for (;;) {
      if (this.key) {
        const { status, text } = await this.#fetch(url, method);
        if (status !== 401) return { ok: status >= 200 && status < 300, text };
        this.#inMemory = null;
        sessionStorage.removeItem(PLACE);
        wrong = "That key is not this node's.";
      }
      this.#inMemory = await this.#askFor(why, wrong, KEPT_IN_MEMORY);
      if (!this.#inMemory) return null;
    }
  }

  /** The key that a person gave, or null. */
  async #askFor(why, wrong, kept) {
    this.#why.textContent = why;
    this.#wrong.textContent = wrong;
    this.#kept.textContent = kept;
    this.#input.value = "";
    this.#dialog.returnValue = "";
    if (!this.#dialog.open) this.#dialog.showModal();
    await new Promise((resolve) => this.#dialog.addEventListener("close", resolve, { once: true }));
    const given = this.#dialog.returnValue;
    this.#dialog.returnValue = "";
    this.#input.value = "";
    return given || null;
  }

  async #fetch(url, method) {
    try {
      const answer = await fetch(url, { method, headers: { Authorization: `Bearer ${this.key}` },
        cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) });
      const text = await answer.text();
      return { status: answer.status, text: answer.ok ? text : (JSON.parse(text).error?.message ?? text) };
    } catch {
      return { status: 0, text: "The node does not answer." };
    }
  }
}
