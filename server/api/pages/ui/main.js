// Puts the page together: what is shown, and what each action does.

import { Answering } from "./answer.js";
import { Api, ApiFailure } from "./api.js";
import { Composer } from "./composer.js";
import { addTurn, exported, imported, newConversation, path, select } from "./conversation.js";
import { askKey, showPictures, showProgram, showPrompt } from "./dialogs.js";
import { announce, h, icon, iconButton, notify, textButton } from "./dom.js";
import { whenIdle } from "./frames.js";
import { LivePanel } from "./live.js";
import { warmUps } from "./markdown.js";
import { bodyOf } from "./request.js";
import { SettingsPanel } from "./settings.js";
import { Store, loadSettings, saveSettings } from "./store.js";
import { Thread } from "./thread.js";
import { Welcome } from "./welcome.js";

const THEMES = ["system", "light", "dark"];
const THEME_ICONS = { system: "half", light: "sun", dark: "moon" };
const WAIT_MS = 2000;
const byId = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.settings = loadSettings();
    this.store = new Store();
    this.api = new Api(new URL(".", document.baseURI), askKey);
    this.conversation = newConversation();
    this.all = [];
    this.thread = new Thread(byId("thread"), {
      again: (turn) => this._run(turn.parent),
      choose: (turn) => { select(this.conversation, turn); this._changed(); },
      edit: (turn) => this._edit(turn),
      showPictures: async (pictures) => showPictures(pictures, await this.limits()),
      showProgram: (turn) => this._showProgram(turn),
      showPrompt: (turn) => this._showPrompt(turn),
    });
    this.answering = new Answering(this.api, {
      started: () => this._changed(),
      grown: (turn) => { this.thread.grow(turn); this._sayNewSentences(turn); },
      ended: (turns) => this._ended(turns),
    });
    this.composer = new Composer(byId("composer"), byId("main"), {
      send: (text, pictures) => this._send(text, pictures),
      stop: () => this.answering.stop(),
      limits: () => this.limits(),
    });
    this.welcome = new Welcome((example) => this._ask(example));
  }

  async start() {
    this._setUpBar();
    this._setUpPanel();
    this._showTheme();
    this._show();
    this.composer.focus();
    whenIdle(...warmUps());
    await Promise.all([this._loadServer(), this._loadConversations()]);
  }

  // The server

  /** The limits of the server; asked for once. */
  async limits() {
    this._limits ??= this.api.json("v1/playground").catch((error) => {
      this._limits = undefined;
      throw error;
    });
    return this._limits;
  }

  async _loadServer() {
    for (;;) {
      try {
        const [limits, models] = await Promise.all([this.limits(), this.api.json("v1/models")]);
        this._showModels(models.data.map((one) => one.id));
        this.thread.limits = limits;
        this.welcome.useServer(limits);
        if (!this.answering.isBusy) this._show();
        const openapi = await this.api.json("openapi.json");
        this._openapi = openapi;
        this.settingsPanel.useDocument(openapi);
        return;
      } catch (error) {
        if (!(error instanceof ApiFailure)) throw error;
        this.welcome.showProblem(error.message);
        if (error.status === 401) {
          this.welcome.offer("Enter the key", () => this._loadServer());
          return;
        }
        await new Promise((resolve) => { setTimeout(resolve, WAIT_MS); });
      }
    }
  }

  _showModels(names) {
    const choice = byId("model");
    choice.replaceChildren(...names.map((name) => h("option", { value: name, text: name })));
    choice.disabled = false;
    if (names.includes(this.settings.model)) choice.value = this.settings.model;
    choice.addEventListener("change", () => { this.settings.model = choice.value; saveSettings(this.settings); });
  }

  // Asking and answering

  async _send(text, pictures) {
    const parent = this._editedParent === undefined ? this.conversation.leaf : this._editedParent;
    this._editedParent = undefined;
    addTurn(this.conversation, parent, { role: "user", text, pictures });
    await this._run(this.conversation.leaf);
  }

  async _ask(example) {
    if (this.answering.isBusy) return;
    await this.composer.add([await example.file(this.api)]);
    byId("question").value = example.question;
    byId("composer").requestSubmit();
  }

  async _run(parent) {
    if (this.answering.isBusy) return;
    this._said = 0;
    this.composer.setBusy(true);
    announce("The answer is being made.");
    const { conversation } = this;
    await this.answering.answer(conversation, parent, byId("model").value, { ...this.settings });
    // Another one may be open by now, and this one deleted.
    if (this.all.includes(conversation)) this._keep(conversation);
  }

  _ended(turns) {
    const [first] = turns;
    this.composer.setBusy(this.answering.isBusy);
    if (!first) return;
    this._show();
    announce(first.state === "failed" ? first.error : first.text.slice(this._said) || "The answer is complete.");
  }

  /** Whole sentences only: a reader of the page would speak half words otherwise. */
  _sayNewSentences(turn) {
    if (turn.index) return;
    const end = Math.max(turn.text.lastIndexOf(". "), turn.text.lastIndexOf("\n"));
    if (end > this._said + 80) {
      announce(turn.text.slice(this._said, end + 1));
      this._said = end + 1;
    }
  }

  _edit(turn) {
    this._editedParent = turn.parent;
    this.composer.fill(turn.text, turn.pictures ?? []);
    announce("The question is in the form. Sending it makes a new version.");
  }

  _bodyBefore(turn) {
    return bodyOf(path(this.conversation, turn.parent), byId("model").value, this.settings);
  }

  async _showPrompt(turn) {
    try {
      showPrompt(await this.api.json("v1/chat/completions/render", this._bodyBefore(turn)));
    } catch (error) {
      notify(error.message);
    }
  }

  _showProgram(turn) {
    try {
      showProgram({ url: this.api.url("v1/chat/completions"), body: this._bodyBefore(turn), key: this.api.key });
    } catch (error) {
      notify(error.message);
    }
  }

  // Conversations

  async _loadConversations() {
    this.all = await this.store.all();
    for (const turn of this.all.flatMap((one) => Object.values(one.nodes))) {
      if (turn.state === "streaming") Object.assign(turn, { state: "failed", error: "The page was closed before the end." });
    }
    this._showList();
  }

  /** The conversation has changed: show and keep it. */
  _changed() {
    this._show();
    this._keep(this.conversation);
  }

  _keep(conversation) {
    if (!Object.keys(conversation.nodes).length) return;
    if (!this.all.includes(conversation)) this.all.unshift(conversation);
    this.store.save(conversation).catch(() => notify("This browser has no room to keep the conversation: export it."));
    this._showList();
  }

  _show() {
    this.thread.show(this.conversation, this.welcome.root);
    byId("main").classList.toggle("empty", this.conversation.leaf === null);
  }

  _open(conversation) {
    this.answering.stop();
    this.conversation = conversation;
    this._editedParent = undefined;
    this._show();
    this._showList();
    this._toggleList(false);
    this.composer.focus();
  }

  _showList() {
    const items = this.all.map((one) => h("li", {},
      h("button", { type: "button", class: "entry", "aria-current": one === this.conversation ? "true" : undefined, onclick: () => this._open(one), text: one.title || "Untitled" }),
      iconButton("trash", `Delete ${one.title || "Untitled"}`, () => this._delete(one))));
    const file = h("input", { type: "file", accept: "application/json,.json", class: "unseen", tabindex: -1, "aria-hidden": "true" });
    file.addEventListener("change", () => this._import(file.files[0]));
    byId("list").replaceChildren(
      h("button", { type: "button", class: "new", onclick: () => this._open(newConversation()) }, icon("plus"), "New conversation"),
      h("ul", {}, items),
      h("div", { class: "list-foot" },
        h("p", { class: "hint", text: "Kept in this browser only." }),
        textButton("Export", () => this._export(), { disabled: !this.all.length }),
        textButton("Import", () => file.click()), file));
  }

  _delete(conversation) {
    const at = this.all.indexOf(conversation);
    this.all.splice(at, 1);
    this.store.remove(conversation.id);
    if (conversation === this.conversation) this._open(newConversation());
    else this._showList();
    notify("Deleted the conversation.", {
      label: "Undo",
      run: () => { this.all.splice(at, 0, conversation); this.store.save(conversation); this._showList(); },
    });
  }

  _export() {
    const url = URL.createObjectURL(new Blob([exported(this.all)], { type: "application/json" }));
    h("a", { href: url, download: "vlmserve-conversations.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  async _import(file) {
    if (!file) return;
    try {
      const found = imported(await file.text());
      for (const one of found) await this.store.save(one);
      this.all.unshift(...found);
      this._showList();
      notify(`Imported ${found.length === 1 ? "a conversation" : `${found.length} conversations`}.`);
    } catch (error) {
      notify(error.message);
    }
  }

  // Bar and panels

  _setUpBar() {
    byId("toggle-list").append(icon("menu"));
    byId("toggle-list").addEventListener("click", () => this._toggleList());
    byId("theme").addEventListener("click", () => {
      this.settings.theme = THEMES[(THEMES.indexOf(this.settings.theme ?? "system") + 1) % THEMES.length];
      saveSettings(this.settings);
      this._showTheme();
    });
    byId("open-engine").addEventListener("click", () => this._openPanel("engine"));
    byId("open-settings").addEventListener("click", () => this._openPanel("settings"));
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
      if (this.answering.isBusy) this.answering.stop();
      else if (!byId("panel").hidden) this._openPanel(null);
      else this._toggleList(false);
    });
  }

  _toggleList(isOpen = !document.body.classList.contains("list-open")) {
    document.body.classList.toggle("list-open", isOpen);
    byId("toggle-list").setAttribute("aria-expanded", String(isOpen));
  }

  _setUpPanel() {
    this._panes = { settings: h("div", { class: "pane" }), engine: h("div", { class: "pane" }) };
    this._panelTitle = h("h2");
    byId("panel").append(
      h("div", { class: "dialog-head" }, this._panelTitle, iconButton("close", "Close", () => this._openPanel(null))),
      this._panes.settings, this._panes.engine);
    this._fillSettings();
    this.livePanel = new LivePanel(this._panes.engine, this.api);
  }

  _fillSettings() {
    this.settingsPanel = new SettingsPanel(this._panes.settings, this.settings, (isReset) => {
      saveSettings(this.settings);
      if (isReset) this._fillSettings();
    });
    if (this._openapi) this.settingsPanel.useDocument(this._openapi);
  }

  /** Show one pane, or none; the same one again closes it. */
  _openPanel(name) {
    const isSame = !byId("panel").hidden && !this._panes[name]?.hidden;
    const shown = isSame ? null : name;
    const opener = byId(`open-${this._pane}`);
    byId("panel").hidden = shown === null;
    for (const [one, pane] of Object.entries(this._panes)) {
      pane.hidden = one !== shown;
      byId(`open-${one}`).setAttribute("aria-expanded", String(one === shown));
    }
    this.livePanel.watch(shown === "engine");
    this._panelTitle.textContent = shown === "engine" ? "Engine" : "Settings";
    if (shown) byId("panel").querySelector("button").focus();
    else opener?.focus();
    this._pane = shown;
  }

  _showTheme() {
    const theme = this.settings.theme ?? "system";
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").replaceChildren(icon(THEME_ICONS[theme]));
    byId("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
  }
}

new Page().start();
