// OpenAI's SDK for node against the bundled model and a scripted engine.

import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { model, picture, questions, scriptedModel, scriptedUrl, url } from "./common.mjs";

const options = { maxRetries: 0, timeout: 120_000 };
const client = new OpenAI({ baseURL: url, apiKey: "unused", ...options });
const scripted = new OpenAI({ baseURL: scriptedUrl, apiKey: "secret", ...options });
const Scene = z.object({ colour: z.enum(["red", "blue"]), is_drawn: z.boolean() });
const turn = {
  type: "function",
  function: {
    name: "turn",
    description: "Turn around",
    parameters: {
      type: "object",
      properties: { to: { enum: ["left", "right"] } },
      required: ["to"],
      additionalProperties: false,
    },
  },
};

const about = (question) => ({
  role: "user",
  content: [
    { type: "image_url", image_url: { url: picture } },
    { type: "text", text: question },
  ],
});
const greedy = (messages, fields = {}) => ({ model, messages, temperature: 0, max_tokens: 64, ...fields });

test("models are listed and retrieved", async () => {
  const names = [];
  for await (const one of client.models.list()) names.push(one.id);
  assert.deepEqual(names, [model]);
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("three turns about a picture are answered plain and streamed", async () => {
  const plain = [];
  const streamed = [];
  for (const [number, [question, answer]] of questions.entries()) {
    const asked = number ? { role: "user", content: question } : about(question);
    plain.push(asked);
    streamed.push(asked);
    const reply = await client.chat.completions.create(greedy(plain));
    if (!number) assert.equal(reply.choices[0].message.content, answer);
    const stream = client.chat.completions.stream(
      greedy(streamed, { stream_options: { include_usage: true } }),
    );
    let pieces = "";
    stream.on("content", (delta) => (pieces += delta));
    const whole = await stream.finalChatCompletion();
    assert.equal(pieces, reply.choices[0].message.content);
    assert.equal(whole.choices[0].message.content, pieces);
    assert.equal(whole.usage.total_tokens, reply.usage.total_tokens);
    plain.push(reply.choices[0].message);
    streamed.push(whole.choices[0].message);
  }
});

test("parse() gives an object about a picture, and its answer is echoed", async () => {
  const messages = [about("What colour is the circle?")];
  const form = { response_format: zodResponseFormat(Scene, "scene") };
  for (let round = 0; round < 3; round++) {
    const reply = await client.chat.completions.parse(greedy(messages, form));
    const message = reply.choices[0].message;
    assert.deepEqual(Scene.parse(message.parsed), message.parsed);
    messages.push(message, { role: "user", content: "What colour is the triangle?" });
  }
  const stream = client.chat.completions.stream(greedy(messages, form));
  assert.ok(Scene.parse((await stream.finalChatCompletion()).choices[0].message.parsed));
});

test("a tool must be called about a picture, plain and streamed", async () => {
  const tools = [zodFunction({ name: "turn", parameters: z.object({ to: z.enum(["left", "right"]) }) })];
  const messages = [about("What is in this image?")];
  for (const tool_choice of ["required", { type: "function", function: { name: "turn" } }]) {
    const body = greedy(messages, { tools, tool_choice, parallel_tool_calls: false });
    const message = (await client.chat.completions.parse(body)).choices[0].message;
    const [call] = message.tool_calls;
    assert.ok(["left", "right"].includes(call.function.parsed_arguments.to));
    const whole = await client.chat.completions.stream(body).finalMessage();
    assert.equal(whole.tool_calls[0].function.arguments, call.function.arguments);
    for (const one of [message, whole]) {
      const result = { role: "tool", tool_call_id: one.tool_calls[0].id, content: "turned" };
      const next = await client.chat.completions.create(greedy([...messages, one, result], { tools }));
      assert.ok(["stop", "length"].includes(next.choices[0].finish_reason));
    }
  }
});

test("calls go round by hand and by runTools", async () => {
  const messages = [];
  for (let round = 0; round < 3; round++) {
    messages.push({ role: "user", content: "Call" });
    const body = { model: scriptedModel, messages, tools: [turn] };
    const first = (await scripted.chat.completions.create(body)).choices[0].message;
    assert.deepEqual(JSON.parse(first.tool_calls[0].function.arguments), { to: "left" });
    messages.push(first, { role: "tool", tool_call_id: first.tool_calls[0].id, content: "turned" });
    const answer = (await scripted.chat.completions.create(body)).choices[0].message;
    assert.equal(answer.content, "It is done.");
    messages.push(answer);
  }
  const done = [];
  const run = (one) => (done.push(one.to), `turned ${one.to}`);
  for (const stream of [false, true]) {
    const runner = scripted.chat.completions.runTools({
      model: scriptedModel,
      stream,
      messages: [{ role: "user", content: "Call" }],
      tools: [{ type: "function", function: { ...turn.function, function: run, parse: JSON.parse } }],
    });
    assert.equal(await runner.finalContent(), "It is done.");
  }
  assert.deepEqual(done, ["left", "left"]);
});

test("responses see the picture, continue, hold a form and stream", async () => {
  const [[first, answer], [second]] = questions;
  const content = [
    { type: "input_image", image_url: picture, detail: "auto" },
    { type: "input_text", text: first },
  ];
  const input = [{ role: "user", content }];
  const body = { model, temperature: 0, max_output_tokens: 64 };
  const described = await client.responses.create({ ...body, input });
  assert.equal(described.output_text, answer);
  const next = await client.responses.create({ ...body, input: second, previous_response_id: described.id });
  const echoed = [...input, ...described.output, { role: "user", content: second }];
  const again = await client.responses.create({ ...body, input: echoed });
  assert.equal(next.output_text, again.output_text);
  const third = [...echoed, ...again.output, { role: "user", content: first }];
  const stream = client.responses.stream({ ...body, input: third });
  let pieces = "";
  stream.on("response.output_text.delta", (event) => (pieces += event.delta));
  const whole = await stream.finalResponse();
  assert.equal(whole.output_text, pieces);
  const text = { format: zodTextFormat(Scene, "scene") };
  const held = await client.responses.parse({ ...body, input, text });
  assert.ok(Scene.parse(held.output_parsed));
});

test("calls of responses go round", async () => {
  const tools = [{ type: "function", strict: false, ...turn.function }];
  const body = { model: scriptedModel, tools };
  const input = [{ role: "user", content: "Call" }];
  for (let round = 0; round < 3; round++) {
    const asked = await scripted.responses.create({ ...body, input });
    const [call] = asked.output;
    assert.deepEqual(JSON.parse(call.arguments), { to: "left" });
    input.push(...asked.output, { type: "function_call_output", call_id: call.call_id, output: "turned" });
    const done = await scripted.responses.create({ ...body, input });
    assert.equal(done.output_text, "It is done.");
    input.push(...done.output, { role: "user", content: "Call" });
  }
});

test("text is completed plain and streamed", async () => {
  const body = { model, prompt: "There is a red", temperature: 0, max_tokens: 4 };
  const whole = (await client.completions.create(body)).choices[0].text;
  let pieces = "";
  for await (const part of await client.completions.create({ ...body, stream: true })) {
    pieces += part.choices[0]?.text ?? "";
  }
  assert.ok(whole);
  assert.equal(pieces, whole);
});

test("errors are the SDK's own", async () => {
  const ask = (words, fields = {}) => ({ model: scriptedModel, messages: [{ role: "user", content: words }], ...fields });
  await assert.rejects(client.chat.completions.create(ask("Hello", { model: "other" })), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create(greedy([{ role: "user", content: "Hello" }], { sead: 1 })), /did you mean seed/);
  await assert.rejects(scripted.chat.completions.create(ask("Busy")), OpenAI.RateLimitError);
  const wrong = new OpenAI({ baseURL: scriptedUrl, apiKey: "wrong", ...options });
  await assert.rejects(wrong.chat.completions.create(ask("Hello")), OpenAI.AuthenticationError);
  await assert.rejects(async () => {
    for await (const _ of await scripted.chat.completions.create(ask("Break", { stream: true })));
  }, /engine/);
});
