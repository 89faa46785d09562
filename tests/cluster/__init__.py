"""The service on real Ray Serve, with fake engines."""
