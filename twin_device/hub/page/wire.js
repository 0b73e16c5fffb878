/* What goes over the wire between one device and the hub. */

import { clock, find, folded, make, visible, write } from "./dom.js";
import { ask, listen } from "./hub.js";

const MOST = 500; // packets that are shown
const MOMENT = 0.005; // seconds between a packet and the event that tells of it
const WAYS = { in: ["→", "device to hub"], out: ["←", "hub to device"] };

let stream = null;
let newest = null; // the packet that came last
let waiting = []; // not shown yet
let paused = false;
let timer = null;

/** Show this device's packets, those before now, too. null: show none. */
export function follow(id) {
  stream?.close();
  stream = null;
  empty();
  newest = null;
  setPaused(false);
  if (id === null) return;
  const name = encodeURIComponent(id);
  const own = listen(`source=packets&deviceId=${name}`, {
    async opened() {
      const before = await packetsOf(name);
      if (stream !== own) return;
      const since = newest?.time ?? 0;
      before
        .filter((packet) => packet.time > since)
        .slice(-MOST)
        .forEach(add);
    },
    happened({ time, body }) {
      if (stream === own && !isKnown(time, body)) add({ ...body, time, live: true });
    },
  });
  stream = own;
}

async function packetsOf(name) {
  try {
    return await ask("GET", `/local/packets?deviceId=${name}`);
  } catch (error) {
    if (error.status === 404) return []; // it may be created yet
    throw error;
  }
}

/** The stream begins before what was is asked for: a packet may be in both. */
function isKnown(time, packet) {
  if (newest === null || newest.live) return false;
  const members = ["direction", "kind", "topic", "size", "payload"];
  const alike = members.every((name) => newest[name] === packet[name]);
  return time < newest.time || (alike && time - newest.time < MOMENT);
}

function add(packet) {
  newest = packet;
  waiting.push(packet);
  if (waiting.length > MOST) waiting.shift();
  timer ??= setTimeout(flush, 50);
}

function flush() {
  timer = null;
  if (!paused) {
    const frame = find("log-frame");
    const log = find("log");
    const atEnd = frame.scrollHeight - frame.scrollTop - frame.clientHeight < 40;
    log.append(...waiting.map(line));
    waiting = [];
    while (log.childElementCount > MOST) log.firstElementChild.remove();
    if (atEnd) frame.scrollTop = frame.scrollHeight;
  }
  count();
}

function count() {
  const shown = find("log").childElementCount;
  const kept = shown === MOST ? `the last ${MOST} packets` : `${shown} packet${shown === 1 ? "" : "s"}`;
  write(find("wire-count"), paused ? `${kept}; ${waiting.length} more since the pause` : kept);
}

function line(packet) {
  const [sign, words] = WAYS[packet.direction];
  const head = make(
    "div",
    { class: "packet" },
    make("time", {}, clock(packet.time * 1000)),
    make(
      "span",
      { class: `way ${packet.direction}` },
      make("span", { "aria-hidden": "true" }, sign),
      make("span", { class: "unseen" }, words),
    ),
    make("strong", {}, packet.kind),
  );
  if (packet.topic) head.append(make("code", { class: "topic" }, visible(packet.topic)));
  if (packet.kind === "PUBLISH") {
    head.append(make("span", { class: "faint" }, `QoS ${packet.qos}, ${packet.size} bytes`));
  }
  const item = make("li", {}, head);
  if (packet.payload) item.append(folded(packet.payload));
  return item;
}

function empty() {
  waiting = [];
  find("log").replaceChildren();
  count();
}

function setPaused(value) {
  paused = value;
  find("pause").setAttribute("aria-pressed", String(paused));
  flush();
}

find("pause").addEventListener("click", () => setPaused(!paused));
find("clear-log").addEventListener("click", empty);
