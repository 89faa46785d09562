// The tenant's own usage and limits, as meters, a chart of this month's days and a table of keys.

import { json, request } from "./api.js";
import { bars, meter, table } from "./charts.js";
import { byId, element, replace, save, show } from "./dom.js";
import { number, onLanguage, t } from "./i18n.js";
import { sum } from "./money.js";

const DAY_MS = 24 * 3600 * 1000;

let usage = null;
let limits = null;

export const price = () => limits?.price ?? null;

const isMoney = (unit) => /^[A-Z]{3}$/.test(unit);
const amount = (value, unit) => (isMoney(unit) ? `${value} ${unit}` : number(value, 1));

function drawLimits() {
  const rows = limits.data.map((row) => {
    const name = t(`limit.${row.limit}`);
    const shown = row.scope === "key" ? t("ofKey", { limit: name }) : name;
    const note = t("left", { remaining: amount(row.remaining, row.unit), max: amount(row.max, row.unit) });
    return meter(shown, note, Number(row.max) ? Number(row.remaining) / Number(row.max) : 0);
  });
  const none = element("p", { class: "quiet" }, t(limits.metered ? "noLimits" : "notMetered"));
  replace(byId("limit-bars"), ...(rows.length ? rows : [none]));
}

const valueOf = (row, measure) =>
  measure === "tokens" ? row.input_tokens + row.output_tokens : Number(row[measure]);

function text(rows, measure) {
  if (measure !== "amount") return number(rows.reduce((total, row) => total + valueOf(row, measure), 0), 1);
  const currencies = [...new Set(rows.map((row) => row.currency))];
  return currencies
    .map((currency) => `${sum(rows.filter((row) => row.currency === currency).map((row) => row.amount))} ${currency}`)
    .join(" + ") || "0";
}

function drawUsage() {
  const measure = byId("measure").value;
  const { data, since, until } = usage;
  if (!data.length) {
    replace(byId("chart"), element("p", { class: "quiet" }, t("noUsage")));
    replace(byId("usage-table"));
    return;
  }
  const points = [];
  for (let day = Date.parse(since); day <= Date.parse(until); day += DAY_MS) {
    const label = new Date(day).toISOString().slice(0, 10);
    const rows = data.filter((row) => row.day === label);
    const value = rows.reduce((total, row) => total + valueOf(row, measure), 0);
    points.push({ label, value, text: text(rows, measure) });
  }
  const name = byId("measure").selectedOptions[0].textContent;
  replace(byId("chart"), bars(points, t("chartLabel", { measure: name, since, until, total: text(data, measure) })));
  const keys = [...new Set(data.map((row) => row.key))];
  const rows = keys.map((key) => {
    const own = data.filter((row) => row.key === key);
    return [own[0].key_name || key, number(own.reduce((total, row) => total + row.requests, 0)), text(own, measure)];
  });
  replace(byId("usage-table"), table([t("key"), t("requests"), name], rows));
}

function redraw() {
  if (limits) drawLimits();
  if (usage) drawUsage();
}

export async function loadAccount() {
  try {
    limits = await json("v1/limits");
    usage = await json("v1/usage");
    byId("account-error").textContent = "";
    show("account");
    redraw();
  } catch (error) {
    // A service that has no such paths shows no account.
    show("account", error.status !== 404);
    byId("account-error").textContent = `${error.message} ${error.hint ?? ""}`;
  }
}

export function forgetAccount() {
  usage = null;
  limits = null;
  show("account", false);
}

async function saveCsv() {
  try {
    const { since, until } = usage;
    const answer = await request(`v1/usage?format=csv&since=${since}&until=${until}`, { accept: "text/csv" });
    save(await answer.text(), `usage-${since}-${until}.csv`, "text/csv");
  } catch (error) {
    byId("account-error").textContent = `${error.message} ${error.hint ?? ""}`;
  }
}

export function startAccount() {
  byId("measure").addEventListener("change", drawUsage);
  byId("refresh").addEventListener("click", loadAccount);
  byId("usage-csv").addEventListener("click", saveCsv);
  onLanguage(redraw);
}
