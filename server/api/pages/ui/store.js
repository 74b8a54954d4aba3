// Where conversations and settings are kept: in this browser only. Without IndexedDB, until the
// page is closed. Tokens of answers are kept as text: a browser copies an object of many parts
// twice before it stores it, and stops the page meanwhile.

import { nextFrame } from "./frames.js";

const NAME = "vlmserve";
const TABLE = "conversations";
const SETTINGS = "vlmserve.settings";
const TOKENS_A_SLICE = 500;

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export class Store {
  constructor() {
    this._memory = new Map();
    this._texts = new WeakMap(); // by the array of tokens
    this._last = Promise.resolve();
    this._opening = this._open();
  }

  async _open() {
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
      return await promised(request);
    } catch {
      return null;
    }
  }

  async _table(mode) {
    const database = await this._opening;
    return database?.transaction(TABLE, mode).objectStore(TABLE) ?? null;
  }

  /** All conversations, the newest first. */
  async all() {
    const table = await this._table("readonly");
    const found = table ? (await promised(table.getAll())).map(unpacked) : [...this._memory.values()];
    return found.sort((a, b) => b.updated - a.updated);
  }

  /** Keep a conversation, once those before it are. Rejects if the browser has no room. */
  save(conversation) {
    this._memory.set(conversation.id, conversation);
    const saved = this._last.then(() => this._save(conversation));
    this._last = saved.catch(() => {});
    return saved;
  }

  async _save(conversation) {
    const turns = Object.values(conversation.nodes).filter((turn) => turn.state !== "streaming" && turn.tokens?.length);
    for (const { tokens } of turns) {
      if (!this._texts.has(tokens)) this._texts.set(tokens, await textOf(tokens));
    }
    const table = await this._table("readwrite");
    // Deleted meanwhile.
    if (table && this._memory.has(conversation.id)) await promised(table.put(this._packed(conversation)));
  }

  _packed(conversation) {
    const nodes = Object.entries(conversation.nodes).map(([id, turn]) => [id, { ...turn, tokens: this._texts.get(turn.tokens) ?? [] }]);
    return { ...conversation, nodes: Object.fromEntries(nodes) };
  }

  async remove(id) {
    this._memory.delete(id);
    const table = await this._table("readwrite");
    if (table) await promised(table.delete(id));
  }
}

/** Tokens as JSON, made in slices. */
async function textOf(tokens) {
  const parts = [];
  for (let start = 0; start < tokens.length; start += TOKENS_A_SLICE) {
    if (start) await nextFrame();
    parts.push(JSON.stringify(tokens.slice(start, start + TOKENS_A_SLICE)).slice(1, -1));
  }
  return `[${parts.join(",")}]`;
}

/** A conversation as it was; those of earlier versions of the page have their tokens as they are. */
function unpacked(conversation) {
  for (const turn of Object.values(conversation.nodes)) {
    if (typeof turn.tokens === "string") turn.tokens = JSON.parse(turn.tokens);
  }
  return conversation;
}

/** The settings of the last visit. */
export function loadSettings() {
  try {
    return JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
  } catch {
    return {};
  }
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // Without storage they last until the page is closed.
  }
}
