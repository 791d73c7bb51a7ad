// What a person sets for all messages that follow. An empty field leaves it to the model or the server.

import { make } from "./elements.js";

export class Settings {
  /** `models`: as the server lists them. `newTokens`: of one answer, at most. */
  constructor(form, models, newTokens) {
    this.form = form;
    this.models = models;
    const choice = form.elements.model;
    choice.replaceChildren(...models.map((model) => make("option", { value: model.id, text: model.id })));
    choice.closest(".field").hidden = models.length < 2;
    const longest = form.elements.max_tokens;
    longest.max = newTokens;
    longest.value = Math.min(newTokens, longest.value || newTokens);
  }

  get model() {
    return this.form.elements.model.value;
  }

  get searches() {
    return this.form.elements.search.checked;
  }

  /** The messages with the system message before them. */
  messages(messages) {
    const system = this.form.elements.system.value.trim();
    return system ? [{ role: "system", content: system }, ...messages] : messages;
  }

  /** The fields of a request that say how tokens are chosen. */
  choosing() {
    const found = {};
    for (const name of ["temperature", "max_tokens", "seed"]) {
      const value = this.form.elements[name].value;
      if (value !== "") found[name] = Number(value);
    }
    return found;
  }

  /** Whether all fields can be sent; where one cannot, it is shown. */
  valid() {
    if (this.form.checkValidity()) return true;
    this.form.querySelector("#settings").open = true; // what is hidden cannot be complained about
    this.form.reportValidity();
    return false;
  }
}
