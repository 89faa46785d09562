"""Names of our dependencies that are private or undocumented: each must exist, with the parameters that we use."""
