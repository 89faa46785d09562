"""What several rooms' tests use: services, wire formats, media servers, system programs."""
