// The page: what was asked, what is set, and what is under way. All of it is gone when the page is closed.

import { ask, refusal } from "./stream.js";
import { element, number, story } from "./story.js";

const at = (id) => document.getElementById(id);
const CHECKS = ["off", "user", "all"];
const CHECK_NAMES = { off: "Off", user: "The last question", all: "The whole conversation" };
const HELD_AFTER_MS = 900;

let key = "";
let served = [];
let talk = [];
let underWay = null;
let temperatureMoved = false;

// ---- settings

const headers = () => {
  const sent = key ? { authorization: `Bearer ${key}` } : {};
  const policy = at("policy").value;
  return policy && policy !== chosenModel()?.policies[0].name ? { ...sent, "x-tta-policy": policy } : sent;
};
const chosenModel = () => served.find((model) => model.name === at("model").value);
const chosenPolicy = () => chosenModel()?.policies.find((policy) => policy.name === at("policy").value);

async function loadModels() {
  try {
    const response = await fetch("playground/models", { headers: key ? { authorization: `Bearer ${key}` } : {} });
    if (!response.ok) throw await refusal(response);
    served = (await response.json()).models;
    clearProblem();
  } catch (error) {
    served = [];
    showProblem(error.status === 401 ? "This server wants an API key. Give it under Settings." : sentence(error));
    if (error.status === 401) openSettings(true);
  }
  fill(at("model"), served.map((model) => [model.name, model.name]));
  at("send").disabled = !served.length;
  showModel();
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, name]) => new Option(name, value)));
}

function showModel() {
  const model = chosenModel();
  at("policy-fields").disabled = !model;
  if (!model) return;
  fill(at("policy"), model.policies.map(({ name }) => [name, name]));
  at("policy").disabled = model.policies.length === 1;
  const checks = CHECKS.slice(CHECKS.indexOf(model.prompt_check));
  fill(at("prompt-check"), checks.map((check) => [check, CHECK_NAMES[check]]));
  at("prompt-check").disabled = checks.length === 1;
  // An upstream does not say what its own are; what is left alone is not sent then.
  const most = model.most_tokens ?? Infinity;
  at("max-tokens").value = model.max_new_tokens ? Math.min(model.max_new_tokens, most) : "";
  at("max-tokens").max = model.most_tokens ?? "";
  at("temperature").value = model.temperature ?? 1;
  temperatureMoved = model.temperature !== null;
  showTemperature();
  showPolicy();
}

/** Sliders go up to the operator's limits; beyond them the server would refuse. */
function showPolicy() {
  const policy = chosenPolicy();
  at("thresholds").hidden = !policy || policy.threshold === null;
  if (at("thresholds").hidden) return;
  setUp(at("threshold"), at("threshold-value"), policy.threshold);
  at("categories").replaceChildren(...Object.entries(policy.limits).map(([name, limit]) => categorySlider(name, limit)));
}

function setUp(slider, output, limit) {
  slider.max = limit;
  slider.value = limit;
  slider.dataset.limit = limit;
  slider.setAttribute("aria-valuetext", number(limit));
  output.value = `${number(limit)} (operator's)`;
  output.classList.remove("changed");
  slider.oninput = () => showSlider(slider, output);
}

function showSlider(slider, output) {
  const changed = isChanged(slider);
  output.value = changed ? number(slider.value) : `${number(slider.dataset.limit)} (operator's)`;
  output.classList.toggle("changed", changed);
  slider.setAttribute("aria-valuetext", output.value);
}

// A range steps by hundredths from 0, so its top may lie just below a limit of three digits.
const isChanged = (slider) => Number(slider.dataset.limit) - Number(slider.value) >= 0.01 - 1e-9;

