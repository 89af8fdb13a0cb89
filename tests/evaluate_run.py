"""A small evaluation in its own process: `python evaluate_run.py OUT [--slow]`"""

import sys
import time

import torch

from smooth_foley.compare import evaluate, folders
from smooth_foley.pipeline import SmoothFoleyPipeline
from smooth_foley.world import passby


def main(out, slow=False):
    torch.set_num_threads(1)
    if slow:
        save = folders.save_sound

        def save_slowly(*args):
            save(*args)
            time.sleep(0.5)

        folders.save_sound = save_slowly
    evaluate.evaluate(
        "ours,half=ours-clipwise:frame_scale=0.5",
        "passby",
        out,
        n=3,
        steps=2,
        batch=2,
        pipe=SmoothFoleyPipeline.from_random(labels=passby.LABELS),
        device="cpu",
    )


if __name__ == "__main__":
    main(sys.argv[1], "--slow" in sys.argv)
