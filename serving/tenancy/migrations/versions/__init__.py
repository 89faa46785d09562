"""Migrations, a file each, in order of their numbers. Forward only: they add, so that older replicas keep working."""
