"""Tenants: their keys, limits, usage and bills."""
