// Requests to this server: its key, its errors, its streams. Knows nothing of the page.

import { bytesOf, eventData } from "./events.js";
import { nextFrame } from "./frames.js";

const KEY = "vlmserve.key";
// A stream that comes faster than this is read further with the next frame.
const SLICE_MS = 8;

/** An answer that is an error. status is 0 if there was no answer. */
export class ApiFailure extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export class Api {
  /** base: the server's URL. askKey(wasRefused): resolves to a key, or null if the user gives none. */
  constructor(base, askKey, storage = sessionStorage) {
    this.base = base;
    this._askKey = askKey;
    this._storage = storage;
    this._asking = null;
  }

  get key() {
    return this._storage.getItem(KEY) ?? "";
  }

  set key(value) {
    if (value) this._storage.setItem(KEY, value);
    else this._storage.removeItem(KEY);
  }

  url(path) {
    return new URL(path, this.base).href;
  }

  /** The parsed JSON of an answer. Throws ApiFailure. */
  async json(path, body = null, signal = undefined) {
    const response = await this.send(path, body, signal);
    return response.json();
  }

  /** Each event of a stream, parsed. Throws ApiFailure, also where the stream breaks off. */
  async *events(path, body = null, signal = undefined) {
    const response = await this.send(path, body, signal);
    let isComplete = body === null;
    let began = performance.now();
    try {
      for await (const data of eventData(bytesOf(response.body))) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiFailure(event.error.code_status ?? 500, event.error.message);
        yield event;
        if (performance.now() - began > SLICE_MS) {
          await nextFrame();
          began = performance.now();
        }
      }
    } catch (error) {
      if (error instanceof ApiFailure || error.name === "AbortError") throw error;
      isComplete = false;
    }
    if (!isComplete) throw new ApiFailure(0, "The connection to the server was lost.");
  }

  /** The response, once a key that the server takes was given. Throws ApiFailure or AbortError. */
  async send(path, body, signal) {
    for (;;) {
      const used = this.key;
      const response = await this._fetch(path, body, signal);
      if (response.ok) return response;
      if (response.status !== 401) throw await failureOf(response);
      if (used === this.key) await this._renewKey(Boolean(used));
    }
  }

  async _fetch(path, body, signal) {
    const headers = {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    const options = { headers, signal, cache: "no-store", redirect: "error" };
    if (body !== null) {
      headers["Content-Type"] = "application/json";
      Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    }
    try {
      return await fetch(this.url(path), options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiFailure(0, "The server cannot be reached.");
    }
  }

  /** Ask once for all requests that wait for a key. */
  async _renewKey(wasRefused) {
    this._asking ??= this._askKey(wasRefused).finally(() => { this._asking = null; });
    const key = await this._asking;
    if (key === null) throw new ApiFailure(401, "This server needs an API key.");
    this.key = key;
  }
}

async function failureOf(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    const body = await response.json();
    message = body.error?.message ?? body.message ?? message;
  } catch {
    // Not this server's JSON: a proxy's page.
  }
  const seconds = Number(response.headers.get("Retry-After"));
  return new ApiFailure(response.status, message, seconds > 0 ? seconds : null);
}
