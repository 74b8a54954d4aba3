// A request as a program that runs as it stands: curl, Python and JavaScript, without packages.

const VARIABLE = "VLMSERVE_API_KEY";

/** request: { url, body, key, isStreamed }. key: written into the program; null: from the environment; "": none. */
export const LANGUAGES = {
  curl: { label: "curl", make: curl },
  python: { label: "Python", make: python },
  javascript: { label: "JavaScript", make: javascript },
};

function curl({ url, body, key }) {
  const lines = [`curl --fail-with-body ${shellQuoted(url)} \\`, "  -H 'Content-Type: application/json' \\"];
  if (key === null) lines.push(`  -H "Authorization: Bearer $${VARIABLE}" \\`);
  else if (key) lines.push(`  -H ${shellQuoted(`Authorization: Bearer ${key}`)} \\`);
  // From its input: an argument may not be as long as a picture.
  return [...lines, "  --data-binary @- <<'REQUEST'", JSON.stringify(body, null, 1), "REQUEST", ""].join("\n");
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function python({ url, body, key }) {
  // No quote that could end the text; JSON reads the escape as the same character.
  const text = JSON.stringify(body, null, 1).replaceAll("'", "\\u0027");
  const lines = ["import json", key === null ? "import os" : null, "import urllib.request", ""];
  lines.push(`body = json.loads(r'''${text}''')`, 'headers = {"Content-Type": "application/json"}');
  if (key === null) lines.push(`headers["Authorization"] = "Bearer " + os.environ["${VARIABLE}"]`);
  else if (key) lines.push(`headers["Authorization"] = ${JSON.stringify(`Bearer ${key}`)}`);
  lines.push(`request = urllib.request.Request(${JSON.stringify(url)}, json.dumps(body).encode(), headers)`);
  lines.push("with urllib.request.urlopen(request) as response:", "    answer = json.load(response)");
  lines.push(`for choice in answer["choices"]:`, `    print(choice["message"]["content"] or choice["message"].get("tool_calls"))`, "");
  return lines.filter((line) => line !== null).join("\n");
}

function javascript({ url, body, key }) {
  const headers = ['"Content-Type": "application/json"'];
  if (key === null) headers.push(`Authorization: \`Bearer \${process.env.${VARIABLE}}\``);
  else if (key) headers.push(`Authorization: ${JSON.stringify(`Bearer ${key}`)}`);
  return [
    "// Run it with node as a .mjs file, or in a page of the same origin.",
    `const body = ${JSON.stringify(body, null, 1)};`,
    `const response = await fetch(${JSON.stringify(url)}, {`,
    '  method: "POST",',
    `  headers: { ${headers.join(", ")} },`,
    "  body: JSON.stringify(body),",
    "});",
    "const answer = await response.json();",
    "if (!response.ok) throw new Error(answer.error.message);",
    "for (const choice of answer.choices) console.log(choice.message.content ?? choice.message.tool_calls);",
    "",
  ].join("\n");
}