function categorySlider(name, limit) {
  const id = `limit-${name.replaceAll("/", "-")}`;
  const slider = document.createElement("input");
  Object.assign(slider, { id, type: "range", min: 0, max: 1, step: 0.01 });
  slider.dataset.category = name;
  const label = element("label", "", name);
  label.htmlFor = id;
  const output = document.createElement("output");
  output.htmlFor = id;
  setUp(slider, output, limit);
  return element("div", "slider", label, output, slider);
}

function showTemperature() {
  at("temperature-value").value = temperatureMoved ? number(at("temperature").value, 1) : "the model's own";
}

/** What is asked beyond the operator's policy; nothing where nothing was changed. */
function stricter() {
  const model = chosenModel();
  const asked = {};
  if (!at("thresholds").hidden) {
    if (isChanged(at("threshold"))) asked.threshold = Number(at("threshold").value);
    const changed = [...at("categories").querySelectorAll("input")].filter(isChanged);
    if (changed.length) asked.categories = Object.fromEntries(changed.map((slider) => [slider.dataset.category, Number(slider.value)]));
  }
  if (at("prompt-check").value !== model.prompt_check) asked.prompt_check = at("prompt-check").value;
  return Object.keys(asked).length ? { tta: asked } : {};
}

function request() {
  const system = at("system").value.trim();
  const tokens = at("max-tokens").valueAsNumber;
  return {
    model: chosenModel().name,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...talk],
    ...(temperatureMoved ? { temperature: at("temperature").valueAsNumber } : {}),
    ...(tokens >= 1 ? { max_completion_tokens: Math.floor(tokens) } : {}),
    ...stricter(),
  };
}

// ---- the conversation

function showAsked(text) {
  at("welcome").hidden = true;
  at("talk").append(element("div", "asked", element("p", "", text)));
}

function newAnswer() {
  const thought = element("div", "thought-text");
  const thoughts = element("details", "thought", element("summary", "", "Thoughts"), thought);
  thoughts.hidden = true;
  const said = element("div", "said waiting");
  const badge = element("span", "badge under-way", "Checking");
  const let_go = element("span", "hint");
  const progress = element("div", "story", element("div", "head", badge, let_go));
  const card = element("article", "answer", thoughts, said, progress);
  card.setAttribute("aria-label", "Answer");
  at("talk").append(card);
  return { card, thoughts, thought, said, badge, let_go, progress };
}

async function send(text) {
  const conversation = talk; // a new chat may begin while this answer is stopped
  conversation.push({ role: "user", content: text });
  showAsked(text);
  const shown = newAnswer();
  const going = new AbortController();
  busy(going);
  const held = heldMark(shown);
  try {
    const put = (box) => (piece) => {
      const follow = nearEnd();
      shown.thoughts.hidden &&= box !== shown.thought;
      box.append(piece);
      held.moved(box.textContent.length);
      if (follow) toEnd();
    };
    const answer = await ask(request(), headers(), going.signal, put(shown.said), put(shown.thought));
    conversation.push({ role: "assistant", content: answer.text });
    shown.progress.replaceWith(story(answer));
    say(`Answer done: ${answer.trace?.outcome ?? answer.finishReason}`);
  } catch (error) {
    ended(shown, conversation, error, going.signal.aborted);
  } finally {
    held.over();
    shown.said.classList.remove("waiting");
    busy(null);
    toEnd();
  }
}

/** An answer that has no end: what has left stays on the page, and in the conversation if it is not empty. */
function ended(shown, conversation, error, stopped) {
  const text = shown.said.textContent;
  if (text) conversation.push({ role: "assistant", content: text });
  else conversation.pop();
  if (stopped) {
    shown.progress.replaceChildren(element("span", "badge under-way", "Stopped"), " What you see was checked.");
    say("Stopped");
    return;
  }
  shown.progress.remove();
  const problem = element("p", "problem", sentence(error));
  problem.setAttribute("role", "alert");
  shown.card.append(problem);
  if (!text) shown.said.hidden = true;
  if (error.status === 401) openSettings(true);
}

