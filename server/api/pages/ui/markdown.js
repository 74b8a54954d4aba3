// Markdown as elements. The library only cuts the text into tokens; elements are made here, one by
// one, from a fixed list, and text is only ever text. So no HTML of a model can run, whatever it is.

import { patched, setText } from "./patch.js";
import { Lexer } from "./vendor/marked.esm.js";

const OPTIONS = { gfm: true, breaks: true, pedantic: false, async: false };
const LINKS = new Set(["http:", "https:", "mailto:"]);
const MAX_DEPTH = 16;
// Longer blocks, and those that take long to read, are shown as plain text.
const MAX_BLOCK_CHARS = 12_000;
const MAX_LEX_MS = 50;
const MIN_SLOW_CHARS = 2_000;
// Plain text is cut into boxes of about this many characters: a box is laid out anew when it grows.
const PLAIN_BOX_CHARS = 4_000;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", "#39": "'", nbsp: "\u00a0" };

/** The tokens of a text; null if they should not be read: too long, or nested too deeply. */
export function tokensOf(text) {
  if (text.length > MAX_BLOCK_CHARS || /^[ \t]*(?:[>*+-][ \t]*){17}/m.test(text)) return null;
  if (/[*_~[\]`(]{400}/.test(text)) return null;
  try {
    return new Lexer({ ...OPTIONS }).lex(text);
  } catch {
    return null;
  }
}

/** Functions that read each kind of Markdown once: what a browser reads first takes ten times as long. */
export function warmUps() {
  const blocks = ["# A *b* **c** ~~d~~ `e` [f](g) <h> & \\*\n\ni\nj\n\n", "- k\n  1. l\n\n> m\n\n---\n\n", "```\nn\n```\n\n|o|p|\n|-|-|\n|q|r|\n"];
  return [...blocks, ...blocks].map((text) => () => tokensOf(text));
}

/**
 * How many characters of a long text can be shown first: up to a blank line outside of code, within
 * MAX_BLOCK_CHARS. 0 if there is none.
 */
export function partOf(text) {
  let [start, end, isCode] = [0, 0, false];
  while (start < MAX_BLOCK_CHARS) {
    const line = text.indexOf("\n", start);
    if (line < 0 || line > MAX_BLOCK_CHARS) break;
    if (/^ {0,3}(```|~~~)/.test(text.slice(start, start + 6))) isCode = !isCode;
    if (!isCode && line === start) end = line + 1;
    start = line + 1;
  }
  return end;
}

/** Shows a growing text. Only its last block is read again when it grows. */
export class MarkdownView {
  /** root: an element, which is emptied. document: for tests without a browser. */
  constructor(root, document = globalThis.document) {
    this.root = root;
    this._document = document;
    this._shown = 0; // characters in finished blocks
    this._tail = []; // the elements of the last block
    this._plain = null; // the box of a block that is not read as Markdown
    root.replaceChildren();
  }

  /** text: begins with what was shown before. */
  update(text) {
    while (!this._plain && text.length - this._shown > MAX_BLOCK_CHARS && this._showPart(text));
    const rest = text.slice(this._shown);
    if (this._plain) {
      this._growPlain(rest);
      return;
    }
    const started = performance.now();
    const tokens = tokensOf(rest);
    const isSlow = rest.length > MIN_SLOW_CHARS && performance.now() - started > MAX_LEX_MS;
    if (tokens === null || isSlow) {
      this._startPlain(rest);
      return;
    }
    this._finishBlocks(tokens);
  }

  /** Show the first part of a long text for good; false if it has none. */
  _showPart(text) {
    const num = partOf(text.slice(this._shown, this._shown + MAX_BLOCK_CHARS + 1));
    const tokens = num ? tokensOf(text.slice(this._shown, this._shown + num)) : null;
    if (tokens === null) return false;
    this._removeTail();
    for (const token of tokens) this.root.append(...block(this._document, token, 0));
    this._shown += num;
    return true;
  }

  _finishBlocks(tokens) {
    const old = this._tail;
    this._tail = [];
    let blocks = tokens.filter((token) => token.type !== "space").length;
    for (const token of tokens) {
      const elements = block(this._document, token, 0).map((made) => this._shownAs(old.shift(), made));
      if (token.type !== "space") blocks -= 1;
      // A block is finished once another has followed it.
      if (blocks >= 1) this._shown += token.raw.length;
      else if (token.type !== "space" || this._tail.length) this._tail.push(...elements);
      else this._shown += token.raw.length;
    }
    for (const element of old) element.remove();
  }

  /** What shows `made`: the old element in its place, changed, or itself at the end. */
  _shownAs(old, made) {
    if (old) return patched(old, made);
    this.root.append(made);
    return made;
  }

  _removeTail() {
    for (const element of this._tail) element.remove();
    this._tail = [];
  }

  _startPlain(rest) {
    this._removeTail();
    this._plain = this._document.createElement("pre");
    this._plain.className = "plain";
    this._plainStart = 0; // of the last part
    this._plainText = this._addPlain();
    this.root.append(this._plain);
    this._growPlain(rest);
  }

