"""The page at `/`, in real Chromium."""
