"""Measure long clips, stems, takes and regions of the shipped model: `python tests/long_run.py OUT.json --n 60`"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from smooth_foley.compare import long_clips
from smooth_foley.core import progress
from smooth_foley.listen.judges import load_judges
from smooth_foley.media import write_video
from smooth_foley.pipeline import SmoothFoleyPipeline

FIRST = 2_000_000  # Test seeds


def memory(seconds):
    "Peak of a process for a video of so many seconds"
    frames = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        shown = np.resize(frames, (round(15 * seconds), 64, 64, 3))
        return long_clips.peak_memory(write_video(Path(folder) / "v.mp4", shown, 15))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--n", type=int, default=60, help="scenes")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--only", default="short,windows,mixed,takes,redo,memory")
    parser.add_argument("--seconds", default="30,60", help="lengths of long scenes")
    parser.add_argument("--ways", default=",".join(long_clips.WAYS), help="how long scenes are made")
    args = parser.parse_args()
    judges = load_judges()
    pipe = SmoothFoleyPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=args.steps)
    lengths, ways = [float(s) for s in args.seconds.split(",")], tuple(args.ways.split(","))
    jobs = dict(
        short=lambda s: long_clips.measure_windows(pipe, s, 10.24, ("ours",), **call),
        windows=lambda s: [r for d in lengths for r in long_clips.measure_windows(pipe, s, d, ways, **call)],
        mixed=lambda s: long_clips.measure_mixed(pipe, s, judges, **call),
        takes=lambda s: long_clips.measure_takes(pipe, s, judges=judges, **call),
        redo=lambda s: long_clips.measure_redo(pipe, s, **call),
    )
    found = {}
    for name in args.only.split(","):
        if name == "memory":
            found[name] = dict(rows={str(s): memory(s) for s in (20, 600)})
            continue
        rows = []
        for seed in progress(range(FIRST, FIRST + args.n), desc=name, unit="scene"):
            rows += jobs[name](seed)
            groups = {d: [r for r in rows if r.get("duration") == d] for d in {r.get("duration") for r in rows}}
            found[name] = dict(rows=rows, summary={str(d): long_clips.summary(r) for d, r in groups.items()})
            Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    for name, result in found.items():
        print(name, json.dumps(result.get("summary", result["rows"]), indent=1))


if __name__ == "__main__":
    main()
