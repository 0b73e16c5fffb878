/* The hub over HTTP: the token, requests, streams of events. */

const VERSION = "api-version=2021-04-12";
const ANSWER_WITHIN = 30_000; // milliseconds
const SILENCE = 40_000; // the hub says something every 15 s
const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 10_000;
const LIFETIME = 86_400; // seconds that a token made here is good for

/** The hub said no. message: its own words. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// ---------------------------------------------------------------------- the token

export const token = () => sessionStorage.getItem("token");
export const keep = (value) => sessionStorage.setItem("token", value);
export const forget = () => sessionStorage.removeItem("token");

let refused = () => {};

/** Have it called with the hub's words when the token is good for nothing. */
export function whenRefused(listener) {
  refused = listener;
}

/** A token that a service connection string stands for. Error says what is wrong with it. */
export async function tokenOf(connectionString) {
  const parts = new Map();
  for (const part of connectionString.trim().split(";")) {
    const at = part.indexOf("=");
    if (at > 0) parts.set(part.slice(0, at), part.slice(at + 1));
  }
  for (const name of ["HostName", "SharedAccessKeyName", "SharedAccessKey"]) {
    if (!parts.get(name)) throw new Error(`A service connection string has a ${name}; this one has none.`);
  }
  if (!globalThis.crypto?.subtle) throw new Error("This browser signs only on localhost or over HTTPS.");
  let secret;
  try {
    secret = Uint8Array.from(atob(parts.get("SharedAccessKey")), (sign) => sign.charCodeAt(0));
  } catch {
    throw new Error("The SharedAccessKey is not base64.");
  }
  const resource = encodeURIComponent(parts.get("HostName").split(":")[0]);
  const expiry = Math.floor(Date.now() / 1000) + LIFETIME;
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  const key = await crypto.subtle.importKey("raw", secret, algorithm, false, ["sign"]);
  const signed = await crypto.subtle.sign("HMAC", key, new TextEncoder().encode(`${resource}\n${expiry}`));
  const signature = encodeURIComponent(btoa(String.fromCharCode(...new Uint8Array(signed))));
  const policy = parts.get("SharedAccessKeyName");
  return `SharedAccessSignature sr=${resource}&sig=${signature}&se=${expiry}&skn=${policy}`;
}

// ---------------------------------------------------------------------- requests

const withVersion = (path) => `${path}${path.includes("?") ? "&" : "?"}${VERSION}`;

/** "/twins/..." or "/devices/..." of an identity's id, "device" or "device/module". */
export function pathOf(collection, id) {
  const [device, module] = id.split("/").map(encodeURIComponent);
  return module === undefined ? `/${collection}/${device}` : `/${collection}/${device}/modules/${module}`;
}

/** Ask the hub; the answer as JSON, null if it is empty. body: JSON as text. Refusal, or Error in words. */
export async function ask(method, path, { body, etag, within = ANSWER_WITHIN } = {}) {
  const used = token();
  const headers = { Authorization: used ?? "" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (etag !== undefined) headers["If-Match"] = etag;
  let answer, text;
  try {
    const signal = AbortSignal.timeout(within);
    answer = await fetch(withVersion(path), { method, headers, body, signal, cache: "no-store" });
    text = await answer.text();
  } catch {
    throw new Error("The hub did not answer.");
  }
  if (!answer.ok) {
    const refusal = new Refusal(answer.status, told(text));
    // An answer to an older token says nothing of this one, nor to who has signed out.
    if (refusal.status === 401 && used && used === token()) doubt(path, refusal);
    throw refusal;
  }
  try {
    return text ? JSON.parse(text) : null;
  } catch {
    throw new Error("The hub's answer is not JSON.");
  }
}

/** A 401 may be for want of one right: ask for what every token here is good for. */
function doubt(path, refusal) {
  if (path.startsWith("/local/")) refused(refusal.message);
  else ask("GET", "/local/faults").catch(() => {});
}

/** The message in the body of an error, in each of the shapes that the service is seen to send. */
function told(text) {
  let message;
  try {
    message = JSON.parse(text).Message;
    if (typeof message === "string" && message.startsWith("{")) message = JSON.parse(message);
  } catch {
    return message ?? text;
  }
  if (typeof message === "string") return message;
  return message?.message ? `${message.message} (errorCode ${message.errorCode})` : text;
}

// ---------------------------------------------------------------------- events

/**
 * Listen until close().
 *
 * opened(): awaited whenever the stream begins, before anything is told: fetch the state here, and nothing is
 * missed. happened(event): one event. changed(connected): it is, or is not and will be tried again.
 */
export function listen(query, { opened, happened, changed = () => {} }) {
  const life = new AbortController();
  let wake = () => {};

  async function once() {
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    life.signal.addEventListener("abort", stop);
    let watchdog = setTimeout(stop, SILENCE);
    try {
      const headers = { Authorization: token() ?? "" };
      const answer = await fetch(withVersion(`/local/events?${query}`), { headers, signal: attempt.signal });
      if (!answer.ok) throw new Refusal(answer.status, told(await answer.text()));
      await opened();
      changed(true);
      for await (const { name, data } of events(answer.body)) {
        clearTimeout(watchdog);
        watchdog = setTimeout(stop, SILENCE);
        if (name === "lost") await opened();
        else if (name) happened(JSON.parse(data));
      }
    } finally {
      clearTimeout(watchdog);
      life.signal.removeEventListener("abort", stop);
      stop();
    }
  }

  async function run() {
    let pause = FIRST_PAUSE;
    while (!life.signal.aborted) {
      const began = Date.now();
      try {
        await once();
      } catch (error) {
        if (life.signal.aborted) return;
        if (error.status === 401) {
          refused(error.message);
          return;
        }
      }
      if (life.signal.aborted) return;
      if (Date.now() - began > LONGEST_PAUSE) pause = FIRST_PAUSE;
      changed(false);
      await new Promise((resolve) => {
        wake = resolve;
        // Spread, so that many pages do not come back at the same moment.
        setTimeout(resolve, pause * (0.75 + Math.random() / 2));
      });
      pause = Math.min(2 * pause, LONGEST_PAUSE);
    }
  }

  run();
  return {
    close() {
      life.abort();
      wake();
    },
    tryNow: () => wake(),
  };
}

/** The events of a text/event-stream, as the hub writes it; a comment is an event without a name. */
async function* events(body) {
  let text = "";
  for await (const chunk of chunks(body.pipeThrough(new TextDecoderStream()))) {
    const blocks = (text + chunk).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = new Map(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      yield { name: fields.get("event"), data: fields.get("data") };
    }
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}
