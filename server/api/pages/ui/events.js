// Server-sent events of a fetched body. Knows nothing of what the events mean.

/** The data of each event, as text. Comments are skipped. chunks: an async iterable of bytes. */
export async function* eventData(chunks) {
  const decoder = new TextDecoder();
  let pieces = [];
  let data = [];
  for await (const chunk of chunks) {
    const text = decoder.decode(chunk, { stream: true });
    let start = 0;
    for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n", start)) {
      pieces.push(text.slice(start, end));
      start = end + 1;
      const line = pieces.length === 1 ? pieces[0] : pieces.join("");
      pieces = [];
      if (line === "" || line === "\r") {
        if (data.length) yield data.join("\n");
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5).replace(/\r$/, ""));
      }
    }
    if (start < text.length) pieces.push(text.slice(start));
  }
}

/** The bytes of a body. Not every browser can iterate a ReadableStream. */
export async function* bytesOf(body) {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
