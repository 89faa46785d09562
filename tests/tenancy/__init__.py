"""Keys, limits, ledger, billing and administration."""
