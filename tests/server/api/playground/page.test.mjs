// The parts of the page that need no browser: the tree of turns, requests, events, pictures, times.

import assert from "node:assert/strict";
import { test } from "node:test";

const UI = "../../../../server/api/pages/ui/";
const { Answering } = await import(`${UI}answer.js`);
const { Api, ApiFailure } = await import(`${UI}api.js`);
const { addTurn, branches, branchOf, exported, imported, newConversation, path, peers, select } = await import(`${UI}conversation.js`);
const { eventData } = await import(`${UI}events.js`);
const { ratesOf, share } = await import(`${UI}live.js`);
const { shortTime, stages, tileText, tokensPerSecond } = await import(`${UI}machine.js`);
const { mediaType, orientationOf, scaleFor } = await import(`${UI}pictures.js`);
const { bodyOf, streamedBody } = await import(`${UI}request.js`);
const { boundsOf, boundsText } = await import(`${UI}settings.js`);
const { levelOf, percent, visible } = await import(`${UI}tokens.js`);
const { tilesOf } = await import(`${UI}tiling.js`);
const { runTool } = await import(`${UI}tools.js`);

const PICTURE = { url: "data:image/png;base64,AA==", width: 2, height: 1, name: "a", notes: [] };
const texts = (turns) => turns.map((turn) => turn.text);

test("an edited question and a second answer are branches; nothing is lost", () => {
  const talk = newConversation();
  const one = addTurn(talk, null, { role: "user", text: "one" });
  const first = addTurn(talk, one.id, { role: "assistant", text: "first" });
  addTurn(talk, first.id, { role: "user", text: "more" });
  addTurn(talk, one.id, { role: "assistant", text: "second" });
  assert.deepEqual(texts(path(talk)), ["one", "second"]);
  assert.deepEqual(texts(branches(talk, first)), ["first", "second"]);
  select(talk, first);
  assert.deepEqual(texts(path(talk)), ["one", "first", "more"]);
  assert.equal(branchOf(talk, first), 0);
  addTurn(talk, null, { role: "user", text: "other" });
  assert.deepEqual(texts(path(talk)), ["other"]);
  assert.equal(talk.title, "one");
});

test("answers of one request stand side by side and are one branch", () => {
  const talk = newConversation();
  const question = addTurn(talk, null, { role: "user", text: "q" });
  const group = ["a", "b"].map((text, index) => addTurn(talk, question.id, { role: "assistant", text, group: "g", index }));
  addTurn(talk, question.id, { role: "assistant", text: "c" });
  assert.deepEqual(texts(peers(talk, group[1])), ["a", "b"]);
  assert.equal(branches(talk, group[1]).length, 2);
});

test("an export is imported with new ids, and a damaged one is refused with a reason", () => {
  const talk = newConversation();
  const question = addTurn(talk, null, { role: "user", text: "q", pictures: [PICTURE] });
  addTurn(talk, question.id, { role: "assistant", text: "a" });
  const [again] = imported(exported([talk]));
  assert.notEqual(again.id, talk.id);
  assert.deepEqual(path(again), path(talk));
  const changed = (change) => {
    const copy = structuredClone(talk);
    change(copy.nodes[question.id], copy);
    return exported([copy]);
  };
  const damaged = [
    "{", "[]", '{"format":"other"}',
    changed((turn) => { turn.role = "system"; }),
    changed((turn) => { turn.pictures[0].url = "javascript:a"; }),
    changed((turn) => { turn.pictures[0].url = "http://evil.example/a.png"; }),
    changed((turn, copy) => { turn.parent = copy.leaf; }),
  ];
  for (const text of damaged) assert.throws(() => imported(text), /The file|damaged/);
});

