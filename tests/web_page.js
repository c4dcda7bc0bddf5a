// node web_page.js URL WORKFLOW.json PICTURE.png
// Opens a workflow file in ComfyUI's page, presses Run, waits for the end, and takes a picture of the page.
const fs = require("fs"), os = require("os"), path = require("path");
const { chromium } = require(process.env.PLAYWRIGHT_CORE);
const [url, workflow, picture] = process.argv.slice(2);

async function main() {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), "page-"));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM,
    headless: true,
    viewport: { width: 1600, height: 1000 },
    args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
  });
  try {
    const here = new URL(url).hostname;
    await context.route((to) => to.hostname !== here && to.protocol.startsWith("http"), (route) => route.abort());
    const page = context.pages()[0] ?? (await context.newPage());
    await page.goto(url, { waitUntil: "domcontentloaded" });
    const ready = () => window.app?.extensionManager && window.app?.graph && window.app?.vueAppReady !== false;
    await page.waitForFunction(ready, null, { timeout: 120000 });
    await page.waitForTimeout(4000);
    await page.keyboard.press("Escape"); // the templates dialog that greets a first visit
    await page.waitForTimeout(500);
    const text = fs.readFileSync(workflow, "utf8");
    await page.evaluate(
      ([content, name]) => window.app.handleFile(new File([content], name, { type: "application/json" })),
      [text, path.basename(workflow)],
    );
    await page.waitForTimeout(2000);
    const missing = await page.evaluate(() =>
      window.app.graph.nodes.filter((node) => node.has_errors).map((node) => node.type).join(", "));
    console.log("missing:", missing || "none");
    const answered = page.waitForResponse(
      (response) => response.url().endsWith("/prompt") && response.request().method() === "POST",
      { timeout: 30000 },
    );
    await page.locator('[data-testid="queue-button"]').first().click();
    const { prompt_id: id, node_errors: errors } = await (await answered).json();
    if (!id) throw new Error(`refused: ${JSON.stringify(errors)}`);
    let entry;
    for (let waited = 0; !entry && waited < 1200; waited++) {
      await page.waitForTimeout(500);
      entry = (await (await fetch(`${url}/history/${id}`)).json())[id];
    }
    console.log("status:", entry?.status?.status_str ?? "not finished");
    await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
    await page.waitForTimeout(2500);
    await page.screenshot({ path: picture });
    if (entry?.status?.status_str !== "success") process.exitCode = 1;
  } finally {
    await context.close();
    fs.rmSync(profile, { recursive: true, force: true });
  }
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
