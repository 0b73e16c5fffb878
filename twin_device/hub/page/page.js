/* The page: who is signed in, which device is chosen, and what happens. */

import * as devices from "./devices.js";
import { announce, find, folded, make, visible, write } from "./dom.js";
import * as editor from "./editor.js";
import * as faults from "./faults.js";
import { ask, forget, keep, listen, pathOf, token, tokenOf, whenRefused } from "./hub.js";
import * as twinView from "./twin.js";
import * as wire from "./wire.js";

const PREFIX = "SharedAccessSignature ";
const SOURCES = ["twinChangeEvents", "deviceLifecycleEvents", "deviceConnectionStateEvents", "faults"];

let stream = null;
let chosen = null;

// ---------------------------------------------------------------------- signing in

function signIn(message) {
  close();
  forget();
  find("workplace").hidden = true;
  find("sign-in").hidden = false;
  find("sign-out").hidden = true;
  find("try-now").hidden = true;
  write(find("connection"), "");
  write(find("sign-in-error"), message);
  find("connection-string").focus();
}

find("sign-in-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = find("connection-string");
  const typed = input.value;
  input.value = "";
  try {
    keep(await tokenOf(typed));
    open();
  } catch (error) {
    write(find("sign-in-error"), error.message);
    input.focus();
  }
});
find("sign-out").addEventListener("click", () => signIn(""));
whenRefused(signIn);

// ---------------------------------------------------------------------- the hub

function open() {
  close();
  find("sign-in").hidden = true;
  find("workplace").hidden = false;
  find("sign-out").hidden = false;
  write(find("connection"), "Connecting to the hub …");
  stream = listen(SOURCES.map((source) => `source=${source}`).join("&"), { opened, happened, changed });
  wire.follow(chosen);
}

function close() {
  stream?.close();
  stream = null;
  wire.follow(null);
  faults.stop();
}

async function opened() {
  await Promise.all([devices.load(), faults.load(), refresh()]);
}

function happened(event) {
  if (event.source === "faults") faults.happened(event.body);
  else if (devices.happened(event)) refresh();
}

function changed(connected) {
  document.body.classList.toggle("away", !connected);
  find("try-now").hidden = connected;
  const words = connected ? "Connected to the hub" : "No connection to the hub; trying again …";
  write(find("connection"), words);
}

find("try-now").addEventListener("click", () => stream?.tryNow());
// A browser opens six connections to one host: a tab that nobody sees takes none.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) close();
  else if (token()) open();
});

// ---------------------------------------------------------------------- the chosen device

/** What the address says: take over a token and hide it; or choose a device. */
function route() {
  let text;
  try {
    text = decodeURIComponent(location.hash.slice(1));
  } catch {
    text = "";
  }
  if (text.startsWith(PREFIX)) {
    keep(text);
    history.replaceState(null, "", location.pathname);
    open();
  } else if (text.startsWith("device=")) {
    choose(text.slice("device=".length));
  } else if (text === "") {
    choose(null);
  }
}

function choose(id) {
  if (id === chosen) return;
  chosen = id;
  devices.choose(id);
  faults.choose(id);
  twinView.reset();
  editor.reset(id, refresh);
  for (const name of ["device-answer", "device-error", "method-error"]) write(find(name), "");
  find("method-answer").replaceChildren();
  find("device").hidden = true;
  find("nothing").hidden = false;
  write(find("nothing-title"), id === null ? "No device chosen" : id);
  write(find("nothing-text"), id === null ? "Choose one from the list." : "Loading …");
  document.title = id === null ? "local hub" : `${id} – local hub`;
  if (!stream) return;
  wire.follow(id);
  refresh().then(() => {
    const title = find("device").hidden ? null : find("device-title");
    title?.focus();
  });
}

let loading = null;
let stale = false;

/** Have the chosen twin anew. One request at a time: what comes meanwhile is in the next. */
async function refresh() {
  if (chosen === null) return;
  stale = true;
  loading ??= reload();
  await loading;
}

async function reload() {
  while (stale && chosen !== null) {
    stale = false;
    const id = chosen;
    try {
      const twin = await ask("GET", pathOf("twins", id));
      if (id === chosen) show(twin);
    } catch (error) {
      if (id === chosen && error.status) {
        find("device").hidden = true;
        find("nothing").hidden = false;
        write(find("nothing-text"), error.message);
      }
      // Out of reach: the stream comes back, and asks again.
    }
  }
  loading = null;
}

function show(twin) {
  find("nothing").hidden = true;
  find("device").hidden = false;
  write(find("device-title"), chosen);
  devices.setEnabled(chosen, twin.status === "enabled");
  const connected = twin.connectionState === "Connected";
  const facts = {
    Connection: connected ? "connected" : "not connected",
    Status: twin.status,
    "Twin version": twin.version,
    ...(twin.modelId ? { Model: twin.modelId } : {}),
  };
  find("facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, visible(String(value)))),
    ),
  );
  find("disconnect").disabled = !connected;
  twinView.show(twin);
  editor.show(twin);
}

/** Do what a button asks for; the hub's own words if it refuses. */
async function act(work) {
  write(find("device-answer"), "");
  write(find("device-error"), "");
  try {
    write(find("device-answer"), await work());
  } catch (error) {
    write(find("device-error"), error.message);
  }
}

find("disconnect").addEventListener("click", () =>
  act(async () => {
    await ask("DELETE", `/local/connections/${encodeURIComponent(chosen)}`);
    return "Its connection was ended.";
  }),
);
find("copy").addEventListener("click", () =>
  act(async () => {
    const { authentication } = await ask("GET", pathOf("devices", chosen));
    const [device, module] = chosen.split("/");
    const parts = [`HostName=${location.hostname}`, `DeviceId=${device}`];
    if (module !== undefined) parts.push(`ModuleId=${module}`);
    const key = authentication.symmetricKey.primaryKey;
    parts.push(key ? `SharedAccessKey=${key}` : "x509=true");
    await navigator.clipboard.writeText(parts.join(";"));
    return "Copied. It names no port: MQTT over TLS is taken to be on 8883.";
  }),
);

const dialog = find("confirm");
find("delete").addEventListener("click", () => {
  write(find("confirm-title"), `Delete ${chosen}?`);
  dialog.showModal();
});
find("confirm-no").addEventListener("click", () => dialog.close());
find("confirm-yes").addEventListener("click", () => {
  dialog.close();
  act(async () => {
    await ask("DELETE", pathOf("devices", chosen), { etag: "*" });
    announce(`${chosen} is deleted`);
    location.hash = "";
    find("filter").focus();
    return "";
  });
});

// ---------------------------------------------------------------------- direct methods

find("method-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const methodName = find("method-name").value;
  const text = find("method-payload").value.trim();
  write(find("method-error"), "");
  find("method-answer").replaceChildren();
  try {
    const body = JSON.stringify({ methodName, payload: text ? JSON.parse(text) : null });
    const answer = await ask("POST", `${pathOf("twins", chosen)}/methods`, { body, within: 60_000 });
    const told = folded(JSON.stringify(answer.payload));
    find("method-answer").replaceChildren(make("span", {}, `Status ${answer.status}: `), told);
  } catch (error) {
    write(find("method-error"), error instanceof SyntaxError ? "The payload is not JSON." : error.message);
  }
});

window.addEventListener("hashchange", route);
find("skip").addEventListener("click", (event) => {
  event.preventDefault();
  find(find("device").hidden ? "faults-title" : "device-title").focus();
});
route();
if (!stream) {
  if (token()) open();
  else signIn("");
}
