"""Administration of tenants, keys, plans and prices."""
