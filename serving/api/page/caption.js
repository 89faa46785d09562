// One caption: the streamed request, its text as it comes, and its figures.

import { events, request } from "./api.js";
import { price } from "./account.js";
import { byId, element, replace, show } from "./dom.js";
import { number, onLanguage, t } from "./i18n.js";
import { listPrice } from "./money.js";
import { addSegments, clearSegments, segmentText, segmentsOf } from "./timeline.js";

let running = null;
let last = null; // result and clip, to be shown again in another language

export const stopCaption = () => running?.abort();

const body = (model, data, timeline) => JSON.stringify({
  model,
  stream: true,
  stream_options: { include_usage: true },
  ...(timeline ? { timeline: true } : {}),
  messages: [{ role: "user", content: [{ type: "input_audio", input_audio: { data: `data:;base64,${data}` } }] }],
});

function state(text) {
  byId("state").textContent = text;
}

function showFacts() {
  const { result, clip } = last;
  const facts = [];
  const add = (name, value, note) => facts.push(element(
    "div", {}, element("dt", {}, t(name)),
    element("dd", {}, value, ...(note ? [element("small", { class: "quiet" }, ` ${t(note)}`)] : [])),
  ));
  const seconds = (value) => t("seconds", { value: number(value, 2) });
  if (clip.duration) add("factLength", seconds(clip.duration));
  if (result.first !== null) add("factFirst", seconds(result.first));
  if (result.total !== null) add("factTotal", seconds(result.total));
  if (result.total !== null && clip.duration) add("factSpeed", number(result.total / clip.duration, 2), "factSpeedNote");
  if (result.usage) add("factTokens", `${number(result.usage.prompt_tokens)} + ${number(result.usage.completion_tokens)}`);
  if (result.price) add("factPrice", result.price, "factPriceNote");
  if (result.requestId) add("factRequest", element("code", {}, result.requestId));
  replace(byId("facts"), ...facts);
}

export function showError(error) {
  const parts = [element("p", {}, element("strong", {}, error.message))];
  if (error.hint) parts.push(element("p", {}, error.hint));
  if (error.requestId) parts.push(element("p", {}, element("small", {}, t("requestId", { id: error.requestId }))));
  replace(byId("request-error"), ...parts);
}

function clear() {
  byId("text").textContent = "";
  byId("done").textContent = "";
  replace(byId("request-error"));
  replace(byId("facts"));
  clearSegments();
  show("copy-text", false);
  show("result");
}

async function receive(response, result, started) {
  const text = byId("text");
  for await (const event of events(response)) {
    const choice = event.choices?.[0];
    const delta = choice?.delta?.content;
    if (delta) {
      result.first ??= (performance.now() - started) / 1000;
      if (!result.text) state(t("streaming"));
      result.text += delta;
      text.append(delta);
    }
    addSegments(segmentsOf(event));
    result.finish = choice?.finish_reason ?? result.finish;
    result.loop ||= event.captioner?.stopped === "loop";
    result.usage = event.usage ?? result.usage;
  }
}

// Caption the clip; return what the history keeps, or nothing if there is no text.
export async function caption(clip, { model, timeline }) {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  const result = { text: "", first: null, total: null, usage: null, finish: null, price: "", requestId: "", loop: false };
  clear();
  show("caption", false);
  show("stop");
  byId("stop").focus();
  state(t("sending"));
  const sent = body(model, await clip.base64(), timeline);
  const started = performance.now();
  try {
    const response = await request("v1/chat/completions", { body: sent, signal, accept: "text/event-stream" });
    result.requestId = response.headers.get("x-request-id") ?? "";
    state(t("waiting"));
    await receive(response, result, started);
    result.total = (performance.now() - started) / 1000;
    const notes = [t("doneIn", { time: number(result.total, result.total < 1 ? 2 : 1) })];
    if (result.loop) notes.push(t("loop"));
    else if (result.finish === "length") notes.push(t("cut"));
    state(notes.join(" "));
  } catch (error) {
    if (error.name === "AbortError") {
      state(t("stopped"));
    } else {
      state("");
      showError(error);
    }
  }
  if (result.usage && price()) {
    const amount = listPrice(price(), result.usage.prompt_tokens, result.usage.completion_tokens);
    result.price = `${amount} ${price().currency}`;
  }
  const written = segmentText() || result.text;
  last = { result, clip };
  showFacts();
  show("stop", false);
  show("caption");
  show("copy-text", Boolean(written));
  byId("done").textContent = result.total === null ? "" : result.text;
  byId(written ? "result" : "caption").focus();
  return written ? { ...result, text: written } : null;
}

export function startCaption() {
  onLanguage(() => {
    if (last && byId("stop").hidden) {
      showFacts();
      state("");
    }
  });
}
