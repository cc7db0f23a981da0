"""Where a run's processes come from: torchrun on this machine, jobs on a cluster."""
