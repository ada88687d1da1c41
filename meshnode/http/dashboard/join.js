// What to run on another host. The token is asked for only when a person says so, with the key.

import { clean, el } from "./dom.js";

const LOOPBACK = /^\/ip4\/127\.|^\/ip6\/::1\//;

export class Join {
  #place = document.getElementById("join");
  #drawn = "";

  constructor(keys) { this.keys = keys; }

  update(model) {
    const { addrs = [], open, network } = model.status;
    const key = JSON.stringify([addrs, open, network]);
    if (key === this.#drawn) return;
    this.#drawn = key;
    const addr = addrs.find((each) => !LOOPBACK.test(each)) ?? addrs[0];
    const belong = open ? `--open --network ${clean(network)}` : "--token-file mesh.token";
    const join = `meshnode up ${belong}${addr ? ` --bootstrap ${clean(addr)}` : ""}`;
    const parts = [
      el("p", {}, "A GPU host, in front of what already runs there:"),
      command(`${join} --expose llm=127.0.0.1:11434`),
      el("p", {}, "A laptop that only asks, at http://127.0.0.1:8080/v1:"),
      command(`${join} --proxy`),
    ];
    if (addr && LOOPBACK.test(addr)) {
      parts.push(el("p", { class: "faint" }, "This node listens on loopback alone: only this machine can join it. Start it with --listen /ip4/0.0.0.0/tcp/4201 to let others in."));
    }
    if (!open) parts.push(...this.#tokenParts());
    this.#place.replaceChildren(...parts);
  }

  #tokenParts() {
    const shown = el("div");
    const button = el("button", { type: "button", "aria-expanded": "false" }, "Show the token");
    button.addEventListener("click", async () => {
      if (button.getAttribute("aria-expanded") === "true") return hide();
      const answer = await this.keys.fetchWithKey("/api/p2p/token", "The token opens the mesh to whoever has it, so the node wants its API key before it tells it.");
      if (answer === null) return undefined;
      if (!answer.ok) {
        shown.replaceChildren(el("p", { class: "wrong", role: "alert" }, answer.text));
        return undefined;
      }
      shown.replaceChildren(
        el("p", { class: "faint" }, "Put this line into mesh.token on the other host, readable by its user alone (chmod 600)."),
        command(answer.text.trim()));
      button.textContent = "Hide the token";
      button.setAttribute("aria-expanded", "true");
      return undefined;
    });
    const hide = () => {
      shown.replaceChildren();
      button.textContent = "Show the token";
      button.setAttribute("aria-expanded", "false");
    };
    return [el("p", { class: "faint" }, "mesh.token holds the mesh's token, which is not shown on this page by itself."), button, shown];
  }
}

function command(text) {
  const button = el("button", { type: "button", class: "quiet" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch { // without a secure context there is no clipboard: let the person copy it
      getSelection().selectAllChildren(button.previousElementSibling);
      button.textContent = "Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return el("div", { class: "command" }, el("code", {}, text), button);
}
