// The texts of the page in English and Chinese, and the person's choice of language.

import { byId, stored } from "./dom.js";
import { en } from "./texts.en.js";
import { zh } from "./texts.zh.js";

const TEXTS = { en, zh };
const LISTENERS = [];
let current = "en";

export function t(key, values = {}) {
  const text = TEXTS[current][key] ?? en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

export const has = (key) => key in en;

export const locale = () => (current === "zh" ? "zh-CN" : "en");

export const number = (value, digits = 0) =>
  new Intl.NumberFormat(locale(), { maximumFractionDigits: digits, minimumFractionDigits: 0 }).format(value);

export const when = (date) =>
  new Intl.DateTimeFormat(locale(), { dateStyle: "medium", timeStyle: "short" }).format(date);

export const onLanguage = (listener) => LISTENERS.push(listener);

function apply() {
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-i18n]")) node.textContent = t(node.dataset.i18n);
  for (const node of document.querySelectorAll("[data-i18n-label]")) {
    node.setAttribute("aria-label", t(node.dataset.i18nLabel));
  }
  for (const listener of LISTENERS) listener();
}

export function startLanguage() {
  const wanted = stored(localStorage, "captioner.language") ?? navigator.language.slice(0, 2);
  current = wanted in TEXTS ? wanted : "en";
  const select = byId("language");
  select.value = current;
  select.addEventListener("change", () => {
    current = select.value;
    stored(localStorage, "captioner.language", current);
    apply();
  });
  apply();
}
