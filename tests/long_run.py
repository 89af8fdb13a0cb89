"""Measure long clips, stems, takes and regions of the shipped model: `python tests/long_run.py results/long --n 60`"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from smooth_foley.compare import long_clips
from smooth_foley.compare.folders import write_results
from smooth_foley.core import progress
from smooth_foley.listen.judges import load_judges
from smooth_foley.media import write_video
from smooth_foley.pipeline import SmoothFoleyPipeline

FIRST = 2_000_000  # Test seeds
JOBS = ("windows", "mixed", "takes", "redo", "memory")


def memory(seconds):
    "Peak of a process for a video of so many seconds"
    frames = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        shown = np.resize(frames, (round(15 * seconds), 64, 64, 3))
        return long_clips.peak_memory(write_video(Path(folder) / "v.mp4", shown, 15))


def save(path, rows):
    write_results(path, rows, list(dict.fromkeys(k for row in rows for k in row)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="folder for a CSV of each kind")
    parser.add_argument("--n", type=int, default=60, help="scenes")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--only", default=",".join(JOBS))
    parser.add_argument(
        "--seconds", default="10.24,30,60", help="lengths of scenes; those of one window only in our way"
    )
    parser.add_argument("--ways", default=",".join(long_clips.WAYS), help="how long scenes are made")
    args = parser.parse_args()
    out, judges = Path(args.out), load_judges()
    out.mkdir(parents=True, exist_ok=True)
    pipe = SmoothFoleyPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=args.steps)

    def windows(seed):
        rows = []
        for d in map(float, args.seconds.split(",")):
            ways = tuple(args.ways.split(",")) if len(pipe.plan(d).starts) > 1 else ("ours",)
            rows += long_clips.measure_windows(pipe, seed, d, ways, **call)
        return rows

    jobs = dict(
        windows=windows,
        mixed=lambda s: long_clips.measure_mixed(pipe, s, judges, **call),
        takes=lambda s: long_clips.measure_takes(pipe, s, judges=judges, **call),
        redo=lambda s: long_clips.measure_redo(pipe, s, **call),
    )
    for name in args.only.split(","):
        rows = []
        if name == "memory":
            save(out / "memory.csv", [dict(seconds=s, bytes=memory(s)) for s in (20, 600)])
            continue
        for seed in progress(range(FIRST, FIRST + args.n), desc=name, unit="scene"):
            rows += jobs[name](seed)
            save(out / f"{name}.csv", rows)
        print(name, long_clips.summary(rows, ("way", "duration") if name == "windows" else ("way",)))


if __name__ == "__main__":
    main()
