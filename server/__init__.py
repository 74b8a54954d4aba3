"""What a client sees: routes, schemas, streaming, images, limits, supervisor, CLI."""
