// One answer of POST v1/chat/completions, streamed. Nothing here touches the page.

/** An answer that the server refused, or broke off. */
export class ServerError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** What a response that is no success says, in words for people. */
export async function refusal(response) {
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // A proxy's page, say; the status is all there is.
  }
  const retry = response.headers.get("retry-after");
  const message = told.message ?? `the server answered with status ${response.status}`;
  return new ServerError(response.status, retry && !told.message ? `${message}; try again in ${retry} s` : message, told.code);
}

/** The payloads of a stream of server-sent events, as they come; "[DONE]" ends it. */
async function* payloads(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError(0, "the connection broke before the answer's end; what you see was checked, but it is not whole");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Asks, and calls `onText` with each checked piece, `onThought` with each of the thoughts before it, where these are shown.
 * Returns { text, finishReason, refusal, trace, policy }; trace is null where the server keeps it to itself.
 */
export async function ask(body, headers, signal, onText, onThought) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  const answer = { text: "", finishReason: null, refusal: null, trace: null, policy: response.headers.get("x-tta-policy") };
  for await (const chunk of payloads(response.body)) {
    if (chunk.error) throw new ServerError(0, chunk.error.message, chunk.error.code);
    if (chunk.tta) answer.trace = chunk.tta;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    if (choice.delta.reasoning_content) onThought(choice.delta.reasoning_content);
    if (choice.delta.content) {
      answer.text += choice.delta.content;
      onText(choice.delta.content);
    }
    answer.refusal = choice.delta.refusal ?? answer.refusal;
    answer.finishReason = choice.finish_reason ?? answer.finishReason;
  }
  return answer;
}
