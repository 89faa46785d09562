"""Engine replicas behind sockets, used as one engine."""
