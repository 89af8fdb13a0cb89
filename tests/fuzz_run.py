"""Damage every kind of file that is read, and every argument, and see that each answer is the right one or one line

python tests/fuzz_run.py --n 2400              damaged inputs, in processes that may crash
python tests/fuzz_run.py --kills 40            kill -9 and SIGTERM at random moments, then run to the end
python tests/fuzz_run.py --n 2400 --out f.csv  a row for every input

A run is bad if it raises something that is no `FoleyError`, ends with code 70, takes longer than `LONGEST`, crashes,
or leaves a temporary file, or an output although it failed. Every input is drawn from its own seed, so a row is enough
to make it again: `--first 1234 --n 1`.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
LONGEST, MEMORY = 60, 2 * 2**30  # Seconds for one input, bytes of a process


# --- damage


def flip(data, rng):
    "A few bytes changed"
    data = bytearray(data)
    for _ in range(rng.choice([1, 3, 30]) if data else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def cut(data, rng):
    return data[: rng.randrange(len(data) + 1)]


def blank(data, rng):
    "A stretch of zeros"
    a = rng.randrange(len(data) + 1)
    n = rng.choice([1, 64, 4096])
    return data[:a] + bytes(len(data[a : a + n])) + data[a + n :]


def double(data, rng):
    a, n = rng.randrange(len(data) + 1), rng.choice([1, 100, 5000])
    return data[: a + n] + data[a:]


def drop(data, rng):
    a, n = rng.randrange(len(data) + 1), rng.choice([1, 100, 5000])
    return data[:a] + data[a + n :]


def huge(data, rng):
    "A length that cannot be"
    a = rng.randrange(max(1, len(data) - 8))
    return data[:a] + rng.choice([b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0\0\0\1" * 2]) + data[a + 8 :]


def empty(data, rng):
    return b""


BYTES = (flip, flip, cut, cut, blank, double, drop, huge, empty)


def other_words(data, rng):
    return rng.choice(
        [b"null", b"[]", b"{}", b'"x"', b"3", b"[" * 100_000, b'{"a": NaN}', b"\xef\xbb\xbf{}", b"9" * 5000]
    )


def other_text(data, rng):
    text = data.decode("utf-8", "replace")
    return rng.choice(
        [
            text.encode("utf-16"),
            ("é" + text).encode("latin-1", "replace"),
            (text[:20] + "x" * 200_000 + text[20:]).encode(),
            (text[:50] + "\0" + text[50:]).encode(),
            text.replace(",", '"', 3).encode(),
            text.replace("\n", "\r").encode(),
            text.replace(",", ";").encode(),
        ]
    )


VALUES = (None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 500, "../up", [], {}, [[]], [None], "1")


def other_value(data, rng):
    "One value of a JSON file replaced, renamed or removed, at any depth"
    try:
        tree = json.loads(data)
    except ValueError:
        return flip(data, rng)
    places, todo = [], [tree]
    while todo:
        node = todo.pop()
        inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in inside:
            places.append((node, key))
            todo.append(value)
    if not places:
        return other_words(data, rng)
    node, key = rng.choice(places)
    how = rng.randrange(3)
    if how == 0:
        node.pop(key)
    elif how == 1 and isinstance(node, dict):
        node[str(key) + "_"] = node.pop(key)
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(tree).encode()


TEXTS = (*BYTES, other_text, other_text, other_text)
JSONS = (*BYTES, other_words, other_value, other_value, other_value, other_value)


def damage(path, rng):
    "Damage a file as its kind can be damaged; returns what was done"
    kinds = JSONS if path.suffix in (".json", ".jsonl") else TEXTS if path.suffix in (".csv", ".tsv") else BYTES
    how = rng.choice(kinds)
    data = how(path.read_bytes(), rng)
    path.unlink()  # It may be a link to the original
    path.write_bytes(data)
    return f"{path.name} {how.__name__}"


# --- what is read


class Originals:
    "Whole files of every kind, made once"

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "made").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self._media()
            self._lists()
            self._models()
            self._caches()
            (self.folder / "made").touch()

    def _media(self):
        import numpy as np

        from smooth_foley.media import write_video, write_wav

        (self.folder / "media").mkdir()
        rng = np.random.default_rng(0)
        film = rng.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8).repeat(6, 1).repeat(8, 2)
        sound = (0.3 * np.sin(np.arange(12800) * 0.2)).astype(np.float32)
        for name in ("a.mp4", "b.mkv", "c.mov"):
            write_video(self.folder / "media" / name, film, 15, sound)
        write_video(self.folder / "media" / "turned.mp4", film, 15, rotation=90)
        write_wav(self.folder / "media" / "d.wav", sound)
        for path in (HERE / "fixtures" / "media").iterdir():
            shutil.copy(path, self.folder / "media")

    def _lists(self):
        from smooth_foley.data.shards import ShardConfig, write_shards
        from smooth_foley.data.sources import passby_items
        from smooth_foley.world.as_vggsound import passby_folder

        lists = passby_folder(self.folder / "lists", 4, seed=40, seconds=1.0)
        clips = sorted((lists / "video").iterdir())
        rows = [f"video/{p.name},dog barking,test\n" for p in clips]
        (lists / "labels.csv").write_text("name,label,split\n" + "".join(rows))
        cfg = ShardConfig(content=("latent",), per_shard=2)
        write_shards(passby_items(range(4)), self.folder / "shards", cfg)

    def _models(self):
        import torch

        from smooth_foley.pipeline import SmoothFoleyPipeline

        torch.manual_seed(0)
        SmoothFoleyPipeline.from_random(labels=("dog barking",)).save_pretrained(self.folder / "model")

    def _caches(self):
        import numpy as np
        import torch
        from safetensors.torch import save_file

        from smooth_foley.data.store import measure_clips
        from smooth_foley.data.tables import write_json, write_rows
        from smooth_foley.train.folder import claim_folder
        from smooth_foley.train.recipe import Recipe
        from smooth_foley.train.records import CsvLog

        caches = self.folder / "caches"
        measure_clips(measured_items(self.folder), caches / "measured", Size())
        save_file({"frames": torch.zeros(4, 8)}, caches / "frames.safetensors")
        np.savez(caches / "arrays.npz", seconds=1.0, mark="m", x=np.zeros((3, 4)))
        (caches / "runs" / "base").mkdir(parents=True)
        claim_folder(caches / "runs", Recipe(), ("base",))
        log = CsvLog(caches / "runs" / "base" / "log.csv")
        for step in (1, 2, 3):
            log(step=step, loss=1.0, lr=1.0, grad_norm=1.0, seconds=1.0)
        write_json(caches / "runs" / "base" / "done.json", dict(stage="base", config=dict(max_train_steps=3)))
        filtered = dict.fromkeys(
            ("id", "start", "label", "split", "duration", "active", "longest", "mean", "kept"), "1"
        )
        write_rows(caches / "filter.csv", [filtered | dict(reason="x")], (*filtered, "reason"))
        write_json(caches / "filter.json", dict(threshold=0.5))


class Size:
    "The least that can be measured of a clip"

    settings = dict(measures="size")

    def __call__(self, item):
        return dict(bytes=item.path.stat().st_size, x=1.0)


def measured_items(folder):
    from smooth_foley.data.items import Item

    return [Item("clip", 0.0, "dog barking", "test", folder / "media" / "a.mp4")]


def linked(folder, to):
    "A copy of a folder whose files are links, which damage replaces one by one"
    for path in folder.rglob("*"):
        if path.is_file():
            target = to / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    return to


def files_of(folder, *suffixes):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in suffixes and p.name != "made")


# --- runs: each damages one input below `tmp` and calls what reads it; an output is expected only from a success


def command(*words):
    from smooth_foley.app.main import main

    code = main([str(w) for w in words])
    if code == 70 or code not in (0, 1, 2):
        raise AssertionError(f"exit code {code}")
    return code


def media(originals, tmp, rng):
    import numpy as np

    from smooth_foley.media import mux, probe, read_audio, read_clip

    source = rng.choice(files_of(originals.folder / "media", ".mp4", ".mkv", ".mov", ".wav", ".webm"))
    path = tmp / source.name
    shutil.copy(source, path)
    what = damage(path, rng)
    yield what
    work = rng.randrange(4)
    if work == 0:
        probe(path)
        read_clip(path, size=32, max_duration=10.24)
    elif work == 1:
        read_audio(path)
    elif work == 2:
        command("data", "grounding", path, "--label", "dog barking", "--csv", tmp / "out" / "x.csv")
    else:
        mux(path, np.zeros(16000, np.float32), 16000, tmp / "out" / f"x{rng.choice(['.mp4', '.mkv', '.mov'])}")


def lists(originals, tmp, rng):
    from smooth_foley.compare.clips import folder_clips

    folder = linked(originals.folder / "lists", tmp / "in")
    path = rng.choice(files_of(folder, ".csv", ".tsv"))
    yield damage(path, rng)
    out = tmp / "out"
    for words in (
        ("data", "vggsound", "--csv", folder / "vggsound.csv", "--clips", folder / "video", "--out", out / "state"),
        ("data", "audioset", folder / "audioset_strong.tsv", "--names", folder / "mid_to_display_name.tsv"),
        ("data", "continuous", "sweep", folder),
    ):
        command(*words)
    with contextlib.suppress(_error()):
        folder_clips(folder)


def shards(originals, tmp, rng):
    from smooth_foley.data.shard_reader import BadMember, Shards, verify

    folder = linked(originals.folder / "shards", tmp / "in")
    path = rng.choice(files_of(folder, ".tar", ".json", ".json", ".csv"))
    whole = hashlib.sha256(path.read_bytes()).digest()
    yield damage(path, rng)
    if path.exists() and path.suffix != ".csv" and hashlib.sha256(path.read_bytes()).digest() != whole:
        try:
            assert verify(folder), f"verify found nothing wrong with {path.name}"
        except _error():
            pass
    truth = {x["key"]: x for x in Shards(originals.folder / "shards")}
    read = Shards(folder)
    for i in range(len(read)):
        try:
            clip = read[i]
        except BadMember:
            continue
        if "latent" not in clip:
            continue
        right = clip["latent"].tobytes() == truth[clip["key"]]["latent"].tobytes()
        assert right or not read.shard(0).indexed or path.suffix == ".tar", "a clip with another one's content"


def models(originals, tmp, rng):
    from smooth_foley.pipeline import SmoothFoleyPipeline

    folder = linked(originals.folder / "model", tmp / "in")
    small = rng.random() < 0.6
    path = rng.choice(files_of(folder, *((".json", ".txt") if small else (".safetensors",))))
    yield f"{path.parent.name}/{damage(path, rng)}"
    if rng.random() < 0.3:
        command("info", "--model", folder, "--device", "cpu")
        command("labels", "--model", folder)
    else:
        SmoothFoleyPipeline.from_pretrained(folder)


def caches(originals, tmp, rng):
    from smooth_foley.data.arrays import read_arrays
    from smooth_foley.data.continuous import read_filter
    from smooth_foley.data.store import measure_clips, read_measurement
    from smooth_foley.frame_cache import EmbeddingCache
    from smooth_foley.train.checkpoints import latest_checkpoint
    from smooth_foley.train.folder import claim_folder
    from smooth_foley.train.recipe import Recipe
    from smooth_foley.train.records import CsvLog

    folder = shutil.copytree(originals.folder / "caches", tmp / "in")
    path = rng.choice(files_of(folder, ".npz", ".json", ".csv", ".safetensors"))
    yield damage(path, rng)
    EmbeddingCache(folder=folder)._read("frames", 4)
    read_arrays(folder / "arrays.npz", ("seconds", "mark", "x"))
    CsvLog(folder / "runs" / "base" / "log.csv", 2)
    (folder / "runs" / "base" / f"checkpoint-{rng.choice(['', 'x', '9' * 30, '1.bak', '-3'])}").touch()
    assert latest_checkpoint(folder / "runs" / "base") is None
    for work in (
        lambda: measure_clips(measured_items(originals.folder), folder / "measured", Size()),
        lambda: claim_folder(folder / "runs", Recipe(), ("base",)),
        lambda: read_filter(folder),
    ):
        with contextlib.suppress(_error()):
            work()
    for item in measured_items(originals.folder):
        found = read_measurement(item, folder / "measured")
        assert found is None or (float(found["x"]) == 1.0 and int(found["bytes"]) == item.path.stat().st_size)


NASTY = (
    "",
    " ",
    "-1",
    "0",
    "1e999",
    "nan",
    "9" * 400,
    "x" * 300,
    "~nouser/x",
    ".",
    "..",
    "/",
    "/dev/null",
    "/dev/full",
    "/proc/x",
    "../x",
    "a,b,,c",
    "=x",
    "=ours",
    "ours=",
    "passby",
    "passby:0-99999999999",
    "passby:9-1",
    "passby:" + "9" * 5000,
    "full",
    "http://127.0.0.1:9/x",
    "12:30",
    "\x1b[2J",
    "caf\udce9",
    "\n",
    "0/0",
    "1/0",
    "3/2",
    "K/N",
    "cuda:99",
    "cpu",
    "none/x.csv",
    "none/x.png",
    "0.5-2.0,3-4.5",
    "5-3",
    "ours:frame_scale=",
    "core",
    "mini",
    "select",
    "filter",
    "dog barking",
    "--",
    "-",
    "💥",
)
# Words that keep a command from beginning long work or leaving the machine
FIRST = {
    "generate": ["none.mp4"],
    "demo": ["--device", "cuda:99"],
    "labels": ["none.mp4"],
    "train mini": ["--stages", "none", "--out", "o"],
    "train diff-foley": ["--stages", "none", "--out", "o"],
    "train projection": ["--shards", "none", "--out", "o"],
    "train temporal-adapter": ["--shards", "none", "--out", "o"],
    "train frame-adapter": ["--shards", "none", "--out", "o"],
    "fetch": ["full", "--from", "none", "--out", "o"],
    "export": ["none", "--out", "o"],
    "bench": ["--out", "none/x.json"],
    "evaluate": ["--split", "none"],
    "info": [],
    "data vggsound": ["--csv", "none.csv"],
    "data audit": ["--clips", "none", "--out", "o"],
    "data audioset": ["none.tsv", "--names", "none.tsv"],
    "data grounding": ["none.wav", "--phrase", "x"],
    "data continuous": ["sweep", "none"],
    "data shards": ["none.csv", "--out", "o"],
}
SKIPPED = {"--passby", "--download", "--from", "--device"}


def option_names():
    "Options of every command by its words"
    from smooth_foley.app.main import _COMMANDS, ADAPTERS, DATA, INFO, TRAIN_DIFF_FOLEY, TRAIN_MINI

    named = {c.name: c for c in (*_COMMANDS, INFO)} | {f"data {c.name}": c for c in DATA}
    named |= {f"train {c.name}": c for c in (TRAIN_MINI, TRAIN_DIFF_FOLEY, *ADAPTERS)}
    return {
        words: [row[0].split()[-1] for group in c.groups for row in group.rows if row[0].startswith("-")]
        for words, c in named.items()
    }


def arguments(originals, tmp, rng):
    options = option_names()
    words = rng.choice(sorted(FIRST))
    line = [*words.split(), *FIRST[words]]
    for _ in range(rng.randrange(1, 4)):
        option = rng.choice([o for o in options[words] if o not in SKIPPED] or [""])
        line += [option, rng.choice(NASTY)][: rng.choice([1, 2, 2, 2])]
    yield " ".join(line)
    os.chdir(tmp / "out")
    try:
        command(*line)
    except SystemExit as e:
        if e.code not in (0, None):
            raise AssertionError(f"SystemExit {e.code}") from e
    finally:
        os.chdir(tmp.parent)


KINDS = (media, lists, shards, models, caches, arguments)


def _error():
    from smooth_foley.core import FoleyError

    return FoleyError


# --- one input


def _hang(*_):
    raise TimeoutError(f"longer than {LONGEST} s")


def try_one(originals, number, seed):
    "A row about one damaged input; `bad` says what was wrong with the answer"
    rng = random.Random(f"{seed}-{number}")
    kind = KINDS[number % len(KINDS)]
    row = dict(number=number, kind=kind.__name__, damage="", answer="done", bad="")
    tmp = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (tmp / "out").mkdir()
    said, start = io.StringIO(), time.time()
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            steps = kind(originals, tmp, rng)
            row["damage"] = next(steps)
            with contextlib.suppress(StopIteration):
                next(steps)
    except _error() as e:
        row["answer"] = str(e)
        row["bad"] = "two lines" if "\n" in str(e) else ""
    except BaseException as e:
        row["answer"] = f"{type(e).__name__}: {e}"
        row["bad"] = " | ".join(traceback.format_exc().strip().splitlines()[-5:])
    finally:
        signal.alarm(0)
    row["seconds"] = round(time.time() - start, 2)
    if "Traceback" in said.getvalue() or "unexpected" in said.getvalue():
        row["bad"] = row["bad"] or said.getvalue()[-500:]
    row["bad"] = row["bad"] or _left(tmp, row)
    shutil.rmtree(tmp, ignore_errors=True)
    return {k: str(v).encode("utf-8", "backslashreplace").decode() for k, v in row.items()}


def _left(tmp, row):
    "What should not be in the folder"
    names = [p.name for p in tmp.rglob("*") if p.is_file()]
    if parts := [n for n in names if ".part" in n]:
        return f"left {parts[0]}"
    if row["kind"] == "media" and row["answer"] != "done" and (outputs := list((tmp / "out").iterdir())):
        return f"failed and wrote {outputs[0].name}"
    return ""


def work(folder, first, stop, seed):
    "In a process of its own: inputs from `first` on, one JSON line each"
    from smooth_foley.app import main  # noqa: F401
    from smooth_foley.data import shard_reader  # noqa: F401
    from smooth_foley.pipeline import SmoothFoleyPipeline

    resource.setrlimit(resource.RLIMIT_DATA, (4 * MEMORY,) * 2)  # The machine outlives what takes too much
    originals = Originals(folder)
    SmoothFoleyPipeline.from_pretrained(originals.folder / "model")  # What is imported late is imported now
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for number in range(first, stop):
        print(json.dumps(dict(begins=number)), file=out, flush=True)
        row = try_one(originals, number, seed)
        row["memory"] = most_memory()
        print(json.dumps(row), file=out, flush=True)


def rows_of(folder, first, stop, seed):
    "Rows of all inputs; a process that crashes costs one input"
    while first < stop:
        words = [sys.executable, __file__, "--work", folder, "--first", first, "--n", stop - first, "--seed", seed]
        env = {**os.environ, "IN_TEST": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
        p = subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True
        )
        begun = None
        for line in p.stdout:
            row = json.loads(line)
            begun = row.get("begins", begun)
            if "begins" not in row:
                yield row
                first = int(row["number"]) + 1
        code = p.wait()
        if first < stop:
            if begun is None:
                raise SystemExit(f"the process that tries inputs does not start (exit code {code})")
            row = dict(
                number=begun, kind=KINDS[begun % len(KINDS)].__name__, damage="", answer="", seconds="", memory=0
            )
            yield row | dict(bad=f"crashed with {code}")
            first = begun + 1


def fuzz(folder, n, seed=0, first=0, out=None):
    "Try inputs, print what they were answered, and return the bad ones"
    rows = []
    for row in rows_of(folder, first, first + n, seed):
        rows.append(row)
        if row["bad"]:
            print(
                f"{row['number']} {row['kind']} {row['damage'][:200]}: {row['answer'][:200]}\n    {row['bad']}",
                flush=True,
            )
    if out:
        with open(out, "w", newline="", encoding="utf-8") as f:
            w = csv.DictWriter(
                f, ("number", "kind", "damage", "answer", "seconds", "memory", "bad"), extrasaction="ignore"
            )
            w.writeheader()
            w.writerows(rows)
    kinds, done = Counter(r["kind"] for r in rows), Counter(r["kind"] for r in rows if r["answer"] == "done")
    most = max(int(r["memory"]) for r in rows)
    for kind in sorted(kinds):
        print(f"{kind:10} {kinds[kind]:5} inputs, {done[kind]:5} answered with a result, the others with one line")
    bad = [r for r in rows if r["bad"]]
    print(f"{len(rows)} inputs, {len(bad)} bad, at most {most / 1e6:.0f} MB")
    return bad if most < MEMORY else [*bad, dict(bad=f"{most} bytes of memory")]


def most_memory():
    "Bytes this process has used at most; `getrusage` would count what its parent had when it started it"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- kills


def _train(folder, out):
    return [sys.executable, HERE / "training_run.py", out]


def _evaluate(folder, out):
    return [sys.executable, HERE / "evaluate_run.py", out]


def _shards(folder, out):
    return [sys.executable, "-m", "smooth_foley", "data", "shards", "passby:0-7", "--out", out, "--per-shard", 2]


def _audit(folder, out):
    clips = folder / "lists" / "video"
    return [sys.executable, "-m", "smooth_foley", "data", "audit", "--clips", clips, "--out", out, "--workers", 1]


def _generate(folder, out):
    words = ["--label", "dog barking", "--steps", 2, "-o", out]
    return [sys.executable, "-m", "smooth_foley", "generate", folder / "lists" / "video", *words]


COMMANDS = dict(train=_train, evaluate=_evaluate, shards=_shards, audit=_audit, generate=_generate)
FINAL = dict(
    train=("final.safetensors",),
    evaluate=("clips.csv", "summary.csv", "differences.csv", "tables.md", "ours/*.wav", "half/*.wav"),
    shards=("*",),
    audit=("audit.csv", "faults.csv", "clean.csv"),
    generate=("*",),
)


def final_bytes(name, out):
    "What a finished run leaves that must not depend on its past"
    files = [p for pattern in FINAL[name] for p in out.glob(pattern) if p.is_file()]
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in files}
    if name == "train":
        with open(out / "log.csv") as f:
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]
        found["log.csv"] = repr(rows).encode()
    return found


def once(words, after=None, how=None):
    "Run a command to its end, or kill it after so many seconds; seconds and exit code"
    start = time.time()
    env = {**os.environ, "IN_TEST": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    p = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    try:
        _, said = p.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        p.send_signal(how)
        told = time.time()
        _, said = p.communicate()
        return time.time() - told, p.returncode, said.decode(errors="replace")
    return time.time() - start, p.returncode, said.decode(errors="replace")


def kills(folder, n, seed=0):
    "Kill commands at random moments and let them end; returns what is wrong"
    Originals(folder)
    rng, whole, wrong = random.Random(seed), {}, []
    tmp = Path(tempfile.mkdtemp(prefix="kills-"))
    for name, words in COMMANDS.items():
        out = tmp / f"{name}-whole"
        out.mkdir()
        seconds, code, said = once(words(folder, out))
        assert code == 0, said[-2000:]
        whole[name] = seconds, final_bytes(name, out)
    for k in range(n):
        name = list(COMMANDS)[k % len(COMMANDS)]
        how = (signal.SIGKILL, signal.SIGTERM)[k // len(COMMANDS) % 2]
        out, (seconds, expected) = tmp / f"{name}-{k}", whole[name]
        out.mkdir()
        after = rng.uniform(0.2, 0.98) * seconds
        late, code, said = once(COMMANDS[name](folder, out), after, how)
        bad = [] if "Traceback" not in said else ["a traceback"]
        again, end, said = once(COMMANDS[name](folder, out))
        bad += [] if end == 0 else [f"exit code {end}: {said[-300:]}"]
        bad += [] if final_bytes(name, out) == expected else ["other bytes"]
        bad += [f"left {p.name}" for p in out.rglob(".*")]
        print(
            f"{name} {how.name} after {after:.1f} s ended {late:.1f} s later ({code}): {bad or 'the same bytes'}",
            flush=True,
        )
        wrong += bad
        shutil.rmtree(out)
    shutil.rmtree(tmp)
    return wrong


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--n", type=int, default=0, help="damaged inputs")
    p.add_argument("--kills", type=int, default=0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--folder", type=Path, help="where whole files are kept (default: a temporary folder)")
    p.add_argument("--out", type=Path, help="CSV with a row for every input")
    p.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work:
        return work(args.work, args.first, args.first + args.n, args.seed)
    with tempfile.TemporaryDirectory() as tmp:
        folder = (args.folder or Path(tmp) / "originals").resolve()
        bad = fuzz(folder, args.n, args.seed, args.first, args.out) if args.n else []
        bad += kills(folder, args.kills, args.seed) if args.kills else []
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
