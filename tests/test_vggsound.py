"Lists, joins, downloads and audits of VGGSound, with everything that goes wrong on the way"

import contextlib
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from smooth_foley.core import FoleyError
from smooth_foley.data.audit import _Worker, audit, inspect_clips
from smooth_foley.data.download import DownloadOptions, cut_clip, download, download_clip, why_failed
from smooth_foley.data.inspection import Limits, find_faults, inspect_clip
from smooth_foley.data.items import Item, vggsound_labels
from smooth_foley.data.vggsound import folder_items, join_clips, read_vggsound, write_state
from smooth_foley.media import SR, read_audio, write_video
from smooth_foley.world.as_vggsound import passby_folder
from smooth_foley.world.passby import scene

TABLES = ("audit.csv", "faults.csv", "clean.csv")
CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return passby_folder(tmp_path_factory.mktemp("passby") / "set", 12, seconds=1.5, wrong=0.25)


@pytest.fixture(scope="module")
def clips(folder):
    return join_clips(read_vggsound(folder / "vggsound.csv", duration=1.5), folder / "video")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    sc = scene(5)
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", sc.frames, 15, sc.audio)


def tables(out):
    return [(Path(out) / t).read_bytes() for t in TABLES]


def remux(source, out, late=0.0, **options):
    "Copy the packets of a file, the sound `late` seconds later"
    with av.open(str(source)) as f, av.open(str(out), "w", options=options) as g:
        to = {s.index: g.add_stream_from_template(s) for s in f.streams}
        for p in f.demux():
            if p.dts is None:
                continue
            if p.stream.type == "audio":
                p.pts, p.dts = (t + round(late / p.time_base) for t in (p.pts, p.dts))
            p.stream = to[p.stream.index]
            g.mux(p)
    return Path(out)


# ---- lists


def test_labels():
    rows = vggsound_labels().values()
    assert (len(rows), sum(r["clips_total"] for r in rows), sum(r["clips_test"] for r in rows)) == (309, 199176, 15446)


def test_quoting(tmp_path):
    f = tmp_path / "list.csv"
    f.write_bytes(
        (
            '\ufeffyoutube_id,start,label,split\r\n--0PQM4-hqg,30,"railroad car, train wagon",train\r\n\r\n'
            '"-_0PQM4-hqg","7", "dog barking" ,test\nA-0PQM4-hq_,1.0,dog barking,val'
        ).encode()
    )
    assert [(i.id, i.start, i.label, i.split) for i in read_vggsound(f)] == [
        ("--0PQM4-hqg", 30, "railroad car, train wagon", "train"),
        ("-_0PQM4-hqg", 7, "dog barking", "test"),
        ("A-0PQM4-hq_", 1, "dog barking", "val"),
    ]


def test_two_columns(tmp_path):
    (tmp_path / "train.csv").write_text(
        'glLQrEijrKg_000300.mp4,playing hammond organ\n-1p_moJIGQc_10000_20000.mp4,"subway, metro, underground"\n'
    )
    assert [(i.id, i.start, i.split) for i in read_vggsound(tmp_path / "train.csv")] == [
        ("glLQrEijrKg", 300, "train"),
        ("-1p_moJIGQc", 10, "train"),
    ]
    (tmp_path / "list.csv").write_text("glLQrEijrKg_000300.mp4,playing hammond organ\n")
    with pytest.raises(FoleyError, match="line 1: split ''"):
        read_vggsound(tmp_path / "list.csv")
    assert read_vggsound(tmp_path / "list.csv", split="test")[0].split == "test"


