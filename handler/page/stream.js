// Asking the server: errors in its own words, and streams of server-sent events.

/** A refusal, with the HTTP status. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Sends JSON (or asks with GET where there is no body); returns the response, or throws what the server says. */
export async function ask(path, { body, key, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store",
  });
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    const { error } = await response.json();
    message = error?.message ?? error ?? message;
  } catch { /* no JSON: the status has to do */ }
  throw new Refused(response.status, String(message));
}

/** The JSON values of a stream of events, up to [DONE]; an event of any number of chunks, a chunk of any number of events. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        } else if (line === "" && data.length) {
          const text = data.join("\n");
          data = [];
          if (text === "[DONE]") return;
          yield JSON.parse(text);
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
