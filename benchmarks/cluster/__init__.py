"""A local Ray cluster under load: autoscaling, chaos, updates, scaling, proxies."""
