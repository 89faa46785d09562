// The official OpenAI client for Node: the same calls and outcomes as drivers/calls.py.
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import OpenAI from "openai";

// Seconds of the machine's monotonic clock, which is Python's `time.monotonic()` too.
const now = () => Number(process.hrtime.bigint()) / 1e9;

async function perform(call, outcome) {
  const client = new OpenAI({
    baseURL: `${call.origin}/compatible-mode/v1`,
    apiKey: call.api_key,
    maxRetries: call.retries,
    timeout: call.timeout_s * 1000,
  });
  if (call.action === "models") {
    for await (const model of client.models.list()) outcome.models.push(model.id);
  } else if (call.action === "model") {
    outcome.models.push((await client.models.retrieve(call.model)).id);
  } else if (call.action === "nowhere") {
    await client.embeddings.create({ model: call.model, input: "x" });
  } else {
    await caption(client, call, outcome);
  }
}

async function caption(client, call, outcome) {
  const data = call.inline_file ? `data:;base64,${readFileSync(call.inline_file, "base64")}` : call.audio;
  const body = {
    model: call.model,
    messages: [{ role: "user", content: [{ type: "input_audio", input_audio: { data } }] }],
    ...(call.stream ? { stream: true, stream_options: { include_usage: true } } : {}),
    ...call.parameters,
  };
  const add = (text, finishReason) => {
    outcome.pieces.push({ text: text ?? "", finish_reason: finishReason ?? null, at_s: now() });
  };
  const sent = client.chat.completions.create(body, { headers: call.headers });
  if (!call.stream) {
    const completion = await sent;
    outcome.request_id = completion._request_id;
    outcome.usage = completion.usage;
    add(completion.choices[0].message.content, completion.choices[0].finish_reason);
    return;
  }
  const { data: stream, response } = await sent.withResponse();
  outcome.request_id = response.headers.get("x-request-id");
  for await (const chunk of stream) {
    if (chunk.choices.length > 0) add(chunk.choices[0].delta.content, chunk.choices[0].finish_reason);
    if (chunk.usage) outcome.usage = chunk.usage;
    if (call.leave_after !== null && outcome.pieces.length >= call.leave_after) break;
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const outcome = { pieces: [], usage: null, request_id: null, status: null, code: null, message: null, error: null };
  outcome.models = [];
  const began = now();
  try {
    await perform(JSON.parse(line), outcome);
  } catch (error) {
    outcome.error = error.constructor.name;
    outcome.status = error.status ?? null;
    outcome.code = error.code ?? null;
    outcome.request_id = error.requestID ?? error.request_id ?? null;
    outcome.message = error.message;
  }
  outcome.elapsed_s = now() - began;
  process.stdout.write(JSON.stringify(outcome) + "\n");
}
