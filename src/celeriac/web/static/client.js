// Follows a task to its end, whatever the network does meanwhile: over a WebSocket, where there is
// none over server-sent events, and where those do not come through either by asking.
//
//   import { watchTask } from "/celeriac/client.js";
//   const end = await watchTask(id, { onEvent: (event) => … });
//
// Types and the meaning of every option are in client.d.ts.

export const TERMINAL = new Set(["SUCCESS", "FAILURE", "REVOKED"]);
// Milliseconds:
const FIRST_WAIT = 250; // after a lost connection; doubled each time, to LONGEST_WAIT
const LONGEST_WAIT = 5000;
const PATIENCE = 10_000; // with a server that says nothing
const LONG_POLL = 20; // seconds
const TRIES = 2; // of a way that never came about, before the next one

export class UnknownTask extends Error {
  constructor(id) {
    super(`Nothing is known of task ${id}.`);
    this.name = "UnknownTask";
  }
}

export class Refused extends Error {
  constructor(message) {
    super(message);
    this.name = "Refused";
  }
}

export async function watchTask(id, options = {}) {
  const { onEvent = () => {}, onLost = () => {}, signal, transports } = options;
  signal?.throwIfAborted();
  const watch = {
    id,
    base: new URL(options.base ?? "", document.baseURI),
    token: options.token,
    last: options.after ?? null,
    waiting: undefined, // the last reason for it that was told
    end: null,
    came: false, // anything at all, over this connection
    works: false, // this way, though the server has nothing to say
    signal,
  };
  watch.take = (event) => {
    if (event.id !== undefined && event.id !== null) {
      const seen = watch.last !== null && event.id <= watch.last && event.recovered !== false;
      const why = event.id === watch.last && event.waiting && event.waiting !== watch.waiting;
      if (seen && !why) {
        if (TERMINAL.has(event.state)) watch.end ??= event;
        return;
      }
      watch.last = event.id;
      watch.waiting = event.waiting;
    }
    onEvent(event);
    if (TERMINAL.has(event.state)) watch.end = event;
  };
  const ways = (transports ?? ["websocket", "sse", "poll"]).map((name) => WAYS[name]);
  let failures = 0;
  let useless = 0;
  while (true) {
    watch.came = watch.works = false;
    await ways[0](watch);
    if (watch.end) return watch.end;
    signal?.throwIfAborted();
    if (watch.came) failures = 0;
    if (watch.came || watch.works) {
      useless = 0;
    } else if (++useless >= TRIES && ways.length > 1) {
      ways.shift();
      useless = 0;
    }
    onLost();
    await backOff(failures++, signal);
  }
}

const WAYS = { websocket, sse, poll };

/** Resolves when the socket has closed; throws where trying again is of no use. */
function websocket(watch) {
  const url = address(watch, `ws/task_status/${encodeURIComponent(watch.id)}`);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(url);
  return new Promise((resolve, reject) => {
    const end = (settle, value) => {
      clearTimeout(timer);
      removeEventListener("offline", lost);
      watch.signal?.removeEventListener("abort", lost);
      socket.onmessage = socket.onclose = null;
      socket.close();
      settle(value);
    };
    // A socket whose network is gone stays open for minutes; the browser knows sooner.
    const lost = () => end(resolve);
    addEventListener("offline", lost);
    watch.signal?.addEventListener("abort", lost);
    // The first frame is due at once, unless it has been seen already.
    const timer = setTimeout(() => {
      if (watch.last === null || socket.readyState !== WebSocket.OPEN) lost();
      else watch.came = true;
    }, PATIENCE);
    socket.onmessage = ({ data }) => {
      clearTimeout(timer);
      watch.came = true;
      watch.take(JSON.parse(data));
      if (watch.end) end(resolve);
    };
    socket.onclose = ({ code, reason }) => {
      if (code === 4404) end(reject, new UnknownTask(watch.id));
      else if (code === 1008) end(reject, new Refused(reason || "The server refuses to tell."));
      else {
        watch.works = code === 1013; // and says: try again later
        end(resolve, code === 1000 && !watch.end ? ask(watch) : null); // an end that it has seen
      }
    };
  });
}

function sse(watch) {
  const url = address(watch, `tasks/${encodeURIComponent(watch.id)}/events`);
  const source = new EventSource(url, { withCredentials: !watch.token });
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      removeEventListener("offline", end);
      watch.signal?.removeEventListener("abort", end);
      // By an answer that is no stream: its code, such as that of an unknown task, is not told here.
      const refused = !watch.end && source.readyState === EventSource.CLOSED;
      source.close();
      resolve(refused ? ask(watch) : null);
    };
    addEventListener("offline", end);
    watch.signal?.addEventListener("abort", end);
    const timer = setTimeout(() => {
      if (watch.last === null || source.readyState !== EventSource.OPEN) end();
      else watch.came = true;
    }, PATIENCE);
    source.onmessage = ({ data }) => {
      clearTimeout(timer);
      watch.came = true;
      watch.take(JSON.parse(data));
      if (watch.end) end();
    };
    source.onerror = end; // the next one is ours to open, with our own pauses
  });
}

