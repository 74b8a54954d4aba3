// The body of a request from a conversation and the settings. Knows nothing of the page.

import { DEMO_TOOL } from "./tools.js";

/** Settings that are fields of the request as they are; empty ones are left out. */
export const SAMPLING = [
  "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed", "presence_penalty",
  "frequency_penalty", "repetition_penalty", "timeout_s", "priority",
];

/** The messages of these turns, with the system message before them. */
export function messagesOf(turns, system) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    if (turn.role === "user") messages.push({ role: "user", content: contentOf(turn) });
    else if (turn.role === "tool") messages.push({ role: "tool", tool_call_id: turn.callId, content: turn.text });
    else messages.push(...answerOf(turn));
  }
  return messages;
}

function contentOf(turn) {
  if (!turn.pictures?.length) return turn.text;
  const pictures = turn.pictures.map((one) => ({ type: "image_url", image_url: { url: one.url } }));
  return turn.text ? [...pictures, { type: "text", text: turn.text }] : pictures;
}

function answerOf(turn) {
  const message = { role: "assistant", content: turn.text || null };
  if (turn.calls?.length) {
    message.tool_calls = turn.calls.map(({ id, name, args }) => (
      { id, type: "function", function: { name, arguments: args } }
    ));
  }
  // An answer that failed before its first token is no turn of the conversation.
  return turn.text || message.tool_calls ? [message] : [];
}

/** The body of a chat completion. Throws Error with a reason for the user. */
export function bodyOf(turns, model, settings) {
  const body = { model, messages: messagesOf(turns, settings.system ?? "") };
  for (const name of SAMPLING) {
    const value = settings[name];
    if (value !== undefined && value !== null && value !== "") body[name] = Number(value);
  }
  const stops = (settings.stop ?? "").split("\n").filter((one) => one !== "");
  if (stops.length) body.stop = stops;
  if (Number(settings.n) > 1) body.n = Number(settings.n);
  if (settings.tools) body.tools = [DEMO_TOOL];
  addForm(body, settings);
  return body;
}

function addForm(body, settings) {
  if (settings.form === "json") {
    let schema;
    try {
      schema = JSON.parse(settings.schema || "{}");
    } catch (error) {
      throw new Error(`The JSON schema in the settings is not JSON: ${error.message}`, { cause: error });
    }
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  } else if (settings.form === "regex" && settings.regex) {
    body.guided_regex = settings.regex;
  }
}

/** The body as the page sends it: streamed, with what the page shows beside an answer. */
export function streamedBody(body, settings) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true }, return_timings: true };
  if (settings.logprobs !== false) {
    streamed.logprobs = true;
    streamed.top_logprobs = settings.alternatives ?? 5;
  }
  return streamed;
}
