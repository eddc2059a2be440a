// The status section of a page. Whatever comes from a task or the server is text, never markup.

const TONES = { SUCCESS: "good", FAILURE: "bad", REVOKED: "stopped" };

const region = document.getElementById("status");
const state = document.getElementById("state");
const message = document.getElementById("message");
const result = document.getElementById("result");
const history = document.getElementById("history"); // not on every page
let waiting = ""; // the text for a task that has not begun
let first = null; // when the first state came: milliseconds of the clock that never goes back

/** Forget the last task. `text` is for now, `pending` for while no worker has begun. */
export function start(text, pending = text) {
  waiting = pending;
  first = null;
  history?.replaceChildren();
  setState("");
  setResult(undefined);
  say(text, "busy");
}

/** A status, or {lost: true}; see task.js. */
export function show(status) {
  if (status.lost) {
    say("Connection lost, trying again…", "lost");
    return;
  }
  if (status.state === undefined) return; // an event of the task's own
  if (status.state !== state.dataset.state) addToHistory(status.state);
  setState(status.state);
  setResult(typeof status.result === "string" ? undefined : status.result);
  say(describe(status), TONES[status.state] ?? "busy");
}

/** The end of it, for a reason that is not the task's own. */
export function refuse(text) {
  say(text, "bad");
}

function describe({ state, result, error }) {
  const more = (text, detail) => (detail ? `${text}: ${detail}` : text);
  if (state === "SUCCESS") return more("Done", typeof result === "string" ? result : "");
  if (state === "FAILURE") return more("Failed", error);
  if (state === "REVOKED") return more("Stopped", error);
  if (state === "RETRY") return more("Failed, will be tried again", error);
  return state === "PENDING" ? waiting : "Processing…";
}

function say(text, tone) {
  region.dataset.tone = tone;
  // The same text set again would be read out again.
  if (message.textContent !== text) message.textContent = text;
}

function setState(name) {
  if (state.dataset.state === name) return;
  state.dataset.state = name;
  state.textContent = name;
}

function setResult(value) {
  result.hidden = value === undefined;
  result.textContent = value === undefined ? "" : JSON.stringify(value, null, 2);
}

function addToHistory(name) {
  if (!history) return;
  const [item, label, time] = ["li", "span", "time"].map((tag) => document.createElement(tag));
  const now = new Date();
  label.textContent = name;
  time.dateTime = now.toISOString();
  time.textContent = now.toLocaleTimeString([], { hour12: false });
  if (first === null) first = performance.now();
  else time.textContent += ` +${((performance.now() - first) / 1000).toFixed(1)} s`;
  item.dataset.state = name;
  item.append(label, time);
  history.append(item);
}
