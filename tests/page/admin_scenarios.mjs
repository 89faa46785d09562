// What administrators do on their page.

import assert from "node:assert/strict";

async function signIn({ page, admin, token }, given = token) {
  await page.goto(admin);
  await page.locator("#token-card").waitFor();
  await page.locator("#token").fill(given);
  await page.locator("#actor").fill("ada");
  await page.locator("#token-form button").click();
}

const cells = (page, id, text) => page.locator(`#${id} tbody tr`, { hasText: text }).locator("td").allTextContents();
const said = (page, words) => page.waitForFunction((text) => document.getElementById("status").textContent.includes(text), words);

export const SCENARIOS = {
  administer: {
    async steps(given) {
      const { page, token, shot, accessible, fits } = given;
      await signIn(given, "a-wrong-token-of-length");
      await page.waitForFunction(() => document.getElementById("token-error").textContent);
      const wrong = await page.locator("#token-error").textContent();
      await accessible();
      await signIn(given);
      await page.locator("#tenants table").waitFor();
      await page.locator("summary").click();
      await page.locator("#tenant-form [name=id]").fill("umbrella");
      await page.locator("#tenant-form [name=name]").fill("Umbrella");
      await page.locator("#tenant-form [name=plan]").selectOption("standard");
      await page.locator("#tenant-form button").click();
      await page.locator("#keys-card").waitFor();
      await page.locator("#key-form [name=name]").fill("laptop");
      await page.locator("#key-form button").click();
      await page.locator("#secret-card").waitFor();
      const secret = await page.locator("#secret").textContent();
      await accessible();
      await shot("key");
      await page.locator("#hide-secret").click();
      assert(!(await page.content()).includes(secret), "the secret is still in the document");
      await page.locator("#tenants tr", { hasText: "umbrella" }).getByRole("button", { name: "Suspend" }).click();
      await page.locator("#confirm").waitFor();
      const focused = await page.evaluate(() => document.activeElement.id);
      await accessible();
      await shot("confirm");
      await page.keyboard.press("Enter");
      const kept = await cells(page, "tenants", "umbrella");
      await page.locator("#tenants tr", { hasText: "umbrella" }).getByRole("button", { name: "Suspend" }).click();
      await page.locator("#confirm-yes").click();
      await said(page, "Suspend umbrella");
      const suspended = await cells(page, "tenants", "umbrella");
      await page.locator("#keys tr", { hasText: "laptop" }).getByRole("button", { name: "Rotate" }).click();
      await page.locator("#confirm-yes").click();
      await page.locator("#secret-card").waitFor();
      const rotated = await page.locator("#secret").textContent();
      const of = await page.locator("#secret-of").textContent();
      await said(page, "Rotate");
      await page.locator("#keys tbody tr").nth(1).getByRole("button", { name: "Revoke" }).click();
      await page.locator("#confirm-yes").click();
      await said(page, "Revoke");
      const keys = await page.locator("#keys tbody tr").allTextContents();
      const audit = await page.locator("#audit tbody tr").allTextContents();
      await accessible();
      await fits();
      await shot("all");
      const storage = await page.evaluate(() => JSON.stringify({ ...localStorage }));
      assert(!storage.includes(token), "the token is in localStorage");
      await page.locator("#forget").click();
      return {
        wrong, secret, rotated, of, focused, kept, suspended, keys, audit: audit.slice(0, 5),
        left: await page.evaluate(() => sessionStorage.length), tenants: await page.locator("#content").isVisible(),
      };
    },
  },

  administer_phone: {
    options: { viewport: { width: 360, height: 740 }, isMobile: true, colorScheme: "dark", locale: "zh-CN" },
    async steps(given) {
      const { page, shot, accessible, fits } = given;
      await signIn(given);
      await page.locator("#tenants table").waitFor();
      await page.locator("#measure").selectOption("amount");
      await page.locator("#tenants tr", { hasText: "acme" }).getByRole("button").first().click();
      await page.locator("#keys table").waitFor();
      await accessible();
      await fits();
      await shot("all");
      return page.locator("h2").allTextContents();
    },
  },
};
