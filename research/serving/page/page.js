// The chat page: a conversation in memory, answers as they stream. Text enters the page as text only, never as markup.
"use strict";

const part = (id) => document.getElementById(id);
const [log, form, message, errorBox] = ["log", "ask", "message", "error"].map(part);
const turns = [];      // {role, content}, what is sent
let model = null;      // the server's card of it
let token = "";        // kept in this variable only
let writing = null;    // the AbortController of the answer under way

function headers() {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function tell(text) {
  errorBox.textContent = text;
  errorBox.hidden = !text;
}

async function words(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status} ${response.statusText}`;
  }
}

async function connect() {
  tell("");
  let response;
  try {
    response = await fetch("/v1/models", { headers: headers() });
  } catch {
    part("model").textContent = "not connected";
    tell("The server cannot be reached. Is it running? Reload this page when it is.");
    return;
  }
  const locked = response.status === 401;
  part("gate").hidden = !locked;
  form.hidden = part("settings").hidden = part("keys").hidden = part("clear").hidden = !response.ok;
  if (response.ok) {
    model = (await response.json()).data[0];
    const written = model.chat_template.endsWith("(plain text)") ? " · no chat template" : "";
    part("model").textContent = `${model.id} · step ${model.step} · ${model.context} tokens${written}`;
    part("model").title = part("model").textContent;
    document.title = `${model.id} · Tessera`;
    message.focus();
    return;
  }
  part("model").textContent = locked ? "locked" : "not ready";
  if (locked) {
    if (token) tell("That is not this server's token.");
    part("token").focus();
  } else {
    tell(await words(response));
  }
}

function add(role, text) {
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const who = document.createElement("h2");
  who.textContent = role === "user" ? "You" : model.id;
  const said = document.createElement("p");
  said.textContent = text;
  turn.append(who, said);
  log.append(turn);
  log.scrollTop = log.scrollHeight;
  return turn;
}

function note(turn, text) {
  const how = document.createElement("div");
  how.className = "how";
  how.textContent = text;
  turn.append(how);
}

function request() {
  const system = part("system").value.trim();
  const asked = {
    model: model.id,
    messages: system ? [{ role: "system", content: system }, ...turns] : turns,
    temperature: Number(part("temperature").value),
    stream: true,
  };
  const most = part("tokens").valueAsNumber;
  return Number.isInteger(most) && most > 0 ? { ...asked, max_tokens: most } : asked;
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

async function answer() {
  // Streams into a new turn. Where nothing came it gives back why, and there is no turn.
  const turn = add("assistant", "");
  const said = turn.querySelector("p");
  turn.classList.add("writing");
  log.setAttribute("aria-busy", "true");  // a screen reader reads the answer when it is whole
  let content = "", finish = "", wrong = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { ...headers(), "Content-Type": "application/json" },
      body: JSON.stringify(request()),
      signal: writing.signal,
    });
    if (!response.ok) throw new Error(await words(response));
    finish = "cut";
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (!choice) continue;
      const below = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
      content += choice.delta.content ?? "";
      said.textContent = content;
      finish = choice.finish_reason ?? finish;
      if (below) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    finish = error.name === "AbortError" ? "stopped" : "failed";
    wrong = finish === "stopped" ? "" : error instanceof TypeError ? "The connection to the server was lost." : error.message;
  }
  turn.classList.remove("writing");
  log.setAttribute("aria-busy", "false");
  const over = finish === "stop" || finish === "length";
  if (!content && !over) {
    turn.remove();
    return wrong || " ";
  }
  turns.push({ role: "assistant", content });
  if (finish === "length") note(turn, "cut off: no more tokens");
  else if (finish === "stopped") note(turn, "stopped");
  else if (!over) note(turn, "cut off");
  else if (!content) note(turn, "no answer");
  if (wrong) tell(wrong);
  return "";
}

async function send(event) {
  event.preventDefault();
  const text = message.value.trim();
  if (!text || writing || !model) return;
  tell("");
  part("empty").hidden = true;
  turns.push({ role: "user", content: text });
  const mine = add("user", text);
  message.value = "";
  grow();
  const why = await whileWriting(answer);
  if (why) {  // the question is not part of the conversation: it may be asked again
    tell(why.trim());
    turns.pop();
    mine.remove();
    message.value = message.value || text;
    grow();
  }
  part("empty").hidden = turns.length > 0;
  message.focus();
}

async function whileWriting(work) {
  writing = new AbortController();
  const mine = writing;
  part("send").hidden = true;
  part("stop").hidden = false;
  try {
    return await work();
  } finally {
    if (writing === mine) writing = null;
    part("send").hidden = false;
    part("stop").hidden = true;
  }
}

function stop() {
  writing?.abort();
}

async function clear() {
  stop();
  while (writing) await new Promise((done) => setTimeout(done, 10));
  turns.length = 0;
  for (const turn of log.querySelectorAll(".turn")) turn.remove();
  part("empty").hidden = false;
  tell("");
  message.focus();
}

function grow() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

form.addEventListener("submit", send);
part("stop").addEventListener("click", stop);
part("clear").addEventListener("click", clear);
part("temperature").addEventListener("input", (event) => { part("shown").textContent = Number(event.target.value).toFixed(2); });
message.addEventListener("input", grow);
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
part("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  token = part("token").value.trim();
  part("token").value = "";
  connect();
});
form.hidden = part("settings").hidden = part("keys").hidden = part("clear").hidden = true;
connect();