@pytest.mark.parametrize(
    "line, why",
    [
        (b"aaaaaaaaaaa,1,dog barking", "3 columns"),
        (b"aaaaaaaaaaa,1,railroad car, train wagon,train", "5 columns.*needs quotes"),
        (b'aaaaaaaaaaa,1,"dog barking,train', "quotes that do not match"),
        (b'aaaaaaaaaaa,1,dog "barking",x,train', "5 columns"),
        (b"aaaaaaaaaaa,-1,dog barking,train", "start '-1'"),
        (b"aaaaaaaaaaa,nan,dog barking,train", "start 'nan'"),
        (b"aaaaaaaaaaa,1,dog borking,train", "did you mean 'dog barking'"),
        (b"aaaaaaaaaaa,1,zzzz,train", "label 'zzzz'"),
        (b"aaaaaaaaaaa,1,dog barking,dev", "split 'dev'"),
        (b"aaaa;reboot,1,dog barking,train", "id"),
        (b"../../../ab,1,dog barking,train", "id"),
        (b"$(reboot)aa,1,dog barking,train", "id"),
        (b"aaaaaaaaaaa\x00,1,dog barking,train", "id"),
        (b"aaaaaaaaaaa,1,caf\xe9,train", "UTF-8"),
        ("aaaaaaaaaaa,1,dog barking,train".encode("utf-16"), "UTF-8"),
        (b"short_0001.mp4,dog barking", "file name"),
    ],
)
def test_wrong_lines(tmp_path, line, why):
    good = b"bbbbbbbbbbb,2,dog barking,test"
    (tmp_path / "l.csv").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(FoleyError, match=f"l.csv line 2: .*({why})") as e:
        read_vggsound(tmp_path / "l.csv")
    assert "\n" not in str(e.value)
    faults = []
    assert len(read_vggsound(tmp_path / "l.csv", faults)) == 2  # nothing else is lost
    assert faults[0]["line"] == 2


def test_no_list(tmp_path):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "bad.csv").write_text("a,b,c\n")
    for name, why in (("empty.csv", "no line"), ("none.csv", "no such file"), ("", "is a directory")):
        with pytest.raises(FoleyError, match=why):
            read_vggsound(tmp_path / name)
    with pytest.raises(FoleyError, match="none of its lines"):
        read_vggsound(tmp_path / "bad.csv", [])


# ---- folders


def test_passby_folder(folder, clips, tmp_path):
    truth = {r["id"]: r for r in csv.DictReader((folder / "truth.csv").open())}
    assert len(clips.present) == 12 and not clips.surplus
    assert {i.id[0] for i in clips} > {"-", "_"} and all(len(i.id) == 11 for i in clips)
    assert [int(truth[i.id]["seed"]) >= 2_000_000 for i in clips] == [i.split == "test" for i in clips]
    strong = list(csv.DictReader((folder / "audioset_strong.tsv").open(), delimiter="\t"))
    names = dict(csv.reader((folder / "mid_to_display_name.tsv").open(), delimiter="\t"))
    for item in clips:
        r = truth[item.id]
        mine = [
            (float(e["start_time_seconds"]), float(e["end_time_seconds"]), names[e["label"]])
            for e in strong
            if e["segment_id"] == f"{item.id}_{item.start * 1000:.0f}"
        ]
        if r["wrong"] in ("silence", "noise"):
            assert not mine and inspect_clip(item.path)["loudest_db"] < -45
            continue
        assert all(name == r["sound_label"] for *_, name in mine) and (r["sound_label"] != item.label) == (
            r["wrong"] == "other"
        )
        sc = scene(int(r["sound_seed"]), frames=False, audio=False)
        cut = next(float(t["cut"]) for t in truth.values() if t["seed"] == r["sound_seed"])
        on = sc.truth["sounding"][round(cut * 100) : round(cut * 100) + 150].mean()
        assert abs(sum(b - a for a, b, _ in mine) - 1.5 * on) < 0.02
    with pytest.raises(FoleyError, match="holds clips or lists already"):
        passby_folder(folder, 2)
    twin = passby_folder(tmp_path / "twin", 2, seconds=1.5, ms_names=True)
    again = passby_folder(tmp_path / "again", 2, seconds=1.5, ms_names=True)
    for a, b in zip(sorted((twin / "video").iterdir()), sorted((again / "video").iterdir())):
        assert a.name == b.name and inspect_clip(a) == inspect_clip(b)
    assert (
        len(join_clips(read_vggsound(twin / "vggsound.csv", duration=1.5), twin).present) == 2
    )  # names by milliseconds, a folder above


