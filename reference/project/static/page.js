// The pages of single tasks, and the way there from an id.

import { follow } from "./task.js";

const task = document.querySelector("[data-follow]");
const form = document.getElementById("open-task");

if (form) {
  const input = form.querySelector("input");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const id = input.value.trim();
    document.getElementById("task-id-error").textContent = id ? "" : "Enter the id of a task.";
    if (id) {
      location.assign(`/task/${encodeURIComponent(id)}/`);
    } else {
      input.setAttribute("aria-invalid", "true");
      input.focus();
    }
  });
  form.querySelector("button").disabled = false;
}

if (task) {
  const { refuse, show, start } = await import("./view.js");
  start("Connecting…", "No worker has begun this task.");
  try {
    await follow(task.dataset.follow, show);
  } catch (error) {
    refuse(error.message);
    if (!error.fields) throw error;
  }
}
