"""From bytes to log-mel features, off the event loop."""
