// Elements and words. Peers' texts reach the page through textContent and attributes alone.

const NOT_FOR_EYES = /[\p{Cc}\p{Cs}\p{Co}\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]/gu;

/** Text of a peer without what moves or hides other text. */
export function clean(text) {
  return String(text ?? "").replace(NOT_FOR_EYES, "·");
}

/** An element with attributes (null leaves one off) and children; strings become text nodes. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Writes only what differs: the browser then lays out nothing for the rest. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) {
    element.setAttribute(name, value);
  }
}

/** Puts `wanted` into `parent` in this order, and moves only what stands elsewhere. */
export function reorder(parent, wanted) {
  let cursor = parent.firstChild;
  for (const element of wanted) {
    if (element === cursor) cursor = cursor.nextSibling;
    else parent.insertBefore(element, cursor);
  }
  while (cursor) {
    const next = cursor.nextSibling;
    cursor.remove();
    cursor = next;
  }
}

export function bytes(size) {
  if (typeof size !== "number") return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) { size /= 1024; unit += 1; }
  return `${unit === 0 ? size : size.toFixed(size >= 100 ? 0 : 1)} ${units[unit]}`;
}

export function milliseconds(value) {
  if (typeof value !== "number") return "–";
  if (value >= 10000) return `${(value / 1000).toFixed(0)} s`;
  if (value >= 1000) return `${(value / 1000).toFixed(1)} s`;
  return value >= 10 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`;
}

export function age(seconds) {
  if (typeof seconds !== "number") return "";
  if (seconds < 120) return `${Math.max(0, Math.floor(seconds))} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

/** The end of a peer ID: the beginning is the same for all. */
export function shortId(id) {
  const text = clean(id);
  return text.length <= 12 ? text : "…" + text.slice(-8);
}

/** Words as the node's log has them, for people: link_lost becomes link lost. */
export function words(text) {
  return clean(text).replaceAll("_", " ");
}
