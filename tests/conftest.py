"Set before anything is imported: no network, no bars, no window"

import os

os.environ.update(IN_TEST="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 on a GPU as precise as on a CPU
