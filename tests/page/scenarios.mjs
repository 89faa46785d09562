// What people do on the page, and what the page then shows.

import { readFileSync } from "node:fs";
import assert from "node:assert/strict";

async function open({ page, url, key }, { withKey = true } = {}) {
  await page.goto(url);
  await page.locator("#key-card").waitFor();
  if (!withKey) return;
  await page.locator("#key").fill(key);
  await page.locator("#key-form button").click();
  await page.locator("#account").waitFor();
  await page.locator("#key-card").waitFor({ state: "hidden" });
}

async function drop(page, path, { name = "tone.wav", type = "audio/wav" } = {}) {
  const data = readFileSync(path).toString("base64");
  const transfer = await page.evaluateHandle(([text, file, mime]) => {
    const made = new DataTransfer();
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    made.items.add(new File([bytes], file, { type: mime }));
    return made;
  }, [data, name, type]);
  await page.dispatchEvent("#drop", "dragenter", { dataTransfer: transfer });
  await page.dispatchEvent("#drop", "drop", { dataTransfer: transfer });
}

const drawn = (page) => page.locator("#scopes[data-drawn]").waitFor();
const text = (page, selector) => page.locator(selector).textContent();

async function captioned(page) {
  await page.locator("#caption").click();
  await page.locator("#facts div").first().waitFor();
  await page.locator("#stop").waitFor({ state: "hidden" });
}

// Shares of the pictures' pixels that differ from their background.
const inked = (page) => page.evaluate(() => ["waveform", "spectrogram"].map((id) => {
  const canvas = document.getElementById(id);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let marked = 0;
  for (let i = 0; i < data.length; i += 4) {
    const empty = id === "waveform" ? data[i + 3] === 0 : data[i] + data[i + 1] + data[i + 2] < 120;
    marked += empty ? 0 : 1;
  }
  return marked / (data.length / 4);
}));

async function whole(given) {
  const { page, clip, shot, accessible, fits } = given;
  await open(given);
  await drop(page, clip);
  await drawn(page);
  await captioned(page);
  await accessible();
  await fits();
  await shot("all");
}

