"`python -m smooth_foley` is the command `smooth-foley`"

import sys

from smooth_foley.app.main import main

if __name__ == "__main__":
    sys.exit(main())
