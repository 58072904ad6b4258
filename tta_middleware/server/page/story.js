// What happened to an answer, drawn from its trace. The trace holds no text, and all words go in as text nodes.

const OUTCOMES = {
  clean: ["Clean", "The model's own answer, unchanged."],
  neutralised: ["Repaired", "The model's answer was flagged and withheld; this is another answer of the same model."],
  blocked: ["Blocked", "Nothing safe and usable was found, so the notice stands in."],
  unanswered: ["No answer", "The model thought and never answered; let it say more, or think less."],
  unchecked: ["Unchecked", "The moderator gave no verdict, and the policy let the answer pass."],
};

/** An element with a class and children; strings become text nodes. */
export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export const number = (value, digits = 2) => Number(value).toFixed(digits);
const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

/** The strip and its words, or a line where the server tells nothing. */
export function story({ trace, policy, finishReason }) {
  if (!trace) return element("div", "story", "This server keeps its scores to itself.");
  const [name, meaning] = OUTCOMES[trace.outcome] ?? [trace.outcome, ""];
  const box = element("section", "story");
  const drawn = lanes(trace);
  box.setAttribute("aria-label", `What happened: ${name}`);
  box.append(
    element("div", "head", ...badges(trace, name), scores(trace), element("span", "cost", cost(trace))),
    ...drawn,
  );
  const tried = repair(trace);
  if (tried) box.append(tried);
  const cut = finishReason === "length" ? " It ends where it reached the longest that was allowed." : "";
  const legend = drawn.length ? " Bars: the score of each checked window; dashed: where it is flagged." : "";
  box.append(element("p", "told hint", meaning + cut + legend), details(trace, policy));
  return box;
}

/** The outcome, and a mark where the policy withholds nothing. */
function badges(trace, name) {
  const outcome = element("span", `badge ${trace.outcome}`, name);
  if (trace.mode !== "observe") return [outcome];
  const seen = trace.observed.length ? `: ${trace.observed.join(", ")}` : "";
  return [outcome, element("span", "badge observed", `Observed only${seen}`)];
}

function scores(trace) {
  const { baseline, final } = trace;
  if (!baseline) return element("span", "", trace.stop_reason);
  if (trace.outcome === "neutralised" && final) {
    return element("span", "", `score ${number(baseline.score)} before, ${number(final.score)} after`);
  }
  return element("span", "", `score ${number(baseline.score)}`);
}

const cost = (trace) =>
  [
    count(trace.generations, "answer"),
    count(trace.generated_tokens, "token"),
    count(trace.moderation_calls, "check"),
    `${number(trace.seconds, 1)} s`,
  ].join(" · ");

/** Lanes of the thoughts, which have positions of their own, then of the answer. */
const lanes = (trace) => ["reasoning", "answer"].flatMap((channel) => channelLanes(trace, channel));

/** A lane for the model's own answer, and one per repair that was given out; all on the same scale. */
function channelLanes(trace, channel) {
  const checked = trace.windows.filter((window) => window.channel === channel);
  const length = Math.max(1, ...checked.map((window) => window.end));
  const repairs = [...new Set(checked.map((window) => window.repair))].sort((a, b) => a - b);
  const drawn = repairs.flatMap((index) => lane(checked, index, length));
  if (drawn.length) {
    drawn.push(element("div", "axis", element("span", "", "0"), element("span", "", count(length, "character"))));
  }
  return drawn;
}

/** What a lane or a row is of. */
function part(window) {
  const thoughts = window.channel === "reasoning";
  if (!window.repair) return thoughts ? "Thoughts" : "First answer";
  return `Repair ${window.repair}${thoughts ? ", thoughts" : ""}`;
}

function lane(checked, index, length) {
  const windows = checked.filter((window) => window.repair === index);
  const flagged = windows.find((window) => window.flagged);
  const unscored = windows.find((window) => window.score === null);
  const begin = index === 0 ? 0 : leftBefore(checked, index);
  const title = element("div", "lane-name", element("span", "", part(windows[0])));
  if (flagged) title.append(element("span", "found", `⚑ ${flagged.category} at ${flagged.released}–${flagged.end}, withheld`));
  if (unscored) title.append(element("span", "found", `no verdict at ${unscored.released}–${unscored.end}`));
  const box = element("div", "lane");
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", spoken(windows));
  if (begin > 0) box.append(placed("kept", 0, begin, length, "had left before, and stays"));
  if (flagged) box.append(placed("withheld", flagged.released, flagged.end, length, "withheld"));
  let at = begin;
  for (const window of windows) {
    box.append(...bars(window, Math.min(at, window.end), length));
    at = window.end;
  }
  if (at < length) box.append(limitLine(windows.at(-1), at, length, length));
  const last = windows.at(-1);
  const limit = element("span", "limit-name", number(last.limit));
  limit.style.bottom = `calc(${100 * last.limit}% + 3px)`;
  if (last.limit > 0.8) limit.style.bottom = `calc(${100 * last.limit}% - 14px)`;
  box.append(limit);
  return [title, box];
}

