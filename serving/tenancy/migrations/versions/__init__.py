"""One file for each step, in order of their numbers. Forward only: a step adds, so that older replicas go on."""
