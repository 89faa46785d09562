"""Audio: from a reference to log-mel features, off the event loop."""
