"""Limits per tenant and key, counted in memory or in Redis."""
