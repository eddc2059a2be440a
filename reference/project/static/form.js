// A form that sends a task; `data-track` says how the task is followed.

import { follow, poll, send } from "./task.js";
import { refuse, show, start } from "./view.js";

const form = document.getElementById("subscribe");
const button = form.querySelector("button");
const link = document.getElementById("task-link");
const track = { poll, follow }[form.dataset.track];

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const focused = document.activeElement;
  button.disabled = true;
  mark({});
  link.parentElement.hidden = true;
  start("Sending…");
  try {
    const id = await send(Object.fromEntries(new FormData(form)));
    link.textContent = id;
    link.href = `/task/${encodeURIComponent(id)}/`;
    link.parentElement.hidden = false;
    start("Processing…");
    await track(id, show);
  } catch (error) {
    const rest = error.fields ? mark(error.fields) : [];
    refuse([error.message, ...rest].join(" "));
    if (!error.fields) throw error; // a fault of ours: into the console with it
  } finally {
    button.disabled = false;
    // A disabled button loses the focus; a reader who has gone elsewhere stays there.
    if (focused === button && document.activeElement === document.body) button.focus();
  }
});
button.disabled = false; // until now, Enter would have reloaded the page

/** Put each text at its field, the first of them in focus; the texts of unknown fields. */
function mark(fields) {
  const rest = { ...fields };
  let first;
  for (const input of form.querySelectorAll("input")) {
    const text = rest[input.name] ?? "";
    delete rest[input.name];
    document.getElementById(`${input.id}-error`).textContent = text;
    if (text) {
      input.setAttribute("aria-invalid", "true");
      first ??= input;
    } else {
      input.removeAttribute("aria-invalid");
    }
  }
  first?.focus();
  return Object.entries(rest).map(([name, text]) => (name ? `${name}: ${text}` : text));
}
