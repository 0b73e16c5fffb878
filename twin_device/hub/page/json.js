/* JSON as people write it, and two documents compared. No page in here. */

/** Not the JSON that is wanted. offset, line, column: where; the latter two count from 1. */
export class NotJson extends Error {
  constructor(what, text, offset) {
    const before = text.slice(0, offset).split("\n");
    super(`Line ${before.length}, column ${before.at(-1).length + 1}: ${what}.`);
    this.offset = offset;
  }
}

const SPACE = /[ \t\n\r]*/y;
const STRING = /"(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/y;
const SCALAR = /true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y;
const DEEPEST = 100;

/**
 * Throw NotJson if a text is not one JSON object. JSON.parse is no help: its messages differ from browser to
 * browser, and of a name that stands twice it forgets one.
 */
export function check(text) {
  let at = 0;

  const fail = (what, offset = at) => {
    throw new NotJson(what, text, offset);
  };
  const take = (pattern) => {
    pattern.lastIndex = at;
    const found = pattern.exec(text);
    if (found) at = pattern.lastIndex;
    return found?.[0];
  };
  const next = () => {
    take(SPACE);
    return text[at];
  };
  const skip = (sign) => {
    if (next() !== sign) return false;
    at += 1;
    return true;
  };

  function object(depth) {
    const names = new Set();
    at += 1;
    if (skip("}")) return;
    do {
      next();
      const start = at;
      const name = take(STRING);
      if (name === undefined) fail("a name in double quotes is expected here");
      const plain = JSON.parse(name);
      if (names.has(plain)) fail(`the name ${name} is here for the second time`, start);
      names.add(plain);
      if (!skip(":")) fail("a colon is expected here");
      value(depth + 1);
    } while (skip(","));
    if (!skip("}")) fail("a comma or } is expected here");
  }

  function array(depth) {
    at += 1;
    if (skip("]")) return;
    do {
      value(depth + 1);
    } while (skip(","));
    if (!skip("]")) fail("a comma or ] is expected here");
  }

  function value(depth) {
    if (depth > DEEPEST) fail("it nests too deeply");
    const sign = next();
    if (sign === "{") object(depth);
    else if (sign === "[") array(depth);
    else if (take(STRING) === undefined && take(SCALAR) === undefined) fail("a value is expected here");
  }

  if (next() !== "{") fail("an object is expected here, in { and }");
  object(0);
  if (next() !== undefined) fail("nothing is expected behind the object");
}

// ---------------------------------------------------------------------- comparing

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
// Not value[name]: a device may report a "constructor" or a "__proto__".
export const member = (value, name) =>
  isObject(value) && Object.hasOwn(value, name) ? value[name] : undefined;
// Those that begin with a "$" are the hub's own.
const names = (value) => (isObject(value) ? Object.keys(value).filter((name) => name[0] !== "$") : []);
const nests = (value) => isObject(value) && Object.keys(value).length > 0;

export function same(one, other) {
  if (Array.isArray(one) && Array.isArray(other)) {
    return one.length === other.length && one.every((item, index) => same(item, other[index]));
  }
  if (isObject(one) && isObject(other)) {
    const keys = Object.keys(one);
    return (
      keys.length === Object.keys(other).length &&
      keys.every((key) => Object.hasOwn(other, key) && same(one[key], other[key]))
    );
  }
  return one === other;
}

/** A document without the hub's own members. */
export function own(document) {
  return Object.fromEntries(names(document).map((name) => [name, document[name]]));
}

/**
 * What a device reports for one desired value: {"value": ..., "ac": ...} (IoT Plug and Play) or with "status"
 * (the tutorials) answers it, and only its value is to be compared.
 */
function answered(reported, desired) {
  const answers = member(reported, "value") !== undefined && ("ac" in reported || "status" in reported);
  if (!answers || desired === undefined || member(desired, "value") !== undefined) {
    return { value: reported, note: "" };
  }
  const rest = Object.entries(reported).filter(([name]) => name !== "value");
  const note = rest.map(([name, value]) => `${name} ${JSON.stringify(value)}`).join(", ");
  return { value: reported.value, note };
}

/**
 * The rows of two documents side by side: {path, desired, reported, note, state}. state: "same", "differs",
 * "unreported" (only desired), "unasked" (only reported), "group" (its members follow).
 */
export function compared(desired, reported, path = []) {
  const rows = [];
  for (const name of new Set([...names(desired), ...names(reported)])) {
    const wanted = member(desired, name);
    const { value: told, note } = answered(member(reported, name), wanted);
    const here = [...path, name];
    const row = { path: here, desired: wanted, reported: told, note, state: "same" };
    rows.push(row);
    const open = (value) => value === undefined || nests(value);
    if (!note && open(wanted) && open(told)) {
      row.state = "group";
      rows.push(...compared(wanted, told, here));
    } else if (told === undefined) {
      row.state = "unreported";
    } else if (wanted === undefined) {
      row.state = "unasked";
    } else if (!same(wanted, told)) {
      row.state = "differs";
    }
  }
  return rows;
}
