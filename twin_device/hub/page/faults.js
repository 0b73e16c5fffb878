/* A switch for each kind of fault, and what is active. */

import { announce, arrange, find, make, write } from "./dom.js";
import { ask } from "./hub.js";

const EVERY_SECOND = 1000;

let kinds = new Map(); // by name: the elements of one
let active = [];
let entries = new Map(); // by id: the element of an active fault
let poll = null;
let events = 0;

export async function load() {
  const before = events;
  const answer = await ask("GET", "/local/faults");
  if (kinds.size === 0) {
    kinds = new Map(Object.entries(answer.kinds).map(([name, kind]) => [name, element(name, kind)]));
    arrange(
      find("kinds"),
      [...kinds.values()].map((kind) => kind.item),
    );
  }
  // An event that came meanwhile may be newer than the answer.
  if (events === before) show(answer.active);
}

/** An event: what is active now. */
export function happened(found) {
  events += 1;
  show(found);
}

function show(found) {
  for (const fault of found) {
    if (!active.some((one) => one.id === fault.id)) announce(`fault ${fault.kind} is set`);
  }
  for (const fault of active) {
    if (!found.some((one) => one.id === fault.id)) announce(`fault ${fault.kind} is over`);
  }
  active = found;
  entries = new Map(active.map((fault) => [fault.id, entry(fault, entries.get(fault.id))]));
  arrange(find("active-list"), [...entries.values()]);
  find("active").hidden = active.length === 0;
  for (const [name, kind] of kinds) {
    const on = active.some((fault) => fault.kind === name);
    kind.toggle.setAttribute("aria-checked", String(on));
    kind.item.classList.toggle("on", on);
  }
  // No event tells that a fault's time is over.
  clearTimeout(poll);
  if (active.some((fault) => fault.seconds !== null)) poll = setTimeout(again, EVERY_SECOND);
}

async function again() {
  try {
    await load();
  } catch {
    // The stream notices, too, and loads again.
  }
}

export function stop() {
  clearTimeout(poll);
}

/** The device that a fault may be narrowed to. */
export function choose(id) {
  const choice = find("scope-device");
  const narrowed = choice.value !== "";
  choice.replaceChildren(make("option", { value: "" }, "every device"));
  if (id !== null) choice.append(make("option", { value: id }, id));
  if (narrowed && id !== null) choice.value = id;
}

// ---------------------------------------------------------------------- one kind

function element(name, kind) {
  const fields = new Map();
  const inputs = make("div", { class: "parameters" });
  if (kind.ofOperations) {
    const choice = make("select", {}, make("option", { value: "" }, "any"));
    for (const operation of ["retrieve", "report"]) choice.append(make("option", {}, operation));
    inputs.append(make("label", {}, "operation ", choice));
    fields.set("operation", () => choice.value || null);
  }
  for (const [parameter, value] of Object.entries(kind.parameters)) {
    const number = typeof value === "number";
    const input = make("input", {
      type: number ? "number" : "text",
      step: number ? "any" : null,
      value: value ?? "",
      placeholder: number ? null : "none",
      autocomplete: "off",
    });
    inputs.append(make("label", {}, `${parameter} `, input));
    fields.set(parameter, () => typed(input.value, number));
  }
  const label = make("code", { id: `kind-${name}` }, name);
  const text = make("p", { id: `text-${name}`, class: "faint" }, kind.text);
  const error = make("p", { class: "error", role: "alert" });
  const toggle = make("button", {
    type: "button",
    role: "switch",
    "aria-checked": "false",
    "aria-labelledby": label.id,
    "aria-describedby": text.id,
    class: "switch",
    on: { click: () => flip(name, fields, error) },
  });
  const item = make("li", {}, make("div", { class: "kind" }, toggle, label), text, inputs, error);
  if (fields.size > 0) {
    inputs.setAttribute("role", "group");
    inputs.setAttribute("aria-label", `Parameters of ${name}`);
  }
  return { item, toggle };
}

/** The value of a parameter that somebody typed: a number where one looks like it, null for nothing. */
function typed(text, number) {
  if (text.trim() === "") return null;
  return number || /^-?\d+$/.test(text.trim()) ? Number(text) : text;
}

const limit = (id) => (find(id).value === "" ? null : Number(find(id).value));

async function flip(kind, fields, error) {
  const set = active.filter((fault) => fault.kind === kind);
  await attempt(error, async () => {
    if (set.length > 0) {
      for (const fault of set) await ask("DELETE", `/local/faults/${fault.id}`);
      return;
    }
    const values = Object.fromEntries([...fields].map(([name, value]) => [name, value()]));
    const { operation = null, ...parameters } = values;
    const device = find("scope-device").value || null;
    const [times, seconds] = [limit("scope-times"), limit("scope-seconds")];
    const fault = { kind, device, operation, times, seconds, parameters };
    await ask("POST", "/local/faults", { body: JSON.stringify(fault) });
  });
}

/** Do it, show the hub's own words if it refuses, and what is active then. */
async function attempt(error, work) {
  try {
    await work();
    write(error, "");
  } catch (refusal) {
    write(error, refusal.message);
  }
  await again();
  // What was clicked may be gone: a keyboard goes on from here.
  if (document.activeElement === document.body) find("faults-title").focus();
}

// ---------------------------------------------------------------------- what is active

function entry(fault, kept) {
  if (!kept) {
    const clear = () => attempt(find("faults-error"), () => ask("DELETE", `/local/faults/${fault.id}`));
    kept = make(
      "li",
      {},
      make("code", {}, fault.kind),
      make("span", {}),
      make(
        "button",
        {
          type: "button",
          class: "quiet",
          "aria-label": `Clear ${fault.kind}, number ${fault.id}`,
          on: { click: clear },
        },
        "Clear",
      ),
    );
  }
  write(kept.children[1], about(fault));
  return kept;
}

function about(fault) {
  const words = [fault.device ?? "every device"];
  if (fault.operation) words.push(fault.operation);
  for (const [name, value] of Object.entries(fault.parameters)) {
    if (value !== null) words.push(`${name} ${value}`);
  }
  if (fault.seconds !== null) words.push(`for ${fault.seconds} s`);
  const hits = fault.times === null ? `${fault.hits}` : `${fault.hits} of ${fault.times}`;
  words.push(`happened ${hits} time${hits === "1" ? "" : "s"}`);
  return words.join(", ");
}

find("clear-faults").addEventListener("click", () =>
  attempt(find("faults-error"), () => ask("DELETE", "/local/faults")),
);
find("forget-sessions").addEventListener("click", async () => {
  try {
    await ask("DELETE", "/local/sessions");
    write(find("sessions-answer"), "All sessions are forgotten.");
  } catch (error) {
    write(find("sessions-answer"), error.message);
  }
});