test("a request has the turns, the pictures before the text, and only settings that are set", () => {
  const talk = newConversation();
  const question = addTurn(talk, null, { role: "user", text: "what", pictures: [PICTURE] });
  const answer = addTurn(talk, question.id, { role: "assistant", text: "", calls: [{ id: "1", name: "current_time", args: "{}" }] });
  addTurn(talk, answer.id, { role: "tool", text: "noon", callId: "1", name: "current_time" });
  const settings = { system: "Be brief.", temperature: "0.5", top_p: "", n: "2", stop: "x\ny", tools: true };
  const body = bodyOf(path(talk), "m", settings);
  assert.deepEqual(body.messages.map((one) => one.role), ["system", "user", "assistant", "tool"]);
  assert.deepEqual(body.messages[1].content, [{ type: "image_url", image_url: { url: PICTURE.url } }, { type: "text", text: "what" }]);
  assert.deepEqual([body.temperature, body.top_p, body.n, body.stop], [0.5, undefined, 2, ["x", "y"]]);
  assert.equal(body.tools[0].function.name, "current_time");
  assert.equal(body.messages[3].tool_call_id, "1");
  const streamed = streamedBody(body, {});
  assert.ok(streamed.stream && streamed.return_timings && streamed.logprobs);
  assert.equal(streamedBody(body, { logprobs: false }).logprobs, undefined);
});

test("the form of an answer is a schema or a pattern; a schema that is no JSON is named", () => {
  const form = (settings) => bodyOf([], "m", settings);
  assert.deepEqual(form({ form: "json", schema: '{"type":"object"}' }).response_format.json_schema.schema, { type: "object" });
  assert.equal(form({ form: "regex", regex: "a+" }).guided_regex, "a+");
  assert.throws(() => form({ form: "json", schema: "{" }), /JSON schema in the settings/);
});

async function* chunksOf(...parts) {
  for (const part of parts) yield part;
}

async function collected(stream) {
  const all = [];
  for await (const one of stream) all.push(one);
  return all;
}

test("events are read wherever the bytes are cut", async () => {
  const bytes = new TextEncoder().encode(": ping\n\ndata: {\"a\":\"é\"}\n\ndata: one\r\ndata: two\r\n\r\ndata: [DONE]\n\n");
  for (let size = 1; size < 9; size += 1) {
    const parts = [];
    for (let at = 0; at < bytes.length; at += size) parts.push(bytes.slice(at, at + size));
    assert.deepEqual(await collected(eventData(chunksOf(...parts))), ['{"a":"é"}', "one\ntwo", "[DONE]"]);
  }
});

class Storage extends Map {
  getItem(name) { return this.get(name) ?? null; }
  setItem(name, value) { this.set(name, value); }
  removeItem(name) { this.delete(name); }
}

function answering(t, ...responses) {
  const seen = [];
  t.mock.method(globalThis, "fetch", async (url, options) => {
    seen.push({ url, options });
    const next = responses.shift();
    if (next instanceof Error) throw next;
    return next;
  });
  return seen;
}

test("a key is asked for once, kept, and asked for again if it is refused", async (t) => {
  const denied = () => Response.json({ error: { message: "no key" } }, { status: 401 });
  const seen = answering(t, denied(), denied(), Response.json({ ok: 1 }));
  const asked = [];
  const api = new Api("http://host/", async (wasRefused) => { asked.push(wasRefused); return `key${asked.length}`; }, new Storage());
  assert.deepEqual(await api.json("v1/models"), { ok: 1 });
  assert.deepEqual(asked, [false, true]);
  assert.equal(seen[2].options.headers.Authorization, "Bearer key2");
  assert.equal(api.key, "key2");
});

test("without a key the request fails, and the errors of the server are passed on", async (t) => {
  answering(t, Response.json({}, { status: 401 }), Response.json({ error: { message: "full" } }, { status: 429, headers: { "Retry-After": "3" } }), new TypeError("net"));
  const api = new Api("http://host/", async () => null, new Storage());
  await assert.rejects(api.json("a"), { status: 401 });
  await assert.rejects(api.json("a"), { status: 429, message: "full", retryAfter: 3 });
  await assert.rejects(api.json("a"), { status: 0 });
});

