// Light, dark or the system's choice; canvases are drawn again after a change.

import { byId, stored } from "./dom.js";

const LISTENERS = [];

export const onTheme = (listener) => LISTENERS.push(listener);

export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function apply(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  for (const listener of LISTENERS) listener();
}

export function startTheme() {
  const select = byId("theme");
  const wanted = stored(localStorage, "captioner.theme");
  select.value = ["light", "dark"].includes(wanted) ? wanted : "auto";
  select.addEventListener("change", () => {
    stored(localStorage, "captioner.theme", select.value === "auto" ? null : select.value);
    apply(select.value);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => apply(select.value));
  apply(select.value);
}
