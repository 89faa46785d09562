print("tenants")
