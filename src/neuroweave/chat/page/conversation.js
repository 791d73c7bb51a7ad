// The chat: what was said, one answer at a time.

import { emptyAnswer, readAnswer } from "./answer.js";
import { make } from "./elements.js";
import { Reply } from "./reply.js";
import { withoutCitations } from "./sources.js";

export class Conversation {
  /** `changed`: called when an answer begins and ends. */
  constructor(server, place, settings, changed) {
    Object.assign(this, { server, place, settings, changed });
    this.turns = []; // {question, said, element, reply}: `said` is what later answers are shown; null: it failed
    this.running = null;
  }

  get busy() {
    return this.running !== null;
  }

  send(question) {
    this.turns.at(-1)?.reply.settle();
    const turn = { question, said: null, element: make("div", { class: "turn" }, userMessage(question)), reply: null };
    this.turns.push(turn);
    this.place.append(turn.element);
    return this.answer(turn);
  }

  async answer(turn) {
    if (this.busy) return;
    const controller = new AbortController();
    this.running = controller;
    this.changed();
    turn.reply?.element.remove();
    const answer = emptyAnswer();
    const searching = this.settings.searches;
    const reply = new Reply(this.settings.model, answer, searching ? "Searching …" : "Reading …");
    turn.reply = reply;
    turn.element.append(reply.element);
    turn.element.scrollIntoView({ block: "end" });
    const outcome = { again: () => this.answer(turn) };
    try {
      await readAnswer(this.server, this.request(turn, searching), answer, controller.signal, reply.grew);
    } catch (error) {
      if (controller.signal.aborted) outcome.stopped = true;
      else outcome.error = error;
    }
    turn.said = outcome.error || !answer.text ? null : withoutCitations(answer.text, answer.grounded);
    if (this.running === controller) this.running = null;
    this.changed();
    reply.end(outcome);
  }

  /** Questions without an answer are left out of what the model is shown: templates want turns to alternate. */
  request(turn, searching) {
    const before = this.turns.slice(0, this.turns.indexOf(turn)).filter((each) => each.said !== null);
    const messages = before.flatMap(({ question, said }) => [
      { role: "user", content: question },
      { role: "assistant", content: said },
    ]);
    messages.push({ role: "user", content: turn.question });
    const request = { model: this.settings.model, messages: this.settings.messages(messages) };
    return { ...request, ...this.settings.choosing(), ...(searching && { web_search_options: {} }) };
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.running = null;
    this.turns = [];
    this.place.replaceChildren();
    this.changed();
  }
}

export function userMessage(text) {
  return make("article", { class: "message user", "aria-label": "You" }, make("p", { dir: "auto", text }));
}
