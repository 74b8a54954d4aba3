// Changes nodes on the page into newly made ones. What is the same stays: it keeps its layout and
// what a reader has selected in it.

/** `old`, changed into `made`; or `made` in its place, where they are of different kinds. */
export function patched(old, made) {
  if (old.isEqualNode(made)) return old;
  if (!old.cloneNode(false).isEqualNode(made.cloneNode(false)) && !areTexts(old, made)) {
    old.replaceWith(made);
    return made;
  }
  if (areTexts(old, made)) setText(old, made.data);
  else patchChildren(old, [...made.childNodes]);
  return old;
}

function patchChildren(old, made) {
  const there = [...old.childNodes];
  made.forEach((node, at) => {
    if (at < there.length) patched(there[at], node);
    else old.append(node);
  });
  for (const node of there.slice(made.length)) node.remove();
}

function areTexts(old, made) {
  return old.data !== undefined && made.data !== undefined;
}

/** Set the text of a text node; one that only grows is extended. */
export function setText(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}
