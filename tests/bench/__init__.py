"""How we prove our own speed: `make bench`, or `python -m tests.bench JOB`. See docs/speed.md."""
