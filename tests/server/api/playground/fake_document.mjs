// A document as small as the Markdown view needs: elements, texts, and their HTML for assertions.

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

const SHOWN = ["href", "rel", "target", "start"];

class FakeText {
  constructor(data) {
    this.data = data;
  }

  appendData(more) {
    this.data += more;
  }

  cloneNode() {
    return new FakeText(this.data);
  }

  get html() {
    return escaped(this.data);
  }
}

class FakeElement {
  constructor(tag) {
    this.tag = tag;
    this.children = [];
    this.parent = null;
  }

  append(...nodes) {
    for (const node of nodes) {
      const child = typeof node === "string" ? new FakeText(node) : node;
      child.parent = this;
      this.children.push(child);
    }
  }

  remove() {
    this.parent.children.splice(this.parent.children.indexOf(this), 1);
  }

  replaceChildren() {
    this.children = [];
  }

  get childNodes() {
    return this.children;
  }

  cloneNode() {
    const attributes = Object.fromEntries(SHOWN.map((name) => [name, this[name]]));
    return Object.assign(new FakeElement(this.tag), attributes);
  }

  get html() {
    const shown = SHOWN.filter((name) => this[name] !== undefined);
    const attributes = shown.map((name) => ` ${name}="${escaped(String(this[name]))}"`).join("");
    return `<${this.tag}${attributes}>${this.inner}</${this.tag}>`;
  }

  get inner() {
    return this.children.map((child) => child.html).join("");
  }
}
FakeElement.prototype.isEqualNode = function isEqualNode(other) {
  return this.html === other.html;
};
FakeElement.prototype.replaceWith = function replaceWith(other) {
  this.parent.children.splice(this.parent.children.indexOf(this), 1, other);
  other.parent = this.parent;
};
for (const name of ["remove", "isEqualNode", "replaceWith"]) FakeText.prototype[name] = FakeElement.prototype[name];

export const fakeDocument = {
  createElement: (tag) => new FakeElement(tag),
  createTextNode: (text) => new FakeText(text),
};

export const newRoot = () => new FakeElement("root");