test("a stream that breaks off before its end is a failure, not an answer", async (t) => {
  answering(t, new Response('data: {"choices":[]}\n\n'), new Response('data: {"error":{"message":"gone"}}\n\n'), new Response("data: [DONE]\n\n"));
  const api = new Api("http://host/", async () => null, new Storage());
  await assert.rejects(collected(api.events("a", {})), ApiFailure);
  await assert.rejects(collected(api.events("a", {})), { message: "gone" });
  assert.deepEqual(await collected(api.events("a", {})), []);
});

const chunk = (index, delta, more = {}) => ({ choices: [{ index, delta, logprobs: null, finish_reason: null, ...more }] });

test("an answer is put together from its chunks, and a call is run and answered", async () => {
  const bodies = [];
  const rounds = [
    [chunk(0, { tool_calls: [{ index: 0, id: "1", function: { name: "current_time", arguments: "" } }] }),
      chunk(0, { tool_calls: [{ index: 0, function: { arguments: '{"timezone":"UTC"}' } }] }, { finish_reason: "tool_calls" })],
    [chunk(0, { content: "It is " }), chunk(0, { content: "late." }, { finish_reason: "stop" }), { choices: [], usage: { completion_tokens: 3 }, timings: { ttft_s: 1 } }],
  ];
  const api = { async *events(_, body) { bodies.push(body); yield* rounds.shift(); } };
  const talk = newConversation();
  addTurn(talk, null, { role: "user", text: "when" });
  const watch = { started() {}, grown() {}, ended() {} };
  await new Answering(api, watch).answer(talk, talk.leaf, "m", { tools: true });
  const turns = path(talk);
  assert.deepEqual(turns.map((turn) => turn.role), ["user", "assistant", "tool", "assistant"]);
  assert.match(turns[2].text, /UTC/);
  assert.deepEqual([turns[3].text, turns[3].state, turns[3].timings.ttft_s], ["It is late.", "done", 1]);
  assert.equal(bodies[1].messages.at(-1).role, "tool");
});

test("a stopped answer keeps its text, and a failed one its reason", async () => {
  const ends = [Object.assign(new Error(), { name: "AbortError" }), new ApiFailure(503, "The server is loading.", 2)];
  for (const [error, state] of [[ends[0], "stopped"], [ends[1], "failed"]]) {
    const api = { async *events() { yield chunk(0, { content: "half" }); throw error; } };
    const talk = newConversation();
    addTurn(talk, null, { role: "user", text: "q" });
    await new Answering(api, { started() {}, grown() {}, ended() {} }).answer(talk, talk.leaf, "m", {});
    const last = path(talk).at(-1);
    assert.deepEqual([last.text, last.state], ["half", state]);
    if (state === "failed") assert.match(last.error, /loading.* 2 s/);
  }
});

test("the orientation of a JPEG is read from either byte order", () => {
  const exif = (isLittle, value) => {
    const view = new DataView(new ArrayBuffer(40));
    [0xff, 0xd8, 0xff, 0xe1, 0, 34, 0x45, 0x78, 0x69, 0x66, 0, 0].forEach((byte, at) => view.setUint8(at, byte));
    view.setUint16(12, isLittle ? 0x4949 : 0x4d4d);
    view.setUint16(14, 42, isLittle);
    view.setUint32(16, 8, isLittle);
    view.setUint16(20, 1, isLittle);
    view.setUint16(22, 0x0112, isLittle);
    view.setUint16(24, 3, isLittle);
    view.setUint32(26, 1, isLittle);
    view.setUint16(30, value, isLittle);
    return new Uint8Array(view.buffer);
  };
  for (const isLittle of [true, false]) assert.equal(orientationOf(exif(isLittle, 6)), 6);
  assert.equal(orientationOf(exif(true, 99)), 1);
  const whole = exif(false, 8);
  for (let end = 0; end < whole.length; end += 1) assert.ok(orientationOf(whole.slice(0, end)) >= 1);
});

