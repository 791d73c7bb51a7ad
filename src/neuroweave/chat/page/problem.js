// An error as a part of the conversation.

import { button, make } from "./elements.js";
import { explained } from "./server.js";

export function problem(error, again) {
  const { title, detail } = explained(error);
  return make(
    "div", { class: "problem", role: "alert" },
    make("div", { dir: "auto" }, make("b", { text: title }), " ", make("span", { text: detail })),
    again && button("Try again", again, { class: "again" }),
  );
}
