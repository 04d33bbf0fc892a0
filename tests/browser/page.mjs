// Works the local page as its user would, and prints what was seen as one line of JSON.
// Argument: {"url", "folder", "centres", "label", "shots": folder for screenshots or null}.
import chromium from "@sparticuz/chromium";
import fs from "node:fs";
import path from "node:path";
import puppeteer from "puppeteer-core";

const { url, folder, centres, label, shots } = JSON.parse(process.argv[2]);
const seen = { steps: [], problems: [], requests: [], axe: {}, seconds: {} };
const AXE = fs.readFileSync(new URL("node_modules/axe-core/axe.min.js", import.meta.url), "utf8");
const LONG = { timeout: 90_000 };
const executablePath = await chromium.executablePath();
const browser = await puppeteer.launch({ args: chromium.args, executablePath, headless: "shell" });

async function opened(address) {
  const page = await browser.newPage();
  await page.setViewport({ width: 1280, height: 1000 });
  page.on("console", (line) => ["error", "warning"].includes(line.type()) && seen.problems.push(line.text()));
  page.on("pageerror", (error) => seen.problems.push(String(error)));
  page.on("request", (request) => seen.requests.push(request.url()));
  await page.goto(address);
  return page;
}
async function look(page, name) {
  if (shots) await page.screenshot({ path: path.join(shots, `${name}.png`), fullPage: true });
  await page.evaluate(AXE);
  const found = await page.evaluate(() => axe.run());
  const bad = found.violations.filter((one) => ["serious", "critical"].includes(one.impact));
  seen.axe[name] = bad.map((one) => `${one.id}: ${one.nodes[0].html}`);
}
const text = (selector) => page.$eval(selector, (element) => element.innerText);
const shown = (selector) => page.waitForSelector(`${selector}:not([hidden])`, LONG);

function chosenAs(role, name) {
  const isChosen = (role, name) => document.getElementById(`${role}-name`).textContent === name && !!chosen[role];
  return page.waitForFunction(isChosen, LONG, role, name);
}
async function pick(role, name) {
  await page.click(`#${role}-pick`);
  const found = `//dialog[@open]//button[text()="${name}"]`;
  await (await page.waitForSelector(`xpath/${found}`)).click();
  await chosenAs(role, name);
}
// Waits for another result than the one that is shown.
async function result(begin) {
  const before = await page.evaluate(() => drawnResult.split(" ")[0]), start = Date.now();
  await begin();
  await page.waitForFunction((before) => drawnResult && drawnResult.split(" ")[0] !== before, LONG, before);
  const seconds = (Date.now() - start) / 1000;
  await page.waitForSelector("#downloads a", LONG);
  const state = await page.$eval("#banner", (element) => element.className);
  return { seconds, headline: await text("#headline"), state };
}

const page = await opened(url);
await look(page, "1-start");
await pick("ct", "ct.nii.gz");
await pick("mask", "mask.nii.gz");
await pick("xray1", "ap.npy");
await page.click("#xray2-pick");
await page.waitForSelector("#picker[open] button");
await look(page, "2-picker");
await page.click("#picker-close");
await (await page.$("#xray2-upload")).uploadFile(path.join(folder, "lateral.npy"));
await chosenAs("xray2", "lateral.npy");
await pick("cameras", "bad.json");
await page.click("#load");
await shown("#error");
seen.error = await text("#error");
await look(page, "3-bad-file");

// cameras.json is dropped on the page.
const cameras = fs.readFileSync(path.join(folder, "cameras.json"), "utf8");
await page.evaluate((content) => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([content], "cameras.json"));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer }));
}, cameras);
await chosenAs("cameras", "cameras.json");
await page.click("#load");
await shown("#choose");
seen.errorGone = await page.$eval("#error", (element) => element.hidden);
await page.waitForFunction(() => views.every((view) => view.numbers));
await page.select("#level", String(label));
for (const [index, [u, v]] of centres.entries()) {
  const canvas = await page.$(`#view${index}`);
  await canvas.evaluate((element) => element.scrollIntoView({ block: "center" }));
  const box = await canvas.boundingBox();
  const [width, height] = await page.evaluate((index) => [views[index].width, views[index].height], index);
  await page.mouse.click(box.x + (u + 0.5) * box.width / width, box.y + (v + 0.5) * box.height / height);
}
seen.clicked = await page.evaluate(() => views.map((view) => view.centre));
await look(page, "4-clicked");
seen.first = await result(() => page.click("#by-points"));
await page.waitForFunction(() => PLANES.every((name) => planes[name].kept.has(0)));
seen.focused = await page.evaluate(() => document.activeElement.id);

await page.focus("#slider-axial");
for (let i = 0; i < 5; i++) await page.keyboard.press("ArrowRight");
await page.waitForFunction(() => planes.axial.kept.has(5));
const hu = await page.evaluate(() => [...planes.axial.kept.get(5)]);
seen.slice = Math.max(...hu) - Math.min(...hu);
await page.click("#accept");
await page.waitForFunction(() => document.getElementById("reviewed").textContent.includes("You accepted"));
await look(page, "5-result");
seen.links = await page.$$eval("#downloads a", (links) => links.map((link) => link.textContent));
const report = await opened(await page.$eval("#downloads a", (link) => link.href));
seen.report = await report.$eval("h2", (element) => element.textContent);
await report.close();

// Again, by keyboard alone: the centre of the first view is where the cross was left, some pixels away.
await page.bringToFront();
await page.focus("#again");
await page.keyboard.press("Enter");
seen.secondByKeys = await result(async () => {
  for (const key of ["ArrowLeft", "ArrowUp", "Enter", "ArrowDown", "Enter", "Enter"]) await page.keyboard.press(key);
});
seen.byBody = await result(() => page.click("#by-body"));
await browser.close();
console.log(JSON.stringify(seen));
