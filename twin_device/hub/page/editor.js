/* Changing desired properties and tags. What is typed is kept, for each device and kind of change. */

import { find, visible, write } from "./dom.js";
import { ask, pathOf } from "./hub.js";
import { NotJson, check, own } from "./json.js";

const HINTS = {
  patch: "Merged into desired; null removes a key. Ctrl+Enter sends.",
  replace: "Takes the place of all desired properties. Ctrl+Enter sends.",
  tags: "Merged into the tags, which the device never sees; null removes a key. Ctrl+Enter sends.",
};

// By id and mode: {text, typed, etag, version}. etag: of the twin that the text was begun with.
const drafts = new Map();
let id = null;
let twin = null;
let sent = () => {};

const mode = () => new FormData(find("change-form")).get("mode");
const pretty = (document) => JSON.stringify(document, null, 2);

function draft() {
  const key = `${id} ${mode()}`;
  if (!drafts.has(key)) drafts.set(key, { text: "{}", typed: false });
  return drafts.get(key);
}

/** Begin with another device. whenSent: called when the twin is another one than was shown. */
export function reset(deviceId, whenSent) {
  id = deviceId;
  twin = null;
  sent = whenSent;
  clear();
  render();
}

function clear() {
  for (const name of ["change-error", "change-answer", "change-notice"]) write(find(name), "");
  find("json").removeAttribute("aria-invalid");
  find("overwrite").hidden = true;
  find("reload-text").hidden = true;
}

export function show(current) {
  twin = current;
  render();
}

/** Show this mode's draft. One that nobody typed into follows the twin. */
function render() {
  const current = draft();
  if (!current.typed && mode() === "replace" && twin) begin(current);
  write(find("change-hint"), HINTS[mode()]);
  const area = find("json");
  if (area.value !== current.text) area.value = current.text;
  const overtaken = current.typed && mode() === "replace" && twin && twin.etag !== current.etag;
  write(find("change-notice"), overtaken ? meanwhile(current) : "");
  find("reload-text").hidden = !overtaken;
}

function meanwhile(current) {
  const version = twin.properties.desired.$version;
  const now = `Meanwhile the twin was changed by somebody else: desired has version ${version}`;
  return `${now}, you began with version ${current.version}.`;
}

function begin(current) {
  current.text = pretty(own(twin.properties.desired));
  current.typed = false;
  current.etag = twin.etag;
  current.version = twin.properties.desired.$version;
}

function refuse(text) {
  write(find("change-answer"), "");
  write(find("change-error"), visible(text));
  find("json").setAttribute("aria-invalid", "true");
  find("json").focus();
}

function request(text, current) {
  if (mode() === "patch") return ["PATCH", { body: `{"properties":{"desired":${text}}}` }];
  if (mode() === "tags") return ["PATCH", { body: `{"tags":${text}}` }];
  // A PUT replaces the tags, too. If-Match: what nobody here has seen is not overwritten.
  const body = `{"tags":${JSON.stringify(twin.tags)},"properties":{"desired":${text}}}`;
  return ["PUT", { body, etag: `"${current.etag}"` }];
}

async function send() {
  const [device, current, text] = [id, draft(), find("json").value];
  if (!twin) return;
  clear();
  try {
    // What is typed is what is sent: parsed and written again, 20.0 would be 20.
    check(text);
    const [method, options] = request(text, current);
    const answer = await ask(method, pathOf("twins", device), options);
    // Unless it was typed on meanwhile.
    if (current.text === text) current.typed = false;
    current.etag = answer.etag;
    current.version = answer.properties.desired.$version;
    if (device !== id) return;
    write(
      find("change-answer"),
      `Done. Desired has version ${answer.properties.desired.$version}, the twin version ${answer.version}.`,
    );
    sent();
  } catch (error) {
    if (device !== id) return;
    if (error instanceof NotJson) {
      refuse(`${error.message} Nothing was sent.`);
      find("json").setSelectionRange(error.offset, error.offset + 1);
    } else if (error.status === 412) {
      const words = "The twin was changed by somebody else meanwhile; nothing was replaced.";
      refuse(`${words} The hub says: ${error.message}`);
      find("overwrite").hidden = false;
      sent();
    } else {
      refuse(error.status ? `The hub refused it, ${error.status}: ${error.message}` : error.message);
    }
  }
}

find("json").addEventListener("input", () => {
  const current = draft();
  current.text = find("json").value;
  current.typed = true;
});
find("json").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
  }
});
find("change-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
for (const choice of document.getElementsByName("mode")) {
  choice.addEventListener("change", () => {
    clear();
    render();
  });
}
find("overwrite").addEventListener("click", () => {
  draft().etag = twin.etag;
  send();
});
find("reload-text").addEventListener("click", () => {
  begin(draft());
  clear();
  render();
  find("json").focus();
});
