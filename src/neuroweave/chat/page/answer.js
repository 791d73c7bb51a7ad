// One answer as it comes: its text, its tokens, when they came, and what it stands on.

/** An answer of which nothing has come. Times are milliseconds of the page's clock. */
export function emptyAnswer() {
  return {
    text: "", tokens: [], usage: null, finish: null, grounded: null,
    sent: performance.now(), first: null, firstTokens: 0, last: null,
  };
}

/** Reads a streamed reply into `answer`; calls `grew` whenever there is more of it. Throws as Server.stream does. */
export async function readAnswer(server, request, answer, signal, grew) {
  const asked = { ...request, logprobs: true, stream_options: { include_usage: true } };
  for await (const chunk of server.stream("v1/chat/completions", asked, signal)) {
    answer.usage = chunk.usage ?? answer.usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    const tokens = choice.logprobs?.content ?? [];
    if (choice.delta.content || tokens.length) {
      answer.last = performance.now();
      if (answer.first === null) {
        answer.first = answer.last;
        answer.firstTokens = tokens.length;
      }
    }
    answer.text += choice.delta.content ?? "";
    answer.tokens.push(...tokens);
    answer.grounded = choice.delta.neuroweave ?? answer.grounded;
    answer.finish = choice.finish_reason ?? answer.finish;
    grew();
  }
}

/** Tokens a second after the first text was there; null: there is too little to tell. */
export function speedOf(answer) {
  const tokens = answer.tokens.length - answer.firstTokens;
  return tokens > 0 && answer.last > answer.first ? (1000 * tokens) / (answer.last - answer.first) : null;
}

/** Seconds until the first text came; null: none has. */
export function firstText(answer) {
  return answer.first === null ? null : (answer.first - answer.sent) / 1000;
}

/** What can be said of an answer in a line. */
export function factsOf(answer) {
  const facts = [`${answer.tokens.length} ${answer.tokens.length === 1 ? "token" : "tokens"}`];
  if (speedOf(answer) !== null) facts.push(`${figures(speedOf(answer))} tokens/s`);
  if (firstText(answer) !== null) facts.push(`first text after ${figures(firstText(answer))} s`);
  if (answer.finish === "length") facts.push("ended by the limit of new tokens");
  return facts;
}

/** A number to three figures. */
export function figures(number) {
  return number >= 100 ? String(Math.round(number)) : String(Number(number.toPrecision(number < 0.01 ? 1 : 3)));
}

export function percent(probability) {
  const share = 100 * probability;
  return `${share >= 99.95 ? "100" : share < 0.1 ? "< 0.1" : share.toFixed(share < 10 ? 1 : 0)} %`;
}
