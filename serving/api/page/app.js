// The page: key, clip, caption, code, account and history, wired together.

import { forgetAccount, loadAccount, startAccount } from "./account.js";
import { json, keepKey, key } from "./api.js";
import { caption, startCaption, stopCaption } from "./caption.js";
import { Clip } from "./clip.js";
import { showCode, startCode } from "./code.js";
import { byId, copy, show } from "./dom.js";
import { remember, startHistory } from "./history.js";
import { startLanguage, t } from "./i18n.js";
import { recording, startRecorder, startRecording, stopRecording } from "./recorder.js";
import { startTheme } from "./theme.js";
import { segmentText } from "./timeline.js";
import { showClip, startViewer } from "./viewer.js";

const LEDGER_MS = 1500; // until the ledger's table has a caption that has ended

let model = null;
let clip = null;

const ready = () => { byId("caption").disabled = !(model && clip); };
const request = () => ({ model: model.id, name: clip.name, timeline: byId("timeline").checked });

// Ask for the models: it shows whether a key is needed, and whether this one is valid.
async function connect({ asked = false } = {}) {
  try {
    const { data } = await json("v1/models");
    [model] = data;
    byId("model").textContent = model.id;
    // The service's own words, which say so if no captioner answers but a stand-in.
    byId("model-note").textContent = model.description ?? "";
    show("model-note", Boolean(model.description));
    byId("key-error").textContent = "";
    show("key-card", false);
    show("forget-key", Boolean(key()));
    if (asked) byId("clip").focus();
    await loadAccount();
  } catch (error) {
    model = null;
    show("key-card");
    show("forget-key", Boolean(key()));
    byId("key-error").textContent = asked || key() || error.status !== 401 ? `${error.message} ${error.hint ?? ""}` : "";
    if (asked) byId("key").focus();
  }
  ready();
}

async function use(blob, name) {
  byId("clip-error").textContent = "";
  try {
    clip = Clip.of(blob, name);
  } catch (error) {
    byId("clip-error").textContent = error.message;
    return;
  }
  ready();
  if (model) showCode(request());
  await showClip(clip);
}

async function run() {
  if (!model || !clip) return;
  showCode(request());
  const captioned = clip;
  const result = await caption(captioned, request());
  if (!result) return;
  remember({
    at: Date.now(), name: captioned.name, duration: captioned.duration, text: result.text, price: result.price,
    usage: result.usage, first: result.first, total: result.total,
  });
  setTimeout(loadAccount, LEDGER_MS);
}

async function toggleRecording() {
  byId("clip-error").textContent = "";
  if (recording()) {
    stopRecording();
    return;
  }
  try {
    await startRecording(use);
  } catch (error) {
    byId("clip-error").textContent = error.message;
  }
}

function startDrop() {
  const area = byId("clip");
  // A file that misses the card would replace the page.
  for (const event of ["dragover", "drop"]) document.addEventListener(event, (dropped) => dropped.preventDefault());
  for (const event of ["dragenter", "dragover"]) area.addEventListener(event, () => area.classList.add("over"));
  for (const event of ["dragleave", "drop"]) area.addEventListener(event, () => area.classList.remove("over"));
  area.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) use(file, file.name);
  });
  byId("choose").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    const [file] = byId("file").files;
    if (file) use(file, file.name);
    byId("file").value = "";
  });
}

function startKey() {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = byId("key").value.trim();
    byId("key").value = "";
    // No header can carry other characters; they come from pasted text around the key.
    if (!/^[\x21-\x7e]+$/.test(given)) {
      byId("key-error").textContent = t("hint.invalid_api_key");
      return;
    }
    keepKey(given);
    connect({ asked: true });
  });
  byId("forget-key").addEventListener("click", () => {
    keepKey("");
    model = null;
    forgetAccount();
    connect();
    show("key-card");
    byId("key").focus();
  });
}

startTheme();
startViewer();
startRecorder();
startHistory();
startAccount();
startCode();
startCaption();
startDrop();
startKey();
byId("record").addEventListener("click", toggleRecording);
byId("caption").addEventListener("click", run);
byId("stop").addEventListener("click", stopCaption);
byId("timeline").addEventListener("change", () => { if (model && clip) showCode(request()); });
byId("copy-text").addEventListener("click", () => {
  copy(segmentText() || byId("text").textContent, byId("copy-text"), t("copied"));
});
startLanguage();
connect();
