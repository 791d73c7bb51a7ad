// An answer token by token: how sure the model was of each, and how far another model would have been from it.

import { percent, figures } from "./answer.js";
import { make } from "./elements.js";

const SURE = [0.9, 0.5, 0.2, 0.05]; // probabilities: level 0 is above the first, level 4 below the last
const APART = [0.01, 0.1, 0.5, 2]; // nats: level 0 is below the first, level 4 above the last
const HOW =
  "The stronger its shade, the less probable a token was. Point at one, or go through them with the arrow keys.";
const AHEAD = 8; // tokens that are looked at to find the place in the text again
const WIDE = 24; // characters that a token has at most, where that has to be guessed

/**
 * Which part of a text each token is. Characters of several tokens, a space that a decoder takes away and citations
 * that were put in make the texts of the tokens differ from the text; there, several tokens share one part.
 */
export class Parts {
  constructor() {
    this.parts = []; // {start, text, first, tokens}: `first` is the number of its first token
    this.at = 0; // characters that have their part
    this.next = 0; // tokens that have theirs
  }

  /** The parts that are new, of a text and tokens that have grown; `last`: they will not grow any more. */
  put(text, tokens, last) {
    const known = this.parts.length;
    while (this.next < tokens.length) {
      const [count, end] = this.step(text, tokens, last);
      if (count === 0) break;
      const part = { start: this.at, text: text.slice(this.at, end), first: this.next };
      part.tokens = tokens.slice(this.next, this.next + count);
      if (part.text) this.parts.push(part); // a token that ends a text has none
      this.at = end;
      this.next += count;
    }
    return this.parts.slice(known);
  }

  /** [tokens, end of their text] of the next part; no tokens: more has to come first. */
  step(text, tokens, last) {
    const whole = tokens[this.next].token;
    const token = this.at === 0 && !text.startsWith(whole) ? whole.trimStart() : whole;
    if (clean(token) && text.startsWith(token, this.at)) return [1, this.at + token.length];
    if (!last && token.startsWith(text.slice(this.at))) return [0, this.at];
    for (let ahead = 1; ahead <= AHEAD && this.next + ahead < tokens.length; ahead += 1) {
      const other = tokens[this.next + ahead].token;
      const found = clean(other) ? text.indexOf(other, this.at) : -1;
      if (found >= 0 && found - this.at <= WIDE * ahead) return [ahead, found];
    }
    return last ? [tokens.length - this.next, text.length] : [0, this.at];
  }
}

function clean(token) {
  return token !== "" && !token.includes("\ufffd");
}

/** The number of the first token that two answers do not share; null: they are the same. */
export function firstDifference(one, other) {
  const length = Math.max(one.length, other.length);
  for (let at = 0; at < length; at += 1) {
    if (one[at]?.token !== other[at]?.token) return at;
  }
  return null;
}

/** An answer's tokens on the page. The arrow keys go through them; what is known of one is shown in `readout`. */
export class TokenText {
  constructor(name) {
    this.parts = new Parts();
    this.spans = [];
    this.current = -1;
    this.divergence = null;
    this.rest = document.createTextNode(""); // text whose tokens are not told apart yet
    this.readout = make("p", { class: "readout quiet", role: "status", text: HOW });
    const label = { "aria-label": `Tokens of ${name}; the arrow keys go through them` };
    this.element = make("div", { class: "tokens", role: "group", dir: "auto", tabIndex: 0, ...label }, this.rest);
    this.element.addEventListener("pointerover", (event) => this.show(this.spans.indexOf(event.target)));
    this.element.addEventListener("click", (event) => this.show(this.spans.indexOf(event.target)));
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.element.addEventListener("blur", () => this.unmark());
  }

  put(text, tokens, last) {
    for (const part of this.parts.put(text, tokens, last)) {
      const doubt = level(probabilityOf(part), SURE, true);
      const span = make("span", { class: "token", "data-doubt": doubt, text: part.text });
      this.spans.push(span);
      this.rest.before(span);
      this.describe(this.spans.length - 1);
    }
    this.rest.data = text.slice(this.parts.at);
  }

  /** `result`: of the server, along this text. */
  diverge(result) {
    const theirs = new Parts();
    const text = this.parts.parts.map((part) => part.text).join("");
    theirs.put(text, result.tokens, true);
    this.divergence = this.parts.parts.map((part) => {
      const end = part.start + part.text.length;
      const within = theirs.parts.filter((each) => each.start >= part.start && each.start < end);
      return within.length ? summed(within.flatMap((each) => each.tokens)) : null; // it is in a longer token of theirs
    });
    this.names = [result.model, result.against];
    this.spans.forEach((span, place) => {
      const found = this.divergence[place];
      if (found) span.dataset.apart = level(found.kl, APART, false);
      this.describe(place);
    });
  }

  /** Marks the token of this number as the first that another answer does not have. Null: the mark goes. */
  differ(token) {
    this.element.querySelector(".differs")?.classList.remove("differs");
    if (token === null) return;
    const place = this.parts.parts.findIndex((part) => part.first + part.tokens.length > token);
    if (place < 0) return;
    this.spans[place].classList.add("differs");
    this.describe(place);
  }

  describe(place) {
    const part = this.parts.parts[place];
    const facts = [`probability ${percent(probabilityOf(part))}`];
    const found = this.divergence?.[place];
    if (found) {
      const [model, against] = [found.logprob, found.logprob_against].map((logprob) => percent(Math.exp(logprob)));
      facts[0] = `probability ${model} in ${this.names[0]}, ${against} in ${this.names[1]}`;
      facts.push(`KL ${figures(found.kl)} nats`);
    }
    if (part.tokens.length > 1) facts.push(`${part.tokens.length} tokens`);
    if (this.spans[place].classList.contains("differs")) facts.push("here the answers part");
    this.spans[place].title = `“${visible(part.text)}”: ${facts.join("; ")}`;
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const ends = { Home: 0, End: this.spans.length - 1 }[event.key];
    if ((step === undefined && ends === undefined) || !this.spans.length) return;
    event.preventDefault();
    this.show(ends ?? Math.min(this.spans.length - 1, Math.max(0, this.current + step)));
    this.spans[this.current].scrollIntoView({ block: "nearest" });
  }

  show(place) {
    if (place < 0) return;
    this.unmark();
    this.current = place;
    this.spans[place].classList.add("current");
    this.readout.textContent = this.spans[place].title;
  }

  unmark() {
    this.spans[this.current]?.classList.remove("current");
  }
}

function probabilityOf(part) {
  return Math.exp(part.tokens.reduce((sum, token) => sum + (token.logprob ?? 0), 0));
}

function summed(tokens) {
  const sum = (name) => tokens.reduce((total, token) => total + token[name], 0);
  return { kl: sum("kl"), logprob: sum("logprob"), logprob_against: sum("logprob_against") };
}

function level(value, limits, falling) {
  const passed = limits.findIndex((limit) => (falling ? value >= limit : value < limit));
  return passed < 0 ? limits.length : passed;
}

/** A token as it can be told of: white space alone is named by signs. */
export function visible(text) {
  const signs = text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return signs.trim() || signs.replaceAll(" ", "␣");
}