def test_join_reports_everything(clips, tmp_path):
    for k, item in enumerate(clips[:4]):
        shutil.copy(
            item.path,
            tmp_path
            / (
                f"{item.name}.mp4" if k % 2 else f"{item.id}_{item.start * 1000:.0f}_{item.start * 1000 + 1500:.0f}.mp4"
            ),
        )
    shutil.copy(clips[0].path, tmp_path / f"{clips[0].name}.webm")
    shutil.copy(clips[0].path, tmp_path / 'it\'s "$(odd)".mp4')
    joined = join_clips(clips, tmp_path)
    assert len(joined.present) == 4 and len(joined.missing) == 8
    assert {f.name for f in joined.surplus} == {
        f"{clips[0].id}_{clips[0].start * 1000:.0f}_{clips[0].start * 1000 + 1500:.0f}.mp4",
        'it\'s "$(odd)".mp4',
    }
    out = write_state(joined, tmp_path / "state", [dict(line=3, reason="no")])
    assert [r["reason"] for r in csv.DictReader((out / "faults.csv").open())] == ["line"] + ["missing"] * 8 + [
        "surplus"
    ] * 2
    with pytest.raises(FoleyError, match="no such folder"):
        join_clips(clips, tmp_path / "nowhere")


# ---- one file


def test_packet_hashes(film, tmp_path):
    first, second = inspect_clip(film), inspect_clip(remux(film, tmp_path / "film.mkv"))
    assert film.read_bytes() != (tmp_path / "film.mkv").read_bytes()
    assert (first["picture_hash"], first["sound_hash"]) == (second["picture_hash"], second["sound_hash"])


@pytest.mark.parametrize("late", [0.25, -0.25])
def test_offset(film, tmp_path, late):
    facts = inspect_clip(
        remux(film, tmp_path / "late.mkv", late + 0.5)
    )  # half a second for the time that may not be negative
    assert facts["sound_start"] - facts["picture_start"] == pytest.approx(late + 0.5 - 0.064, abs=0.07)
    assert "offset" in dict(find_faults(facts)) and "offset" not in dict(find_faults(facts, limits=Limits(offset=2.0)))


