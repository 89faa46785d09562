// The clip on the page: pictures, cursor, play and position.

import { byId, show } from "./dom.js";
import { number, onLanguage, t } from "./i18n.js";
import { draw, forget } from "./scopes.js";
import { onTheme } from "./theme.js";
import { clock } from "./time.js";

let clip = null;
let ticking = 0;
let drawnWidth = 0;
const player = () => byId("player");

function labels() {
  byId("play").textContent = t(player().paused ? "play" : "pause");
  if (!clip) return;
  const top = clip.samples ? number(clip.rate / 2000, 1) : "";
  byId("spectrogram").setAttribute("aria-label", t("spectrogram", { top }));
  const facts = [`${number(clip.blob.size / 1000, 1)} kB`];
  if (clip.duration) facts.unshift(clock(clip.duration, 1));
  byId("clip-facts").textContent = facts.join(" · ");
}

function moved() {
  if (!clip) return;
  const duration = clip.duration || player().duration || 0;
  const time = Math.min(player().currentTime, duration || Infinity);
  const share = duration && Number.isFinite(duration) ? time / duration : 0;
  byId("cursor").style.left = `${100 * share}%`;
  byId("seek").value = time;
  const text = `${clock(time, 1)} / ${clock(Number.isFinite(duration) ? duration : 0, 1)}`;
  byId("seek").setAttribute("aria-valuetext", text);
  byId("time").textContent = text;
}

function follow() {
  moved();
  ticking = player().paused ? 0 : requestAnimationFrame(follow);
}

export function seek(time, { play = false } = {}) {
  player().currentTime = time;
  moved();
  if (play) player().play().catch(() => {});
}

export async function showClip(given) {
  clip?.release();
  forget();
  clip = given;
  show("viewer");
  byId("clip-name").textContent = clip.name;
  await clip.decode(player());
  if (clip !== given) return;
  show("scopes", Boolean(clip.samples));
  show("no-picture", !clip.samples);
  show("transport", !player().error);
  byId("seek").max = clip.duration || 1;
  labels();
  moved();
  await redraw();
}

export function startViewer() {
  const audio = player();
  byId("play").addEventListener("click", () => (audio.paused ? audio.play().catch(() => {}) : audio.pause()));
  for (const event of ["play", "pause", "ended"]) {
    audio.addEventListener(event, () => {
      labels();
      if (!ticking) follow();
    });
  }
  audio.addEventListener("seeked", moved);
  byId("seek").addEventListener("input", () => seek(Number(byId("seek").value)));
  byId("scopes").addEventListener("click", (event) => {
    const box = byId("scopes").getBoundingClientRect();
    if (clip?.duration) seek(((event.clientX - box.left) / box.width) * clip.duration);
  });
  let resizing = 0;
  new ResizeObserver(() => {
    clearTimeout(resizing);
    resizing = setTimeout(() => {
      if (clip?.samples && byId("waveform").clientWidth !== drawnWidth) redraw();
    }, 150);
  }).observe(byId("scopes"));
  onTheme(redraw);
  onLanguage(() => { labels(); moved(); });
}

async function redraw() {
  drawnWidth = byId("waveform").clientWidth;
  if (clip?.samples) await draw(clip);
}
