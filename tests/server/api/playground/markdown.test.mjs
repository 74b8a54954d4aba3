// Markdown of a model becomes elements of a fixed list, whatever it contains.

import assert from "node:assert/strict";
import { test } from "node:test";

import { MarkdownView, safeAddress } from "../../../../server/api/pages/ui/markdown.js";
import { fakeDocument, newRoot } from "./fake_document.mjs";

const TAGS = new Set([
  "p", "h3", "h4", "h5", "h6", "pre", "code", "hr", "blockquote", "ul", "ol", "li", "div", "table", "thead",
  "tbody", "tr", "th", "td", "strong", "em", "del", "br", "a", "span",
]);

function shown(...texts) {
  const root = newRoot();
  const view = new MarkdownView(root, fakeDocument);
  for (const text of texts) view.update(text);
  return root;
}

function tagsIn(node) {
  return node.children ? [node.tag, ...node.children.flatMap(tagsIn)] : [];
}

test("Markdown is shown as elements", () => {
  assert.equal(shown("# A\n\n*b* **c** `d`").inner, "<h3>A</h3><p><em>b</em> <strong>c</strong> <code>d</code></p>");
  assert.equal(shown("- a\n- b").inner, "<ul><li>a</li><li>b</li></ul>");
  assert.equal(shown("3. a").inner, '<ol start="3"><li>a</li></ol>');
  assert.equal(shown("```\n<b>\n```").inner, "<pre><code>&lt;b&gt;</code></pre>");
  assert.match(shown("| a |\n|---|\n| b |").inner, /<th>a<\/th>.*<td>b<\/td>/);
  assert.equal(shown("a &amp; b &lt;").inner, "<p>a &amp; b &lt;</p>");
});

const HOSTILE = [
  '<img src=x onerror="alert(1)">', "<script>alert(1)</script>", "a <b onclick=alert(1)>b</b>", "<svg/onload=alert(1)>",
  "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](data:text/html;base64,AA==)", "[x](vbscript:a)",
  "![x](javascript:alert(1))", "![x](http://evil.example/pixel.png)", "<javascript:alert(1)>", "[x]: javascript:a\n\n[x]",
  "<iframe src=//evil.example></iframe>", "<a href='javascript:alert(1)'>x</a>", "```html\n<script>alert(1)</script>\n```",
  "<!-- a --><style>*{display:none}</style>", "&lt;script&gt;alert(1)&lt;/script&gt;", "| <img src=x onerror=a> |\n|---|\n| <b> |",
];

test("no HTML of a model becomes an element, and no address but the web's becomes a link", () => {
  for (const text of HOSTILE) {
    const root = shown(text);
    for (const tag of tagsIn(root).slice(1)) assert.ok(TAGS.has(tag), `${text} made ${tag}`);
    assert.doesNotMatch(root.inner, /href="(?!https?:|mailto:)/, text);
  }
});

test("a picture of another host is a link, so that nothing is fetched", () => {
  assert.match(shown("![x](http://evil.example/p.png)").inner, /<a href="http:\/\/evil.example\/p.png" rel="noopener noreferrer nofollow" target="_blank">x<\/a>/);
});

test("only addresses of the web and of mail are links", () => {
  assert.equal(safeAddress("https://a.example/b"), "https://a.example/b");
  assert.equal(safeAddress("mailto:a@b.example"), "mailto:a@b.example");
  for (const href of ["javascript:a", " java\nscript:a", "data:,a", "file:///etc", "/v1/models", "blob:x"]) {
    assert.equal(safeAddress(href), null, href);
  }
});

test("a text that grows token by token ends as the whole text", () => {
  const text = "# Title\n\nSome *text* and `code`.\n\n- one\n- two\n\n  more\n\n```js\nlet a = 1;\n\nlet b;\n```\n\n> q\n\n1. a\n2. b\n\nend";
  const steps = Array.from(text, (_, end) => text.slice(0, end + 1));
  assert.equal(shown(...steps).inner, shown(text).inner);
});

test("finished blocks are not made again while the last one grows", () => {
  const root = newRoot();
  const view = new MarkdownView(root, fakeDocument);
  view.update("first\n\nsecond\n\nthird");
  const [first] = root.children;
  view.update("first\n\nsecond\n\nthird and more\n\nfourth");
  assert.equal(root.children[0], first);
  assert.equal(root.inner, "<p>first</p><p>second</p><p>third and more</p><p>fourth</p>");
});

test("a long answer is shown as Markdown, at once or as it grows, and code in it stays whole", () => {
  const parts = Array.from({ length: 400 }, (_, at) => `Some *text* ${at} of an answer.\n\n\`\`\`\nlet a = ${at};\n\nlet b;\n\`\`\`\n\n`);
  const text = `${parts.join("")}The end.`;
  const steps = Array.from({ length: text.length / 500 }, (_, at) => text.slice(0, 500 * at));
  const whole = shown(text);
  assert.equal(tagsIn(whole).filter((tag) => tag === "pre").length, 400);
  assert.equal(tagsIn(whole).filter((tag) => tag === "p").length, 401);
  assert.equal(shown(...steps, text).inner, whole.inner);
});

test("a line of a megabyte is shown as plain text that only grows", () => {
  const root = newRoot();
  const view = new MarkdownView(root, fakeDocument);
  const line = "a*_[".repeat(2 ** 18);
  for (const end of [2 ** 16, 2 ** 18, line.length]) view.update(line.slice(0, end));
  const [box, ...others] = root.children;
  assert.deepEqual(others, []);
  const first = box.children[0];
  view.update(`${line} end`);
  assert.equal(box.children[0], first);
  assert.equal(box.children.map((part) => part.children[0].data).join(""), `${line} end`);
  assert.ok(box.children.every((part) => part.children[0].data.length <= 4000));
});

test("plain text is cut after lines and words, and never in a character", () => {
  for (const line of ["some words ", "some\nlines of\nwords", "\u{1f600}"]) {
    const root = newRoot();
    new MarkdownView(root, fakeDocument).update(line.repeat(10_000));
    const parts = root.children[0].children.map((part) => part.children[0].data);
    assert.equal(parts.join(""), line.repeat(10_000));
    assert.ok(parts.length > 2 && parts.every((part) => part.length <= 4000 && part.isWellFormed()));
    if (line.includes("s")) assert.ok(parts.slice(0, -1).every((part) => /[\n ]$/.test(part)));
  }
});

test("of a growing list only the last item changes", () => {
  const root = newRoot();
  const view = new MarkdownView(root, fakeDocument);
  view.update("- one\n- two");
  const [list] = root.children;
  const [first, second] = list.children;
  view.update("- one\n- two and\n- three");
  assert.equal(root.children[0], list);
  assert.deepEqual([list.children[0], list.children[1]], [first, second]);
  assert.equal(root.inner, shown("- one\n- two and\n- three").inner);
  view.update("- one\n- two and\n- three\n\nend");
  assert.equal(root.inner, shown("- one\n- two and\n- three\n\nend").inner);
});

test("deep nesting neither hangs nor overflows", () => {
  for (const text of [">".repeat(20_000), "[".repeat(20_000), "*a".repeat(5_000), "- ".repeat(5_000), "`".repeat(10_000)]) {
    assert.ok(shown(text).inner.length > 0);
  }
});