test("pictures are known by their bytes and scaled only over a limit", () => {
  assert.equal(mediaType(new Uint8Array([0xff, 0xd8, 0xff, 0])), "image/jpeg");
  assert.equal(mediaType(new Uint8Array([0x3c, 0x73, 0x76, 0x67])), null);
  const limits = { max_side: 16384, max_pixels: 25e6 };
  assert.deepEqual(scaleFor(4000, 3000, limits), { factor: 1, reason: "" });
  const { factor, reason } = scaleFor(10_000, 10_000, limits);
  assert.equal(factor, 0.5);
  assert.match(reason, /25 megapixels/);
  assert.match(scaleFor(20_000, 100, limits).reason, /16,384 pixels a side/);
});

test("times, probabilities, rates and bounds are written shortly", () => {
  assert.deepEqual([0.0004, 0.0312, 2.4, 12].map(shortTime), ["0.4 ms", "31 ms", "2.40 s", "12.0 s"]);
  assert.deepEqual([0, Math.log(0.5), Math.log(0.01), -20].map(percent), ["100 %", "50 %", "1.0 %", "< 0.01 %"]);
  assert.deepEqual([0, Math.log(0.7), Math.log(0.4), Math.log(0.1), -9].map(levelOf), ["p4", "p3", "p2", "p1", "p0"]);
  assert.equal(visible(" a\n"), "␣a↵");
  assert.equal(share(1, 0), "–");
  assert.equal(tokensPerSecond({ completion_tokens: 11 }, { decode_s: 2 }), 5);
  assert.equal(tokensPerSecond({ completion_tokens: 1 }, { decode_s: 0 }), null);
  const before = { time_s: 1, steps: 10, generated_tokens: 5, prompt_tokens: 0, images_encoded: 0 };
  assert.equal(ratesOf(before, { ...before, time_s: 3, steps: 20 }).steps, 5);
  assert.equal(ratesOf(before, { ...before, time_s: 3, steps: 0 }), null);
  const parts = stages({ images_s: 1, queue_s: 1, vision_s: 2, prefill_s: 3, decode_s: 4, ttft_s: 6, total_s: 10 });
  assert.deepEqual(parts.map(([name, , seconds]) => [name, seconds]), [["other", 1], ["images", 1], ["queue", 1], ["vision", 2], ["prefill", 1], ["decode", 4]]);
});

test("bounds come from the API's document", () => {
  const field = (type) => ({ components: { schemas: { ChatCompletionRequest: { properties: { a: { anyOf: [type, { type: "null" }] } } } } } });
  const of = (type) => boundsText(boundsOf(field(type), "a"));
  assert.equal(of({ type: "number", minimum: 0, maximum: 2 }), "from 0 to 2");
  assert.equal(of({ type: "number", exclusiveMinimum: 0, maximum: 2 }), "over 0 to 2");
  assert.equal(of({ type: "integer", minimum: 1, maximum: 2 ** 31 - 1 }), "from 1");
  assert.equal(boundsOf(field({ type: "string" }), "a"), null);
  assert.equal(boundsOf(field({}), "b"), null);
});

test("the tiles of a picture are described with resize and padding", () => {
  const text = tileText({ width: 320, height: 240 }, tilesOf(240, 320, 4, 224));
  assert.match(text, /^4 tiles, 2 across and 2 down, of 224 px\. 320 × 240/);
});

test("the demo tool answers every call, an error too", () => {
  assert.match(runTool("current_time", '{"timezone":"Europe/Berlin"}', new Date(0)), /1970.*01:00/);
  for (const call of [["current_time", "{"], ["current_time", '{"timezone":"Nowhere/X"}'], ["other", "{}"]]) assert.match(runTool(...call), /^error/);
});
