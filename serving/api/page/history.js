// Captions made before: texts in this browser's storage, never audio.

import { byId, copy, element, replace, show, stored } from "./dom.js";
import { number, onLanguage, t, when } from "./i18n.js";

const KEY = "captioner.history";
const MOST = 50;

function read() {
  try {
    const found = JSON.parse(stored(localStorage, KEY) ?? "[]");
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

function write(entries) {
  stored(localStorage, KEY, entries.length ? JSON.stringify(entries.slice(0, MOST)) : null);
  draw();
}

export const remember = (entry) => write([entry, ...read()]);

function item(entry, index) {
  const remove = element("button", { type: "button", class: "small" }, t("remove"));
  remove.addEventListener("click", () => {
    write(read().filter((_, other) => other !== index));
    byId("history-title").focus();
  });
  const again = element("button", { type: "button", class: "small" }, t("copy"));
  again.addEventListener("click", () => copy(entry.text, again, t("copied")));
  const facts = [when(new Date(entry.at))];
  if (entry.duration) facts.push(t("seconds", { value: number(entry.duration, 1) }));
  if (entry.price) facts.push(entry.price);
  return element(
    "li", {},
    element("p", { class: "file" }, element("strong", {}, entry.name), " ", element("span", { class: "quiet" }, facts.join(" · "))),
    element("p", { lang: "en", class: "text" }, entry.text),
    element("div", { class: "row" }, again, remove),
  );
}

function draw() {
  const entries = read();
  const none = element("li", { class: "quiet" }, t("noHistory"));
  replace(byId("history"), ...(entries.length ? entries.map(item) : [none]));
  show("clear-history", entries.length > 0);
}

export function startHistory() {
  byId("clear-history").addEventListener("click", () => {
    write([]);
    byId("history-title").focus();
  });
  onLanguage(draw);
}
