// Draws openapi.json. Texts reach the page as text nodes only, never as markup.
"use strict";

let components = {};

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A description's paragraphs and lists.
function described(text) {
  return text.split(/\n\s*\n/).map((part) => {
    const lines = part.trim().split("\n");
    if (!lines[0].startsWith("- ")) return element("p", { class: "faint" }, lines.join(" "));
    return element("ul", { class: "faint" }, ...lines.map((line) => element("li", {}, line.slice(2))));
  });
}

// "#/components/schemas/Name" -> its content.
function resolved(part) {
  if (!part || !part.$ref) return part;
  return part.$ref.split("/").slice(1).reduce((at, step) => at[step], { components });
}

function nameOf(schema) {
  return schema.$ref ? schema.$ref.split("/").pop() : "";
}

// One line that says what a value may be.
function typeLine(schema) {
  if (schema === true || !Object.keys(schema).length) return "anything";
  if (schema.$ref) return nameOf(schema);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  const options = schema.anyOf || schema.oneOf;
  if (options) return options.map(typeLine).join(" | ");
  if (schema.type === "array") {
    return `list of ${schema.items ? typeLine(schema.items) : "anything"}${limits(schema)}`;
  }
  if (schema.type === "object" && typeof schema.additionalProperties === "object") {
    return `object of ${typeLine(schema.additionalProperties)}${limits(schema)}`;
  }
  return `${[].concat(schema.type || "anything").join(" | ")}${limits(schema)}`;
}

const LIMITS = {
  minimum: (value) => `≥ ${value}`,
  exclusiveMinimum: (value) => `> ${value}`,
  maximum: (value) => `≤ ${value}`,
  exclusiveMaximum: (value) => `< ${value}`,
  minLength: (value) => `at least ${value} characters`,
  maxLength: (value) => `at most ${value} characters`,
  minItems: (value) => `at least ${value}`,
  maxItems: (value) => `at most ${value}`,
  minProperties: (value) => `at least ${value} keys`,
  maxProperties: (value) => `at most ${value} keys`,
  pattern: (value) => `matching ${value}`,
};

function limits(schema) {
  const told = Object.keys(LIMITS).filter((name) => schema[name] !== undefined);
  return told.length ? ` (${told.map((name) => LIMITS[name](schema[name])).join(", ")})` : "";
}

// The objects that a schema refers to, by their names.
function referred(schema, found = new Map()) {
  if (!schema || typeof schema !== "object") return found;
  if (schema.$ref) found.set(nameOf(schema), schema);
  for (const key of ["anyOf", "oneOf", "allOf"]) (schema[key] || []).forEach((one) => referred(one, found));
  for (const key of ["items", "additionalProperties"]) referred(schema[key], found);
  return found;
}

// A type by its name, drawn when it is first opened, as types may hold themselves.
function foldedSchema(name, schema) {
  const content = element("div");
  const folded = element("details", { class: "schema" }, element("summary", {}, name), content);
  folded.addEventListener("toggle", () => {
    if (!content.childNodes.length) content.append(...schemaContent(resolved(schema)));
  });
  return folded;
}

function schemaContent(schema) {
  const parts = [];
  if (schema.description) parts.push(...described(schema.description));
  if (schema.properties) parts.push(propertyTable(schema));
  else parts.push(element("code", {}, typeLine(schema)));
  for (const [name, one] of referred({ ...schema, $ref: undefined })) parts.push(foldedSchema(name, one));
  if (schema.properties && schema.additionalProperties === false) {
    parts.push(element("p", { class: "faint" }, "No other fields are taken."));
  }
  return parts;
}

function propertyTable(schema) {
  const required = new Set(schema.required || []);
  const rows = Object.entries(schema.properties).map(([name, property]) => {
    const mark = required.has(name) ? element("span", { class: "required" }, " required") : "";
    const meaning = element("td", {}, element("code", {}, typeLine(property)));
    if (property.description) meaning.append(...described(property.description));
    for (const [type, one] of referred(property)) meaning.append(foldedSchema(type, one));
    return element("tr", {}, element("td", {}, element("code", {}, name), mark), meaning);
  });
  return element("table", {}, element("tbody", {}, ...rows));
}

