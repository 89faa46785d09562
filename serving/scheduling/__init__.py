"""Queueing and capacity shared between tenants."""
