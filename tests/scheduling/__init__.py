"""Queues and shared capacity."""
