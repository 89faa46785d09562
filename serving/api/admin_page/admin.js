// The administrators' page: tenants, keys, usage and the last changes, over the verbs of the API.

import { AdminError, call, keepToken, part, token } from "./admin_api.js";
import { table } from "./charts.js";
import { confirmed } from "./confirm.js";
import { byId, copy, element, replace, show } from "./dom.js";
import { has, onLanguage, startLanguage, t, when } from "./i18n.js";
import { startTheme } from "./theme.js";
import { drawUsage, thisMonth, total } from "./usage.js";

const AUDIT_ROWS = 20;
const TAKES_AWAY = ["suspend", "revoke"];

let data = null; // {tenants, plans, usage, audit}
let opened = ""; // the tenant whose keys are shown
let keys = [];

function fail(error) {
  byId("error").textContent = error.message;
  if (error.status === 401) {
    keepToken("");
    signedOut();
    byId("token-error").textContent = error.message;
    byId("error").textContent = "";
  }
}

const state = (name) => element(
  "span", { class: ["active", "valid"].includes(name) ? "state" : "state off" }, has(`state.${name}`) ? t(`state.${name}`) : name,
);

function button(label, of, action) {
  const made = element("button", { type: "button", class: "small" }, label, element("span", { class: "hidden" }, ` ${of}`));
  made.addEventListener("click", () => action().catch(fail));
  return made;
}

const row = (...buttons) => element("div", { class: "row" }, ...buttons);
const time = (ms) => (ms === null ? "" : when(new Date(ms)));
const none = (text) => element("p", { class: "quiet" }, text);

// Ask, then change; afterwards everything is read again.
async function change(name, values, work) {
  if (!(await confirmed(t(`${name}Title`, values), t(`${name}Text`), t(name), { danger: TAKES_AWAY.includes(name) }))) return;
  const answer = await work();
  if (answer?.key) showSecret(answer);
  await load();
  byId("status").textContent = t("done", { what: `${t(name)} ${Object.values(values).join(" ")}` });
}

function drawTenants() {
  const rows = data.tenants.map((tenant) => {
    const used = data.usage.filter((entry) => entry.tenant === tenant.id);
    const active = tenant.state === "active";
    const path = `v1/tenants/${part(tenant.id)}`;
    return [
      tenant.id, tenant.name, tenant.plan, tenant.region, state(tenant.state),
      total(used, "requests"), total(used, "amount"),
      row(
        button(t("showKeys"), tenant.id, () => openKeys(tenant.id, { focus: true })),
        active
          ? button(t("suspend"), tenant.id, () => change("suspend", { tenant: tenant.id }, () => call("PATCH", path, { state: "suspended" })))
          : button(t("activate"), tenant.id, () => change("activate", { tenant: tenant.id }, () => call("PATCH", path, { state: "active" }))),
      ),
    ];
  });
  const heads = ["id", "name", "plan", "region", "state", "requests", "money", "actions"].map((name) => t(name));
  replace(byId("tenants"), rows.length ? table(heads, rows, [5, 6, 7]) : none(t("noTenants")));
}

function drawKeys() {
  show("keys-card", Boolean(opened));
  byId("keys-title").textContent = t("keysOf", { tenant: opened });
  const rows = keys.map((key) => {
    const valid = key.state === "valid";
    const path = `v1/keys/${part(key.id)}`;
    const rotate = () => change("rotate", { key: key.id }, () => call("POST", `${path}/rotate`, {}));
    const revoke = () => change("revoke", { key: key.id }, () => call("POST", `${path}/revoke`, {}));
    return [
      element("code", {}, `${key.prefix}…`), key.name, key.id, state(key.state), time(key.created_at),
      time(key.revoked_at ?? key.expires_at),
      row(
        ...(valid && !key.replaced_by ? [button(t("rotate"), key.id, rotate)] : []),
        ...(valid ? [button(t("revoke"), key.id, revoke)] : []),
      ),
    ];
  });
  const heads = ["key", "name", "id", "state", "made", "ends", "actions"].map((name) => t(name));
  replace(byId("keys"), rows.length ? table(heads, rows, [6]) : none(t("noKeys")));
}

