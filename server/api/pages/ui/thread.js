// The conversation on the page: questions, answers as they come, and what can be done with each.

import { branchOf, branches, path, peers } from "./conversation.js";
import { copyText, h, iconButton, notify, place, set, textButton } from "./dom.js";
import { machineNotes } from "./machine.js";
import { MarkdownView } from "./markdown.js";
import { tokenView } from "./tokens.js";

const NEAR_END_PX = 120;
const REASONS = { length: "The answer reached its maximum length.", stop: "", tool_calls: "" };

export class Thread {
  /** actions: see main.js; each gets the turn. */
  constructor(root, actions) {
    this._root = root;
    this._actions = actions;
    this._views = new Map(); // what is shown, by the id of its turn
    this._known = new Map();
    this._conversation = null;
    this._isDue = false;
    this._grown = new Set();
    /** Of /v1/playground; null before they are known. */
    this.limits = null;
  }

  /** Show the conversation from its start to its leaf. */
  show(conversation, welcome) {
    const hadFocus = this._root.contains(document.activeElement);
    // What is on the page already stays there: a long answer takes time to make and to lay out.
    this._known = this._conversation === conversation ? this._views : new Map();
    this._conversation = conversation;
    this._views = new Map();
    const turns = path(conversation);
    const shown = turns.map((turn) => (turn.role === "assistant" ? this._answers(conversation, turn) : this._said(conversation, turn)));
    place(this._root, shown.length ? shown : [welcome]);
    this.follow(true);
    // Where what had the focus is gone: go on where the next question is asked.
    if (hadFocus && !this._root.contains(document.activeElement)) document.getElementById("question")?.focus();
  }

  /** An answer has more text: show it with the next frame. */
  grow(turn) {
    this._grown.add(turn);
    if (this._isDue) return;
    this._isDue = true;
    requestAnimationFrame(() => {
      this._isDue = false;
      const isAtEnd = this._isAtEnd();
      for (const one of this._grown) this._views.get(one.id)?.update(one);
      this._grown.clear();
      this.follow(isAtEnd);
    });
  }

  /** Scroll to the end if the reader was there. */
  follow(isAtEnd) {
    if (isAtEnd) this._root.scrollTop = this._root.scrollHeight;
  }

  _isAtEnd() {
    const { scrollTop, scrollHeight, clientHeight } = this._root;
    return scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
  }

  _said(conversation, turn) {
    if (turn.role === "tool") {
      return h("article", { class: "turn tool", "aria-label": `Result of ${turn.name}` },
        h("div", { class: "said" }, h("span", { class: "label", text: `${turn.name} returned` }), h("code", { text: turn.text })));
    }
    const pictures = turn.pictures ?? [];
    return h("article", { class: "turn user", "aria-label": "You" },
      h("div", { class: "said" },
        pictures.length ? this._pictures(pictures) : null,
        turn.text ? h("p", { class: "question", text: turn.text }) : null),
      h("div", { class: "actions" },
        this._branches(conversation, turn, "question"),
        iconButton("edit", "Edit and ask again", () => this._actions.edit(turn))));
  }

  _pictures(pictures) {
    return h("div", { class: "pictures" }, pictures.map((one) => h("button", {
      type: "button", class: "picture", "aria-label": `${one.name}: show what the model sees`, onclick: () => this._actions.showPictures(pictures),
    }, h("img", { src: one.url, alt: "", width: one.width, height: one.height }))));
  }

  _answers(conversation, turn) {
    const group = peers(conversation, turn);
    const columns = group.map((one, number) => this._answer(conversation, one, group.length > 1 ? number + 1 : 0));
    const pictures = path(conversation, turn.parent).flatMap((one) => one.pictures ?? []);
    const notes = machineNotes(group[0], group.length, pictures, this.limits, () => this._actions.showPictures(pictures));
    return this._views.get(group[0].id).article(columns, notes, turn.state === "streaming");
  }

  _answer(conversation, turn, number) {
    const view = this._known.get(turn.id) ?? new AnswerView();
    this._views.set(turn.id, view);
    view.update(turn);
    const isChosen = path(conversation).includes(turn);
    return view.section(turn, number, isChosen, [this._ending(turn), this._tools(conversation, turn, number, isChosen)]);
  }

