// Starts Swagger UI on the document of this same daemon. In a file of its own, because the page's
// content security policy takes no script that stands in the page.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  layout: "BaseLayout",
  presets: [SwaggerUIBundle.presets.apis],
  deepLinking: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
  // The badge would ask a server on the internet whether the document is valid.
  validatorUrl: null,
  // Credentials that were typed in are gone with the page.
  persistAuthorization: false,
});
