// Runs the page's script in node, with as much of a browser as it touches: node page.mjs FOLDER URL
import fs from "node:fs";

const [folder, url] = process.argv.slice(2);

class Element {
  constructor() {
    Object.assign(this, { value: "", textContent: "", children: [], listeners: {}, disabled: false, classList: { toggle() {} } });
  }
  addEventListener(type, f) { (this.listeners[type] ??= []).push(f); }
  fire(type, event = {}) { for (const f of this.listeners[type]) f({ preventDefault() {}, ...event }); }
  append(...nodes) { for (const node of nodes) { this.children.push(node); node.parent = this; } }
  appendChild(node) { this.append(node); return node; }
  replaceChildren(...nodes) { this.children = []; this.append(...nodes); }
  remove() { this.parent.children = this.parent.children.filter((child) => child !== this); }
  focus() { document.activeElement = this; }
  setAttribute() {}
  scrollIntoView() {}
  reportValidity() { return true; }
  get text() { return this.textContent + this.children.map((child) => child.data ?? child.text).join(""); }
}

const $ = {};
for (const [, id] of fs.readFileSync(`${folder}/index.html`, "utf8").matchAll(/ id="([^"]+)"/g)) $[id] = new Element();
const listeners = {};
const stored = {};
globalThis.document = {
  getElementById: (id) => $[id], createElement: () => new Element(), body: new Element(), documentElement: {},
  createTextNode: (data) => ({ data, appendData(more) { this.data += more; } }),
  addEventListener: (type, f) => { listeners[type] = f; },
};
globalThis.window = { scrollTo() {} };
globalThis.sessionStorage = { getItem: (name) => stored[name] ?? null, setItem: (name, value) => { stored[name] = value; } };
const fetched = globalThis.fetch;
globalThis.fetch = (path, options) => fetched(url + path, options);

async function until(condition) {
  for (let i = 0; i < 500; i++) {
    if (condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  throw new Error(`it did not happen: ${condition}; the page says: ${$.status.textContent}`);
}

async function ask(message) {
  $.message.value = message;
  $.message.fire("keydown", { key: "Enter", shiftKey: false });
}

const told = {};
await import(`${folder}/chat.js`);
await until(() => $.status.textContent);
told.locked = $.status.textContent;
$.key.value = "sesame";
$.key.fire("change");
await until(() => $.model.textContent);
told.model = $.model.textContent;
$["max-tokens"].value = "20";
ask("tell me");
told.answering = [$.send.disabled, $.stop.disabled];
await until(() => !$.send.disabled);
told.turns = $.chat.children.map((turn) => turn.children.slice(0, 2).map((part) => part.text));
told.facts = $.status.textContent;
$["max-tokens"].value = "100";
ask("again");
await until(() => $.chat.children[3]?.text.includes("once"));
listeners.keydown({ key: "Escape" });
await until(() => !$.send.disabled);
told.stopped = $.status.textContent;
$.clear.fire("click");
told.cleared = $.chat.children.length;
$.message.value = "third";
$["show-tokens"].fire("click");
await until(() => $.tokens.children.length);
told.tokens = $.tokens.children.map((item) => item.text);
told.count = $["tokens-count"].textContent;
$["max-tokens"].value = "20";
$.temperature.value = "-9";
ask("too warm");
await until(() => !$.send.disabled && $.message.value);
told.refused = $.status.textContent;
told.kept = $.message.value;
console.log(JSON.stringify(told));
process.exit(0);
