// Usage of all tenants or of one, as bars of this month's days.

import { bars } from "./charts.js";
import { byId, element, replace } from "./dom.js";
import { number, t } from "./i18n.js";
import { sum } from "./money.js";

const DAY_MS = 24 * 3600 * 1000;

export const thisMonth = () => {
  const until = new Date().toISOString().slice(0, 10);
  return { since: `${until.slice(0, 8)}01`, until };
};

const valueOf = (row, measure) => (measure === "tokens" ? row.input_tokens + row.output_tokens : Number(row[measure]));

export function total(rows, measure) {
  if (measure !== "amount") return number(rows.reduce((all, row) => all + valueOf(row, measure), 0), 1);
  const currencies = [...new Set(rows.map((row) => row.currency))];
  return currencies
    .map((currency) => `${sum(rows.filter((row) => row.currency === currency).map((row) => row.amount))} ${currency}`)
    .join(" + ") || "0";
}

// `rows`: of the report by day and tenant.
export function drawUsage(rows) {
  const [tenant, measure] = [byId("usage-tenant").value, byId("measure").value];
  const chosen = rows.filter((row) => !tenant || row.tenant === tenant);
  if (!chosen.length) {
    replace(byId("chart"), element("p", { class: "quiet" }, t("noUsage")));
    return;
  }
  const { since, until } = thisMonth();
  const points = [];
  for (let day = Date.parse(since); day <= Date.parse(until); day += DAY_MS) {
    const label = new Date(day).toISOString().slice(0, 10);
    const own = chosen.filter((row) => row.day === label);
    points.push({ label, value: own.reduce((all, row) => all + valueOf(row, measure), 0), text: total(own, measure) });
  }
  const name = byId("measure").selectedOptions[0].textContent;
  replace(byId("chart"), bars(points, t("chartLabel", { measure: name, since, until, total: total(chosen, measure) })));
}
