"""Stored files, and batches of caption requests over them: their state, and the runner of their lines."""
