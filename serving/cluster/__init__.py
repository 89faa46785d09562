"""The service on Ray Serve: the only importers of ray."""
