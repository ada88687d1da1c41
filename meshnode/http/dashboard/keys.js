// The API key: asked for in a dialog when the node wants it, and kept in this tab alone.

const PLACE = "meshnode-api-key";

export class Keys {
  #dialog = document.getElementById("key-dialog");
  #why = document.getElementById("key-why");
  #input = document.getElementById("key-input");
  #wrong = document.getElementById("key-wrong");

  constructor() {
    document.getElementById("key-cancel").addEventListener("click", () => this.#dialog.close(""));
    document.getElementById("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#dialog.close(this.#input.value.trim());
    });
  }

  get key() { return sessionStorage.getItem(PLACE); }

  /** Asks a person for the key; returns whether one was given. */
  async ask(why, wrong = "") {
    this.#why.textContent = why;
    this.#wrong.textContent = wrong;
    this.#input.value = "";
    this.#dialog.returnValue = "";
    if (!this.#dialog.open) this.#dialog.showModal();
    await new Promise((resolve) => this.#dialog.addEventListener("close", resolve, { once: true }));
    const given = this.#dialog.returnValue;
    this.#dialog.returnValue = "";
    this.#input.value = "";
    if (given) sessionStorage.setItem(PLACE, given);
    return Boolean(given);
  }

  /** The text at `url`, asking for the key as often as it takes; null when the person gives up. */
  async fetchWithKey(url, why) {
    let wrong = "";
    for (;;) {
      if (this.key) {
        const answer = await this.#get(url);
        if (answer.status === 200) return answer.text;
        if (answer.status !== 401) wrong = answer.text;
        else {
          sessionStorage.removeItem(PLACE);
          wrong = "That key is not this node's.";
        }
      }
      if (!(await this.ask(why, wrong))) return null;
    }
  }

  async #get(url) {
    try {
      const answer = await fetch(url, { headers: { Authorization: `Bearer ${this.key}` }, cache: "no-store" });
      const text = await answer.text();
      return { status: answer.status, text: answer.ok ? text : (JSON.parse(text).error?.message ?? text) };
    } catch {
      return { status: 0, text: "The node does not answer." };
    }
  }
}
