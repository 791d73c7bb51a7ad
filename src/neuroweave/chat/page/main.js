// The page: finds out what the server serves, and gives what is typed to the chat or to the comparison.

import { Comparison } from "./compare.js";
import { Conversation } from "./conversation.js";
import { announce } from "./elements.js";
import { askForKey } from "./key.js";
import { problem } from "./problem.js";
import { Server } from "./server.js";
import { Settings } from "./settings.js";

const find = (selector) => document.querySelector(selector);
const form = find("#composer");
const field = form.elements.message;
const server = new Server(askForKey);
const views = {}; // chat, and compare where there are two models
let shown = "chat";

async function start() {
  find("#welcome .problem")?.remove();
  try {
    const [health, models] = await Promise.all([server.get("health"), server.get("v1/models")]);
    open(models.data, health);
  } catch (error) {
    find("#welcome").append(problem(error, start));
  }
}

function open(models, { search, new_tokens }) {
  const settings = new Settings(form, models, new_tokens);
  const pair = ["original", "model"].map((role) => models.find((model) => model.role === role));
  views.chat = new Conversation(server, find("#chat .turns"), settings, changed);
  if (pair.every(Boolean)) views.compare = new Comparison(server, find("#compare .turns"), settings, changed, pair);
  find("nav").hidden = !views.compare;
  find("#searching").hidden = search === null;
  find("#searching").title = search ?? "";
  find("#searching span").textContent = `Search ${search}`;
  find("#served").textContent = models.map((model) => model.id).join(" · ");
  document.title = `${models[0].id} · Neuroweave`;
  const other = views.compare ? `, or compare it with ${pair[0].id}` : "";
  find("#welcome-text").textContent = `Write to ${models[0].id}${other}.`;
  form.elements.send.disabled = false;
  turnTo();
}

/** The view that the address names. */
function turnTo() {
  const wanted = location.hash.slice(1) || "chat";
  if (Object.hasOwn(views, wanted)) shown = wanted;
  for (const view of ["chat", "compare"]) {
    find(`#${view}`).hidden = view !== shown;
    find(`nav a[href="#${view}"]`).setAttribute("aria-current", view === shown ? "page" : "false");
  }
  field.placeholder = shown === "chat" ? "Write a message" : "Write a prompt for both";
  changed();
}

function changed() {
  const busy = views[shown]?.busy ?? false;
  const here = document.activeElement;
  form.elements.send.hidden = busy;
  form.elements.stop.hidden = !busy;
  find("#searching").classList.toggle("away", shown !== "chat");
  find("#welcome").hidden = find(`#${shown} .turns`).childElementCount > 0;
  if (here === form.elements.send || here === form.elements.stop) field.focus(); // it may be hidden now
}

function send() {
  const text = field.value.trim();
  const view = views[shown];
  if (!view || view.busy || !text || !view.settings.valid()) return;
  field.value = "";
  view.send(text);
}

function stop() {
  views[shown]?.stop();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
form.elements.stop.addEventListener("click", stop);
field.addEventListener("keydown", (event) => {
  const writing = event.isComposing || event.keyCode === 229; // Enter ends a word of an input method
  const touched = matchMedia("(hover: none) and (pointer: coarse)").matches; // such a keyboard has no other new line
  if (event.key !== "Enter" || event.shiftKey || writing || touched) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !find("#key").open) stop();
});
find("#new").addEventListener("click", () => {
  views[shown]?.clear();
  announce("A new chat");
  field.focus();
});
for (const name of ["confidence", "divergence"]) {
  const box = find(`#show-${name}`);
  box.addEventListener("change", () => find("#compare").classList.toggle(`no-${name}`, !box.checked));
}
window.addEventListener("hashchange", turnTo);
start();
