// The settings: sampling with the bounds of /openapi.json, the form of answers, tools.

import { h, newId } from "./dom.js";

const REQUEST = "ChatCompletionRequest";
const FIELDS = [
  ["temperature", "Temperature", "0 always takes the likeliest token."],
  ["top_p", "top_p", "Only the likeliest tokens that sum to this probability."],
  ["top_k", "top_k", "Only this many of the likeliest tokens; 0 is off."],
  ["min_p", "min_p", "Only tokens with this part of the likeliest one's probability."],
  ["max_tokens", "Maximum tokens", ""],
  ["min_tokens", "Minimum tokens", ""],
  ["seed", "Seed", "The same request and seed give the same answer."],
  ["presence_penalty", "Presence penalty", ""],
  ["frequency_penalty", "Frequency penalty", ""],
  ["repetition_penalty", "Repetition penalty", ""],
  ["n", "Answers side by side", ""],
];
const MORE_FIELDS = [
  ["timeout_s", "Timeout in seconds", ""],
  ["priority", "Priority", "Lower numbers run first."],
];

/** The bounds of a field in the API's document: { isInteger, min, max, isOpenBelow }. */
export function boundsOf(document, name) {
  const field = document.components.schemas[REQUEST].properties[name];
  const type = (field?.anyOf ?? [field]).find((one) => one?.type === "number" || one?.type === "integer");
  if (!type) return null;
  return {
    isInteger: type.type === "integer",
    min: type.minimum ?? type.exclusiveMinimum ?? null,
    max: type.maximum ?? null,
    isOpenBelow: type.exclusiveMinimum !== undefined,
  };
}

/** The bounds in words; numbers that no one would type are left out. */
export function boundsText({ min, max, isOpenBelow }) {
  const low = min === null || min < -1e6 ? "" : `${isOpenBelow ? "over" : "from"} ${min}`;
  const high = max === null || max > 1e6 ? "" : `to ${max}`;
  return [low, high].filter(Boolean).join(" ");
}

export class SettingsPanel {
  /** settings: changed in place. changed(): called after each change. */
  constructor(root, settings, changed) {
    this._settings = settings;
    this._changed = changed;
    this._numbers = h("div", { class: "fields" });
    this._more = h("div", { class: "fields" });
    root.replaceChildren(
      this._area("system", "System message", "Sent before the conversation.", 4),
      h("h3", { text: "Sampling" }),
      this._numbers,
      this._area("stop", "Stop texts", "One on each line.", 2),
      h("h3", { text: "Form of the answer" }),
      this._form(),
      h("h3", { text: "Tools and tokens" }),
      this._check("tools", "Offer the demo tool current_time; this page runs it", false),
      this._check("logprobs", "Get each token's probability and five alternatives", true),
      this._more,
      h("p", {}, h("button", { type: "button", class: "quiet", onclick: () => this._reset(), text: "Reset all settings" })),
    );
  }

  /** Fill in the numbers, once the document is here. */
  useDocument(document) {
    const inputs = (fields) => fields.map(([name, label, help]) => {
      const bounds = boundsOf(document, name);
      return bounds ? this._number(name, label, help, bounds) : null;
    }).filter(Boolean);
    this._numbers.replaceChildren(...inputs(FIELDS));
    this._more.replaceChildren(...inputs(MORE_FIELDS));
  }

  _set(name, value) {
    if (value === "" || value === undefined) delete this._settings[name];
    else this._settings[name] = value;
    this._changed();
  }

  _reset() {
    for (const name of Object.keys(this._settings)) if (name !== "theme" && name !== "model") delete this._settings[name];
    this._changed(true);
  }

  _number(name, label, help, bounds) {
    const [id, helpId] = [newId("field"), newId("help")];
    const input = h("input", {
      id, type: "number", "aria-describedby": helpId, placeholder: "default", inputmode: bounds.isInteger ? "numeric" : "decimal",
      min: bounds.min, max: bounds.max, step: bounds.isInteger ? 1 : "any",
    });
    input.value = this._settings[name] ?? "";
    const words = h("small", { id: helpId, text: [boundsText(bounds), help].filter(Boolean).join(". ") });
    input.addEventListener("input", () => {
      const isValid = input.validity.valid && !(bounds.isOpenBelow && input.value !== "" && Number(input.value) <= bounds.min);
      input.setAttribute("aria-invalid", String(!isValid));
      if (isValid) this._set(name, input.value);
    });
    return h("div", { class: "field" }, h("label", { for: id, text: label }), input, words);
  }

  _area(name, label, help, rows) {
    const [id, helpId] = [newId("field"), newId("help")];
    const area = h("textarea", { id, rows, "aria-describedby": helpId, spellcheck: "false" });
    area.value = this._settings[name] ?? "";
    area.addEventListener("input", () => this._set(name, area.value));
    return h("div", { class: "field wide" }, h("label", { for: id, text: label }), area, h("small", { id: helpId, text: help }));
  }

  _check(name, label, isOnByDefault) {
    const id = newId("field");
    const box = h("input", { id, type: "checkbox" });
    box.checked = this._settings[name] ?? isOnByDefault;
    box.addEventListener("change", () => this._set(name, box.checked));
    return h("div", { class: "check" }, box, h("label", { for: id, text: label }));
  }

  _form() {
    const id = newId("field");
    const choice = h("select", { id }, [["", "Free text"], ["json", "JSON schema"], ["regex", "Regular expression"]].map(
      ([value, text]) => h("option", { value, text }),
    ));
    choice.value = this._settings.form ?? "";
    const schema = this._area("schema", "JSON schema", "The answer is JSON that matches it.", 6);
    const regex = this._area("regex", "Regular expression", "The whole answer matches it.", 2);
    const show = () => {
      schema.hidden = choice.value !== "json";
      regex.hidden = choice.value !== "regex";
    };
    choice.addEventListener("change", () => { this._set("form", choice.value); show(); });
    show();
    return h("div", {}, h("div", { class: "field" }, h("label", { for: id, text: "Held to" }), choice), schema, regex);
  }
}
