/* Elements and what is shown in them. Everything is text here: nothing takes markup. */

export const find = (id) => document.getElementById(id);

/** An element. attributes: true is "", false and null leave one out; "on" holds listeners by event. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (attribute === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value !== false && value !== null) {
      element.setAttribute(attribute, value === true ? "" : value);
    }
  }
  element.append(...children);
  return element;
}

/** Set a text only where it is another one, so that nobody's selection or reading place is lost. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Let parent have exactly these children, in this order. Those that stay are not touched and keep focus. */
export function arrange(parent, nodes) {
  const wanted = new Set(nodes);
  for (const child of [...parent.childNodes]) {
    if (!wanted.has(child)) child.remove();
  }
  let place = parent.firstChild;
  for (const node of nodes) {
    if (node === place) place = place.nextSibling;
    else parent.insertBefore(node, place);
  }
}

const UNSEEN = /(?![\n\t])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

/** Text with what cannot be seen, or turns the direction of what can, as \uXXXX. */
export function visible(text) {
  return text.replace(UNSEEN, (sign) =>
    sign.replace(/[^]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`),
  );
}

/** An element with a text of any length: one that is longer than short is folded and opens on demand. */
export function folded(text, short = 240) {
  const whole = visible(text);
  if (whole.length <= short) return make("span", { class: "value" }, whole);
  const more = `… all ${whole.length.toLocaleString("en")} characters`;
  return make(
    "details",
    { class: "value" },
    make(
      "summary",
      {},
      make("span", { class: "start" }, whole.slice(0, short)),
      make("span", { class: "more" }, more),
    ),
    make("div", { class: "whole" }, whole),
  );
}

export const clock = (milliseconds) => new Date(milliseconds).toLocaleTimeString("en-GB", { hour12: false });

const PAUSE = 1500; // milliseconds between two announcements
const MOST = 3; // things said at once
let waiting = [];
let timer = null;

/** Say it to who cannot see the page: at most a few words every now and then. */
export function announce(text) {
  waiting.push(visible(text).slice(0, 200));
  if (timer === null) timer = setTimeout(say, 100);
}

function say() {
  if (waiting.length === 0) {
    timer = null;
    return;
  }
  const more = waiting.length - MOST;
  const said = waiting.slice(0, MOST).join(". ");
  waiting = [];
  find("announcements").textContent = more > 0 ? `${said}. And ${more} more changes.` : `${said}.`;
  timer = setTimeout(say, PAUSE);
}
