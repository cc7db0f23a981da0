"""`python -m gowide_dist` is the `gowide` command."""

from gowide_dist.cli import main

main()
