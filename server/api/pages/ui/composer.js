// The question: its text and its pictures, before they are sent.

import { announce, h, icon, iconButton, newId, notify } from "./dom.js";
import { photograph } from "./dialogs.js";
import { PictureError, pictureOf } from "./pictures.js";

const ACCEPTED = "image/png,image/jpeg,image/webp,image/gif,image/*";

export class Composer {
  /** actions: { send(text, pictures), stop(), limits() -> Promise }. dropZone: where pictures may be dropped. */
  constructor(form, dropZone, actions) {
    this._actions = actions;
    this._pictures = [];
    this._isBusy = false;
    this._strip = h("ul", { class: "strip", "aria-label": "Pictures of the question" });
    this._text = h("textarea", { id: "question", rows: 1, placeholder: "Ask about a picture", "aria-label": "Your question" });
    this._button = h("button", { type: "submit", class: "send", "aria-label": "Send", title: "Send" }, icon("send"));
    this._chooser = h("input", { type: "file", accept: ACCEPTED, multiple: true, class: "unseen", tabindex: -1, "aria-hidden": "true", id: newId("file") });
    this._camera = h("input", { type: "file", accept: "image/*", capture: "environment", class: "unseen", tabindex: -1, "aria-hidden": "true" });
    form.append(
      this._strip,
      h("div", { class: "ask" },
        h("div", { class: "tools" },
          iconButton("picture", "Add pictures", () => this._chooser.click()),
          iconButton("camera", "Take a photo", () => this._photograph())),
        this._text, this._button),
      this._chooser, this._camera,
    );
    this._listen(form, dropZone);
  }

  _listen(form, dropZone) {
    form.addEventListener("submit", (event) => { event.preventDefault(); this._submit(); });
    this._text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this._submit(); }
    });
    this._text.addEventListener("input", () => this._grow());
    for (const input of [this._chooser, this._camera]) {
      input.addEventListener("change", () => { this.add([...input.files]); input.value = ""; });
    }
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (files.length) { event.preventDefault(); this.add(files); }
    });
    const mark = (isOver) => dropZone.classList.toggle("dropping", isOver);
    dropZone.addEventListener("dragover", (event) => { event.preventDefault(); mark(true); });
    dropZone.addEventListener("dragleave", (event) => { if (!dropZone.contains(event.relatedTarget)) mark(false); });
    dropZone.addEventListener("drop", (event) => {
      event.preventDefault();
      mark(false);
      this.add([...event.dataTransfer.files]);
    });
  }

  focus() {
    this._text.focus();
  }

  /** Put a turn back into the form, to be changed. */
  fill(text, pictures) {
    this._text.value = text;
    this._pictures = [...pictures];
    this._showPictures();
    this._grow();
    this.focus();
  }

  /** Show the stop button while an answer is made. */
  setBusy(isBusy) {
    this._isBusy = isBusy;
    const label = isBusy ? "Stop" : "Send";
    this._button.setAttribute("aria-label", label);
    this._button.title = label;
    this._button.classList.toggle("busy", isBusy);
    this._button.replaceChildren(icon(isBusy ? "stop" : "send"));
  }

  /** Add files as pictures, one after the other, so that they keep their order. */
  async add(files) {
    const limits = await this._actions.limits();
    for (const file of files) {
      if (this._pictures.length >= limits.max_images) {
        notify(`This server takes at most ${limits.max_images} pictures in one request.`);
        break;
      }
      try {
        const picture = await pictureOf(file, limits);
        this._pictures.push(picture);
        announce([`Added ${picture.name}.`, ...picture.notes].join(" "));
      } catch (error) {
        if (!(error instanceof PictureError)) throw error;
        notify(error.message);
      }
      this._showPictures();
    }
    this.focus();
  }

  async _photograph() {
    const isPhone = matchMedia("(pointer: coarse)").matches;
    if (isPhone || !navigator.mediaDevices) {
      this._camera.click();
      return;
    }
    const file = await photograph();
    if (file) this.add([file]);
  }

  _submit() {
    if (this._isBusy) {
      this._actions.stop();
      return;
    }
    const text = this._text.value;
    if (!text.trim() && !this._pictures.length) return;
    const pictures = this._pictures;
    this.fill("", []);
    this._actions.send(text, pictures);
  }

  _grow() {
    this._text.style.height = "auto";
    this._text.style.height = `${Math.min(this._text.scrollHeight, 240)}px`;
  }

  _showPictures() {
    const last = this._pictures.length - 1;
    this._strip.replaceChildren(...this._pictures.map((picture, at) => h("li", { class: "chip" },
      h("img", { src: picture.url, alt: picture.name }),
      h("div", { class: "chip-tools" },
        at > 0 ? iconButton("left", `Move ${picture.name} forward`, () => this._move(at, at - 1)) : null,
        at < last ? iconButton("right", `Move ${picture.name} back`, () => this._move(at, at + 1)) : null,
        iconButton("close", `Remove ${picture.name}`, () => this._remove(at))),
      picture.notes.length ? h("p", { class: "chip-note", text: picture.notes.join(" ") }) : null)));
  }

  _move(from, to) {
    const [picture] = this._pictures.splice(from, 1);
    this._pictures.splice(to, 0, picture);
    this._showPictures();
    announce(`${picture.name} is picture ${to + 1} of ${this._pictures.length}.`);
    this._strip.children[to].querySelector("button")?.focus();
  }

  _remove(at) {
    const [picture] = this._pictures.splice(at, 1);
    this._showPictures();
    announce(`Removed ${picture.name}.`);
    this.focus();
  }
}
