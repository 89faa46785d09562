"""Prices, usage reports and invoices."""
