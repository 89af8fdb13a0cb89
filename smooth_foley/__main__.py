"`python -m smooth_foley`, and the command `smooth-foley`"

import os
import signal
import sys


def run():
    "Run the command line and end the process; Ctrl-C is one line from the first import on"
    try:
        from smooth_foley.app.main import main

        code = main()
    except KeyboardInterrupt:
        os.write(2, b"smooth-foley: interrupted\n")
        code = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    run()
