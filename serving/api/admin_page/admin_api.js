// The administration's API: the token of this tab, and its verbs.

import { stored } from "./dom.js";
import { t } from "./i18n.js";

const [TOKEN, ACTOR] = ["captioner.admin-token", "captioner.admin-actor"];

export const token = () => stored(sessionStorage, TOKEN) ?? "";

export function keepToken(value, actor = "") {
  stored(sessionStorage, TOKEN, value || null);
  stored(sessionStorage, ACTOR, actor || null);
}

export class AdminError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export async function call(method, path, body) {
  const headers = { authorization: `Bearer ${token()}`, "x-actor": stored(sessionStorage, ACTOR) ?? "" };
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method, headers, body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store", credentials: "omit", redirect: "error",
    });
  } catch {
    throw new AdminError(t("offline"));
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) throw new AdminError(answer?.error?.message ?? `HTTP ${response.status}`, response.status);
  return answer;
}

export const part = encodeURIComponent;