/** Question after question; each is answered when there is something new. */
async function poll(watch) {
  for (let tag = null; ; ) {
    const answer = await ask(watch, tag);
    if (!answer) return;
    watch.came = true;
    if (watch.end) return;
    tag = answer.tag;
    await pause(FIRST_WAIT, watch.signal);
  }
}

/** The state now or, with the tag of one, the next. Null where there is no answer. */
async function ask(watch, tag = null) {
  const url = address(watch, `tasks/${encodeURIComponent(watch.id)}`);
  url.searchParams.delete("after");
  const headers = {};
  if (tag !== null) {
    url.searchParams.set("wait", LONG_POLL);
    headers["If-None-Match"] = tag;
  }
  let response, event;
  try {
    const patience = AbortSignal.timeout(LONG_POLL * 1000 + PATIENCE);
    const signal = watch.signal ? AbortSignal.any([watch.signal, patience]) : patience;
    response = await fetch(url, { headers, signal, cache: "no-store" });
    if (response.ok) event = await response.json();
  } catch {
    return null;
  }
  const { status } = response;
  if (status === 404) throw new UnknownTask(watch.id);
  if (status >= 400 && status < 500 && ![408, 425, 429].includes(status))
    throw new Refused(`The server answered with an error (${status}).`);
  if (event) {
    // What was between the two states is not asked for.
    if (watch.last !== null && event.id > watch.last + 1) event.recovered = false;
    watch.take(event);
  }
  return event || status === 304 ? { tag: response.headers.get("ETag") ?? tag } : null;
}

function address(watch, path) {
  const base = watch.base.href.endsWith("/") ? watch.base : new URL("./", watch.base);
  const url = new URL(path, base);
  if (watch.token) url.searchParams.set("token", watch.token);
  if (watch.last !== null) url.searchParams.set("after", watch.last);
  return url;
}

/** Shortened by chance, so that the readers of a restarted server do not come back in step. */
export function backOff(failures, signal) {
  const longest = Math.min(FIRST_WAIT * 2 ** failures, LONGEST_WAIT);
  return pause(longest * (0.75 + Math.random() / 4), signal);
}

/** Over at once when the browser is online again. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      removeEventListener("online", end);
      signal?.removeEventListener("abort", end);
      if (signal?.aborted) reject(signal.reason);
      else resolve();
    };
    const timer = setTimeout(end, milliseconds);
    addEventListener("online", end);
    signal?.addEventListener("abort", end);
  });
}

/** `<task-status task-id="…">`: the state, a progress bar, the result or the error, as text. */
export class TaskStatusElement extends HTMLElement {
  static observedAttributes = ["task-id", "base", "token"];
  #watch = null;

  constructor() {
    super();
    const root = this.attachShadow({ mode: "open" });
    this.bar = document.createElement("progress");
    this.bar.part = "progress";
    this.text = document.createElement("span");
    this.text.part = "text";
    this.text.setAttribute("role", "status");
    root.append(this.bar, " ", this.text);
  }

  connectedCallback() {
    this.#start();
  }

  disconnectedCallback() {
    this.#watch?.abort();
    this.#watch = null;
  }

  attributeChangedCallback() {
    if (this.isConnected) this.#start();
  }

  async #start() {
    this.#watch?.abort();
    const id = this.getAttribute("task-id");
    if (!id) return;
    const watch = (this.#watch = new AbortController());
    this.bar.hidden = false;
    this.bar.removeAttribute("value");
    try {
      await watchTask(id, {
        base: this.getAttribute("base") ?? "",
        token: this.getAttribute("token") ?? undefined,
        signal: watch.signal,
        onEvent: (event) => this.#show(event),
        onLost: () => this.#say("Connection lost, trying again…"),
      });
    } catch (error) {
      if (watch.signal.aborted) return;
      this.bar.hidden = true;
      this.#say(error.message);
    }
  }

  #show(event) {
    this.dispatchEvent(new CustomEvent("task-event", { detail: event, bubbles: true }));
    if (event.state === undefined) return;
    this.dataset.state = event.state;
    if (event.state === "PROGRESS" && event.result?.total) {
      this.bar.max = event.result.total;
      this.bar.value = event.result.current;
    }
    this.bar.hidden = TERMINAL.has(event.state);
    this.#say(describe(event));
  }

  #say(text) {
    if (this.text.textContent !== text) this.text.textContent = text;
  }
}

function describe({ state, result, error, waiting }) {
  switch (state) {
    case "PENDING":
      return waiting ?? "Waiting…";
    case "PROGRESS":
      return result?.message ?? "Running…";
    case "RETRY":
      return error ? `Failed, will be tried again: ${error}` : "Failed, will be tried again";
    case "SUCCESS":
      return typeof result === "string" ? `Done: ${result}` : "Done";
    case "FAILURE":
      return error ? `Failed: ${error}` : "Failed";
    case "REVOKED":
      return "Stopped";
    default:
      return "Running…";
  }
}

if (!customElements.get("task-status")) customElements.define("task-status", TaskStatusElement);
