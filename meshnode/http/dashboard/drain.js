// Draining this node: asked for twice, as the node ends by it, and told until it is gone.

import { clean, setText } from "./dom.js";

const WHY = "Draining ends the node, so it wants its API key before it does.";
const GONE = "This node was draining and answers no more: it has left the mesh. It comes back when it is started again on its host.";

export class Drain {
  #button = document.getElementById("drain");
  #dialog = document.getElementById("drain-dialog");
  #line = document.getElementById("drain-line");
  #phase = "none"; // none, asked (not heard of from the node yet), draining, gone
  #said = ""; // what the node answered, as long as it drains

  constructor(keys, model) {
    this.keys = keys;
    this.model = model;
    this.#button.addEventListener("click", () => this.#confirm());
    document.getElementById("drain-cancel").addEventListener("click", () => this.#dialog.close(""));
    document.getElementById("drain-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#dialog.close("drain");
    });
    this.#dialog.addEventListener("close", () => {
      if (this.#dialog.returnValue === "drain") this.#drain();
    });
  }

  /** Takes what the node says of itself: others may drain it too, and start it again. */
  update() {
    const { state } = this.model.status;
    if (state === "draining" || state === "leaving") this.#show("draining", this.#said);
    else if (this.#phase !== "asked") this.#show("none", this.#phase === "none" ? this.#said : "");
  }

  /** The connection to the node is lost. */
  lost() {
    if (this.#phase === "asked" || this.#phase === "draining") this.#show("gone", "");
  }

  #confirm() {
    if (this.#phase !== "none") return;
    const { model } = this;
    const here = model.peers.get(model.selfId)?.in_flight ?? 0;
    const own = model.status.own_in_flight ?? 0;
    setText(document.getElementById("drain-title"), `Drain ${clean(model.status.name) || "this node"}?`);
    setText(document.getElementById("drain-running"), `Now ${here} request${here === 1 ? " is" : "s are"} served here, and ${own} of its own clients' run.`);
    this.#dialog.returnValue = "";
    this.#dialog.showModal();
  }

  async #drain() {
    const answer = await this.keys.fetchWithKey("/api/drain", WHY, "POST");
    if (answer === null) return; // the person gave up; nothing has changed
    if (!answer.ok) {
      this.#show("none", `The node was not drained: ${answer.text}`);
      return;
    }
    const told = JSON.parse(answer.text);
    const running = told.served_here + told.sent_elsewhere;
    const rest = running ? `${running} request${running === 1 ? "" : "s"} may end first, within ${told.grace_s} s.` : "Nothing runs any more.";
    // The connection may have ended before the answer was read.
    if (this.#phase !== "gone") this.#show(this.#phase === "draining" ? "draining" : "asked", rest);
  }

  #show(phase, said) {
    this.#phase = phase;
    this.#said = said;
    this.#button.hidden = false;
    // Not disabled: whoever stands on it by keyboard would be thrown off it.
    this.#button.setAttribute("aria-disabled", String(phase !== "none"));
    setText(this.#button, { none: "Drain…", gone: "Drained" }[phase] ?? "Draining");
    const text = phase === "gone" ? GONE
      : phase === "none" ? said
        : `This node drains: it takes nothing new, and leaves when what runs has ended. ${said}`.trim();
    setText(this.#line, text);
    this.#line.classList.toggle("banner", text !== "");
  }
}
