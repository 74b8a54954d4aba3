// The engine panel: counts of /v1/live, once a second, while the panel is open and in sight.

import { h, svg } from "./dom.js";

const KEPT = 60;
const RETRY_MS = 2000;

/** What a second was like, from two counts. Null if the server restarted between them. */
export function ratesOf(before, now) {
  const seconds = now.time_s - before.time_s;
  if (!(seconds > 0) || now.steps < before.steps || now.generated_tokens < before.generated_tokens) return null;
  const per = (name) => (now[name] - before[name]) / seconds;
  return { steps: per("steps"), tokens: per("generated_tokens"), prompt: per("prompt_tokens"), images: per("images_encoded") };
}

/** A share as "62 %"; a dash before anything was counted. */
export function share(part, whole) {
  return whole > 0 ? `${Math.round((100 * part) / whole)} %` : "–";
}

export class LivePanel {
  constructor(root, api) {
    this._api = api;
    this._state = h("p", { class: "state" });
    this._body = h("div");
    this._abort = null;
    this._samples = [];
    this._isWanted = false;
    root.replaceChildren(this._state, this._body);
    document.addEventListener("visibilitychange", () => this._match());
  }

  /** Watch while `isOpen`. */
  watch(isOpen) {
    this._isWanted = isOpen;
    this._match();
  }

  _match() {
    const isDue = this._isWanted && !document.hidden;
    if (isDue && !this._abort) this._run();
    else if (!isDue && this._abort) {
      this._abort.abort();
      this._abort = null;
    }
  }

  async _run() {
    const abort = new AbortController();
    this._abort = abort;
    this._state.textContent = "Connecting…";
    while (!abort.signal.aborted) {
      try {
        for await (const counts of this._api.events("v1/live", null, abort.signal)) this._show(counts);
        this._state.textContent = "The server is stopping.";
      } catch (error) {
        if (error.name === "AbortError") return;
        this._state.textContent = error.message;
        if (error.status === 401 || error.status === 404) return;
      }
      await new Promise((resolve) => { setTimeout(resolve, RETRY_MS); });
    }
  }

  _show(counts) {
    const last = this._samples.at(-1)?.counts;
    const rates = last ? ratesOf(last, counts) : null;
    if (last && !rates) this._samples = [];
    this._samples.push({ counts, rates });
    if (this._samples.length > KEPT) this._samples.shift();
    this._state.textContent = counts.is_ready ? "Ready" : "Not ready: the engine is loading, or does not respond.";
    this._state.className = counts.is_ready ? "state good" : "state bad";
    this._body.replaceChildren(...this._content(counts, rates));
  }

  _content(counts, rates) {
    const history = (name) => this._samples.map((one) => one.rates?.[name] ?? 0);
    const rate = (value) => (rates ? (value >= 10 ? Math.round(value) : value.toFixed(1)) : "–");
    return [
      h("div", { class: "meters" },
        meter("Tokens a second", rate(rates?.tokens ?? 0), history("tokens")),
        meter("Steps a second", rate(rates?.steps ?? 0), history("steps")),
        meter("Running", counts.running, this._samples.map((one) => one.counts.running)),
        meter("Waiting", counts.waiting, this._samples.map((one) => one.counts.waiting))),
      h("h3", { text: "Memory" }),
      pool("Text blocks", counts.text_blocks),
      pool("Image blocks", counts.image_blocks),
      h("h3", { text: "Caches" }),
      table([
        ["Prompt tokens found", share(counts.prefix_tokens_hit, counts.prefix_tokens_queried)],
        ["Pictures found", picturesFound(counts)],
        ["Pictures encoded", counts.images_encoded.toLocaleString("en")],
      ]),
      h("h3", { text: "Incidents" }),
      table([
        ["Preemptions", counts.preemptions],
        ["Restarts of engines", counts.engine_restarts],
        ["Restarts of workers", counts.worker_restarts],
      ]),
      ...(counts.replicas.length > 1 ? [h("h3", { text: "Replicas" }), ...replicas(counts.replicas)] : []),
    ];
  }
}

function meter(label, value, history) {
  return h("div", { class: "meter" }, h("span", { class: "label", text: label }), h("span", { class: "value", text: value }), sparkline(history));
}

function sparkline(values) {
  const most = Math.max(1e-9, ...values);
  const points = values.map((value, at) => `${((at + KEPT - values.length) * 100) / (KEPT - 1)},${(22 - (20 * value) / most).toFixed(1)}`);
  return svg("svg", { class: "spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("polyline", { points: points.join(" "), "vector-effect": "non-scaling-stroke" }));
}

function pool(label, { used, cached, total }) {
  const free = Math.max(0, total - used - cached);
  const bar = h("div", { class: "pool", "aria-hidden": "true" }, [["used", used], ["cached", cached], ["free", free]].map(([name, number]) => {
    const part = h("span", { class: name });
    part.style.flexGrow = String(number);
    return part;
  }));
  const text = `${used.toLocaleString("en")} used, ${cached.toLocaleString("en")} cached, ${free.toLocaleString("en")} free`;
  return h("div", { class: "pool-row" }, h("div", { class: "label" }, h("span", { text: label }), h("span", { class: "figure", text })), bar);
}

function table(rows) {
  return h("dl", { class: "facts" }, rows.map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", { text: value }))));
}

function picturesFound({ image_cache_hits: hits, image_cache_misses: misses }) {
  return share(hits, hits + misses);
}

/** The replicas one below the other: what each does, and what its caches found. */
function replicas(all) {
  const work = (one) => [one.running, one.waiting, share(one.text_blocks.used, one.text_blocks.total), share(one.image_blocks.used, one.image_blocks.total)];
  const caches = (one) => [share(one.prefix_tokens_hit, one.prefix_tokens_queried), picturesFound(one), one.preemptions, one.restarts];
  return [
    replicaTable("What each replica does", ["Running", "Waiting", "Text", "Images"], all, work),
    replicaTable("What each replica found in its caches, and its incidents", ["Prompt tokens found", "Pictures found", "Preemptions", "Restarts"], all, caches),
  ];
}

function replicaTable(caption, columns, all, cells) {
  const head = h("tr", {}, h("th", { scope: "col" }, h("span", { class: "unseen", text: "Replica" })), columns.map((text) => h("th", { scope: "col", text })));
  const rows = all.map((one, number) => h("tr", {},
    h("th", { scope: "row", text: `${number}${one.is_ready ? "" : " (not ready)"}` }),
    cells(one).map((text) => h("td", { text }))));
  return h("table", { class: "replicas" }, h("caption", { class: "unseen", text: caption }), h("thead", {}, head), h("tbody", {}, rows));
}
