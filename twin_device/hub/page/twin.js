/* One device's twin: desired and reported side by side. */

import { announce, arrange, clock, find, folded, make, visible, write } from "./dom.js";
import { compared, own } from "./json.js";

const MARKS = {
  same: ["=", "same"],
  differs: ["≠", "differs"],
  unreported: ["○", "not reported"],
  unasked: ["·", "reported only"],
  group: ["", ""],
};
const SHORT = 100; // characters that a cell shows of a value
const DIFFERING = new Set(["differs", "unreported"]);

// By path: {element, cells, texts}. Rows are kept, so that what is unfolded stays so.
let rows = new Map();
let former = null;

/** Show another twin, or none yet. */
export function reset() {
  rows = new Map();
  former = null;
  arrange(find("rows"), []);
}

export function show(twin) {
  const { desired, reported } = twin.properties;
  const found = compared(desired, reported);
  const before = rows;
  rows = new Map();
  for (const row of found) {
    const key = JSON.stringify(row.path);
    const kept = before.get(key) ?? blank(row.path);
    fill(kept, row, former !== null);
    rows.set(key, kept);
  }
  filter();
  write(find("desired-version"), about(desired));
  write(find("reported-version"), about(reported));
  write(find("twin-summary"), summary(found));
  write(find("tags"), visible(JSON.stringify(twin.tags, null, 2)));
  tell(twin, found);
}

const about = (section) =>
  `version ${section.$version}, ${clock(Date.parse(section.$metadata.$lastUpdated))}`;

function summary(found) {
  const asked = found.filter((row) => row.desired !== undefined && row.state !== "group");
  const differing = asked.filter((row) => DIFFERING.has(row.state)).length;
  if (found.length === 0) return "Nothing is desired or reported.";
  if (asked.length === 0) return "Nothing is desired.";
  if (differing === 0) return "All that is desired is reported.";
  return `${differing} of ${asked.length} desired values ${differing === 1 ? "differs" : "differ"}.`;
}

function blank(path) {
  const parents = path
    .slice(0, -1)
    .map((name) => `${name}.`)
    .join("");
  const key = make(
    "th",
    { role: "rowheader", scope: "row" },
    make("span", { class: "unseen" }, visible(parents)),
    folded(path.at(-1), SHORT),
  );
  // Deeper than this, the indentation would leave no room on a phone.
  key.classList.add(`depth-${Math.min(path.length - 1, 6)}`);
  const cells = [make("td", { role: "cell" }), make("td", { role: "cell" })];
  const mark = make("td", { role: "cell", class: "mark" });
  const element = make("tr", { role: "row" }, key, ...cells, mark);
  return { element, key, cells, mark, texts: [], state: "" };
}

function fill(kept, row, live) {
  const group = row.state === "group";
  [row.desired, row.reported].forEach((value, index) => {
    const note = index === 1 ? row.note : "";
    const text = group || value === undefined ? "" : JSON.stringify(value);
    const whole = group ? "group" : text + note;
    if (kept.texts[index] === whole) return;
    const fresh = live && !group;
    kept.texts[index] = whole;
    const nodes = text || group ? [] : [make("span", { class: "faint" }, "–")];
    if (text) nodes.push(folded(text, SHORT));
    if (note) nodes.push(make("span", { class: "note" }, visible(note)));
    kept.cells[index].replaceChildren(...nodes);
    kept.cells[index].classList.remove("fresh");
    if (fresh) requestAnimationFrame(() => kept.cells[index].classList.add("fresh"));
  });
  if (kept.state !== row.state) {
    const [sign, word] = MARKS[row.state];
    kept.mark.replaceChildren(make("span", { "aria-hidden": "true" }, sign), make("span", {}, word));
    kept.element.className = row.state;
    kept.key.colSpan = group ? 4 : 1;
    kept.state = row.state;
  }
}

function filter() {
  let shown = [...rows.entries()];
  if (find("only-differing").checked) {
    const wanted = new Set();
    for (const [key, row] of shown) {
      // With those that they are members of.
      const path = DIFFERING.has(row.state) ? JSON.parse(key) : [];
      path.forEach((_, index) => wanted.add(JSON.stringify(path.slice(0, index + 1))));
    }
    shown = shown.filter(([key]) => wanted.has(key));
  }
  arrange(
    find("rows"),
    shown.map(([, row]) => row.element),
  );
}

/** Say in words what is another than before. */
function tell(twin, found) {
  const now = new Map();
  for (const row of found) {
    for (const side of ["desired", "reported"]) {
      if (row[side] !== undefined && row.state !== "group") {
        now.set(`${side} ${row.path.join(".")}`, JSON.stringify(row[side]));
      }
    }
  }
  now.set("tags", JSON.stringify(own(twin.tags)));
  if (former !== null) {
    for (const [name, text] of now) {
      if (former.get(name) !== text) announce(`${name} is ${text}`);
    }
    for (const name of former.keys()) {
      if (!now.has(name)) announce(`${name} is gone`);
    }
  }
  former = now;
}

find("only-differing").addEventListener("change", filter);
