// The page: two modes, one box to write in. Everything that is written stays in memory, and enters the page as text, never as markup.

import { Chat } from "./chat.js";
import { Locked, pageData, useToken } from "./server.js";
import { Settings } from "./settings.js";
import { Text } from "./text.js";
import { cancelEditing, grow } from "./turn.js";

const part = (id) => document.getElementById(id);
const [form, message, errorBox] = ["ask", "message", "error"].map(part);
const settings = new Settings();
const page = { tell, whileWriting, changed };
const modes = { chat: new Chat(part("chat"), settings, page), text: new Text(part("text"), settings, page) };
let writing = null;  // the AbortController of the text under way

const current = () => modes[settings.mode];

function tell(text) {
  errorBox.textContent = text;
  errorBox.hidden = !text;
}

async function connect() {
  tell("");
  let data;
  try {
    data = await pageData();
  } catch (error) {
    const locked = error instanceof Locked;
    part("model").textContent = locked ? "locked" : "not connected";
    part("gate").hidden = !locked;
    if (locked) part("token").focus();
    tell(error.message);
    return;
  }
  const { model } = data;
  part("gate").hidden = true;
  part("model").textContent = part("model").title = `${model.id} · step ${model.step} · ${model.context} tokens`;
  document.title = `${model.id} · Tessera`;
  settings.begin(data);
  for (const mode of Object.values(modes)) mode.begin(data);
  for (const each of [form, part("keys"), part("modes"), part("actions")]) each.hidden = false;
  open(settings.mode);
}

function open(mode) {
  cancelEditing();
  settings.mode = mode;
  for (const name of Object.keys(modes)) part(name).hidden = name !== mode;
  document.querySelector(`[name=mode][value=${mode}]`).checked = true;
  part("send").textContent = current().sends;
  part("enter").textContent = mode === "chat" ? "sends" : "continues";
  tell("");
  changed();
  if (!matchMedia("(pointer: coarse)").matches) message.focus();  // on a phone that would open the keyboard
}

function changed() {
  message.placeholder = current().placeholder;
  grow(message);
}

// Runs `work`, which Esc, Stop, Clear and a change of the mode abort through the signal that it is given.
async function whileWriting(work) {
  writing = new AbortController();
  setWriting(true);
  changed();
  try {
    return await work(writing.signal);
  } finally {
    writing = null;
    setWriting(false);
  }
}

function setWriting(is) {
  document.body.classList.toggle("busy", is);
  part("send").hidden = is;
  part("stop").hidden = !is;
  part("modes").disabled = is;
}

async function send(event) {
  event.preventDefault();
  if (writing) return;
  tell("");
  const text = message.value;
  message.value = "";
  const rest = await current().submit(text);
  message.value ||= rest;
  changed();
  message.focus();
}

async function clear() {
  cancelEditing();
  stop();
  while (writing) await new Promise((done) => setTimeout(done, 10));
  current().clear();
  tell("");
  changed();
  message.focus();
}

function stop() {
  writing?.abort();
}

form.addEventListener("submit", send);
part("stop").addEventListener("click", stop);
part("clear").addEventListener("click", clear);
part("modes").addEventListener("change", (event) => open(event.target.value));
message.addEventListener("input", () => grow(message));
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !part("settings").open) stop(); });
part("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(part("token").value.trim());
  part("token").value = "";
  connect();
});
connect();
