// The public API: the key of this tab, requests, errors and streams.

import { stored } from "./dom.js";
import { has, t } from "./i18n.js";

const KEY = "captioner.key";

export const key = () => stored(sessionStorage, KEY) ?? "";
export const keepKey = (value) => stored(sessionStorage, KEY, value || null);

// Relative to the page, so that a path prefix of a proxy stays.
export const address = (path) => new URL(path, document.baseURI).href;

export class ApiError extends Error {
  constructor(message, { code = "", status = 0, requestId = "", retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { code, status, requestId, retryAfter });
  }

  // What to do, in the person's language.
  get hint() {
    const wait = this.retryAfter || 10;
    const found = [this.code, String(this.status)].find((name) => name && has(`hint.${name}`));
    if (found) return t(`hint.${found}`, { wait });
    if (this.status === 0) return t("hint.network");
    return this.status === 429 || this.status === 503 ? t("hint.limit_requests", { wait }) : t("hint.500");
  }
}

async function failure(response) {
  const details = {
    status: response.status,
    requestId: response.headers.get("x-request-id") ?? "",
    retryAfter: Number(response.headers.get("retry-after")) || 0,
  };
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { ...details, code: error.code ?? error.type });
  } catch {
    return new ApiError(`HTTP ${response.status}`, details);
  }
}

export async function request(path, { body, signal, accept = "application/json" } = {}) {
  const headers = { accept };
  if (key()) headers.authorization = `Bearer ${key()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), {
      method: body === undefined ? "GET" : "POST",
      headers, body, signal, cache: "no-store", credentials: "omit", redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(t("offline"), { code: "network" });
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export const json = async (path) => (await request(path)).json();

// Yield the objects of an event stream. Raises `ApiError` for an error event and for a stream that breaks off.
export async function* events(response) {
  const requestId = response.headers.get("x-request-id") ?? "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      buffer += value;
      const lines = buffer.split("\n");
      buffer = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) {
          const { message, code, type } = event.error;
          throw new ApiError(message, { code: code ?? type, status: 500, requestId });
        }
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError(t("brokenStream"), { code: "network", requestId });
  }
  throw new ApiError(t("brokenStream"), { code: "network", requestId });
}
