// What the page tells: for screen readers, errors, and that something is awaited.

import { ApiError } from "./api.js";

const $ = (id) => document.getElementById(id);

let liveTimer = 0;

/** Tells a screen reader, once things are quiet. */
export function say(text, wait = 150) {
  clearTimeout(liveTimer);
  liveTimer = setTimeout(() => ($("live").textContent = text), wait);
}

/** Shows an error until it is dismissed or something succeeds; `retry` is offered where it is given. */
export function fail(error, retry = null) {
  if (error.name === "AbortError") return;
  const known = error instanceof ApiError || error.isPlain;
  $("error-text").textContent = known ? error.message : `The page has a fault: ${error.message}.`;
  $("error").hidden = false;
  $("retry").hidden = !retry;
  $("retry").onclick = () => {
    clearError();
    retry();
  };
}

/** Takes the error away. */
export function clearError() {
  $("error").hidden = true;
  $("error-text").textContent = "";
}

/** Returns an error whose message is a sentence for people. */
export const plainError = (message) => Object.assign(new Error(message), { isPlain: true });

const jobs = new Set(); // what is being waited for
let busyTimer = 0;

/** Shows that something is awaited, from 150 ms on; returns what ends it. `value`: how much is done, 0 to 1. */
export function busy() {
  const job = {};
  jobs.add(job);
  const bar = $("progress").firstElementChild;
  if (jobs.size === 1) {
    bar.removeAttribute("value");
    busyTimer = setTimeout(() => ($("progress").hidden = false), 150);
  }
  $("panes").setAttribute("aria-busy", "true");
  return {
    value: (part) => (part < 1 ? (bar.value = part) : bar.removeAttribute("value")),
    end: () => {
      jobs.delete(job);
      if (jobs.size) return;
      clearTimeout(busyTimer);
      $("progress").hidden = true;
      $("panes").removeAttribute("aria-busy");
    },
  };
}
