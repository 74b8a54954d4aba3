// The token view: each token of an answer, coloured by its probability, with its alternatives.

import { h } from "./dom.js";

/** One token of an answer, from an entry of the log-probabilities. top: text, logprob, text, ... */
export function tokenOf(entry) {
  const top = entry.top_logprobs.flatMap((one) => [one.token, one.logprob]);
  return { text: entry.token, logprob: entry.logprob, isSpecial: entry.bytes === null, top };
}

/** The class of a probability, from p0 (below 5 %) to p4 (from 90 %). */
export function levelOf(logprob) {
  const probability = Math.exp(logprob);
  return `p${[0.05, 0.3, 0.6, 0.9].filter((bound) => probability >= bound).length}`;
}

/** A probability as text: "97 %", "0.3 %", "< 0.01 %". */
export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value < 0.01) return "< 0.01 %";
  return `${value >= 10 ? Math.round(value) : value.toPrecision(value >= 1 ? 2 : 1)} %`;
}

/** A token's text with its blanks and line ends visible. */
export function visible(text) {
  return text === "" ? "(empty)" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

/** The view of these tokens: one stop of the tab key, then the arrow keys move. */
export function tokenView(tokens) {
  const detail = h("div", { class: "token-detail", role: "status" });
  const list = h("div", { class: "tokens", role: "listbox", "aria-label": "Tokens of the answer", "aria-orientation": "horizontal" });
  const items = tokens.map((token, number) => tokenItem(token, number === 0));
  const show = (number) => { detail.replaceChildren(...alternatives(tokens[number])); };
  items.forEach((item, number) => {
    item.addEventListener("mouseenter", () => show(number));
    item.addEventListener("focus", () => { choose(items, item); show(number); });
    item.addEventListener("click", () => item.focus());
  });
  list.append(...items);
  list.addEventListener("keydown", (event) => moveFocus(event, items));
  if (tokens.length) show(0);
  return h("div", { class: "token-view" }, list, detail, legend());
}

function tokenItem(token, isFirst) {
  const item = h("span", {
    class: `token ${levelOf(token.logprob)}${token.isSpecial ? " special" : ""}`,
    role: "option",
    "aria-selected": String(isFirst),
    tabindex: isFirst ? 0 : -1,
    "aria-label": `${visible(token.text)}, ${percent(token.logprob)}`,
    text: token.text.replaceAll("\n", "↵\n"),
  });
  return item;
}

function choose(items, chosen) {
  for (const item of items) {
    if (item.tabIndex === 0 || item === chosen) {
      item.tabIndex = item === chosen ? 0 : -1;
      item.setAttribute("aria-selected", String(item === chosen));
    }
  }
}

function moveFocus(event, items) {
  const at = items.indexOf(event.target);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: items.length - 1 }[event.key];
  if (to === undefined || at < 0) return;
  event.preventDefault();
  items[Math.max(0, Math.min(items.length - 1, to))].focus();
}

/** The chosen token and its alternatives, with bars. */
function alternatives(token) {
  const others = [];
  for (let at = 0; at < token.top.length; at += 2) {
    const [text, logprob] = token.top.slice(at, at + 2);
    if (text !== token.text || logprob !== token.logprob) others.push({ text, logprob });
  }
  const all = [{ ...token, isChosen: true }, ...others].sort((a, b) => b.logprob - a.logprob);
  return all.map((one) => {
    const bar = h("span", { class: "bar-fill" });
    bar.style.width = `${Math.max(1, 100 * Math.exp(one.logprob))}%`;
    return h(
      "div",
      { class: one.isChosen ? "alternative chosen" : "alternative" },
      h("code", { text: visible(one.text) }),
      h("span", { class: "bar-track", "aria-hidden": "true" }, bar),
      h("span", { class: "figure", text: percent(one.logprob) }),
      one.isChosen ? h("span", { class: "unseen", text: "chosen" }) : null,
    );
  });
}

function legend() {
  const levels = [["p4", "90 % and over"], ["p3", "60 %"], ["p2", "30 %"], ["p1", "5 %"], ["p0", "less"]];
  return h(
    "p",
    { class: "legend" },
    levels.map(([level, text]) => [h("span", { class: `token ${level}`, "aria-hidden": "true", text: "ab" }), ` ${text} `]),
  );
}

/** A prompt as spans, with its special tokens marked. */
export function promptText(text) {
  const parts = text.split(/(<\|[a-z0-9_]+\|>)/);
  return parts.filter((part) => part).map((part) => (
    /^<\|[a-z0-9_]+\|>$/.test(part) ? h("span", { class: "special-token", text: part }) : part
  ));
}
