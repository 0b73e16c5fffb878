/* The list of devices and modules. */

import { announce, arrange, find, make, write } from "./dom.js";
import { ask, pathOf } from "./hub.js";

const PAGE = 200; // entries that are shown before somebody asks for more

// By id: {connected, enabled}. An entry's element is kept, so that it keeps focus.
let identities = new Map();
const elements = new Map();
let chosen = null;
let shown = PAGE;

export const linkTo = (id) => `#device=${encodeURIComponent(id)}`;
export const stateOf = (id) => identities.get(id);

export async function load() {
  const found = await ask("GET", "/local/devices");
  identities = new Map(found.map(({ id, connected, enabled }) => [id, { connected, enabled }]));
  for (const id of [...elements.keys()]) {
    if (!identities.has(id)) elements.delete(id);
  }
  render();
}

/** Take over an event; true if it was about the chosen identity. */
export function happened({ source, device, properties }) {
  const before = identities.get(device);
  if (source === "deviceConnectionStateEvents") {
    if (before) before.connected = properties.opType === "deviceConnected";
  } else if (source === "deviceLifecycleEvents") {
    if (properties.opType === "createDeviceIdentity") {
      identities.set(device, { connected: false, enabled: true });
    } else {
      identities.delete(device);
      elements.delete(device);
    }
  } else {
    return device === chosen;
  }
  later();
  if (device !== chosen) return false;
  if (before) announce(`${device} is ${identities.get(device) ? wordOf(before) : "deleted"}`);
  return true;
}

export function choose(id) {
  chosen = id;
  render();
}

/** What a twin says of an identity's status, which no event tells. */
export function setEnabled(id, enabled) {
  const state = identities.get(id);
  if (state && state.enabled !== enabled) {
    state.enabled = enabled;
    later();
  }
}

const wordOf = (state) => (state.connected ? "connected" : "not connected");

let timer = null;

/** Render once for all that comes within a moment: a thousand devices may connect together. */
function later() {
  timer ??= setTimeout(render, 50);
}

const collator = new Intl.Collator("en", { numeric: true });

function render() {
  clearTimeout(timer);
  timer = null;
  const wanted = find("filter").value.trim().toLowerCase();
  const connectedOnly = find("only-connected").checked;
  const ids = [...identities.keys()]
    .filter((id) => id.toLowerCase().includes(wanted) && (!connectedOnly || identities.get(id).connected))
    .sort(collator.compare);
  arrange(find("device-list"), ids.slice(0, shown).map(entry));
  const connected = [...identities.values()].filter((state) => state.connected).length;
  write(find("devices-count"), `${identities.size.toLocaleString("en")} in all, ${connected} connected`);
  const none = find("device-none");
  none.hidden = ids.length > 0;
  write(none, identities.size === 0 ? "There is no device yet." : "No id fits.");
  const more = find("more-devices");
  more.hidden = ids.length <= shown;
  write(more, `Show ${Math.min(PAGE, ids.length - shown)} more of ${ids.length - shown}`);
}

function entry(id) {
  let element = elements.get(id);
  if (!element) {
    const state = make("span", { class: "state" });
    const link = make("a", { href: linkTo(id) }, make("span", { class: "id" }, id), " ", state);
    element = make("li", { class: id.includes("/") ? "module" : false }, link);
    elements.set(id, element);
  }
  const state = identities.get(id);
  const link = element.firstChild;
  link.classList.toggle("connected", state.connected);
  link.classList.toggle("disabled", !state.enabled);
  write(link.lastChild, state.enabled ? wordOf(state) : "disabled");
  if (id === chosen) link.setAttribute("aria-current", "true");
  else link.removeAttribute("aria-current");
  return element;
}

async function create(event) {
  event.preventDefault();
  const input = find("new-id");
  const id = input.value.trim();
  const [deviceId, moduleId] = id.split("/");
  try {
    await ask("PUT", pathOf("devices", id), { body: JSON.stringify({ deviceId, moduleId }) });
    write(find("new-error"), "");
    input.value = "";
    location.hash = linkTo(id);
  } catch (error) {
    write(find("new-error"), error.message);
    input.focus();
  }
}

function restart() {
  shown = PAGE;
  render();
}

find("filter").addEventListener("input", restart);
find("only-connected").addEventListener("change", restart);
find("more-devices").addEventListener("click", () => {
  const first = find("device-list").children.length;
  shown += PAGE;
  render();
  find("device-list").children[first].firstChild.focus();
});
find("new-device-form").addEventListener("submit", create);
