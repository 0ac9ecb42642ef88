// A streamed chat with the fetch that Node and browsers have built in: node examples/fetch.mjs [URL]
const url = process.argv[2] ?? process.env.TPSERVE_URL ?? "http://127.0.0.1:8080";
const headers = { "Content-Type": "application/json" };
if (process.env.TPSERVE_API_KEY) headers.Authorization = `Bearer ${process.env.TPSERVE_API_KEY}`;

async function ask(path, body) {
  const sent = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  const response = await fetch(url + path, sent);
  if (!response.ok) throw new Error(`${response.status}: ${await response.text()}`);
  return response;
}

/** The data of server-sent events, however the network has cut them. */
async function* events(response) {
  let rest = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
  }
}

const model = (await (await ask("/v1/models")).json()).data[0].id;
const response = await ask("/v1/chat/completions", {
  model,
  messages: [{ role: "user", content: "Tell me a story." }],
  max_completion_tokens: 32,
  stream: true,
  stream_options: { include_usage: true },
});
let usage;
for await (const data of events(response)) {
  if (data === "[DONE]") break;
  const chunk = JSON.parse(data);
  if (chunk.error) throw new Error(chunk.error.message);
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  usage = chunk.usage ?? usage;
}
console.log(`\nstream: ${usage.completion_tokens} tokens`);
