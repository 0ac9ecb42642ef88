// OpenAI's own client for node.
import { client as named, end, key, load, model, step, url } from "./steps.mjs";

const { default: OpenAI } = await load("openai");
named("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "Tell me a story about a king." }];
const schema = {
  type: "object", additionalProperties: false, required: ["color", "n"],
  properties: { color: { enum: ["red", "green"] }, n: { type: "integer", minimum: 0, maximum: 9 } },
};
const tools = [{ type: "function", function: { name: "paint", description: "Paints.", parameters: schema } }];

function check(right, said) {
  if (!right) throw new Error(said);
}

await step("models.list", async () => {
  const ids = [];
  for await (const one of client.models.list()) ids.push(one.id);
  check(ids.join() === model, `models: ${ids}`);
});
await step("streaming with usage", async () => {
  const stream = await client.chat.completions.create({
    model, messages, max_completion_tokens: 40, temperature: 0, stream: true, stream_options: { include_usage: true },
  });
  let chunks = 0, text = "", usage = null;
  for await (const chunk of stream) {
    chunks += 1;
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  check(chunks > 5 && text.length > 20, `${chunks} chunks, ${text.length} characters`);
  check(usage.completion_tokens === 40, `usage: ${JSON.stringify(usage)}`);
  return `${chunks} chunks`;
});
await step("the stream helper", async () => {
  const stream = client.chat.completions.stream({ model, messages, max_tokens: 20, temperature: 0 });
  let heard = "";
  stream.on("content", (delta) => { heard += delta; });
  const whole = await stream.finalChatCompletion();
  check(whole.choices[0].message.content === heard, `${heard} | ${whole.choices[0].message.content}`);
});
await step("abort of a stream", async () => {
  const stream = await client.chat.completions.create({ model, messages, max_tokens: 300, stream: true });
  for await (const _ of stream) stream.controller.abort();
});
await step("json_schema", async () => {
  const whole = await client.chat.completions.create({
    model, messages, max_tokens: 100, seed: 1,
    response_format: { type: "json_schema", json_schema: { name: "answer", strict: true, schema } },
  });
  const { color } = JSON.parse(whole.choices[0].message.content);
  check(["red", "green"].includes(color), color);
});
await step("a tool call and its result", async () => {
  const asked = { model, messages, tools, max_tokens: 200, temperature: 0 };
  const { message } = (await client.chat.completions.create({ ...asked, tool_choice: "required" })).choices[0];
  const [call] = message.tool_calls;
  check("n" in JSON.parse(call.function.arguments), call.function.arguments);
  const next = await client.chat.completions.create({
    ...asked, messages: [...messages, message, { role: "tool", tool_call_id: call.id, content: "painted" }], max_tokens: 10,
  });
  check(next.choices.length === 1, JSON.stringify(next));
});
await step("a tool call in a stream", async () => {
  const stream = client.chat.completions.stream({ model, messages, tools, tool_choice: "required", max_tokens: 200, temperature: 0 });
  const { message } = (await stream.finalChatCompletion()).choices[0];
  check(message.tool_calls[0].function.name === "paint", JSON.stringify(message));
});
await step("runTools", async () => {
  let called = 0;
  const run = client.chat.completions.runTools({
    model, messages, max_tokens: 200, temperature: 0, tool_choice: { type: "function", function: { name: "paint" } },
    tools: [{ type: "function", function: { ...tools[0].function, parse: JSON.parse, function: () => { called += 1; return "painted"; } } }],
  });
  await run.done();
  check(called === 1, `called ${called} times`);
});
await step("an error by its class", async () => {
  const refused = await client.chat.completions.create({ model, messages, temperature: -1 }).then(() => null, (error) => error);
  check(refused instanceof OpenAI.BadRequestError && refused.param === "temperature", String(refused));
});
end();
