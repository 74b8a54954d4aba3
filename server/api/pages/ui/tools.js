// The demo tool: the page runs it itself, so that a call and its result can be watched.

export const DEMO_TOOL = {
  type: "function",
  function: {
    name: "current_time",
    description: "The present date and time in a time zone.",
    parameters: {
      type: "object",
      properties: { timezone: { type: "string", description: "An IANA name such as Europe/Berlin" } },
      required: ["timezone"],
    },
  },
};

/** The result of a call, as text for the model. Never throws: an error is a result too. */
export function runTool(name, args, now = new Date()) {
  if (name !== DEMO_TOOL.function.name) return `error: there is no tool ${name}`;
  try {
    const { timezone } = JSON.parse(args || "{}");
    const time = new Intl.DateTimeFormat("en-GB", { dateStyle: "full", timeStyle: "long", timeZone: timezone });
    return time.format(now);
  } catch (error) {
    return `error: ${error.message}`;
  }
}
