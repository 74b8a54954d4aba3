// Dialogs: the key, a request as a program, a prompt, a picture, the camera.

import { copyText, h, iconButton, newId, notify, textButton } from "./dom.js";
import { tileFigure } from "./machine.js";
import { LANGUAGES } from "./snippets.js";
import { promptText } from "./tokens.js";

function open(title, content, className = "") {
  const id = newId("dialog");
  const dialog = h("dialog", { class: className, "aria-labelledby": id });
  dialog.append(
    h("div", { class: "dialog-head" }, h("h2", { id, text: title }), iconButton("close", "Close", () => dialog.close())),
    ...content(dialog),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask for an API key; resolves to null if none is given. */
export function askKey(wasRefused) {
  return new Promise((resolve) => {
    let key = null;
    const id = newId("field");
    const input = h("input", { id, type: "password", autocomplete: "off", required: true, "aria-invalid": String(wasRefused) });
    const form = (dialog) => [h("form", {
      class: "key-form",
      onsubmit: (event) => { event.preventDefault(); key = input.value.trim(); dialog.close(); },
    },
    wasRefused ? h("p", { class: "error", role: "alert", text: "The server refused this key." }) : null,
    h("p", { text: "This server needs an API key. It is kept until you close this tab." }),
    h("label", { for: id, text: "API key" }), input,
    h("button", { type: "submit", class: "main", text: "Use this key" }))];
    open("API key", form).addEventListener("close", () => resolve(key || null));
    input.focus();
  });
}

/** Show a request as a program. request: { url, body, key }. */
export function showProgram({ url, body, key }) {
  open("This request as a program", () => {
    const code = h("code");
    const box = h("pre", { class: "program", tabindex: 0 }, code);
    const withKey = h("input", { type: "checkbox", id: newId("field") });
    const choice = h("select", { "aria-label": "Language" }, Object.entries(LANGUAGES).map(
      ([name, { label }]) => h("option", { value: name, text: label }),
    ));
    let program = "";
    const show = () => {
      const shownKey = key ? (withKey.checked ? key : null) : "";
      program = LANGUAGES[choice.value].make({ url, body, key: shownKey });
      code.textContent = shortened(program);
    };
    choice.addEventListener("change", show);
    withKey.addEventListener("change", show);
    show();
    const copy = textButton("Copy", async () => {
      notify(await copyText(program) ? "Copied." : "This browser does not allow copying.");
    }, { class: "main" });
    const keyRow = h("p", { class: "check" }, withKey, h("label", { for: withKey.id, text: "With my key; without it, the program reads VLMSERVE_API_KEY" }));
    return [h("div", { class: "row" }, choice, copy), key ? keyRow : null, box,
      h("p", { class: "hint", text: "Pictures are shortened here; the copy has them whole." })].filter(Boolean);
  }, "large");
}

function shortened(program) {
  return program.replace(/(data:image\/[a-z]+;base64,[A-Za-z0-9+/]{24})[A-Za-z0-9+/=]+/g, "$1…");
}

/** Show prompts as the model reads them. rendering: of /v1/chat/completions/render. */
export function showPrompt(rendering) {
  open("The prompt as the model reads it", () => rendering.prompts.flatMap((prompt) => [
    h("p", { class: "hint", text: `${prompt.token_ids.length} tokens, ${rendering.format === "meta" ? "Meta's format" : "the model's chat template"}. Special tokens are marked.` }),
    h("pre", { class: "prompt", tabindex: 0 }, ...promptText(prompt.text)),
  ]), "large");
}

/** Show pictures as the model sees them. */
export function showPictures(pictures, limits) {
  open(pictures.length > 1 ? "The pictures as the model sees them" : "The picture as the model sees it",
    () => pictures.map((one) => tileFigure(one, limits)), "large");
}

/** Photograph with the camera of this machine; resolves to a File or null. */
export async function photograph() {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    notify(error.name === "NotAllowedError" ? "The browser does not allow the camera." : "There is no camera.");
    return null;
  }
  return new Promise((resolve) => {
    let file = null;
    const video = h("video", { autoplay: true, playsinline: true, "aria-label": "The camera" });
    video.muted = true;
    video.srcObject = stream;
    const dialog = open("Camera", (box) => {
      const take = textButton("Take the photo", async () => {
        file = await frameOf(video);
        box.close();
      }, { class: "main", disabled: true });
      video.addEventListener("loadeddata", () => { take.disabled = false; });
      return [video, take];
    });
    dialog.addEventListener("close", () => {
      stream.getTracks().forEach((track) => track.stop());
      resolve(file);
    });
  });
}

async function frameOf(video) {
  const canvas = h("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => { canvas.toBlob(resolve, "image/jpeg", 0.92); });
  return blob && new File([blob], "photo.jpg", { type: "image/jpeg" });
}
