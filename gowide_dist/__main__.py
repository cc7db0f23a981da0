"""`python -m gowide_dist` is the `gowide` command."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the command is imported Ctrl-C ends it without a traceback

from gowide_dist.cli import main

if __name__ == "__main__":
    main()
