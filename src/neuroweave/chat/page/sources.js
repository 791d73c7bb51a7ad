// What an answer stands on: a card for each source, and links to them from the text.

import { button, make } from "./elements.js";

const LONG = 220; // characters of an excerpt that are shown at once

/** The address as a link's, or null: only the web's addresses can be followed, not a path or a script. */
export function webAddress(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:"].includes(url.protocol) ? url : null;
  } catch {
    return null;
  }
}

/** `text`: the answer's, with citations. `prefix`: makes the cards' ids unique on the page. */
export function sourceCards(grounded, text, prefix) {
  if (!grounded.sources.length) return null;
  const cited = grounded.cited ?? [...text.matchAll(/\[(\d{1,3})\]/g)].map((mark) => Number(mark[1])); // it was stopped
  const cards = grounded.sources.map((source) => card(source, cited.includes(source.number), prefix));
  const heading = make("h4", { text: "Sources" });
  return make("section", { class: "sources", "aria-label": "Sources" }, heading, make("ol", {}, ...cards));
}

function card(source, cited, prefix) {
  const url = webAddress(source.address);
  const title = source.title || source.address;
  const name = url
    ? make("a", { href: url.href, rel: "noopener noreferrer", target: "_blank", dir: "auto", text: title })
    : make("span", { dir: "auto", text: title });
  const place = [make("bdi", { text: url ? url.host : source.address })];
  if (source.date) place.push(` · ${source.date}`);
  if (!cited) place.push(" · ", make("span", { class: "mark", text: "not cited" }));
  const text = make("p", { class: "excerpt", dir: "auto", text: excerptOf(source) });
  const number = make("span", { class: "number", "aria-hidden": "true", text: source.number });
  const parts = [number, make("b", {}, name), make("small", {}, ...place), text];
  if (source.text.length > LONG) parts.push(opener(text));
  const made = make("li", { class: cited ? "source" : "source uncited", value: source.number }, ...parts);
  return Object.assign(made, { id: cardId(prefix, source.number), tabIndex: -1 }); // a citation moves the focus here
}

/** A source's text, close together, its paragraphs in one line each, and without its title once more. */
function excerptOf(source) {
  const text = source.text.trim().replace(/([^\n]{60,})\n(?=[\p{L}\p{N}("])/gu, "$1 ").replace(/\n\s*\n/g, "\n");
  return text.startsWith(`${source.title}\n`) ? text.slice(source.title.length).trim() : text;
}

function opener(text) {
  text.classList.add("cut");
  const made = button("Show all", () => {
    const cut = text.classList.toggle("cut");
    made.textContent = cut ? "Show all" : "Show less";
    made.setAttribute("aria-expanded", String(!cut));
  }, { class: "plain", "aria-expanded": "false" });
  return made;
}

/** For drawProse: a [number] as a link to its card; null where there is no such card. */
export function citations(grounded, prefix) {
  const titles = new Map(grounded.sources.map((source) => [source.number, source.title || source.address]));
  return (number) => {
    if (!titles.has(number)) return null;
    const title = titles.get(number);
    const link = make("a", { class: "citation", "aria-label": `Source ${number}: ${title}`, title });
    link.textContent = `[${number}]`;
    link.href = `#${cardId(prefix, number)}`;
    link.addEventListener("click", (event) => {
      event.preventDefault(); // the address is for the views
      const target = document.getElementById(cardId(prefix, number));
      target.scrollIntoView({ block: "nearest" });
      target.focus();
    });
    return link;
  };
}

function cardId(prefix, number) {
  return `${prefix}-source-${number}`;
}

/** What a person should know of the search. */
export function noticesOf(grounded) {
  const removed = (grounded.removed_citations ?? []).map((number) => `[${number}]`).join(", ");
  return [...grounded.notices, ...(removed ? [`Taken out, since it points to no source: ${removed}`] : [])];
}

/** An answer without the numbers that point to sources: what the model is shown of it later. */
export function withoutCitations(text, grounded) {
  const numbers = new Set((grounded?.sources ?? []).map((source) => source.number));
  const without = (prose) => prose.replace(/ ?\[(\d{1,3})\]/g, (mark, number) => (numbers.has(Number(number)) ? "" : mark));
  const parts = text.split(/(^\s*```[^]*?(?:^\s*```|$(?![^]))|`[^`\n]*`)/m); // code is every second
  return parts.map((part, place) => (place % 2 ? part : without(part))).join("");
}
