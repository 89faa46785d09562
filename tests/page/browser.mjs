// Runs scenarios of the page in real Chromium: reads a job as JSON from each line, writes the result.
//
//     node browser.mjs MODULES CHROMIUM
//
// A result is `{"problems": […], "value": …}`: problems are what the page may never do, in any scenario.

import { mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { SCENARIOS as ADMINISTRATION } from "./admin_scenarios.mjs";
import { SCENARIOS as PAGE } from "./scenarios.mjs";

const [, , modules, executablePath] = process.argv;
const require = createRequire(`${modules}/`);
const { chromium } = require("playwright-core");
const axe = require("node:fs").readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox", "--disable-background-networking", "--disable-gpu", "--autoplay-policy=no-user-gesture-required",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
  ],
});

const DESKTOP = { viewport: { width: 1280, height: 900 } };

async function run({ scenario, url, admin, token, key, clip, out }) {
  const { options = {}, steps } = { ...PAGE, ...ADMINISTRATION }[scenario];
  const problems = [];
  const context = await browser.newContext({ ...DESKTOP, locale: "en-GB", colorScheme: "light", ...options });
  await context.exposeBinding("violated", (_, text) => { problems.push(`CSP: ${text}`); });
  await context.addInitScript(() => {
    document.addEventListener("securitypolicyviolation", (event) => {
      window.violated(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}`);
    });
  });
  const page = await context.newPage();
  page.setDefaultTimeout(20_000);
  page.on("pageerror", (error) => problems.push(`error: ${error}`));
  page.on("console", (message) => {
    const refused = /Failed to load resource: (the server responded with a status of|net::ERR_FAILED)/.test(message.text());
    if (["error", "warning"].includes(message.type()) && !refused) problems.push(`console: ${message.text()}`);
  });
  page.on("request", (request) => {
    if (![url, admin].some((own) => request.url().startsWith(own)) && !request.url().startsWith("blob:")) problems.push(`request: ${request.url()}`);
  });
  const shot = async (name) => {
    if (!out) return;
    mkdirSync(out, { recursive: true });
    await page.screenshot({ path: `${out}/${scenario}-${name}.png`, fullPage: true });
  };
  const accessible = async () => {
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
    for (const { id, help, nodes } of violations) {
      problems.push(`axe ${id}: ${help}: ${nodes.map((node) => `${node.target} ${node.failureSummary}`).join(" | ")}`);
    }
  };
  // Nothing is wider than the window.
  const fits = async () => {
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    if (wide > 0) problems.push(`overflow: ${wide} px`);
  };
  try {
    const value = await steps({ page, context, url, admin, token, key, clip, shot, accessible, fits });
    return { problems, value: value ?? null };
  } catch (error) {
    await shot("failed").catch(() => {});
    return { problems: [...problems, `failed: ${error.stack}`], value: null };
  } finally {
    await context.close();
  }
}

console.log(JSON.stringify({ ready: browser.version() }));
for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await run(JSON.parse(line))));
}
await browser.close();
