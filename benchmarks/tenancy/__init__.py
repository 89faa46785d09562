"""Fairness between tenants, exactness of the ledger, cost of keys and limits, timing of caches."""