def test_truncated_and_damaged(film, tmp_path):
    fast, mkv = (
        remux(film, tmp_path / "fast.mp4", movflags="+faststart").read_bytes(),
        remux(film, tmp_path / "film.mkv").read_bytes(),
    )
    (tmp_path / "cut.mp4").write_bytes(fast[: len(fast) // 2])
    (tmp_path / "cut.mkv").write_bytes(mkv[: len(mkv) // 2])
    for name in ("cut.mp4", "cut.mkv"):
        assert [r for r, _ in find_faults(inspect_clip(tmp_path / name), 10.24)] == ["truncated"]
    hurt = bytearray(fast)
    hurt[len(fast) // 2 : len(fast) // 2 + 3000] = bytes(3000)
    (tmp_path / "hurt.mp4").write_bytes(hurt)
    assert [r for r, _ in find_faults(inspect_clip(tmp_path / "hurt.mp4"), 10.24)] == ["damaged"]
    assert find_faults(inspect_clip(tmp_path / "fast.mp4"), 10.24) == []


def test_nothing_in_a_file_raises(film, tmp_path):
    whole = film.read_bytes()
    rng = np.random.default_rng(0)
    for k in range(40):  # cuts, noise and zeros anywhere
        data = bytearray(whole[: rng.integers(1, len(whole))] if k % 3 == 0 else whole)
        at = rng.integers(0, len(data), 50 if k % 3 == 1 else 1)
        for a in at:
            data[a : a + (1 if k % 3 == 1 else 4000)] = rng.bytes(1 if k % 3 == 1 else 4000)
        (tmp_path / "x.mp4").write_bytes(data)
        facts = inspect_clip(tmp_path / "x.mp4")
        json.dumps(facts)
        find_faults(facts, 10.24)
    for odd in (tmp_path, tmp_path / "none.mp4", "/dev/null"):
        assert inspect_clip(odd)["error"] in ("unreadable", "missing", "empty")


# ---- workers


@pytest.fixture(scope="module")
def long_film(tmp_path_factory):
    frames = np.broadcast_to(np.arange(6000, dtype=np.uint16).astype(np.uint8)[:, None, None, None], (6000, 64, 64, 3))
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", frames, 60)


def test_a_file_that_took_too_long_is_read_again_with_more_time(long_film, clips, tmp_path):
    items = [replace(clips[0], path=long_film)]
    for seconds, hangs, lines in ((0.1, 1, 1), (0.1, 1, 1), (60.0, 0, 2), (0.1, 0, 2)):
        report = audit(items, tmp_path, workers=1, seconds=seconds)
        assert report.faults["hang"] == hangs and len((tmp_path / "audit.jsonl").read_text().splitlines()) == lines


def test_hang(long_film, clips):
    facts = dict(inspect_clips([long_film, clips[0].path], workers=1, seconds=0.1))
    assert facts[long_film] == dict(error="hang", detail="not read in 0.1 s")
    assert facts[clips[0].path]["frames"] == clips[0].duration * 15 // 1


def test_crash(long_film, clips):
    worker, answers = _Worker(60.0, 4.0), []
    asking = threading.Thread(target=lambda: answers.append(worker.ask(long_film)))
    asking.start()
    while asking.is_alive():  # every decoder that touches it dies, the one that gives a second opinion, too
        process = worker.process
        with contextlib.suppress(psutil.Error):
            if process and str(long_film) in {f.path for f in psutil.Process(process.pid).open_files()}:
                os.kill(process.pid, signal.SIGSEGV)
        time.sleep(0.01)
    assert answers == [dict(error="crash", detail="the decoder ended with SIGSEGV")]
    assert "error" not in worker.ask(clips[0].path)  # a fresh one goes on
    worker.stop()


def test_memory(tmp_path, clips):
    "A picture too large for the memory that a worker may have harms nobody else"
    write_video(tmp_path / "huge.mp4", np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (2, 8000, 4000, 3)), 15)
    free = _Worker(60.0, 4.0)
    assert {r for r, _ in find_faults(free.ask(clips[0].path))} <= {"silent"}
    held = psutil.Process(free.process.pid).memory_info().vms / 2**30
    assert {r for r, _ in find_faults(free.ask(tmp_path / "huge.mp4"))} == {"no_sound"}
    tight = _Worker(60.0, held + 0.07)
    for _ in range(2):
        assert {"memory", "crash", "damaged"} & {r for r, _ in find_faults(tight.ask(tmp_path / "huge.mp4"))}
        assert tight.ask(clips[0].path) == free.ask(clips[0].path)
    free.stop()
    tight.stop()


def test_memory_stays_flat(clips):
    worker = _Worker(60.0, 4.0)

    def rss(n):
        for k in range(n):
            worker.ask(clips[k % 12].path)
        return psutil.Process(worker.process.pid).memory_info().rss

    first, second = rss(40), rss(120)
    worker.stop()
    assert second - first < 4e6


# ---- the audit


@pytest.fixture(scope="module")
def everything(folder, clips, film, tmp_path_factory):
    "A list with copies across the splits, a clip named twice, one that is missing, an empty file, a broken one"
    d = tmp_path_factory.mktemp("everything") / "video"
    shutil.copytree(folder / "video", d)
    items = list(clips)
    train, test = next(i for i in items if i.split == "train"), next(i for i in items if i.split == "test")
    for k, what in enumerate((test, train)):
        copy = Item(f"copy{k}aaaaaa", 7.0, what.label, "train", duration=1.5)
        remux(what.path, d / f"{copy.name}.mkv")
        items.append(copy)
    for name, data in (("emptyaaaaaa", b""), ("brokenaaaaa", train.path.read_bytes()[:9000])):
        items.append(Item(name, 1.0, "dog barking", "train", duration=1.5))
        (d / f"{items[-1].name}.mp4").write_bytes(data)
    items += [Item("absentaaaaa", 1.0, "dog barking", "train", duration=1.5), items[0]]
    (d / os.fsdecode(b"surpl\xffs.mp4")).touch()
    return join_clips(items, d)


@pytest.fixture(scope="module")
def reference(everything, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    return out, audit(everything, out, workers=1)


def test_audit(everything, reference):
    out, report = reference
    rows = report.rows()
    reasons = {(r["id"], r["reason"]) for r in rows}
    assert {
        ("copy0aaaaaa", "duplicate_across_splits"),
        ("copy1aaaaaa", "duplicate"),
        ("emptyaaaaaa", "empty"),
        ("brokenaaaaa", "unreadable"),
        ("absentaaaaa", "missing"),
        (everything[0].id, "listed_twice"),
        ("", "surplus"),
    } <= reasons
    assert report.clips == len(everything) == len(list(csv.DictReader((out / "audit.csv").open())))
    clean = read_vggsound(out / "clean.csv")
    assert len(clean) == report.clean and not {i.id for i in clean} & {
        r["id"] for r in rows if r["reason"] != "listed_twice"
    }


def test_processes_leave_no_trace(everything, reference, tmp_path):
    audit(everything, tmp_path, workers=3)
    assert tables(tmp_path) == tables(reference[0])


SCRIPT = """
import pickle, sys
from smooth_foley.data.audit import audit
items, surplus = pickle.load(open(sys.argv[1], 'rb'))
items.surplus = surplus
audit(items, sys.argv[2], workers=2)
"""


@pytest.fixture(scope="module")
def pickled(everything, tmp_path_factory):
    import pickle

    f = tmp_path_factory.mktemp("pickled") / "items"
    f.write_bytes(pickle.dumps((everything, everything.surplus)))
    return f


@pytest.mark.parametrize("lines", [1, 7])
def test_kill(everything, reference, pickled, tmp_path, lines):
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, pickled, tmp_path])
    log = tmp_path / "audit.jsonl"
    while run.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        time.sleep(0.005)
    workers = psutil.Process(run.pid).children()
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    gone, alive = psutil.wait_procs(workers, 10)
    assert not alive  # nobody is left behind
    done = log.read_bytes().count(b"\n")
    assert lines <= done < len(everything) and not (tmp_path / "audit.csv").exists()
    with open(log, "ab") as f:
        f.write(b'{"path": "torn')
    audit(everything, tmp_path, workers=2)
    assert tables(tmp_path) == tables(reference[0])
    assert log.read_bytes().count(b"\n") == len({i.path for i in everything.present})  # nothing was read twice


def limited(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk(everything, reference, pickled, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, pickled, tmp_path], preexec_fn=limited(2500), capture_output=True, text=True
    )
    last = run.stderr.strip().splitlines()[-1]
    assert "FoleyError" in last and "audit.jsonl: cannot be written (file too large); make room" in last
    assert (tmp_path / "audit.jsonl").stat().st_size == 2500  # torn in a line
    audit(everything, tmp_path)
    assert tables(tmp_path) == tables(reference[0])


def test_full_disk_at_the_tables(everything, reference, pickled, tmp_path):
    shutil.copy(reference[0] / "audit.jsonl", tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, pickled, tmp_path], preexec_fn=limited(1000), capture_output=True, text=True
    )
    assert "cannot be written (file too large)" in run.stderr.strip().splitlines()[-1]
    assert [f.name for f in tmp_path.iterdir()] == ["audit.jsonl"]  # no half table


def test_changed_files_are_read_again(clips, tmp_path):
    copies = tmp_path / "v"
    shutil.copytree(clips[0].path.parent, copies)
    items = folder_items(copies, 1.5)
    before = audit(items, tmp_path / "a", workers=1)
    items[3].path.write_bytes(b"")
    after = audit(items, tmp_path / "a", workers=1)
    assert after.faults["empty"] == 1 and before.faults["empty"] == 0
    assert len((tmp_path / "a" / "audit.jsonl").read_text().splitlines()) == len(items) + 1


def test_one_at_a_time(clips, tmp_path):
    import fcntl

    with open(tmp_path / "audit.jsonl", "ab") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(FoleyError, match="another run is writing it"):
            audit(clips, tmp_path)
    with pytest.raises(FoleyError, match="no clip"):
        audit([], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FoleyError, match="cannot be made"):
        audit(clips, tmp_path / "file")


@pytest.mark.skipif(not (CLIPS / "clips.csv").is_file(), reason="no real clips: clips/ is absent")
def test_real_footage(tmp_path):
    report = audit(folder_items(CLIPS), tmp_path)
    known = {r["file"]: r for r in csv.DictReader((CLIPS / "clips.csv").open()) if r["file"].endswith(".mp4")}
    assert report.clips == len(known)
    assert [(r["id"], r["reason"]) for r in report.rows()] == [
        (Path(f).stem, "no_sound") for f, r in known.items() if r["has_audio"] == "False"
    ]
    for row in csv.DictReader((tmp_path / "audit.csv").open()):
        assert (
            abs(
                float(row["picture_end"])
                - float(row["picture_start"])
                - float(known[Path(row["path"]).name]["duration_s"])
            )
            < 0.1
        )


# ---- downloads, from a server on this machine

MPD = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT10S"
profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>
<AdaptationSet mimeType="video/mp4">
<Representation id="v" codecs="avc1.4d401f" width="64" height="64" bandwidth="90000">
<BaseURL>/picture.mp4</BaseURL></Representation></AdaptationSet>
<AdaptationSet mimeType="audio/mp4">
<Representation id="a" codecs="mp4a.40.2" bandwidth="64000">
<BaseURL>/sound.m4a</BaseURL></Representation></AdaptationSet></Period></MPD>"""


def alone(source, out, kind):
    "One stream of a file"
    with av.open(str(source)) as f, av.open(str(out), "w", format="mp4") as g:
        stream = getattr(f.streams, kind)[0]
        to = g.add_stream_from_template(stream)
        for p in f.demux(stream):
            if p.dts is not None:
                p.stream = to
                g.mux(p)
    return out.read_bytes()


class Tube(BaseHTTPRequestHandler):
    "Answers by the id: gone, busy, sick (fails twice), slow, page, dash (picture and sound apart), or the video"

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        id_, s = self.path.split("=")[-1], self.server
        s.seen.append((id_, self.command, self.headers.get("Range"), self.headers.get("Cookie")))
        code = dict(gone=410, busy=429, deny=403).get(id_[-4:], 200)
        if id_.endswith("sick") and sum(i == id_ for i, *_ in s.seen) <= 2:
            code = 503
        if code != 200:
            return self.reply(code, b"")
        if id_.endswith("page"):
            return self.reply(200, b"<html><title>no film here</title></html>", "text/html")
        if id_.endswith("dash"):
            return self.reply(200, MPD.encode(), "application/dash+xml")
        film = s.parts.get(self.path, s.film)
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        self.reply(206 if start else 200, film[start:], start=start, pace=id_.endswith("slow"))

    def reply(self, code, body, kind="video/mp4", start=0, pace=False):
        self.send_response(code)
        for k, v in (("Content-Type", kind), ("Content-Length", len(body)), ("Accept-Ranges", "bytes")):
            self.send_header(k, str(v))
        if code == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{start + len(body)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for k in range(0, len(body), 4096):
                self.wfile.write(body[k : k + 4096])
                time.sleep(0.05 * (pace and not self.server.hurry))
        except OSError:
            pass


@pytest.fixture
def tube(film):
    pytest.importorskip("yt_dlp")
    with ThreadingHTTPServer(("127.0.0.1", 0), Tube) as server:
        server.film, server.seen, server.hurry, server.parts = film.read_bytes(), [], False, {}
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def how(tube, **options):
    return DownloadOptions(
        **{
            **dict(
                retries=0, timeout=5.0, sections=False, address=f"http://127.0.0.1:{tube.server_port}/watch?v={{id}}"
            ),
            **options,
        }
    )


def want(*ids):
    return [Item(i, 4.0, "dog barking", "train", duration=2.0) for i in ids]


def test_download(tube, tmp_path):
    items = want("--here_____", "_-----_gone", "-------busy", "-------deny", "-------page")
    report = download(items, tmp_path, how(tube), workers=2)
    assert (report.downloaded, dict(report.failed)) == (1, dict(removed=1, rate_limited=1, forbidden=1, format=1))
    got = join_clips(items, tmp_path).present
    assert [i.id for i in got] == ["--here_____"] and not find_faults(inspect_clip(got[0].path), 2.0)
    x, y = read_audio(got[0].path)[: 2 * SR], scene(5, frames=False).audio[4 * SR : 6 * SR]
    assert np.corrcoef(x, y)[0, 1] > 0.9
    rows = list(csv.DictReader((tmp_path / "download.csv").open()))
    assert [(r["id"], r["reason"]) for r in rows] == [
        ("_-----_gone", "removed"),
        ("-------busy", "rate_limited"),
        ("-------deny", "forbidden"),
        ("-------page", "format"),
    ]
    assert all(r["detail"] and "ERROR" not in r["detail"] for r in rows) and not list((tmp_path / ".parts").iterdir())
    tube.seen.clear()
    again = download(join_clips(items, tmp_path).missing, tmp_path, how(tube))
    assert {i for i, *_ in tube.seen} == {"-------busy", "-------deny"}  # what failed for good is not asked for again
    assert dict(again.failed) == dict(report.failed)
    download(items[1:2], tmp_path, how(tube), again=True)
    assert "_-----_gone" in {i for i, *_ in tube.seen}


def test_picture_and_sound_apart(tube, film, tmp_path):
    tube.parts = {
        "/picture.mp4": alone(film, tmp_path / "v", "video"),
        "/sound.m4a": alone(film, tmp_path / "a", "audio"),
    }
    path = download_clip(want("-------dash")[0], tmp_path / "clips", how(tube))
    assert {"/picture.mp4", "/sound.m4a"} <= {i for i, *_ in tube.seen}
    assert not find_faults(inspect_clip(path), 2.0) and not list((tmp_path / "clips" / ".parts").iterdir())
    assert np.corrcoef(read_audio(path)[: 2 * SR], scene(5, frames=False).audio[4 * SR : 6 * SR])[0, 1] > 0.9


def test_retries(tube, tmp_path):
    assert download(want("-------sick"), tmp_path / "a", how(tube)).failed["network"] == 1
    tube.seen.clear()
    assert download(want("-------sick"), tmp_path / "b", how(tube, retries=3)).downloaded == 1


def test_stops_when_refused(tube, tmp_path):
    report = download(want(*(f"{k:07d}busy" for k in range(12))), tmp_path, how(tube), patience=3)
    assert report.left == 12 - 3 and report.failed["rate_limited"] == 3
    assert len({i for i, *_ in tube.seen}) == 3


def test_unreachable(tube, tmp_path):
    gone = how(tube)
    tube.shutdown()
    tube.server_close()
    assert download(want("-------here"), tmp_path / "a", gone).failed["network"] == 1
    proxied = DownloadOptions(
        retries=0, timeout=5.0, proxy=gone.address.split("/watch")[0]
    )  # YouTube's own extractor, behind a proxy that is down
    assert download(want("-------here"), tmp_path / "b", proxied).failed["network"] == 1


def test_cookies(tube, tmp_path):
    jar = tmp_path / "cookies.txt"
    jar.write_text("# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsigned\tin\n")
    before = jar.read_bytes()
    assert download(want("-------here"), tmp_path, how(tube, cookies=jar)).downloaded == 1
    assert all(cookie == "signed=in" for *_, cookie in tube.seen) and jar.read_bytes() == before
    for text, why in (("signed=in", "no cookie in it"), (None, "cannot be read")):
        if text:
            jar.write_text(text)
        else:
            jar.unlink()
        with pytest.raises(FoleyError, match=why):
            download(want("-------her2"), tmp_path, how(tube, cookies=jar))


def test_rate(tube, tmp_path):
    start = time.time()
    download(want("-------here"), tmp_path, how(tube, rate=len(tube.film) / 1.5))
    assert time.time() - start > 1.2


DOWNLOAD = """
import sys
from smooth_foley.data.download import DownloadOptions, download
from smooth_foley.data.items import Item
item = Item('-------slow', 4., 'dog barking', 'train', duration=2.)
download([item], sys.argv[1], DownloadOptions(retries=0, sections=False, address=sys.argv[2]))
"""


def test_kill_in_the_middle_of_a_video(tube, tmp_path):
    run = subprocess.Popen([sys.executable, "-c", DOWNLOAD, tmp_path, how(tube).address])

    def part():
        return next((tmp_path / ".parts").glob("*.part"), None)

    while run.poll() is None and not (part() and part().stat().st_size > 10000):
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    have = part().stat().st_size
    assert 10000 < have < len(tube.film) and not list(tmp_path.glob("*.mp4"))
    tube.seen.clear()
    tube.hurry = True
    assert download(want("-------slow"), tmp_path, how(tube)).downloaded == 1
    assert f"bytes={have}-" in {r for _, _, r, _ in tube.seen}  # on from the byte where it was
    whole = cut_clip(write_film(tube, tmp_path), tmp_path / "whole.mp4", 4.0, 2.0)
    assert inspect_clip(tmp_path / "-------slow_000004.mp4") == inspect_clip(whole)


def write_film(tube, folder):
    (folder / "film.mp4").write_bytes(tube.film)
    return folder / "film.mp4"


def test_full_disk_while_downloading(tube, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", DOWNLOAD.replace("-------slow", "-------here"), tmp_path, how(tube).address],
        preexec_fn=limited(20000),
        capture_output=True,
        text=True,
    )
    last = run.stderr.strip().splitlines()[-1]
    assert "FoleyError" in last and "make room" in last and not list(tmp_path.glob("*.mp4"))
    assert download(want("-------here"), tmp_path, how(tube)).downloaded == 1


@pytest.mark.parametrize(
    "id_", ["$(touch pwn)", ";touch pwned", "../../../abc", "--exec=touc", "a b c d e f", "-" * 12]
)
def test_ids_that_bite(tube, tmp_path, id_):
    if id_ == "--exec=touc":
        assert "=" in id_  # eleven characters, one of them wrong
    with pytest.raises(FoleyError, match="not 11 characters"):
        download_clip(Item(id_, 0.0, "x", "train"), tmp_path, how(tube))
    assert not tube.seen and not list(tmp_path.iterdir())


def test_too_short(tube, tmp_path):
    late = Item("-------here", 300.0, "dog barking", "train")
    assert download([late], tmp_path, how(tube)).failed["short"] == 1


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg")
def test_sections(tube, tmp_path):
    path = download_clip(want("-------here")[0], tmp_path, how(tube, sections=True))
    assert not find_faults(inspect_clip(path), 2.0)
    assert np.corrcoef(read_audio(path)[: 2 * SR], scene(5, frames=False).audio[4 * SR : 6 * SR])[0, 1] > 0.9


def test_reasons_cover_what_yt_dlp_says():
    "Phrases that stand in the extractor's own source"
    video = pytest.importorskip("yt_dlp.extractor.youtube._video")
    source = Path(video.__file__).read_text(encoding="utf-8")
    for phrase, reason in (
        ("Private video", "private"),
        ("confirm your age", "age"),
        ("has not made this video available in your country", "region"),
        ("has been rate-limited by YouTube", "rate_limited"),
    ):
        assert phrase in source and why_failed(phrase) == reason
