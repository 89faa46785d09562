// The request of this page as lines to copy. The key is a variable, never the person's own.

import { address } from "./api.js";

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const quoted = (text) => JSON.stringify(text);

// Names of recordings have blanks and colons; lines that people copy name a plain file.
export const fileName = (name) => (/^[\w.\-+ ()]+\.\w+$/u.test(name) ? name : "clip.webm");

export function snippet(language, { model, name, timeline }) {
  const file = fileName(name);
  const base = address("v1");
  return { curl, python, node }[language]({ base, file, model, timeline });
}

function curl({ base, file, model, timeline }) {
  const head = `{"model":${quoted(model)},"stream":true,"stream_options":{"include_usage":true},`
    + `${timeline ? '"timeline":true,' : ""}"messages":[{"role":"user","content":[{"type":"input_audio","input_audio":{"data":"data:;base64,`;
  return [
    `(printf %s ${shell(head)}`,
    ` base64 < ${shell(file)} | tr -d '\\n'`,
    ` printf %s ${shell('"}}]}]}')}) |`,
    `curl -sSN ${shell(`${base}/chat/completions`)} -H 'Content-Type: application/json' \\`,
    `  -H "Authorization: Bearer $CAPTIONER_KEY" -d @-`,
  ].join("\n");
}

function python({ base, file, model, timeline }) {
  const more = timeline ? ', extra_body={"timeline": True}' : "";
  return `import base64, os
from pathlib import Path

from openai import OpenAI

clip = base64.b64encode(Path(${quoted(file)}).read_bytes()).decode()
client = OpenAI(base_url=${quoted(base)}, api_key=os.environ["CAPTIONER_KEY"])
audio = {"type": "input_audio", "input_audio": {"data": f"data:;base64,{clip}"}}
stream = client.chat.completions.create(
    model=${quoted(model)}, messages=[{"role": "user", "content": [audio]}],
    stream=True, stream_options={"include_usage": True}${more},
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)`;
}

function node({ base, file, model, timeline }) {
  const more = timeline ? " timeline: true," : "";
  return `import { readFileSync } from "node:fs";
import OpenAI from "openai";

const clip = readFileSync(${quoted(file)}).toString("base64");
const client = new OpenAI({ baseURL: ${quoted(base)}, apiKey: process.env.CAPTIONER_KEY });
const audio = { type: "input_audio", input_audio: { data: \`data:;base64,\${clip}\` } };
const stream = await client.chat.completions.create({
  model: ${quoted(model)}, messages: [{ role: "user", content: [audio] }],
  stream: true, stream_options: { include_usage: true },${more}
});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");`;
}
