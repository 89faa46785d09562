"""Prices and reports."""
