"""Proof at length: fuzzing of what strangers, other processes and disks send. `make harden` runs all of it."""
