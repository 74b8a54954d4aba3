// Shows this server's own document, and asks for the API key where one is needed to read it.
// No validator: the page contacts no other host.
async function start() {
  let key = "";
  let answer = await fetch("openapi.json");
  while (answer.status === 401) {
    key = window.prompt("API key of this server:");
    if (!key) return;
    answer = await fetch("openapi.json", { headers: { Authorization: `Bearer ${key}` } });
  }
  const page = SwaggerUIBundle({
    spec: await answer.json(),
    dom_id: "#swagger-ui",
    deepLinking: true,
    displayOperationId: false,
    validatorUrl: null,
    onComplete: () => key && page.preauthorizeApiKey("key", key),
  });
}
start();
