// Shows this server's own document. No validator: the page contacts no other host.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayOperationId: false,
  validatorUrl: null,
});
