// Vercel's AI SDK with its provider for OpenAI-compatible servers.

import assert from "node:assert/strict";
import test from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { model, picture, questions, scriptedModel, scriptedUrl, url } from "./common.mjs";

const provider = createOpenAICompatible({
  name: "vlmserve",
  baseURL: url,
  apiKey: "unused",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const scriptedProvider = createOpenAICompatible({ name: "scripted", baseURL: scriptedUrl, apiKey: "secret" });
const greedy = { model: provider(model), temperature: 0, maxOutputTokens: 64, maxRetries: 0 };
const scripted = { model: scriptedProvider(scriptedModel), maxRetries: 0 };
const Scene = z.object({ colour: z.enum(["red", "blue"]), is_drawn: z.boolean() });
const turn = tool({
  description: "Turn around",
  inputSchema: z.object({ to: z.enum(["left", "right"]) }),
  execute: async ({ to }) => `turned ${to}`,
});

const about = (question) => ({
  role: "user",
  content: [
    { type: "file", data: picture, mediaType: "image/png" },
    { type: "text", text: question },
  ],
});
const onError = () => {};

test("three turns about a picture are answered plain and streamed", async () => {
  const plain = [];
  const streamed = [];
  for (const [number, [question, answer]] of questions.entries()) {
    const asked = number ? { role: "user", content: question } : about(question);
    plain.push(asked);
    streamed.push(asked);
    const reply = await generateText({ ...greedy, messages: plain });
    if (!number) assert.equal(reply.text, answer);
    const stream = streamText({ ...greedy, messages: streamed });
    let pieces = "";
    for await (const piece of stream.textStream) pieces += piece;
    assert.equal(pieces, reply.text);
    assert.equal(await stream.finishReason, reply.finishReason);
    assert.equal((await stream.usage).outputTokens, reply.usage.outputTokens);
    plain.push(...reply.response.messages);
    streamed.push(...(await stream.response).messages);
  }
});

test("an answer about a picture is an object, plain and streamed", async () => {
  const messages = [about("What colour is the circle?")];
  for (const output of [Output.object({ schema: Scene }), Output.choice({ options: ["red", "blue"] })]) {
    const reply = await generateText({ ...greedy, messages, output });
    const stream = streamText({ ...greedy, messages, output });
    let last;
    for await (const part of stream.partialOutputStream) last = part;
    assert.deepEqual(last, reply.output);
    assert.ok(typeof last === "string" ? ["red", "blue"].includes(last) : Scene.parse(last));
  }
});

test("a tool must be called about a picture, plain and streamed", async () => {
  const tools = { turn };
  const messages = [about("What is in this image?")];
  for (const toolChoice of ["required", { type: "tool", toolName: "turn" }]) {
    const asked = { ...greedy, messages, tools, toolChoice, providerOptions: { vlmserve: { parallel_tool_calls: false } } };
    const reply = await generateText(asked);
    const [call] = reply.toolCalls;
    assert.ok(["left", "right"].includes(call.input.to));
    const stream = streamText(asked);
    await stream.consumeStream();
    assert.deepEqual((await stream.toolCalls)[0].input, call.input);
    for (const more of [reply.response.messages, (await stream.response).messages]) {
      const next = await generateText({ ...greedy, messages: [...messages, ...more], tools });
      assert.ok(["stop", "length"].includes(next.finishReason));
    }
  }
});

test("calls go round in steps until an answer", async () => {
  const tools = { turn };
  const messages = [];
  for (let round = 0; round < 3; round++) {
    messages.push({ role: "user", content: "Call" });
    const asked = { ...scripted, messages, tools, stopWhen: stepCountIs(3) };
    const reply = await generateText(asked);
    assert.equal(reply.text, "It is done.");
    assert.deepEqual(reply.steps[0].toolCalls[0].input, { to: "left" });
    const stream = streamText(asked);
    await stream.consumeStream();
    assert.equal(await stream.text, "It is done.");
    messages.push(...(await stream.response).messages);
  }
});

test("text is completed", async () => {
  const reply = await generateText({ ...greedy, model: provider.completionModel(model), prompt: "There is a red", maxOutputTokens: 4 });
  // The provider writes a dialogue into the prompt, of which the small model makes little.
  assert.ok(["stop", "length"].includes(reply.finishReason));
});

test("errors have the server's words", async () => {
  const failure = async (promise) => {
    const error = await promise.then(assert.fail, (reason) => reason);
    assert.ok(APICallError.isInstance(error), String(error));
    return error;
  };
  const missing = await failure(generateText({ ...greedy, model: provider("other"), prompt: "Hello" }));
  assert.equal(missing.statusCode, 404);
  assert.match(missing.message, /other/);
  const busy = await failure(generateText({ ...scripted, prompt: "Busy" }));
  assert.deepEqual([busy.statusCode, busy.isRetryable], [429, true]);
  const errors = [];
  const broken = streamText({ ...scripted, prompt: "Break", onError: ({ error }) => errors.push(error) });
  await broken.consumeStream({ onError });
  assert.match(JSON.stringify(errors) + String(errors), /engine/);
});

test("comments that fill silence are no parts", async () => {
  const stream = streamText({ ...scripted, prompt: "Slow" });
  let pieces = "";
  for await (const piece of stream.textStream) pieces += piece;
  assert.equal(pieces, "What is in this image?");
});
