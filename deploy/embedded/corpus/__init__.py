"""What the embedded captioner is trained on: sources, mixtures of them, and what is true of each mixture."""