async function openKeys(tenant, { focus = false } = {}) {
  keys = await call("GET", `v1/tenants/${part(tenant)}/keys`);
  opened = tenant;
  drawKeys();
  if (focus) byId("keys-card").focus();
}

function drawAudit() {
  const rows = data.audit.map((entry) => [time(entry.at), entry.actor, entry.action, entry.subject]);
  replace(byId("audit"), table(["at", "who", "change", "subject"].map((name) => t(name)), rows, []));
}

function options(id, values, first) {
  const select = byId(id);
  const before = select.value;
  const all = first === undefined ? [] : [element("option", { value: "" }, first)];
  replace(select, ...all, ...values.map((value) => element("option", { value }, value)));
  if (values.includes(before)) select.value = before;
}

function draw() {
  if (!data) return;
  options("usage-tenant", data.tenants.map((tenant) => tenant.id), t("allTenants"));
  options("plan", data.plans.map((plan) => plan.name));
  drawUsage(data.usage);
  drawTenants();
  drawAudit();
  drawKeys();
}

async function load() {
  const { since, until } = thisMonth();
  const [tenants, plans, usage, audit] = await Promise.all([
    call("GET", "v1/tenants"),
    call("GET", "v1/plans"),
    call("GET", `v1/usage?since=${since}&until=${until}&by=day,tenant`),
    call("GET", `v1/audit?limit=${AUDIT_ROWS}`),
  ]);
  data = { tenants, plans, usage, audit };
  byId("error").textContent = "";
  if (opened) await openKeys(opened);
  draw();
}

function showSecret({ key, id, tenant }) {
  byId("secret").textContent = key;
  byId("secret-of").textContent = `${tenant}, ${id}`;
  show("secret-card");
  byId("secret-card").focus();
}

function hideSecret() {
  byId("secret").textContent = "";
  show("secret-card", false);
}

function signedOut() {
  data = null;
  opened = "";
  hideSecret();
  show("content", false);
  show("forget", false);
  show("token-card");
}

async function signIn({ asked = false } = {}) {
  if (!token()) {
    signedOut();
    return;
  }
  try {
    await load();
    byId("token-error").textContent = "";
    show("token-card", false);
    show("content");
    show("forget");
    if (asked) byId("content").focus();
  } catch (error) {
    if (!(error instanceof AdminError)) throw error;
    fail(error);
  }
}

function startForms() {
  byId("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keepToken(byId("token").value.trim(), byId("actor").value.trim());
    byId("token").value = "";
    signIn({ asked: true });
  });
  byId("tenant-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const form = event.target;
    const values = Object.fromEntries([...new FormData(form)].filter(([, value]) => value));
    try {
      await call("POST", "v1/tenants", values);
      form.reset();
      await load();
      await openKeys(values.id, { focus: true });
    } catch (error) {
      fail(error);
    }
  });
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const made = await call("POST", `v1/tenants/${part(opened)}/keys`, Object.fromEntries(new FormData(event.target)));
      event.target.reset();
      await load();
      showSecret(made);
    } catch (error) {
      fail(error);
    }
  });
}

startTheme();
startForms();
byId("forget").addEventListener("click", () => {
  keepToken("");
  signedOut();
  byId("token").focus();
});
byId("refresh").addEventListener("click", () => load().catch(fail));
for (const id of ["usage-tenant", "measure"]) byId(id).addEventListener("change", () => drawUsage(data.usage));
byId("copy-secret").addEventListener("click", () => copy(byId("secret").textContent, byId("copy-secret"), t("copied")));
byId("hide-secret").addEventListener("click", hideSecret);
onLanguage(draw);
startLanguage();
signIn();
