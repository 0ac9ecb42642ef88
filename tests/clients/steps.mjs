// As steps.py, for node. Clients are installed far from here, so they are looked for where the runner says.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.TPSERVE_NODE}/package.json`);
export const { TPSERVE_URL: url, TPSERVE_MODEL: model, TPSERVE_KEY: key } = process.env;
let failed = false;

export const load = (name) => import(pathToFileURL(require.resolve(name)));

export function client(name) {
  const { version } = JSON.parse(readFileSync(`${process.env.TPSERVE_NODE}/node_modules/${name}/package.json`));
  console.log(`client ${name} ${version}`);
}

export async function step(name, work) {
  try {
    const found = await work();
    console.log(`done ${name}${found ? ` (${found})` : ""}`);
  } catch (error) {
    failed = true;
    const said = String(error.message ?? error).replaceAll(/\s+/g, " ").slice(0, 400);
    console.log(`failed ${name}: ${error.name}: ${said}`);
  }
}

export function end() {
  process.exitCode = failed ? 1 : 0;
}
