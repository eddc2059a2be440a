// Sending a task and following it to its end, whatever the network does meanwhile.
//
// `poll` and `follow` call `show` with every status ({state, result?, error?}), or with {lost: true}
// while the server is out of reach. They return after the terminal state, and throw Refused where
// the server says that trying again is of no use.

import { TERMINAL, backOff, pause, watchTask } from "/celeriac/client.js";

const TRANSIENT = new Set([0, 408, 425, 429]); // and every 5xx; 0 is no answer at all
// Milliseconds:
const INTERVAL = 500; // between two polls
const PATIENCE = 10_000; // with a server that says nothing

/** What the server refused: a message for the reader, and one for each field that is wrong. */
export class Refused extends Error {
  constructor(message, fields = {}) {
    super(message);
    this.fields = fields;
  }
}

/** Post the form; the new task's id. Never repeated by itself: a lost answer may be an accepted task. */
export async function send(data) {
  const { status, body } = await ask("/users/form/", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(data),
  });
  if (body?.task_id) return body.task_id;
  throw refusal(status, body);
}

/** Ask for the state again and again. */
export async function poll(id, show) {
  const url = `/users/task_status/?task_id=${encodeURIComponent(id)}`;
  for (let failures = 0; ; ) {
    const { status, body } = await ask(url);
    if (body?.state) {
      failures = 0;
      show(body);
      if (TERMINAL.has(body.state)) return;
      await pause(INTERVAL);
    } else if (status >= 500 || status === 200 || TRANSIENT.has(status)) {
      show({ lost: true });
      await backOff(failures++);
    } else {
      throw refusal(status, body);
    }
  }
}

/** Be told of every state; see /celeriac/client.js. */
export async function follow(id, show) {
  try {
    await watchTask(id, { base: "/", onEvent: show, onLost: () => show({ lost: true }) });
  } catch (error) {
    throw new Refused(error.message);
  }
}

/** Status 0 where there was no answer; body null where it was no JSON. */
async function ask(url, options) {
  try {
    const response = await fetch(url, { ...options, signal: AbortSignal.timeout(PATIENCE) });
    return { status: response.status, body: await response.json().catch(() => null) };
  } catch {
    return { status: 0, body: null };
  }
}

function refusal(status, body) {
  const detail = body?.detail;
  if (Array.isArray(detail)) {
    const fields = {};
    for (const { loc, msg } of detail) {
      const name = loc.slice(1).join(".");
      fields[name] = fields[name] ? `${fields[name]} ${sentence(msg)}` : sentence(msg);
    }
    return new Refused("Not sent: see the marked fields.", fields);
  }
  if (detail) return new Refused(sentence(String(detail)));
  if (status === 0) return new Refused("The server does not answer. Please try again.");
  return new Refused(`The server answered with an error (${status}).`);
}

function sentence(text) {
  const end = /[.!?…]$/.test(text) ? "" : ".";
  return text.charAt(0).toUpperCase() + text.slice(1) + end;
}
