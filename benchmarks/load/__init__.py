"""Load generators, the clips that they send, and the checks of every answer."""
