// A conversation as a tree: editing a turn or asking again adds a branch and loses nothing.
// Knows neither the page nor the server.

import { randomId } from "./ids.js";

export const FORMAT = "vlmserve-conversations";
const ROLES = new Set(["user", "assistant", "tool"]);

/** An empty conversation. leaf: the last turn that is shown; null while there is none. */
export function newConversation() {
  const now = Date.now();
  return { id: randomId(), title: "", created: now, updated: now, leaf: null, nodes: {} };
}

/** Add a turn behind `parent` and show it. Returns the turn. */
export function addTurn(conversation, parent, turn) {
  const node = { id: randomId(), parent, created: Date.now(), ...turn };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node);
  return node;
}

function titleOf(node) {
  const line = node.text.trim().split("\n")[0];
  if (line) return line.length > 60 ? `${line.slice(0, 59)}…` : line;
  return node.pictures?.length ? "A picture" : "A question";
}

/** The turns from the first to `leaf`. */
export function path(conversation, leaf = conversation.leaf) {
  const turns = [];
  for (let id = leaf; id !== null && conversation.nodes[id]; id = conversation.nodes[id].parent) {
    turns.unshift(conversation.nodes[id]);
  }
  return turns;
}

/** The turns with the same parent, oldest first. */
export function siblings(conversation, node) {
  return Object.values(conversation.nodes)
    .filter((one) => one.parent === node.parent)
    .sort((a, b) => a.created - b.created || (a.index ?? 0) - (b.index ?? 0));
}

/** The answers that were asked for together with this one, in order. */
export function peers(conversation, node) {
  if (!node.group) return [node];
  return siblings(conversation, node).filter((one) => one.group === node.group);
}

/** The alternatives at this place; answers of one request count as one. */
export function branches(conversation, node) {
  const seen = new Set();
  return siblings(conversation, node).filter((one) => {
    const key = one.group ?? one.id;
    if (seen.has(key)) return false;
    seen.add(key);
    return true;
  });
}

/** Which of its branches a turn belongs to, from 0. */
export function branchOf(conversation, node) {
  return branches(conversation, node).findIndex((one) => (one.group ?? one.id) === (node.group ?? node.id));
}

/** Show the branch of this turn, down to its newest end. */
export function select(conversation, node) {
  let leaf = node;
  for (;;) {
    const children = Object.values(conversation.nodes).filter((one) => one.parent === leaf.id);
    if (!children.length) break;
    leaf = children.reduce((newest, one) => (one.created > newest.created ? one : newest));
  }
  conversation.leaf = leaf.id;
}

/** The text of a file with these conversations. */
export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** The conversations of such a file, with new ids. Throws Error with a reason for the user. */
export function imported(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) {
    throw new Error("The file is not an export of this page.");
  }
  return file.conversations.map(checked);
}

function checked(conversation) {
  const nodes = {};
  for (const [id, node] of Object.entries(conversation?.nodes ?? {})) {
    const isTurn = node && node.id === id && ROLES.has(node.role) && typeof node.text === "string";
    const pictures = Array.isArray(node?.pictures) ? node.pictures : [];
    if (!isTurn || !pictures.every(isPicture)) throw new Error("A turn in the file is damaged.");
    nodes[id] = node;
  }
  const conversations = { ...newConversation(), title: String(conversation.title ?? ""), nodes };
  conversations.leaf = nodes[conversation.leaf] ? conversation.leaf : null;
  if (hasCircle(nodes)) throw new Error("A turn in the file is damaged.");
  return conversations;
}

function isPicture(picture) {
  const isImage = /^data:image\/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]*$/.test(picture?.url ?? "");
  return isImage && picture.width > 0 && picture.height > 0;
}

function hasCircle(nodes) {
  const most = Object.keys(nodes).length;
  return Object.values(nodes).some((node) => {
    let count = 0;
    for (let id = node.id; id !== null && nodes[id]; id = nodes[id].parent) {
      count += 1;
      if (count > most) return true;
    }
    return false;
  });
}