  _ending(turn) {
    if (turn.state === "streaming") return h("span", { class: "cursor", "aria-hidden": "true" });
    if (turn.state === "failed") {
      return h("p", { class: "error", role: "alert" }, turn.text ? `${turn.error} The answer is incomplete. ` : `${turn.error} `,
        textButton("Try again", () => this._actions.again(turn)));
    }
    const text = turn.state === "stopped" ? "Stopped." : REASONS[turn.reason] ?? "";
    return text ? h("p", { class: "hint", text }) : null;
  }

  _tools(conversation, turn, number, isChosen) {
    if (turn.state === "streaming") return null;
    const extra = h("div", { class: "extra" });
    const toggle = textButton("Tokens", () => {
      const isOpen = toggle.getAttribute("aria-expanded") === "true";
      toggle.setAttribute("aria-expanded", String(!isOpen));
      extra.replaceChildren(...(isOpen ? [] : [tokenView(turn.tokens)]));
    }, { "aria-expanded": "false" });
    const copy = async () => notify(await copyText(turn.text) ? "Copied the answer." : "This browser does not allow copying.");
    return h("div", {},
      h("div", { class: "actions" },
        number > 1 ? null : this._branches(conversation, turn, "answer"),
        number && !isChosen ? textButton("Go on with this answer", () => this._actions.choose(turn)) : null,
        iconButton("again", "Answer again", () => this._actions.again(turn)),
        iconButton("copy", "Copy the answer", copy),
        iconButton("code", "This request as a program", () => this._actions.showProgram(turn)),
        turn.tokens?.length ? toggle : null,
        textButton("Prompt", () => this._actions.showPrompt(turn))),
      extra);
  }

  _branches(conversation, turn, what) {
    const all = branches(conversation, turn);
    if (all.length < 2) return null;
    const at = branchOf(conversation, turn);
    const go = (to) => this._actions.choose(all[to]);
    return h("span", { class: "branches", role: "group", "aria-label": `Versions of the ${what}` },
      iconButton("left", `Previous ${what}`, () => go(at - 1), { disabled: at === 0 }),
      h("span", { class: "figure", text: `${at + 1} of ${all.length}` }),
      iconButton("right", `Next ${what}`, () => go(at + 1), { disabled: at === all.length - 1 }));
  }
}

/** One answer: its text and its calls, which grow, and what stands around them. */
class AnswerView {
  constructor() {
    this._prose = h("div", { class: "prose" });
    this._calls = h("div", { class: "calls" });
    this._markdown = new MarkdownView(this._prose);
    this._section = h("section");
    // Of the turn, where this is the first of its answers.
    this._columns = h("div", { class: "columns" });
    this._notes = h("aside", { class: "margin", "aria-label": "What the machine did" });
    this._article = h("article", { "aria-label": "Answer" }, this._columns, this._notes);
  }

  update({ text, calls }) {
    this._markdown.update(text);
    if (calls?.length) this._calls.replaceChildren(...calls.filter(Boolean).map(callView));
  }

  /** number: from 1 where there are several, else 0. after: what follows the text. */
  section(turn, number, isChosen, after) {
    set(this._section, { class: `answer ${turn.state}${number && isChosen ? " chosen" : ""}`, "aria-label": number ? `Answer ${number}` : undefined });
    const heading = number ? h("h3", { class: "label", text: `Answer ${number}` }) : null;
    place(this._section, [heading, this._prose, this._calls, ...after].filter(Boolean));
    return this._section;
  }

  /** The turn, with the sections of all its answers. */
  article(sections, notes, isBusy) {
    set(this._article, { class: sections.length > 1 ? "turn assistant several" : "turn assistant", "aria-busy": String(isBusy) });
    place(this._columns, sections);
    this._notes.replaceChildren(...(notes ? [notes] : []));
    return this._article;
  }
}

function callView(call) {
  return h("p", { class: "call" }, h("span", { class: "label", text: "Call " }), h("code", { text: `${call.name}(${call.args})` }));
}
