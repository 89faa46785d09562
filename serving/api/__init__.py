"""HTTP: routes, middleware and endpoints in front of the pipeline."""