/** How far the answer had left when a repair began: the release of the flagged window before it. */
function leftBefore(checked, index) {
  const before = checked.filter((window) => window.repair < index && window.flagged);
  return before.length ? before.at(-1).released : 0;
}

function bars(window, begin, length) {
  const bar = placed(`bar ${kind(window)}`, begin, window.end, length, sentence(window, begin));
  bar.style.height = `${100 * (window.score ?? 1)}%`;
  return [bar, limitLine(window, begin, window.end, length)];
}

function kind(window) {
  if (window.score === null) return "unscored";
  if (window.flagged) return "flagged";
  if (window.score >= window.limit) return "observed";
  return window.repair ? "repair" : "";
}

function limitLine(window, begin, end, length) {
  const line = placed("limit", begin, end, length);
  line.style.bottom = `${100 * window.limit}%`;
  return line;
}

function placed(className, begin, end, length, title = "") {
  const made = element("div", className);
  made.style.left = `${(100 * begin) / length}%`;
  made.style.width = `${(100 * (end - begin)) / length}%`;
  if (title) made.title = title;
  return made;
}

function sentence(window, begin) {
  const what = window.score === null ? "no verdict" : `${window.category || "score"} ${number(window.score)}`;
  return `characters ${begin} to ${window.end}: ${what}, limit ${number(window.limit)}${window.flagged ? ", flagged" : ""}`;
}

function spoken(windows) {
  const highest = Math.max(0, ...windows.map((window) => window.score ?? 0));
  const flagged = windows.find((window) => window.flagged);
  const end = flagged ? `flagged for ${flagged.category} before character ${flagged.end}` : "none flagged";
  return `${part(windows[0])}: ${count(windows.length, "window")}, highest score ${number(highest)}, ${end}`;
}

/** What the repair tried, wave by wave, and what it came to. */
function repair(trace) {
  if (!trace.steps.length) return null;
  const limit = trace.windows.filter((window) => window.repair > 0).at(-1)?.limit ?? trace.windows.at(-1)?.limit ?? 1;
  const box = element("div", "waves", element("span", "", "Tried:"));
  for (const step of trace.steps) {
    for (const score of step.scores) {
      box.append(element("span", `try ${score < limit ? "under" : "over"}`, number(score)));
    }
  }
  const move = trace.outcome === "neutralised" ? ` The move that helped: ${moved(trace)}.` : "";
  box.append(element("span", "", `in ${count(trace.steps.length, "wave")}.${move}`));
  return box;
}

const moved = (trace) =>
  trace.relative_move ? `“${trace.move}”, which moved the prompt by ${Math.round(100 * trace.relative_move)}%` : trace.move || trace.method;

/** The same in a table, for readers of tables and for who cannot see the strip. */
function details(trace, policy) {
  const table = element("table", "");
  const head = ["Of", "Ends at", "Category", "Score", "Limit", "Let go to"];
  table.append(element("thead", "", element("tr", "", ...head.map((name) => element("th", "", name)))));
  const rows = trace.windows.map((window) => {
    const score = element("td", window.flagged ? "over" : "", window.score === null ? "none" : number(window.score, 3));
    const cells = [part(window), window.end, window.category || "–"];
    const rest = [number(window.limit), window.released];
    return element("tr", "", ...cells.map(cell), score, ...rest.map(cell));
  });
  table.append(element("tbody", "", ...rows));
  const facts = element("dl", "");
  const known = { Ended: trace.stop_reason, Policy: policy ?? "", Model: trace.model, Moderator: trace.moderator, Method: trace.method, Seed: trace.seed };
  for (const [name, value] of Object.entries(known)) facts.append(element("dt", "", name), element("dd", "", String(value)));
  return element("details", "", element("summary", "", "Details"), element("div", "scroll", table), facts);
}

const cell = (value) => element("td", "", String(value));
