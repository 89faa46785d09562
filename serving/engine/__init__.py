"""What writes the caption: one protocol, two implementations."""
