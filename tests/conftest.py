"Set before anything is imported: no network, no bars, no window"

import os

os.environ.update(IN_TEST="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
