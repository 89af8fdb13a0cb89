"""Audit many small clips, killing the audit now and then, and log time and memory

python tests/audit_run.py FOLDER --n 10000 --out results/audit/10000.csv
"""

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from smooth_foley.core import atomic_path, progress
from smooth_foley.data.items import Item, vggsound_labels
from smooth_foley.data.tables import write_cells
from smooth_foley.media import SR, write_video
from smooth_foley.world.as_vggsound import passby_id


def make(folder, n):
    "Clips of one second, all different, 32 px"
    (folder / "video").mkdir(parents=True, exist_ok=True)
    x, t, labels, rows = np.arange(32), np.arange(SR) / SR, list(vggsound_labels()), []
    for k in progress(range(n), "make", "clip", n):
        rng, item = (
            np.random.default_rng(k),
            Item(passby_id(k, k), float(k % 300), labels[k % len(labels)], "test" if k % 13 == 0 else "train"),
        )
        rows.append((item.id, int(item.start), item.label, item.split))
        out = folder / "video" / f"{item.name}.mp4"
        if out.exists():
            continue
        stripes = (x * rng.uniform(1, 4) + np.arange(10)[:, None] * rng.uniform(5, 20)) % 256
        frames = np.broadcast_to(stripes[:, None, :, None], (10, 32, 32, 3)).astype(np.uint8).copy()
        frames[..., 0] += np.uint8(k % 200)
        write_video(out, frames, 10, (0.3 * np.sin(2 * np.pi * rng.uniform(100, 2000) * t)).astype(np.float32))
    write_cells(folder / "vggsound.csv", rows)


AUDIT = """
import sys
from smooth_foley.data.audit import audit
from smooth_foley.data.vggsound import join_clips, read_vggsound
folder, out, workers = sys.argv[1:]
audit(join_clips(read_vggsound(folder + "/vggsound.csv", duration=1.0), folder + "/video"), out, workers=int(workers))
"""


def lines(out):
    try:
        return (out / "audit.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def sample(p, out, start):
    "One row of the log: clips done, seconds, memory of the parent and of its largest worker (MB)"
    try:
        return dict(
            clips=lines(out),
            seconds=round(time.time() - start, 1),
            parent_mb=round(p.memory_info().rss / 1e6, 1),
            worker_mb=round(max([c.memory_info().rss for c in p.children()] or [0]) / 1e6, 1),
        )
    except psutil.Error:
        return None


def run(folder, out, workers, stop, log, start):
    "Audit until `stop` clips are done, then kill -9"
    p = subprocess.Popen([sys.executable, "-c", AUDIT, folder, out, str(workers)], env={**os.environ, "CI": "1"})
    while p.poll() is None and lines(out) < stop:
        time.sleep(0.5)
        if (row := sample(psutil.Process(p.pid), out, start)) and row["worker_mb"]:
            log.append(dict(workers=workers, **row))
    if p.poll() is None:
        os.kill(p.pid, signal.SIGKILL)
    return p.wait()


def main(folder, n, out, stops):
    make(folder, n)
    log, tables = [], {}
    for workers, kills in ((2, stops), (1, ())):
        report = folder / f"report{workers}"
        shutil.rmtree(report, ignore_errors=True)
        start = time.time()
        codes = [run(folder, report, workers, k, log, start) for k in (*kills, n + 1)]
        assert codes == [-signal.SIGKILL] * len(kills) + [0] and lines(report) == n
        tables[workers] = [(report / f).read_bytes() for f in ("audit.csv", "faults.csv", "clean.csv")]
    assert tables[1] == tables[2]
    keep = [
        r
        for k, r in enumerate(log)
        if k == 0
        or r["workers"] != log[k - 1]["workers"]
        or r["clips"] // (n // 20) != log[k - 1]["clips"] // (n // 20)
    ]
    with atomic_path(out) as tmp, open(tmp, "w", newline="") as f:
        w = csv.DictWriter(f, keep[0], lineterminator="\n")
        w.writeheader()
        w.writerows(keep)
    print(
        f"{n} clips, two processes killed at {', '.join(map(str, stops))}, one process without: the same tables;",
        f"at most {max(r['parent_mb'] for r in log)} and {max(r['worker_mb'] for r in log)} MB",
    )


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("folder", type=Path)
    p.add_argument("--n", type=int, default=10000)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    main(args.folder, args.n, args.out, (args.n // 5, args.n // 2))
