// The same prompt to the original and to the model, side by side, and how far one is from the other along each answer.

import { emptyAnswer, figures, firstText, readAnswer, speedOf } from "./answer.js";
import { userMessage } from "./conversation.js";
import { announce, button, follow, make, onceAFrame } from "./elements.js";
import { problem } from "./problem.js";
import { firstDifference, TokenText, visible } from "./tokens.js";

const NOTHING = "–";
const SEEDS = 2 ** 31;

export class Comparison {
  /** `pair`: the original and the model, as the server lists them. */
  constructor(server, place, settings, changed, pair) {
    Object.assign(this, { server, place, settings, changed, pair });
    this.running = null;
  }

  get busy() {
    return this.running !== null;
  }

  send(question) {
    const element = make("div", { class: "turn" });
    this.place.append(element);
    return this.compare(question, element);
  }

  async compare(question, element) {
    if (this.busy) return;
    const controller = new AbortController();
    this.running = controller;
    this.changed();
    const columns = this.pair.map((model) => new Column(model));
    const verdict = make("p", { class: "parting quiet", role: "status" });
    const row = make("div", { class: "columns" }, ...columns.map((column) => column.element));
    element.replaceChildren(userMessage(question), row, verdict);
    element.scrollIntoView({ block: "nearest" });
    const messages = this.settings.messages([{ role: "user", content: question }]);
    // One seed for both: what differs is the models' doing.
    const request = { messages, seed: Math.floor(Math.random() * SEEDS), ...this.settings.choosing() };
    await Promise.all(columns.map((column) => column.read(this.server, request, controller.signal)));
    verdict.textContent = parting(columns);
    if (!controller.signal.aborted) await this.diverge(columns, messages, controller.signal);
    if (this.running === controller) this.running = null;
    const again = button("Try again", () => this.compare(question, element), { class: "again" });
    follow(() => element.append(make("div", { class: "actions" }, again)));
    for (const column of columns) column.end();
    if (columns.every((column) => !column.failed)) announce(columns.map((column) => column.told()).join(". "));
    this.changed();
  }

  async diverge(columns, messages, signal) {
    const [against, model] = this.pair.map((each) => each.id);
    for (const column of columns.filter((each) => each.answer.text)) {
      column.tiles.apart.detail.textContent = "measuring …";
      try {
        const asked = { model, against, messages, answer: column.answer.text };
        column.diverge(await this.server.post("v1/neuroweave/divergence", asked, signal));
      } catch (error) {
        column.tiles.apart.detail.textContent = "not measured";
        if (!signal.aborted) column.element.append(problem(error));
      }
    }
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.running = null;
    this.place.replaceChildren();
    this.changed();
  }
}

/** One model's answer. */
class Column {
  constructor(model) {
    this.model = model;
    this.answer = emptyAnswer();
    this.failed = false;
    this.stopped = false;
    this.tokens = new TokenText(model.id);
    this.tiles = {
      speed: tile("tokens/s"),
      first: tile("first text after, s"),
      count: tile("tokens"),
      apart: tile("mean KL, nats", "KL(original ‖ model) of the predictions along this text"),
    };
    const tiles = make("div", { class: "tiles" }, ...Object.values(this.tiles).map((each) => each.element));
    const role = make("span", { class: "mark", text: model.role });
    const name = make("h3", { class: "who" }, make("bdi", { text: model.id }), " ", role);
    const label = { "aria-label": `${model.id}, ${model.role}`, "aria-busy": "true" };
    this.element = make("article", { class: `card column ${model.role} busy`, ...label }, name, tiles);
    this.element.append(this.tokens.element, this.tokens.readout);
    this.grew = onceAFrame(() => follow(() => this.draw(false)));
  }

  async read(server, request, signal) {
    try {
      await readAnswer(server, { ...request, model: this.model.id }, this.answer, signal, this.grew);
    } catch (error) {
      this.stopped = signal.aborted;
      this.failed = !this.stopped;
      if (this.failed) this.element.append(problem(error));
    }
    this.element.classList.remove("busy");
    this.draw(true);
  }

  draw(last) {
    this.tokens.put(this.answer.text, this.answer.tokens, last);
    const [speed, first] = [speedOf(this.answer), firstText(this.answer)];
    this.tiles.speed.value.textContent = speed === null ? NOTHING : figures(speed);
    this.tiles.first.value.textContent = first === null ? NOTHING : figures(first);
    this.tiles.count.value.textContent = this.answer.tokens.length;
    const why = this.stopped ? "stopped" : this.answer.finish === "length" ? "at the limit" : "";
    this.tiles.count.detail.textContent = why;
  }

  diverge(result) {
    this.tokens.diverge(result);
    this.tiles.apart.value.textContent = figures(result.mean_kl);
    this.tiles.apart.detail.textContent = "along this text";
  }

  end() {
    this.element.removeAttribute("aria-busy");
  }

  told() {
    return `${this.model.id}${this.stopped ? " was stopped" : ""}: ${this.answer.text || "no text"}`;
  }
}

function tile(label, title) {
  const value = make("b", { text: NOTHING });
  const detail = make("small");
  const element = make("div", { class: "tile", title }, make("small", { text: label }), value, detail);
  return { element, value, detail };
}

/** Marks where the answers part, and says it. */
function parting(columns) {
  const [one, other] = columns.map((column) => column.answer.tokens);
  if (columns.some((column) => column.failed)) return "";
  const at = firstDifference(one, other);
  columns.forEach((column) => column.tokens.differ(at));
  if (at === null) return one.length ? "Both answers are the same, token by token." : "";
  if (at === Math.min(one.length, other.length)) return `The same for ${at} tokens; then only one goes on.`;
  const same = at === 1 ? "token is" : `${at} tokens are`;
  const alike = at ? `The first ${same} the same; then the answers part` : "The answers differ from the first token";
  return `${alike}: “${visible(one[at].token)}” and “${visible(other[at].token)}”.`;
}
