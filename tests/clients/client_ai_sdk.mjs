// Vercel's AI SDK through its provider for servers that speak OpenAI's protocol.
import { client, end, key, load, model, step, url } from "./steps.mjs";

const { generateObject, generateText, stepCountIs, streamObject, streamText, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { z } = await load("zod");
client("ai");
const provider = createOpenAICompatible({
  name: "tpserve", baseURL: `${url}/v1`, apiKey: key, includeUsage: true, supportsStructuredOutputs: true,
});
const chat = provider.chatModel(model);
const prompt = "Tell me a story about a king.";
const schema = z.object({ color: z.enum(["red", "green"]), n: z.number().int().min(0).max(9) });

function check(right, said) {
  if (!right) throw new Error(said);
}

await step("streamText", async () => {
  let failure = null;
  const result = streamText({ model: chat, prompt, maxOutputTokens: 40, temperature: 0, maxRetries: 0, onError: ({ error }) => { failure = error; } });
  let parts = 0, text = "";
  for await (const part of result.textStream) {
    parts += 1;
    text += part;
  }
  if (failure) throw failure;
  const usage = await result.usage;
  check(parts > 5 && text.length > 20, `${parts} parts, ${text}`);
  check(usage.outputTokens === 40, `usage: ${JSON.stringify(usage)}`);
  check(await result.finishReason === "length", await result.finishReason);
  return `${parts} parts`;
});
await step("generateObject", async () => {
  const { object } = await generateObject({ model: chat, schema, prompt, maxOutputTokens: 100, seed: 1, maxRetries: 0 });
  check(schema.safeParse(object).success, JSON.stringify(object));
});
await step("streamObject", async () => {
  const result = streamObject({ model: chat, schema, prompt, maxOutputTokens: 100, seed: 1, maxRetries: 0 });
  for await (const _ of result.partialObjectStream);
  check(schema.safeParse(await result.object).success, JSON.stringify(await result.object));
});
for (const streamed of [false, true]) {
  await step(streamed ? "a tool call in a stream" : "a tool call", async () => {
    let called = 0;
    const asked = {
      model: chat, prompt, maxOutputTokens: 200, maxRetries: 0, toolChoice: "required", stopWhen: stepCountIs(1),
      tools: { paint: tool({ description: "Paints.", inputSchema: schema, execute: async () => { called += 1; return "painted"; } }) },
    };
    const result = streamed ? streamText(asked) : await generateText(asked);
    if (streamed) await result.consumeStream();
    const [call] = await result.toolCalls;
    check(call?.toolName === "paint" && called === 1, JSON.stringify(call));
  });
}
await step("two steps: a call, its result, an answer", async () => {
  const result = await generateText({
    model: chat, prompt, maxOutputTokens: 200, maxRetries: 0, stopWhen: stepCountIs(2), temperature: 0,
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    tools: { paint: tool({ description: "Paints.", inputSchema: schema, execute: async () => "painted" }) },
  });
  check(result.steps.length === 2 && result.text.length > 0, JSON.stringify(result.steps.map((one) => one.finishReason)));
});
await step("completionModel", async () => {
  const { text } = await generateText({ model: provider.completionModel(model), prompt: "Once upon a time", maxOutputTokens: 10, maxRetries: 0 });
  check(text.length > 0, "no text");
});
end();
