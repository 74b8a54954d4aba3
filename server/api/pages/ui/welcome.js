// What is shown before the first question: examples of the bundled model, or how to begin.

import { h, textButton } from "./dom.js";

const EXAMPLES = [
  { name: "shapes.png", question: "What is in this image?" },
  { name: "three.png", question: "How many shapes are there?" },
  { name: "wide.png", question: "What colour is the background?" },
];

export class Welcome {
  /** ask(example): sends it. */
  constructor(ask) {
    this._ask = ask;
    this._text = h("p", { class: "lead", text: "Add a picture and ask about it." });
    this._more = h("div");
    this.root = h("div", { class: "welcome" }, h("h2", { text: "Ask about a picture" }), this._text, this._more);
  }

  /** limits: of /v1/playground. */
  useServer(limits) {
    if (!limits.is_bundled_model) {
      this._text.textContent = "Drop, paste, photograph or choose a picture, and ask about it.";
      this._more.replaceChildren();
      return;
    }
    this._text.textContent = "This server has the small model that comes with it. It knows drawn shapes and their colours.";
    this._more.replaceChildren(h("ul", { class: "examples" }, EXAMPLES.map((one) => this._card(one))));
  }

  showProblem(message) {
    this._text.textContent = message;
    this._more.replaceChildren();
  }

  /** A way on, below the problem. */
  offer(label, run) {
    this._more.replaceChildren(textButton(label, run, { class: "main" }));
  }

  _card({ name, question }) {
    const file = async (api) => {
      const blob = await (await api.send(`ui/examples/${name}`, null)).blob();
      return new File([blob], name, { type: "image/png" });
    };
    return h("li", {}, h("button", { type: "button", class: "example", onclick: () => this._ask({ question, file }) },
      h("img", { src: `ui/examples/${name}`, alt: "" }), h("span", { text: question })));
  }
}
