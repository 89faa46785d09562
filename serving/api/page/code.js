// The card with the request as code: tabs by the keyboard's rules, and a button to copy.

import { byId, copy, show } from "./dom.js";
import { t } from "./i18n.js";
import { snippet } from "./snippets.js";

const tabs = () => [...document.querySelectorAll("[role=tab]")];
let current = "curl";
let of = null;

function draw() {
  for (const tab of tabs()) {
    const chosen = tab.dataset.language === current;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen) byId("snippet-panel").setAttribute("aria-labelledby", tab.id);
  }
  if (of) byId("snippet").textContent = snippet(current, of);
}

export function showCode(given) {
  of = given;
  show("code");
  draw();
}

export function startCode() {
  for (const tab of tabs()) {
    tab.addEventListener("click", () => {
      current = tab.dataset.language;
      draw();
    });
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const all = tabs();
      const next = all[(all.indexOf(tab) + move + all.length) % all.length];
      next.focus();
      next.click();
    });
  }
  byId("copy-code").addEventListener("click", () => copy(byId("snippet").textContent, byId("copy-code"), t("copied")));
}
