"""Metrics, logs, traces and the record of a request."""
