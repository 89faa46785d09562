"""HTTP: endpoints, connections and dialects."""
