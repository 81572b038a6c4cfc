// Requests to the server, and texts as they stream.

let token = "";  // kept in this variable only

export class Locked extends Error {}  // the server asks for its token

export function useToken(text) {
  token = text;
}

export async function pageData() {
  let response;
  try {
    response = await fetch("/page.json", { headers: headers() });
  } catch {
    throw new Error("The server cannot be reached. Is it running? Reload this page when it is.");
  }
  if (response.status === 401) throw new Locked(token ? "That is not this server's token." : "");
  if (!response.ok) throw new Error(await words(response));
  return response.json();
}

// Calls show(text so far) for every piece. Returns {text, finish, usage, leftOut, problem}: finish is the server's reason, or "stopped" by
// the signal, or "cut" by a failure, which `problem` puts in words; leftOut counts what the context has no room for, as the server says it.
export async function generate(path, request, signal, show) {
  const result = { text: "", finish: "", usage: null, leftOut: 0, problem: "" };
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { ...headers(), "Content-Type": "application/json" },
      body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true }, truncation: "auto" }),
      signal,
    });
    if (!response.ok) throw new Error(await words(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      result.leftOut = event.messages_left_out ?? event.tokens_left_out;
      result.usage = event.usage ?? result.usage;
      const [choice] = event.choices;
      if (!choice) continue;
      result.text += choice.delta?.content ?? choice.text ?? "";
      result.finish = choice.finish_reason ?? result.finish;
      show(result.text);
    }
    result.finish ||= "cut";
  } catch (error) {
    result.finish = error.name === "AbortError" ? "stopped" : "cut";
    if (result.finish === "cut") result.problem = error instanceof TypeError ? "The connection to the server was lost." : error.message;
  }
  return result;
}

// What the line under a text says: the server's count of tokens, and why the text ended.
export function ending({ text, finish, usage }) {
  const ends = { stop: "", length: "limit reached", stopped: "stopped", cut: "cut off" };
  return [usage ? counted(usage.completion_tokens, "token") : "", ends[finish], text ? "" : "no text"].filter(Boolean).join(" · ");
}

export function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

function headers() {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function words(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status} ${response.statusText}`;
  }
}

async function* events(response) {
  // Each event is a line that begins with "data: ".
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}