export const SCENARIOS = {
  drop: {
    async steps(given) {
      const { page, clip, key, shot, accessible } = given;
      await open(given);
      await shot("start");
      await accessible();
      await drop(page, clip);
      await drawn(page);
      const pictures = await inked(page);
      await page.evaluate(() => {
        window.seen = [];
        new MutationObserver(() => window.seen.push(document.getElementById("text").textContent))
          .observe(document.getElementById("text"), { childList: true });
      });
      await captioned(page);
      await page.waitForFunction(() => !/ 0 in all/.test(document.querySelector(".chart")?.getAttribute("aria-label") ?? " 0 in all"));
      await accessible();
      await shot("captioned");
      const seen = await page.evaluate(() => window.seen);
      const facts = await page.locator("#facts dd").allTextContents();
      const storage = await page.evaluate(() => [JSON.stringify({ ...localStorage }), JSON.stringify({ ...sessionStorage })]);
      assert(!storage[0].includes(key), "the key is in localStorage");
      assert(storage[1].includes(key), "the key is not in sessionStorage");
      assert(!(await page.content()).includes(key), "the key is in the document");
      return {
        pictures, pieces: seen.length, text: await text(page, "#text"), facts, done: await text(page, "#done"),
        focused: await page.evaluate(() => document.activeElement.id), history: await page.locator("#history .text").allTextContents(),
        times: await page.locator("#timeline-choice").isVisible(),
        limits: await page.locator(".limit").allTextContents(), bars: await page.locator(".chart .day").count(),
        chart: await page.locator(".chart").getAttribute("aria-label"), snippet: await text(page, "#snippet"),
      };
    },
  },

  choose_and_play: {
    async steps(given) {
      const { page, clip } = given;
      await open(given);
      const chooser = page.waitForEvent("filechooser");
      await page.locator("#choose").click();
      await (await chooser).setFiles(clip);
      await drawn(page);
      const seek = page.locator("#seek");
      await seek.focus();
      await page.keyboard.press("End");
      const end = await text(page, "#time");
      const box = await page.locator("#waveform").boundingBox();
      await page.mouse.click(box.x + box.width / 2, box.y + 10);
      const middle = await page.locator("#player").evaluate((audio) => audio.currentTime);
      await page.locator("#play").click();
      await page.waitForFunction((from) => document.getElementById("player").currentTime > from + 0.2, middle);
      const playing = await text(page, "#play");
      await page.locator("#play").click();
      return { end, middle, playing, cursor: await page.locator("#cursor").evaluate((node) => parseFloat(node.style.left)) };
    },
  },

  record: {
    async steps(given) {
      const { page, shot } = given;
      await given.context.grantPermissions(["microphone"]);
      await open(given);
      await page.locator("#record").click();
      await page.locator("#recording").waitFor();
      await page.waitForFunction(() => parseFloat(document.getElementById("level").style.width) > 0);
      await page.waitForTimeout(1500);
      await shot("recording");
      const label = await text(page, "#record");
      await page.locator("#record").click();
      await drawn(page);
      const [wave] = await inked(page);
      await captioned(page);
      return { label, wave, name: await text(page, "#clip-name"), text: await text(page, "#text"), snippet: await text(page, "#snippet") };
    },
  },

  no_microphone: {
    async steps(given) {
      await given.page.addInitScript(() => {
        navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("Permission denied", "NotAllowedError"));
      });
      await open(given);
      await given.page.locator("#record").click();
      return text(given.page, "#clip-error");
    },
  },

  errors: {
    async steps(given) {
      const { page, clip, shot, accessible } = given;
      await page.goto(given.url);
      await page.locator("#key-card").waitFor();
      const first = await text(page, "#key-error");
      await page.locator("#key").fill("sk-\u2026");
      await page.locator("#key-form button").click();
      const pasted = await text(page, "#key-error");
      await page.locator("#key").fill("sk-wrong");
      await page.locator("#key-form button").click();
      await page.waitForFunction(() => /^Incorrect/.test(document.getElementById("key-error").textContent));
      const wrong = await text(page, "#key-error");
      await accessible();
      await open(given);
      await drop(page, clip, { name: "notes.wav" });
      await page.locator("#caption:not([disabled])").waitFor();
      await drop(page, new URL(import.meta.url), { name: "notes.txt", type: "text/plain" });
      await page.locator("#no-picture").waitFor();
      await page.locator("#caption").click();
      await page.locator("#request-error p").first().waitFor();
      await accessible();
      await shot("unreadable");
      const unreadable = await page.locator("#request-error p").allTextContents();
      await page.route("**/v1/chat/completions", (route) => route.abort());
      await page.locator("#caption").click();
      await page.waitForFunction(() => /reached/.test(document.getElementById("request-error").textContent));
      const away = await page.locator("#request-error p").allTextContents();
      await page.unroute("**/v1/chat/completions");
      await page.route("**/v1/chat/completions", (route) => route.fulfill({
        status: 429, contentType: "application/json", headers: { "retry-after": "17", "x-request-id": "r-1" },
        body: JSON.stringify({ error: { message: "Requests rate limit exceeded, please try again later.", code: "limit_requests" } }),
      }));
      await page.locator("#caption").click();
      await page.waitForFunction(() => /17 s/.test(document.getElementById("request-error").textContent));
      const limited = await page.locator("#request-error p").allTextContents();
      await page.unroute("**/v1/chat/completions");
      await page.route("**/v1/chat/completions", (route) => route.fulfill({
        status: 200, contentType: "text/event-stream",
        body: 'data: {"choices":[{"delta":{"content":"A dog"}}]}\n\ndata: {"error":{"message":"inference internal error.","code":"internal_error"}}\n\n',
      }));
      await page.locator("#caption").click();
      await page.waitForFunction(() => /inference/.test(document.getElementById("request-error").textContent));
      const broken = [await text(page, "#text"), ...(await page.locator("#request-error p").allTextContents())];
      await page.evaluate(() => { window.big = new File([new Uint8Array(9e6)], "big.wav"); });
      const transfer = await page.evaluateHandle(() => { const made = new DataTransfer(); made.items.add(window.big); return made; });
      await page.dispatchEvent("#drop", "drop", { dataTransfer: transfer });
      return { first, pasted, wrong, unreadable, away, limited, broken, large: await text(page, "#clip-error") };
    },
  },

  stop: {
    async steps(given) {
      const { page, clip } = given;
      await open(given);
      await drop(page, clip);
      await drawn(page);
      await page.locator("#caption").click();
      await page.waitForFunction(() => document.getElementById("text").textContent.length > 5);
      await page.locator("#stop").click();
      await page.locator("#stop").waitFor({ state: "hidden" });
      return { state: await text(page, "#state"), text: await text(page, "#text") };
    },
  },

  history: {
    async steps(given) {
      const { page, clip } = given;
      await open(given);
      await drop(page, clip);
      await captioned(page);
      await page.locator("#history .text").waitFor();
      const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      const backgrounds = [await background()];
      await page.locator("#theme").selectOption("dark");
      backgrounds.push(await background());
      await page.reload();
      backgrounds.push(await background());
      await page.locator("#history .text").waitFor();
      const kept = await page.locator("#history .text").count();
      const stays = await page.locator("#key-card").isHidden();
      await page.locator("#clear-history").click();
      const left = await page.evaluate(() => localStorage.getItem("captioner.history"));
      await page.locator("#forget-key").click();
      await page.locator("#key-card").waitFor();
      return {
        backgrounds, kept, stays, left,
        focused: await page.evaluate(() => document.activeElement.id), session: await page.evaluate(() => sessionStorage.length),
      };
    },
  },

  keyboard: {
    async steps(given) {
      const { page, clip } = given;
      await open(given);
      await drop(page, clip);
      await drawn(page);
      await page.locator("#caption").focus();
      await page.keyboard.press("Enter");
      await page.locator("#facts div").first().waitFor();
      await page.locator(".chart").waitFor();
      await page.locator("#tab-curl").focus();
      const curl = await text(page, "#snippet");
      await page.keyboard.press("ArrowRight");
      const python = await text(page, "#snippet");
      await page.keyboard.press("ArrowRight");
      const node = await text(page, "#snippet");
      await page.locator("#measure").focus();
      await page.locator("#measure").selectOption("amount");
      const chart = await page.locator(".chart").getAttribute("aria-label");
      const download = page.waitForEvent("download");
      await page.locator("#usage-csv").click();
      const csv = [(await download).suggestedFilename(), readFileSync(await (await download).path(), "utf8").split("\r\n")[0]];
      await page.locator("#tab-node").focus();
      await page.keyboard.press("Tab");
      const order = [];
      for (let i = 0; i < 3; i += 1) {
        order.push(await page.evaluate(() => document.activeElement.id || document.activeElement.tagName));
        await page.keyboard.press("Tab");
      }
      return { curl, python, node, order, chart, csv };
    },
  },

  timeline: {
    async steps(given) {
      const { page, clip, shot, accessible } = given;
      let sent = null;
      await page.route("**/v1/chat/completions", (route) => {
        sent = route.request().postDataJSON();
        const event = (value) => `data: ${JSON.stringify(value)}\n\n`;
        const segments = [{ start: 0, end: 1.5, caption: "A tone." }, { start: 1.5, end: 3, caption: "The tone goes on." }];
        route.fulfill({
          status: 200, contentType: "text/event-stream",
          body: event({ choices: [{ delta: { content: "A tone.", timeline: { segments: [segments[0]] } } }] })
            + event({ choices: [{ delta: { content: "" } }], timeline: { segments: [segments[1]] } })
            + event({ choices: [{ delta: {}, finish_reason: "stop" }] }) + "data: [DONE]\n\n",
        });
      });
      await open(given);
      await drop(page, clip);
      await drawn(page);
      await page.getByLabel("With times").check();
      await captioned(page);
      await accessible();
      await shot("segments");
      await page.locator("#segments button").nth(1).click();
      await page.waitForFunction(() => document.getElementById("player").currentTime >= 1.5);
      return { asked: sent.timeline, text: await page.locator("#text").isVisible(), segments: await page.locator("#segments li").allTextContents(), snippet: await text(page, "#snippet") };
    },
  },

  long: {
    async steps(given) {
      const { page } = given;
      await open(given);
      // 40 minutes: the longest stall of the page while it draws them, in ms.
      const stall = await page.evaluate(async () => {
        const { draw } = await import("/page/scopes.js");
        document.getElementById("viewer").hidden = false;
        const samples = new Float32Array(2400 * 8000).map((_, i) => Math.sin(i / 9) * Math.sin(i / 90_000));
        let [last, most] = [performance.now(), 0];
        const timer = setInterval(() => {
          most = Math.max(most, performance.now() - last);
          last = performance.now();
        }, 5);
        await draw({ samples, duration: 2400, rate: 8000 });
        clearInterval(timer);
        return most;
      });
      return { stall };
    },
  },

  phone: { options: { viewport: { width: 320, height: 640 }, isMobile: true, hasTouch: true }, steps: whole },
  dark: { options: { colorScheme: "dark" }, steps: whole },
  phone_dark_chinese: {
    options: { viewport: { width: 360, height: 740 }, deviceScaleFactor: 2, isMobile: true, colorScheme: "dark", locale: "zh-CN" },
    steps: whole,
  },

  chinese: {
    options: { locale: "zh-CN" },
    async steps(given) {
      await whole(given);
      const { page } = given;
      const heads = await page.locator("h2").allTextContents();
      const lang = await page.evaluate(() => document.documentElement.lang);
      await page.locator("#language").selectOption("en");
      const english = await page.locator("h2").allTextContents();
      return { heads, lang, english, caption: await page.locator("#text").getAttribute("lang") };
    },
  },
};