  _growPlain(rest) {
    while (rest.length - this._plainStart > PLAIN_BOX_CHARS) {
      const end = cutOf(rest, this._plainStart, this._plainStart + PLAIN_BOX_CHARS);
      setText(this._plainText, rest.slice(this._plainStart, end));
      this._plainStart = end;
      this._plainText = this._addPlain();
    }
    setText(this._plainText, rest.slice(this._plainStart));
  }

  _addPlain() {
    const text = this._document.createTextNode("");
    this._plain.append(element(this._document, "div", [text]));
    return text;
  }
}

/** Where to cut a text before `end`: after its last line, else after its last word. */
function cutOf(text, start, end) {
  for (const mark of ["\n", " "]) {
    const at = text.lastIndexOf(mark, end - 1);
    if (at >= start) return at + 1;
  }
  // Not between the halves of a character.
  return /[\ud800-\udbff]/.test(text[end - 1]) ? end - 1 : end;
}

/** The elements of a block token. */
function block(document, token, depth) {
  const make = (tag, ...children) => element(document, tag, children);
  if (depth > MAX_DEPTH) return [document.createTextNode(token.raw ?? "")];
  switch (token.type) {
    case "space":
    case "def":
      return [];
    case "heading":
      // The page's own headings come above those of an answer.
      return [make(`h${Math.min(6, token.depth + 2)}`, ...inlines(document, token.tokens, depth))];
    case "code":
      return [codeBlock(document, token)];
    case "hr":
      return [make("hr")];
    case "blockquote":
      return [make("blockquote", ...blocks(document, token.tokens, depth))];
    case "list":
      return [list(document, token, depth)];
    case "table":
      return [table(document, token, depth)];
    case "paragraph":
      return [make("p", ...inlines(document, token.tokens, depth))];
    case "text":
      return token.tokens ? inlines(document, token.tokens, depth) : [document.createTextNode(plain(token.text))];
    default:
      return [make("p", document.createTextNode(token.raw ?? ""))];
  }
}

function blocks(document, tokens, depth) {
  return (tokens ?? []).flatMap((token) => block(document, token, depth + 1));
}

function element(document, tag, children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

function codeBlock(document, token) {
  const code = element(document, "code", [document.createTextNode(token.text)]);
  const box = element(document, "pre", [code]);
  // A box that scrolls must be reachable by keyboard.
  box.tabIndex = 0;
  return box;
}

function list(document, token, depth) {
  const made = document.createElement(token.ordered ? "ol" : "ul");
  if (token.ordered && Number.isSafeInteger(token.start)) made.start = token.start;
  for (const item of token.items) {
    const entry = document.createElement("li");
    if (item.task) entry.append(document.createTextNode(item.checked ? "☑ " : "☐ "));
    const inner = (item.tokens ?? []).filter((one) => one.type !== "checkbox");
    entry.append(...blocks(document, inner, depth));
    made.append(entry);
  }
  return made;
}

function table(document, token, depth) {
  const row = (cells, tag) => element(document, "tr", cells.map(
    (cell) => element(document, tag, inlines(document, cell.tokens, depth)),
  ));
  const head = element(document, "thead", [row(token.header, "th")]);
  const body = element(document, "tbody", token.rows.map((cells) => row(cells, "td")));
  const box = element(document, "div", [element(document, "table", [head, body])]);
  box.className = "scroll";
  box.tabIndex = 0;
  return box;
}

/** The nodes of inline tokens. */
function inlines(document, tokens, depth) {
  return (tokens ?? []).flatMap((token) => inline(document, token, depth + 1));
}

function inline(document, token, depth) {
  const text = (content) => document.createTextNode(content ?? "");
  if (depth > MAX_DEPTH) return [text(token.raw)];
  switch (token.type) {
    case "strong":
    case "em":
    case "del":
      return [element(document, token.type, inlines(document, token.tokens, depth))];
    case "codespan":
      return [element(document, "code", [text(token.text)])];
    case "br":
      return [document.createElement("br")];
    case "link":
      return [link(document, token, inlines(document, token.tokens, depth))];
    case "image":
      // A picture of another host would report the reader to it.
      return [link(document, token, [text(token.text || token.href)])];
    case "text":
      return token.tokens ? inlines(document, token.tokens, depth) : [text(plain(token.text))];
    case "escape":
      return [text(token.text)];
    default:
      return [text(token.raw)];
  }
}

/** A link to another page; anything but http, https and mailto stays text. */
function link(document, token, children) {
  const address = safeAddress(token.href);
  if (address === null) return element(document, "span", children);
  const made = element(document, "a", children);
  made.href = address;
  made.rel = "noopener noreferrer nofollow";
  made.target = "_blank";
  return made;
}

/** The address if it may be a link, else null. */
export function safeAddress(href) {
  try {
    const url = new URL(href);
    return LINKS.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/** The text that HTML would show for its few entities. */
function plain(text) {
  return (text ?? "").replace(/&(amp|lt|gt|quot|apos|#39|nbsp);/g, (_, name) => ENTITIES[name]);
}
