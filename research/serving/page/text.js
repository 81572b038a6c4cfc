// A text that the model continues: the reader's pieces and the model's, one after the other.

import { counted, ending, generate } from "./server.js";
import { button, copy, edited, element, following } from "./turn.js";

// Between these, scripts that write words apart have a space.
const WORD_OR_PUNCTUATION = /[\p{sc=Latin}\p{sc=Greek}\p{sc=Cyrillic}\p{N}.,;:!?)\]”’]$/u;
const WORD = /^[\p{sc=Latin}\p{sc=Greek}\p{sc=Cyrillic}\p{N}]/u;

export class Text {
  sends = "Continue";

  constructor(section, settings, page) {
    this.section = section;
    this.settings = settings;
    this.page = page;  // tell(problem), whileWriting(work)
    [this.empty, this.document, this.foot, this.note, this.leftOut] =
      [".empty", ".document", ".foot", ".how", ".left-out"].map((css) => section.querySelector(css));
    this.pieces = [];
    const tool = (name) => section.querySelector(`[name=${name}]`);
    tool("copy").addEventListener("click", () => copy(this.text, tool("copy")));
    tool("retry").addEventListener("click", () => this.retry());
    tool("undo").addEventListener("click", () => this.undo());
    tool("edit").addEventListener("click", () => this.edit());
  }

  begin({ model, prompts }) {
    this.model = model;
    const items = prompts.map((prompt) => {
      const item = element("li");
      item.append(button(`${prompt} …`, "prompt", () => this.submit(prompt)));
      return item;
    });
    this.section.querySelector(".prompts").replaceChildren(...items);
  }

  get text() {
    return this.pieces.map((piece) => piece.content).join("");
  }

  get placeholder() {
    return this.pieces.length ? "Add text, or continue" : "Begin a text";
  }

  // Returns the text that belongs into the box: nothing, or what was written there if it could not be continued.
  async submit(text) {
    let addition = text.replace(/[ \t]+$/, "");  // a space at the end is part of most tokenizers' next word
    if (!addition && !this.pieces.length) return text;
    if (WORD_OR_PUNCTUATION.test(this.text) && WORD.test(addition)) addition = ` ${addition}`;
    if (addition) this.add("user", addition);
    const continued = await this.continue();
    if (!continued && addition) this.cut(this.pieces.length - 1);
    return continued ? "" : text;
  }

  clear() {
    this.cut(0);
  }

  async continue() {
    const prompt = this.text;
    const piece = this.add("assistant", "");
    const result = await this.page.whileWriting((signal) => {
      this.document.classList.add("writing");
      this.document.setAttribute("aria-busy", "true");  // a screen reader reads the text when it is whole
      const show = (text) => following(() => this.write(piece, text));
      return generate("/v1/completions", { ...this.settings.request(), prompt }, signal, show);
    });
    this.document.classList.remove("writing");
    this.document.setAttribute("aria-busy", "false");
    if (result.problem) this.page.tell(result.problem);
    const ended = ["stop", "length"].includes(result.finish);
    if (!result.text) this.cut(this.pieces.length - 1);
    if (!result.text && !ended) return false;
    following(() => {
      this.note.textContent = result.finish === "stop" ? [ending(result), "the model ends its text here"].filter(Boolean).join(" · ") : ending(result);
      this.showLeftOut(result.leftOut ?? 0);
    });
    return true;
  }

  add(role, content) {
    const piece = { role, element: element("span", role) };
    this.pieces.push(piece);
    this.write(piece, content);
    following(() => this.document.append(piece.element));
    this.empty.hidden = true;
    this.foot.hidden = false;
    return piece;
  }

  write(piece, content) {
    piece.content = content;
    piece.element.textContent = content;
  }

  async retry() {
    const last = this.pieces.at(-1);
    this.page.tell("");
    if (last.role === "assistant") this.cut(this.pieces.length - 1);
    if (!await this.continue() && last.role === "assistant") this.add("assistant", last.content);
  }

  undo() {
    this.cut(this.pieces.length - 1);
    this.page.changed();
  }

  async edit() {
    this.foot.hidden = true;
    const text = await edited(this.document, this.text, "Save");
    this.foot.hidden = false;
    if (text === null) return;
    this.cut(0);
    if (text) this.add("user", text);
    this.page.changed();
  }

  cut(length) {
    for (const piece of this.pieces.splice(length)) piece.element.remove();
    this.note.textContent = "";
    this.showLeftOut(0);
    this.empty.hidden = this.pieces.length > 0;
    this.foot.hidden = this.pieces.length === 0;
  }

  showLeftOut(count) {
    this.leftOut.hidden = count === 0;
    const is = count === 1 ? "is" : "are";
    this.leftOut.textContent = `The first ${counted(count, "token")} ${is} left out: the model reads ${this.model.context} tokens`;
  }
}
