"""A finished network as files for other programs: each converted, compared and timed in a process of its own."""
