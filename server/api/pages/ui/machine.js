// What the machine did for an answer: times, tokens, and the tiles of each picture.

import { h, svg } from "./dom.js";
import { tilesOf } from "./tiling.js";

/** Seconds as a short text: "0.4 ms", "31 ms", "2.4 s". */
export function shortTime(seconds) {
  if (seconds < 0.01) return `${(1000 * seconds).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

/** The parts of an answer's time, in order: [class, label, seconds]. */
export function stages(timings) {
  const other = timings.ttft_s - timings.images_s - timings.queue_s - timings.prefill_s;
  return [
    ["other", "checks", Math.max(0, other)],
    ["images", "pictures", timings.images_s],
    ["queue", "queue", timings.queue_s],
    ["vision", "vision", Math.min(timings.vision_s, timings.prefill_s)],
    ["prefill", "prefill", Math.max(0, timings.prefill_s - timings.vision_s)],
    ["decode", "decode", timings.decode_s],
  ];
}

/** Generated tokens per second while they were generated; null where there is only one. */
export function tokensPerSecond(usage, timings, numAnswers = 1) {
  const num = usage.completion_tokens - numAnswers;
  return num > 0 && timings.decode_s > 0 ? num / timings.decode_s : null;
}

/**
 * The notes beside an answer. turn: with usage and timings. pictures: what it is about; limits: of
 * /v1/playground, null before they are known. open(): show the pictures large.
 */
export function machineNotes(turn, numAnswers, pictures, limits, open) {
  const { usage, timings } = turn;
  if (!usage || !timings) return null;
  const speed = tokensPerSecond(usage, timings, numAnswers);
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const facts = [
    ["First token", shortTime(timings.ttft_s)],
    ["Speed", speed === null ? "–" : `${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s`],
    ["Prompt", cached ? `${usage.prompt_tokens} tokens, ${cached} cached` : `${usage.prompt_tokens} tokens`],
    [numAnswers > 1 ? `${numAnswers} answers` : "Answer", `${usage.completion_tokens} tokens`],
  ];
  if (timings.images.length) facts.push(["Pictures", tileFacts(timings.images)]);
  const list = h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", { text: value }))));
  return h("div", { class: "machine" }, list, timeline(timings), limits && pictures.length ? smallTiles(pictures, limits, open) : null);
}

function smallTiles(pictures, limits, open) {
  return h("div", { class: "seen-small" }, pictures.map((one) => (
    h("button", { type: "button", "aria-label": `${one.name} as the model saw it: show it large`, onclick: open }, tileDrawing(one, limits))
  )));
}

function tileFacts(images) {
  const tiles = images.reduce((sum, image) => sum + image.num_tiles, 0);
  return `${images.length}, ${tiles} ${tiles === 1 ? "tile" : "tiles"}`;
}

function timeline(timings) {
  const parts = stages(timings);
  const total = parts.reduce((sum, [, , seconds]) => sum + seconds, 0) || 1;
  const bar = h("div", { class: "timeline", "aria-hidden": "true" }, parts.map(([name, , seconds]) => {
    const part = h("span", { class: `stage ${name}` });
    part.style.flexGrow = String(seconds / total);
    return part;
  }));
  const legend = h("ul", { class: "stages", "aria-label": "Where the time went" }, parts.map(([name, label, seconds]) => (
    h("li", {}, h("span", { class: `key ${name}`, "aria-hidden": "true" }), `${label} `, h("span", { class: "figure", text: shortTime(seconds) }))
  )));
  return h("div", {}, bar, legend);
}

/** The picture as the model saw it: resized, padded, cut into tiles. limits: of /v1/playground. */
export function tileFigure(picture, limits) {
  const seen = tilesOf(picture.height, picture.width, limits.max_image_tiles, limits.tile_size);
  return h("figure", { class: "seen" }, tileDrawing(picture, limits), h("figcaption", { text: tileText(picture, seen) }));
}

function tileDrawing(picture, limits) {
  const seen = tilesOf(picture.height, picture.width, limits.max_image_tiles, limits.tile_size);
  const { canvas, inner, tileSize } = seen;
  const lines = [];
  for (let column = 0; column <= seen.columns; column += 1) {
    lines.push(svg("path", { d: `M${column * tileSize} 0V${canvas.height}`, class: "grid-line", "vector-effect": "non-scaling-stroke" }));
  }
  for (let row = 0; row <= seen.rows; row += 1) {
    lines.push(svg("path", { d: `M0 ${row * tileSize}H${canvas.width}`, class: "grid-line", "vector-effect": "non-scaling-stroke" }));
  }
  return svg(
    "svg",
    { viewBox: `-1 -1 ${canvas.width + 2} ${canvas.height + 2}`, class: "tiles", role: "img", "aria-label": `${picture.name}: ${tileText(picture, seen)}` },
    svg("rect", { width: canvas.width, height: canvas.height, class: "padding" }),
    svg("image", { href: picture.url, width: inner.width, height: inner.height, preserveAspectRatio: "none" }),
    ...lines,
  );
}

/** What was done to a picture, in words. */
export function tileText(picture, seen) {
  const tiles = seen.rows * seen.columns;
  const count = tiles === 1 ? "1 tile" : `${tiles} tiles, ${seen.columns} across and ${seen.rows} down,`;
  const { inner, canvas } = seen;
  const padding = [
    canvas.width > inner.width ? `${canvas.width - inner.width} px right` : "",
    canvas.height > inner.height ? `${canvas.height - inner.height} px below` : "",
  ].filter(Boolean).join(", ");
  const resized = inner.width === picture.width && inner.height === picture.height
    ? `${picture.width} × ${picture.height}, not resized`
    : `${picture.width} × ${picture.height} resized to ${inner.width} × ${inner.height}`;
  return `${count} of ${seen.tileSize} px. ${resized}${padding ? `; padding ${padding}` : ""}.`;
}
