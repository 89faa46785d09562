// Captions with times: a list of segments, each of which plays from its start.

import { byId, element, replace, show } from "./dom.js";
import { t } from "./i18n.js";
import { clock } from "./time.js";
import { seek } from "./viewer.js";

let shown = [];

export const segmentsOf = (answer) => {
  const found = answer.timeline?.segments ?? answer.choices?.[0]?.delta?.timeline?.segments;
  return Array.isArray(found) ? found : [];
};

export function clearSegments() {
  shown = [];
  replace(byId("segments"));
  show("segments", false);
  show("text");
}

export function addSegments(segments) {
  for (const segment of segments) {
    if (shown.some((other) => other.start === segment.start && other.end === segment.end)) continue;
    shown.push(segment);
    const times = `${clock(segment.start, 1)} – ${clock(segment.end, 1)}`;
    const button = element("button", { type: "button", class: "small" }, element("span", { class: "hidden" }, `${t("play")} `), times);
    button.addEventListener("click", () => seek(segment.start, { play: true }));
    byId("segments").append(element("li", {}, button, element("span", { lang: "en" }, segment.caption)));
  }
  show("segments", shown.length > 0);
  show("text", !shown.length); // the segments have the same words
}

export const segmentText = () =>
  shown.map((segment) => `${clock(segment.start, 1)} – ${clock(segment.end, 1)}  ${segment.caption}`).join("\n");
