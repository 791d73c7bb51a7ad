// Requests to the server that this page came from, and what its refusals mean to a person.

import { eventsOf } from "./events.js";

const KEY = "neuroweave-api-key"; // in sessionStorage: gone with the tab

/** The server said no. `status`: of HTTP; 0: it broke off in the middle of an answer. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** `askForKey(refused)`: gives a key, or null. It is asked for when the server wants one. */
export class Server {
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.asking = null;
  }

  async get(path) {
    return (await this.send(path, {})).json();
  }

  async post(path, content, signal) {
    return (await this.send(path, posted(content, signal))).json();
  }

  /** The chunks of a streamed reply. Throws Refusal for an error in its middle, and for an end before its end. */
  async *stream(path, content, signal) {
    const response = await this.send(path, posted({ ...content, stream: true }, signal));
    let done = false;
    for await (const data of eventsOf(response.body)) {
      done ||= data === "[DONE]";
      if (done) continue; // up to its end, so that the connection can be used again
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(0, chunk.error.message);
      yield chunk;
    }
    if (!done) throw new Refusal(0, "the connection ended before the answer did");
  }

  async send(path, options) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
      const response = await fetch(path, { ...options, headers });
      if (response.ok) return response;
      const refusal = new Refusal(response.status, await messageOf(response));
      if (response.status !== 401 || !(await this.newKey(key))) throw refusal;
    }
  }

  /** Whether there is another key than the one that was refused. Asked for once, however many requests want it. */
  async newKey(refused) {
    if (sessionStorage.getItem(KEY) !== refused) return true;
    this.asking ??= this.askForKey(refused !== null).finally(() => (this.asking = null));
    const key = await this.asking;
    if (key !== null) sessionStorage.setItem(KEY, key);
    return key !== null;
  }
}

function posted(content, signal) {
  return { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(content), signal };
}

async function messageOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300) || response.statusText; // of a proxy in between
  }
}

/** An error as {title, detail}. */
export function explained(error) {
  if (!(error instanceof Refusal)) {
    const gone = "Is it still running? A very long message can also be the cause.";
    return error instanceof TypeError
      ? { title: "The server cannot be reached.", detail: gone }
      : { title: "This page failed.", detail: String(error) };
  }
  const titles = {
    0: "The answer broke off:",
    400: "The server cannot answer this:",
    401: "The server wants its API key:",
    408: "The server did not get the message in time:",
    413: "This message is too long for the server:",
    429: "The server is busy:",
  };
  return { title: titles[error.status] ?? `The server failed (${error.status}):`, detail: error.message };
}
