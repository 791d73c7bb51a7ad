// An answer in the conversation: its text with citations, its tokens, its sources, and what can be done with it.

import { factsOf } from "./answer.js";
import { announce, button, make, onceAFrame, follow } from "./elements.js";
import { problem } from "./problem.js";
import { drawProse } from "./prose.js";
import { citations, noticesOf, sourceCards } from "./sources.js";
import { TokenText } from "./tokens.js";

let replies = 0;

export class Reply {
  /** `waiting`: what is said before any text has come. */
  constructor(model, answer, waiting) {
    this.model = model;
    this.answer = answer;
    this.id = `reply-${(replies += 1)}`;
    this.prose = make("div", { class: "prose" });
    this.facts = make("p", { class: "facts quiet", text: waiting });
    const name = make("h3", { class: "who", text: model });
    const label = { "aria-label": model, "aria-busy": "true" };
    this.element = make("article", { class: "message reply busy", ...label }, name, this.prose, this.facts);
    this.grew = onceAFrame(() => this.element.classList.contains("busy") && follow(() => this.draw()));
  }

  draw(options) {
    drawProse(this.prose, this.answer.text, options);
    if (this.answer.text) this.facts.textContent = "";
    else if (this.answer.grounded) this.facts.textContent = "Reading …"; // the search is over
  }

  /** Called once, however the answer ended. `again`: writes it anew. */
  end({ stopped = false, error = null, again }) {
    this.element.classList.remove("busy");
    this.element.removeAttribute("aria-busy");
    follow(() => {
      const grounded = this.answer.grounded;
      this.draw(grounded ? { cite: citations(grounded, this.id), fresh: true } : {});
      const facts = this.answer.tokens.length || !error ? factsOf(this.answer) : [];
      if (stopped) facts.push("stopped");
      this.facts.textContent = facts.join(" · ");
      if (grounded) {
        const notices = noticesOf(grounded).map((notice) => make("p", { class: "notice", dir: "auto", text: notice }));
        this.facts.before(...notices, ...[sourceCards(grounded, this.answer.text, this.id)].filter(Boolean));
      }
      if (error) this.element.append(problem(error, again));
      this.element.append(this.actions(error ? null : again));
    });
    if (!error) announce(`${this.model}${stopped ? " was stopped" : ""}: ${this.answer.text || "no text"}`);
  }

  actions(again) {
    const row = make("div", { class: "actions" });
    if (this.answer.text && navigator.clipboard) row.append(button("Copy", (event) => this.copy(event.target)));
    const toggle = (event) => this.toggle(event.target);
    if (this.answer.tokens.length) row.append(button("Tokens", toggle, { "aria-pressed": "false" }));
    if (again) row.append(button("Try again", again, { class: "again" }));
    return row;
  }

  async copy(pressed) {
    const copied = await navigator.clipboard.writeText(this.answer.text).then(() => "Copied", () => "Not allowed");
    pressed.textContent = copied;
    announce(copied);
    setTimeout(() => (pressed.textContent = "Copy"), 1500);
  }

  /** The text as prose, or token by token. */
  toggle(pressed) {
    if (!this.tokens) {
      this.tokens = new TokenText(this.model);
      this.tokens.put(this.answer.text, this.answer.tokens, true);
      this.prose.after(make("div", { class: "shaded" }, this.tokens.element, this.tokens.readout));
    }
    const shown = pressed.getAttribute("aria-pressed") === "false";
    pressed.setAttribute("aria-pressed", String(shown));
    this.prose.hidden = shown;
    this.tokens.element.parentElement.hidden = !shown;
  }

  /** It is not the last answer any more. */
  settle() {
    for (const each of this.element.querySelectorAll(".again")) each.remove();
  }
}
