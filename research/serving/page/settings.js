// The settings sheet. Numbers and the mode are kept over a reload, in this browser; the system prompt is not, because it is text.

const KEPT = "tessera.settings";
const DEFAULTS = { temperature: "0.7", top_p: "0.95", repetition_penalty: "1", top_k: "", max_tokens: "", seed: "" };
const SHARE = 4;  // by default an answer has a quarter of the context at most, which leaves three to what comes before
const MOST = { chat: 1024, text: 128 };

const part = (id) => document.getElementById(id);

export class Settings {
  constructor() {
    this.sheet = part("settings");
    this.fields = Object.keys(DEFAULTS).map(part);
    part("open").addEventListener("click", () => this.sheet.showModal());
    part("close").addEventListener("click", () => this.sheet.close());
    part("reset").addEventListener("click", () => { this.fill({}); this.keep(); });
    this.sheet.addEventListener("click", (event) => { if (event.target === this.sheet) this.sheet.close(); });  // beside the sheet
    this.sheet.addEventListener("input", () => { this.show(); this.keep(); });
  }

  begin({ model, has_chat_template }) {
    this.model = model;
    const kept = this.kept();
    this.fill(kept);
    part("about").textContent = `${model.id}, step ${model.step}, ${model.precision}, a context of ${model.context} tokens. `
      + `Chat template: ${has_chat_template ? model.chat_template : "none"}.`;
    this.mode = kept.model === model.id && kept.mode ? kept.mode : has_chat_template ? "chat" : "text";
  }

  set mode(mode) {
    this.current = mode;
    part("system-field").hidden = mode !== "chat";
    part("max_tokens").placeholder = this.longest;
    this.keep();
  }

  get mode() {
    return this.current;
  }

  get longest() {
    return Math.max(1, Math.min(Math.floor(this.model.context / SHARE), MOST[this.mode]));
  }

  get system() {
    return part("system").value.trim();
  }

  request() {
    const set = this.fields.filter((field) => field.value !== "").map((field) => [field.id, Number(field.value)]);
    return { model: this.model.id, max_tokens: this.longest, ...Object.fromEntries(set) };
  }

  fill(values) {
    for (const field of this.fields) field.value = values[field.id] ?? DEFAULTS[field.id];
    this.show();
  }

  show() {
    for (const output of this.sheet.querySelectorAll("output")) output.textContent = Number(part(output.htmlFor.value).value).toFixed(2);
  }

  keep() {
    const values = Object.fromEntries(this.fields.map((field) => [field.id, field.value]));
    try {
      localStorage.setItem(KEPT, JSON.stringify({ ...values, model: this.model.id, mode: this.mode }));
    } catch { /* a browser may allow no storage: then a reload begins with the defaults */ }
  }

  kept() {
    try {
      return JSON.parse(localStorage.getItem(KEPT)) ?? {};
    } catch {
      return {};
    }
  }
}
