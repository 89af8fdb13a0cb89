"`python -m smooth_foley`, and the command `smooth-foley`"

import os
import signal
import sys


def run():
    "Run the command line and end the process; Ctrl-C is one line from the first import on"
    code = None
    try:
        try:
            from smooth_foley.app.main import main

            code = main()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # From here on the process ends in any case
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code is None:
        os.write(2, b"smooth-foley: interrupted\n")
        code = 130
    exec("")  # Ctrl-C within an `exec`, as imports use it, would otherwise be CPython's exit code
    sys.exit(code)


if __name__ == "__main__":
    run()
