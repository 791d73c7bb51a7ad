// Server-sent events, read by hand: the browser's own EventSource can only GET.
// https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation

/** The data of each event of a stream of bytes, however the bytes are cut. An event that is not ended is dropped. */
export async function* eventsOf(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      held += decoder.decode(value ?? new Uint8Array(), { stream: !done });
      // A \r at the very end may be half of a \r\n.
      const lines = held.split(/\r\n|\n|\r(?!$)/);
      held = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) {
        if (held === "\r" && data.length) yield data.join("\n");
        return;
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // whoever stops reading ends the request
  }
}