/** Says so where nothing has left for a while: the text is held until its check, or its repair, is over. */
function heldMark(shown) {
  let timer = 0;
  const wait = () => {
    shown.badge.textContent = "Checking";
    timer = setTimeout(() => {
      shown.badge.textContent = "Held back";
      shown.let_go.textContent = "waiting for a check or a repair";
    }, HELD_AFTER_MS);
  };
  wait();
  return {
    moved(length) {
      clearTimeout(timer);
      shown.let_go.textContent = `${length} characters checked and let go`;
      wait();
    },
    over: () => clearTimeout(timer),
  };
}

function busy(controller) {
  underWay = controller;
  at("talk").setAttribute("aria-busy", String(Boolean(controller)));
  at("send").hidden = Boolean(controller);
  at("stop").hidden = !controller;
  if (!controller) at("question").focus({ preventScroll: true });
}

function newTalk() {
  underWay?.abort();
  talk = [];
  for (const old of [...at("talk").children]) if (old.id !== "welcome") old.remove();
  at("welcome").hidden = false;
  at("question").focus();
}

const nearEnd = () => at("talk").scrollHeight - at("talk").scrollTop - at("talk").clientHeight < 120;
const toEnd = () => at("talk").scrollTo({ top: at("talk").scrollHeight });
const say = (text) => (at("status").textContent = text);

/** An error in words: the server's own, or that it could not be reached. */
function sentence(error) {
  const words = error instanceof TypeError ? "the server cannot be reached; is it still running?" : error.message;
  return words.charAt(0).toUpperCase() + words.slice(1);
}

function showProblem(text) {
  clearProblem();
  const problem = element("p", "problem", text);
  problem.id = "problem";
  problem.setAttribute("role", "alert");
  at("talk").prepend(problem);
}

const clearProblem = () => at("problem")?.remove();

// ---- what the reader does

function submit() {
  const text = at("question").value.trim();
  if (!text || underWay || !served.length) return;
  at("question").value = "";
  grow();
  send(text);
}

function grow() {
  const box = at("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function openSettings(open) {
  const panel = at("settings");
  const was = panel.classList.contains("open");
  panel.classList.toggle("open", open);
  at("open-settings").setAttribute("aria-expanded", String(open));
  // On a narrow screen the panel lies over the page, which then takes no focus.
  const covers = open && matchMedia("(max-width: 900px)").matches;
  for (const behind of document.querySelectorAll("header, main")) behind.inert = covers;
  if (open) at("key").focus();
  else if (was) at("open-settings").focus();
}

function nextTheme() {
  const order = ["auto", "light", "dark"];
  const root = document.documentElement;
  const next = order[(order.indexOf(root.dataset.theme ?? "auto") + 1) % order.length];
  if (next === "auto") delete root.dataset.theme;
  else root.dataset.theme = next;
  at("theme").textContent = `Theme: ${next}`;
}

at("ask").addEventListener("submit", (event) => (event.preventDefault(), submit()));
at("question").addEventListener("input", grow);
at("question").addEventListener("keydown", (event) => {
  // While an input method composes a word, Enter belongs to it.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (at("settings").classList.contains("open")) openSettings(false);
  else underWay?.abort();
});
at("stop").addEventListener("click", () => underWay?.abort());
at("new").addEventListener("click", newTalk);
at("theme").addEventListener("click", nextTheme);
at("open-settings").addEventListener("click", () => openSettings(true));
at("close-settings").addEventListener("click", () => openSettings(false));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  loadModels();
});
at("model").addEventListener("change", showModel);
at("policy").addEventListener("change", showPolicy);
at("reset").addEventListener("click", showPolicy);
at("temperature").addEventListener("input", () => {
  temperatureMoved = true;
  showTemperature();
});
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => {
    at("question").value = example.textContent;
    submit();
  });
}

await loadModels();
if (served.length) at("question").focus();
