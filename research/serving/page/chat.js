// A conversation: turns in memory, sent whole. The server leaves out those that the context has no room for, and says how many.

import { counted, ending, generate } from "./server.js";
import { button, copy, edited, element, following } from "./turn.js";

export class Chat {
  placeholder = "Message";
  sends = "Send";

  constructor(section, settings, page) {
    this.section = section;
    this.settings = settings;
    this.page = page;  // tell(problem), whileWriting(work)
    this.list = section.querySelector(".turns");
    this.empty = section.querySelector(".empty");
    this.divider = element("p", "left-out");
    this.divider.setAttribute("role", "note");
    this.turns = [];
  }

  begin(data) {
    this.data = data;
    this.section.querySelector("#base").hidden = data.has_chat_template;
  }

  // Returns the text that belongs into the box: nothing, or the question if it could not be answered.
  async submit(text) {
    const question = text.trim();
    if (!question) return text;
    const turn = this.add("user", question);
    const answered = await this.answer();
    if (!answered) this.cut(this.turns.indexOf(turn));
    return answered ? "" : text;
  }

  clear() {
    this.cut(0);
  }

  // Streams the next turn. Returns false if nothing came: then there is no turn, and the page says why.
  async answer() {
    const turn = this.add("assistant", "");
    const result = await this.page.whileWriting((signal) => {
      turn.element.classList.add("writing");
      this.list.setAttribute("aria-busy", "true");  // a screen reader reads the answer when it is whole
      const { request, unsent } = this.request(turn);
      turn.unsent = unsent;
      return generate("/v1/chat/completions", request, signal, (text) => following(() => this.write(turn, text)));
    });
    turn.element.classList.remove("writing");
    this.list.setAttribute("aria-busy", "false");
    if (result.problem) this.page.tell(result.problem);
    if (!result.text && !["stop", "length"].includes(result.finish)) {
      this.cut(this.turns.indexOf(turn));
      return false;
    }
    following(() => {
      turn.note.textContent = ending(result);
      const leftOut = result.leftOut ?? 0;
      const reads = leftOut ? `the model reads ${this.data.model.context} tokens` : `the server takes ${this.data.most_messages} messages`;
      this.markLeftOut(turn.unsent + leftOut, reads);
    });
    return true;
  }

  request(before) {
    const said = this.turns.slice(0, this.turns.indexOf(before));
    const system = this.settings.system;
    let unsent = Math.max(0, said.length - (this.data.most_messages - 1));
    while (said[unsent]?.role === "assistant" && unsent > 0) unsent += 1;
    const messages = said.slice(unsent).map(({ role, content }) => ({ role, content }));
    if (system) messages.unshift({ role: "system", content: system });
    return { request: { ...this.settings.request(), messages }, unsent };
  }

  add(role, content) {
    const turn = { role, element: element("article", `turn ${role}`), text: element("p"), note: element("div", "how") };
    const tools = element("div", "tools");
    const copying = button("Copy", "tool", () => copy(turn.content, copying));
    tools.append(copying, button("Edit", "tool", () => this.edit(turn)), button("Retry", "tool retry", () => this.retry(turn)));
    const foot = element("div", "foot");
    foot.append(turn.note, tools);
    turn.element.append(element("h2", "", role === "user" ? "You" : this.data.model.id), turn.text, foot);
    this.turns.push(turn);
    this.write(turn, content);
    following(() => this.list.append(turn.element));
    this.empty.hidden = true;
    return turn;
  }

  write(turn, content) {
    turn.content = content;
    turn.text.textContent = content.trimStart();
  }

  // A question that is edited is asked again, without what came after it. An answer that is edited is read as the model's own.
  async edit(turn) {
    const content = await edited(turn.text, turn.content, turn.role === "user" ? "Send" : "Save");
    if (content === null || !content.trim()) return;
    if (turn.role === "assistant") {
      this.write(turn, content);
      turn.note.textContent = "edited";
      return;
    }
    this.page.tell("");
    this.write(turn, content.trim());
    this.cut(this.turns.indexOf(turn) + 1);
    if (!await this.answer()) turn.note.textContent = "no answer";
  }

  // Answers the last question again. If nothing comes, the answer that was there returns.
  async retry(last) {
    this.page.tell("");
    const isAnswer = last.role === "assistant";
    if (isAnswer) this.cut(this.turns.length - 1);
    if (await this.answer() || !isAnswer) return;
    this.add("assistant", last.content).note.textContent = last.note.textContent;
  }

  cut(length) {
    for (const turn of this.turns.splice(length)) turn.element.remove();
    if (this.divider.nextSibling === null) this.divider.remove();
    this.empty.hidden = this.turns.length > 0;
  }

  markLeftOut(count, reason) {
    this.turns.forEach((turn, i) => turn.element.classList.toggle("unread", i < count));
    this.divider.remove();
    if (count === 0) return;
    const is = count === 1 ? "is" : "are";
    this.divider.textContent = `${counted(count, "earlier message")} ${is} left out: ${reason}`;
    this.turns[count].element.before(this.divider);
  }
}
