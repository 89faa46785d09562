// The same with the Node client: node tutorial.mjs BASE_URL KEY
import fs from "node:fs";
import OpenAI from "openai";

const openai = new OpenAI({ baseURL: process.argv[2], apiKey: process.argv[3] });

const file = await openai.files.create({ file: fs.createReadStream("batchinput.jsonl"), purpose: "batch" });
let batch = await openai.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/chat/completions",
  completion_window: "24h",
  metadata: { description: "nightly eval job" },
});
while (!["completed", "failed", "expired", "cancelled"].includes((batch = await openai.batches.retrieve(batch.id)).status)) {
  await new Promise((resolve) => setTimeout(resolve, 200));
}
const text = await (await openai.files.content(batch.output_file_id)).text();
const listed = [];
for await (const each of await openai.batches.list({ limit: 10 })) listed.push(each.id);
const files = [];
for await (const each of await openai.files.list()) files.push(each.purpose);
const del = openai.files.delete ?? openai.files.del;
const deleted = (await del.call(openai.files, file.id)).deleted;
const lines = text.trim().split("\n").map((line) => JSON.parse(line));
console.log(JSON.stringify({ batch, lines, listed, files, deleted }));
