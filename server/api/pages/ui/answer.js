// Makes answers: sends the request, reads the stream into turns, runs the demo tool and goes on.
// Knows nothing of how turns are shown.

import { addTurn, path } from "./conversation.js";
import { randomId } from "./ids.js";
import { bodyOf, streamedBody } from "./request.js";
import { tokenOf } from "./tokens.js";
import { runTool } from "./tools.js";

// A model that only ever calls tools stops here.
const MAX_ROUNDS = 4;

export class Answering {
  /** watch: { started(turns), grown(turn), ended(turns) }. */
  constructor(api, watch) {
    this._api = api;
    this._watch = watch;
    this._abort = null;
  }

  get isBusy() {
    return this._abort !== null;
  }

  /** End the answer that is being made; what it has so far stays. */
  stop() {
    this._abort?.abort();
  }

  /** Answer the turn `parent`. Each turn of the answer says in `state` how it ended. */
  async answer(conversation, parent, model, settings) {
    this._abort = new AbortController();
    try {
      for (let round = 0; round < MAX_ROUNDS; round += 1) {
        const turns = await this._once(conversation, parent, model, settings);
        const [first] = turns;
        if (turns.length !== 1 || first.state !== "done" || !first.calls?.length) return;
        for (const call of first.calls) {
          addTurn(conversation, conversation.leaf, { role: "tool", text: runTool(call.name, call.args), callId: call.id, name: call.name });
        }
        parent = conversation.leaf;
      }
    } finally {
      this._abort = null;
      this._watch.ended([]);
    }
  }

  async _once(conversation, parent, model, settings) {
    const before = path(conversation, parent);
    const group = Number(settings.n) > 1 ? randomId() : undefined;
    const turns = Array.from({ length: Math.max(1, Number(settings.n) || 1) }, (_, index) => addTurn(conversation, parent, {
      role: "assistant", text: "", calls: [], tokens: [], state: "streaming", model, group, index,
    }));
    conversation.leaf = turns[0].id;
    this._watch.started(turns);
    try {
      const body = streamedBody(bodyOf(before, model, settings), settings);
      for await (const chunk of this._api.events("v1/chat/completions", body, this._abort.signal)) {
        this._take(turns, chunk);
      }
      for (const turn of turns) turn.state = "done";
    } catch (error) {
      this._fail(turns, error);
    }
    this._watch.ended(turns);
    return turns;
  }

  _take(turns, chunk) {
    if (chunk.usage) turns[0].usage = chunk.usage;
    if (chunk.timings) turns[0].timings = chunk.timings;
    for (const choice of chunk.choices) {
      const turn = turns[choice.index];
      if (choice.delta.content) turn.text += choice.delta.content;
      for (const part of choice.delta.tool_calls ?? []) takeCall(turn, part);
      for (const entry of choice.logprobs?.content ?? []) turn.tokens.push(tokenOf(entry));
      if (choice.finish_reason) turn.reason = choice.finish_reason;
      this._watch.grown(turn);
    }
  }

  _fail(turns, error) {
    const isStopped = error.name === "AbortError";
    for (const turn of turns) {
      turn.state = isStopped ? "stopped" : "failed";
      if (!isStopped) turn.error = error.message;
      if (!isStopped && error.retryAfter) turn.error += ` Try again in ${error.retryAfter} s.`;
    }
  }
}

function takeCall(turn, part) {
  turn.calls[part.index] ??= { id: part.id, name: part.function.name, args: "" };
  turn.calls[part.index].args += part.function.arguments ?? "";
}
