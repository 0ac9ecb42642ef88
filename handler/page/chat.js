// The chat page. What users and models write is only ever set as text.
import { Refused, ask, events } from "./stream.js";

const $ = (id) => document.getElementById(id);
const KEY = "tpserve.api_key";
let turns = []; // {role, content}
let model = null;
let running = null; // the AbortController of the answer that is being made

$("key").value = sessionStorage.getItem(KEY) ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  readModel();
});
$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  $("chat").replaceChildren();
  say("");
  $("message").focus();
});
$("show-tokens").addEventListener("click", showTokens);
$("tokens-close").addEventListener("click", () => { $("tokens-box").hidden = true; $("show-tokens").focus(); });
readModel();

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

/** What to say of an error; `lead`: the user waits for this answer, and is led to where something is to be done. */
function explain(error, lead = true) {
  if (error instanceof Refused && error.status === 401) {
    $("settings").open = true;
    if (lead) $("key").focus(); // whoever types elsewhere meanwhile would type into it
    return "This server asks for an API key: enter it in the settings.";
  }
  return error instanceof Refused ? error.message : "The server cannot be reached.";
}

async function readModel(lead = false) {
  try {
    model = (await (await ask("v1/models", { key: key() })).json()).data[0].id;
    $("model").textContent = model;
    say("");
  } catch (error) {
    say(explain(error, lead || document.activeElement === document.body), true);
  }
}

function key() {
  return $("key").value.trim();
}

function messages(last) {
  const system = $("system").value.trim();
  return [...(system ? [{ role: "system", content: system }] : []), ...turns, ...(last ? [{ role: "user", content: last }] : [])];
}

function sampling() {
  const fields = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens", seed: "seed" };
  const given = {};
  for (const [name, id] of Object.entries(fields)) {
    if (!$(id).reportValidity()) return null;
    if ($(id).value !== "") given[name] = Number($(id).value);
  }
  return given;
}

function show(role, text) {
  const turn = document.createElement("article");
  const title = document.createElement("h2");
  const body = document.createElement("p");
  turn.className = `turn ${role}`;
  title.textContent = role === "user" ? "You" : "Model";
  body.textContent = text;
  turn.append(title, body);
  $("chat").append(turn);
  turn.scrollIntoView({ block: "end" });
  return { turn, text: body.appendChild(document.createTextNode("")) };
}

async function send() {
  const content = $("message").value;
  const chosen = sampling();
  if (running || !content.trim() || chosen === null) return;
  if (model === null) await readModel(true);
  if (model === null) return;
  running = new AbortController();
  const history = turns; // another one after "New chat"
  $("send").disabled = true;
  $("stop").disabled = false;
  const asked = show("user", content);
  const answer = show("assistant", "");
  $("chat").setAttribute("aria-busy", "true"); // read out when it is whole, not token by token
  $("message").value = "";
  say("Answering …");
  let error = null;
  const said = { text: "", usage: null, reason: null, sentMs: performance.now(), firstMs: null, lastMs: null };
  try {
    const body = { model, messages: messages(content), stream: true, stream_options: { include_usage: true }, ...chosen };
    const response = await ask("v1/chat/completions", { body, key: key(), signal: running.signal });
    for await (const event of events(response)) read(event, said, answer.text);
    if (said.reason === null) error = new Refused(200, "The answer broke off.");
  } catch (caught) {
    if (caught.name === "AbortError") said.reason = "stopped";
    else error = caught;
  }
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  $("chat").setAttribute("aria-busy", "false");
  if (said.text === "" && (error !== null || said.reason === "stopped")) { // as if it had not been asked
    asked.turn.remove();
    answer.turn.remove();
    $("message").value ||= content;
  } else {
    history.push({ role: "user", content }, { role: "assistant", content: said.text });
    const facts = document.createElement("p");
    facts.className = "facts";
    facts.textContent = factsOf(said);
    following(() => answer.turn.append(facts));
    answer.turn.classList.toggle("wrong", error !== null);
  }
  following(() => say(error === null ? factsOf(said) : explain(error), error !== null));
  if (document.activeElement === document.body) $("message").focus();
}

function read(event, said, node) {
  if (event.error) throw new Refused(200, String(event.error.message ?? event.error));
  said.usage = event.usage ?? said.usage;
  const choice = event.choices?.[0];
  if (!choice) return;
  said.reason = choice.finish_reason ?? said.reason;
  const text = choice.delta?.content;
  if (!text) return;
  said.lastMs = performance.now();
  said.firstMs ??= said.lastMs;
  said.text += text;
  following(() => node.appendData(text));
}

/** Does what makes the page longer, and stays at its end; whoever has scrolled up reads on there. */
function following(change) {
  const below = document.documentElement.scrollHeight - window.innerHeight - window.scrollY;
  change();
  if (below < 80) window.scrollTo(0, document.documentElement.scrollHeight);
}

function factsOf({ usage, reason, sentMs, firstMs, lastMs }) {
  const facts = [{ stop: "Complete", length: "At the most tokens", stopped: "Stopped" }[reason] ?? "Ended"];
  if (firstMs !== null) facts.push(`first token after ${Math.round(firstMs - sentMs)} ms`);
  if (usage) {
    const seconds = (lastMs - firstMs) / 1000;
    if (usage.completion_tokens > 1 && seconds > 0) {
      facts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
    facts.push(`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`);
  }
  return facts.join(", ");
}

async function showTokens() {
  try {
    const asked = messages($("message").value);
    if (!asked.length) return say("Write a message first.", true);
    const body = { ...(model === null ? {} : { model }), messages: asked, return_token_strs: true };
    const { tokens, token_strs: strings, count, max_model_len: most } = await (await ask("tokenize", { body, key: key() })).json();
    $("tokens").replaceChildren(...tokens.map((id, i) => {
      const item = document.createElement("li");
      const number = document.createElement("small");
      item.textContent = `${strings?.[i] ?? ""} `;
      number.textContent = id;
      item.append(number);
      return item;
    }));
    $("tokens-count").textContent = `${count} tokens; prompt and answer together may have ${most}.`;
    $("tokens-box").hidden = false;
    $("tokens-box").scrollIntoView({ block: "nearest" });
    say(`The prompt has ${count} tokens.`);
  } catch (error) {
    say(explain(error), true);
  }
  return undefined;
}
