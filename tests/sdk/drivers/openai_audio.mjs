// The official OpenAI client for Node: transcriptions and translations, as drivers/openai_audio.py.
import { createReadStream } from "node:fs";
import { createInterface } from "node:readline";
import OpenAI from "openai";

const now = () => Number(process.hrtime.bigint()) / 1e9;

async function perform(call, outcome) {
  const client = new OpenAI({
    baseURL: `${call.origin}/v1`,
    apiKey: call.api_key,
    maxRetries: call.retries,
    timeout: call.timeout_s * 1000,
  });
  const add = (text) => outcome.pieces.push({ text, finish_reason: null, at_s: now() });
  const answer = await client.audio[call.action].create(
    {
      file: createReadStream(call.inline_file),
      model: call.model,
      ...(call.stream ? { stream: true } : {}),
      ...call.parameters,
    },
    { headers: call.headers },
  );
  if (call.stream) {
    for await (const event of answer) {
      if (event.type === "transcript.text.delta") {
        add(event.delta);
      } else {
        outcome.usage = event.usage;
        outcome.models = [event.text];
      }
    }
  } else if (typeof answer === "string") {
    add(answer);
  } else {
    outcome.request_id = answer._request_id;
    outcome.usage = answer.usage;
    add(answer.text);
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
