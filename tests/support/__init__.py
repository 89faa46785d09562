"""Support for tests: services, wire formats, media servers, system programs."""
