"""Training corpus of the embedded captioner: sources, mixtures of them, and the facts of each mixture."""