function drawn(schema) {
  return schema.$ref ? [foldedSchema(nameOf(schema), schema)] : schemaContent(schema);
}

function pretty(value) {
  return element("pre", {}, typeof value === "string" ? value : JSON.stringify(value, null, 2));
}

function mediaContent(type, media, isOpen = false) {
  const parts = [element("p", {}, element("code", {}, type))];
  if (media.schema) parts.push(...drawn(media.schema));
  if (isOpen) parts.filter((one) => one.className === "schema").forEach((one) => { one.open = true; });
  if (media.example !== undefined) parts.push(pretty(media.example));
  for (const one of Object.values(media.examples || {})) parts.push(pretty(one.value));
  return parts;
}

function responseContent(status, response) {
  const whole = resolved(response);
  const headers = Object.keys(whole.headers || {});
  const parts = [
    element("p", {}, element("span", { class: "status" }, status), ` ${whole.description}`),
  ];
  if (headers.length > 1) {
    parts.push(element("p", { class: "faint" }, `Headers: ${headers.join(", ")}`));
  }
  for (const [type, media] of Object.entries(whole.content || {})) parts.push(...mediaContent(type, media));
  return element("div", {}, ...parts);
}

function operationBody(operation) {
  const body = element("div");
  if (operation.description) body.append(...described(operation.description));
  if (operation.parameters) {
    body.append(element("h3", {}, "Parameters"));
    for (const one of operation.parameters) {
      body.append(element("p", {}, element("code", {}, one.name), ` in ${one.in}: ${one.description || ""}`));
    }
  }
  if (operation.requestBody) {
    body.append(element("h3", {}, "Request"));
    if (operation.requestBody.description) {
      body.append(...described(operation.requestBody.description));
    }
    for (const [type, media] of Object.entries(operation.requestBody.content)) {
      body.append(...mediaContent(type, media, true));
    }
  }
  body.append(element("h3", {}, "Responses"));
  for (const [status, one] of Object.entries(operation.responses)) body.append(responseContent(status, one));
  return body;
}

function drawOperation(path, method, operation) {
  const heading = element(
    "summary", {},
    element("span", { class: `method ${method}` }, method.toUpperCase()),
    element("span", { class: "path" }, path),
    element("span", { class: "faint" }, operation.summary || ""),
  );
  const drawnOperation = element("details", { class: "operation", id: operation.operationId }, heading);
  drawnOperation.addEventListener("toggle", () => {
    if (drawnOperation.childNodes.length === 1) drawnOperation.append(operationBody(operation));
  });
  return drawnOperation;
}

function drawAll(content) {
  components = content.components;
  document.title = `${content.info.title} API`;
  document.getElementById("title").textContent = `${content.info.title} ${content.info.version}`;
  const keys = content.security ? " Send a key as Authorization: Bearer KEY." : "";
  document.getElementById("about").textContent = content.info.description + keys;
  const contents = document.getElementById("contents");
  const operations = document.getElementById("operations");
  operations.replaceChildren();
  for (const tag of content.tags) {
    contents.append(element("h2", {}, tag.name));
    operations.append(element("h2", {}, tag.name));
    for (const [path, item] of Object.entries(content.paths)) {
      for (const [method, operation] of Object.entries(item)) {
        // HEAD is GET without a body, wherever there is GET.
        if (method === "head" || !operation.tags.includes(tag.name)) continue;
        contents.append(element(
          "a", { href: `#${operation.operationId}` },
          element("span", { class: `method ${method}` }, method.toUpperCase()), element("span", {}, path),
        ));
        operations.append(drawOperation(path, method, operation));
      }
    }
  }
  openNamed();
}

function openNamed() {
  const named = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!named || named.tagName !== "DETAILS") return;
  named.open = true;
  named.scrollIntoView();
}

async function main() {
  window.addEventListener("hashchange", openNamed);
  try {
    const response = await fetch("openapi.json");
    if (!response.ok) throw new Error(`it answered ${response.status}`);
    drawAll(await response.json());
  } catch (error) {
    document.getElementById("operations").replaceChildren(
      element("p", { class: "problem" }, `openapi.json could not be drawn: ${error.message}`),
    );
  }
}

main();
