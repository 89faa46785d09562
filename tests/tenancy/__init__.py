"""Tests of tenants: their keys, limits, usage and bills."""
