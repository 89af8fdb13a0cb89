"Media where it is no story: damaged files, memory, full disks, foreign containers"

import hashlib
import os
import subprocess
import sys

import av
import numpy as np
import pytest

from smooth_foley.core import FoleyError
from smooth_foley.media import SR, mux, probe, read_audio, read_clip, write_video, write_wav

rng = np.random.default_rng(0)
NOISE = rng.integers(0, 255, (15, 48, 64, 3), dtype=np.uint8)


def packets(path):
    with av.open(str(path)) as f:
        return [hashlib.sha256(bytes(p)).hexdigest() for p in f.demux(f.streams.video[0]) if p.size]


def encode(path, codec, frames=NOISE, pix="yuv420p", **options):
    "A video of 1.5 s in whatever codec and container"
    with av.open(str(path), "w") as out:
        s = out.add_stream(codec, rate=10)
        s.height, s.width, s.pix_fmt, s.options = *frames.shape[1:3], pix, {k: str(v) for k, v in options.items()}
        for f in frames:
            out.mux(s.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        out.mux(s.encode())
    return path


def python(code, *args):
    r = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r.stdout.strip()


@pytest.mark.parametrize("index_in_front", [False, True])
def test_a_file_cut_anywhere_is_one_line_or_whole(tmp_path, index_in_front):
    whole = tmp_path / "whole.mp4"
    write_video(whole, NOISE, audio=np.zeros(SR, np.float32))
    if index_in_front:
        front = tmp_path / "front.mp4"
        with av.open(str(whole)) as f, av.open(str(front), "w", options={"movflags": "faststart"}) as out:
            streams = {s.index: out.add_stream_from_template(s) for s in f.streams}
            for p in f.demux():
                if p.dts is not None:
                    p.stream = streams[p.stream_index]
                    out.mux(p)
        whole = front
    data, cut, refused = whole.read_bytes(), tmp_path / "cut.mp4", 0
    for share in np.linspace(0, 0.98, 25):
        cut.write_bytes(data[: int(share * len(data))])
        try:
            clip = read_clip(cut)
        except FoleyError as e:
            refused += 1
            assert "cut.mp4" in str(e) and "\n" not in str(e)
        else:
            assert len(clip.frames) == 15
    assert refused >= 22  # near the end only the last of the sound may be missing


def test_bytes_changed_in_the_middle_never_end_in_a_foreign_error(tmp_path):
    data, bad = bytearray(write_video(tmp_path / "v.mp4", NOISE).read_bytes()), tmp_path / "bad.mp4"
    for k in range(30):
        broken = bytearray(data)
        for i in np.random.default_rng(k).integers(0, len(data), 20):
            broken[i] ^= 0x5A
        bad.write_bytes(broken)
        try:
            read_clip(bad, size=32)
        except FoleyError as e:
            assert "\n" not in str(e)


def test_4k_is_read_without_holding_all_frames(tmp_path):
    frames = np.broadcast_to(np.full((1, 2160, 3840, 3), 90, np.uint8), (24, 2160, 3840, 3))
    write_video(tmp_path / "4k.mp4", frames, fps=12)
    code = """
import resource, sys
from smooth_foley.media import read_clip
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip = read_clip(sys.argv[1], fps=60, size=64)
assert clip.frames.shape == (120, 64, 64, 3), clip
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)//1024)
"""
    grown = int(python(code, tmp_path / "4k.mp4"))
    assert grown < 500, f"{grown} MB; the 24 frames held would be 570 MB, the 120 sampled ones 2850 MB"


def test_4k_unresized_is_refused_before_memory_goes(tmp_path):
    write_video(tmp_path / "4k.mp4", np.zeros((2, 2160, 3840, 3), np.uint8), fps=1)
    with pytest.raises(FoleyError, match="pass `size`"):
        read_clip(tmp_path / "4k.mp4", fps=60)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    write_video(tmp_path / "v.mp4", NOISE)
    code = """
import os, resource, sys, numpy as np
from smooth_foley.core import FoleyError
from smooth_foley.media import mux, write_video, write_wav
os.chdir(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
noise = np.random.default_rng(0).integers(0, 255, (15, 64, 64, 3), dtype=np.uint8)
sound = np.random.default_rng(0).uniform(-.5, .5, 16000)
for write, arguments in (
    (mux, ('v.mp4', sound, 16000, 'm.mp4')),
    (write_wav, ('w.wav', np.zeros(16000))),
    (write_video, ('x.mp4', noise)),
):
    try: write(*arguments)
    except FoleyError as e: print(e)
"""
    said = python(code, tmp_path).split("\n")
    assert len(said) == 3 and all("cannot be written" in line for line in said), said
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_places_that_cannot_be_written(tmp_path):
    v = write_video(tmp_path / "v.mp4", NOISE)
    places = ["/proc/x.mp4", tmp_path / "v.mp4" / "x.mp4", tmp_path / "none" / "x.mp4", tmp_path]
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        places.append(tmp_path / "locked" / "x.mp4")
    for place in places:
        for write, arguments in (
            (mux, (v, np.zeros(SR), SR, place)),
            (write_wav, (place, np.zeros(SR))),
            (write_video, (place, NOISE)),
        ):
            with pytest.raises(FoleyError) as e:
                write(*arguments)
            assert "\n" not in str(e.value)
    assert not [p for p in tmp_path.rglob("*") if ".part" in p.name]


@pytest.mark.parametrize(
    "name,codec,options",
    [
        ("a.mp4", "libx264", dict(bf=2)),
        ("a.mov", "libx264", dict(bf=2)),
        ("a.mkv", "libx264", dict(bf=3)),
        ("a.webm", "libvpx-vp9", dict(deadline="realtime")),
        ("a.avi", "mpeg4", {}),
        ("a.mp4", "mpeg4", dict(bf=2)),
        ("a.mkv", "ffv1", {}),
    ],
)
def test_any_codec_comes_back_byte_for_byte(tmp_path, name, codec, options):
    source = encode(tmp_path / name, codec, **options)
    out = mux(source, rng.uniform(-0.3, 0.3, 3 * SR), SR, tmp_path / "out.mp4")
    assert packets(source) == packets(out)
    assert (read_clip(source, 10).frames == read_clip(out, 10).frames).all()
    assert len(read_audio(out)) == round(probe(source)["duration"] * SR) == 24000


@pytest.mark.parametrize(
    "name,codec,options",
    [("a.ts", "libx264", dict(bf=2)), ("a.flv", "libx264", dict(bf=2)), ("a.avi", "libx264", dict(bf=2))],
)
def test_a_picture_that_starts_late_stays_in_step_with_its_sound(tmp_path, name, codec, options):
    source, click = encode(tmp_path / name, codec, **options), np.zeros(24000, np.float32)
    click[8000:8050] = 0.9
    out = mux(source, click, SR, tmp_path / "out.mp4")
    assert probe(out)["start"] == 0 and len(read_audio(out)) == 24000
    assert abs(np.abs(read_audio(out)).argmax() / SR - 0.5) < 0.01
    assert (read_clip(source, 10).frames == read_clip(out, 10).frames).all()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("late", [0.0, 1.0, -0.2])
def test_a_sound_is_read_from_the_first_picture_on(tmp_path, suffix, late):
    click = np.zeros(2 * SR, np.float32)
    click[8000:8050] = 0.9
    source, out = write_video(tmp_path / f"v{suffix}", NOISE, audio=click), tmp_path / f"late{suffix}"
    with av.open(str(source)) as f, av.open(str(out), "w") as g:
        targets = {s: g.add_stream_from_template(s) for s in f.streams}
        for packet in f.demux():
            if packet.dts is None:
                continue
            shift = round((0.5 + late * (packet.stream.type == "audio")) / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, targets[packet.stream]
            g.mux(packet)
    assert abs(np.abs(read_audio(out)).argmax() / SR - (0.5 + late)) < 0.01


def test_the_original_sound_is_kept_as_it_was(tmp_path):
    tone = (0.4 * np.sin(2 * np.pi * 500 * np.arange(SR) / SR)).astype(np.float32)
    source = write_video(tmp_path / "v.mp4", NOISE, audio=tone)
    out = mux(source, np.zeros(SR), SR, tmp_path / "out.mp4", keep_original=True)
    with av.open(str(out)) as f, av.open(str(source)) as g:
        assert len(f.streams.audio) == 2
        kept, given = ([bytes(p) for p in c.demux(c.streams.audio[k]) if p.size] for c, k in ((f, 1), (g, 0)))
        assert kept == given
    assert np.abs(read_audio(out)).max() < 1e-3  # the first track is the new one


def test_files_that_are_no_clip(tmp_path):
    with av.open(str(tmp_path / "zero.mp4"), "w") as out:
        s = out.add_stream("libx264", rate=10)
        s.width, s.height, s.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    (tmp_path / "empty.mp4").touch()
    write_wav(tmp_path / "sound.wav", np.zeros(SR))
    from PIL import Image

    Image.fromarray(NOISE[0]).save(tmp_path / "still.png")
    for name, word in (
        ("zero.mp4", "no picture"),
        ("empty.mp4", "cannot be read"),
        ("sound.wav", "only sound"),
        ("still.png", "single picture"),
    ):
        with pytest.raises(FoleyError, match=word):
            read_clip(tmp_path / name)


def test_overwriting_keeps_the_mode_and_follows_links(tmp_path):
    real, link = tmp_path / "real.wav", tmp_path / "link.wav"
    write_wav(real, np.zeros(10))
    link.symlink_to(real)
    write_wav(link, np.zeros(20))
    assert link.is_symlink() and len(read_audio(real)) == 20
    os.umask(mask := os.umask(0))
    assert real.stat().st_mode & 0o777 == 0o666 & ~mask
    for mode in (0o600, 0o640, 0o444):
        real.chmod(mode)
        write_wav(real, np.zeros(30))
        assert real.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_elsewhere_is_replaced_and_what_it_names_stays(tmp_path, there):
    v, target = write_video(tmp_path / "v.mp4", NOISE), tmp_path / "else" / "precious.mp4"
    target.parent.mkdir()
    if there:
        target.write_text("precious")
    (tmp_path / "out").mkdir()
    link = tmp_path / "out" / "link.mp4"
    link.symlink_to(target)
    with pytest.raises(FoleyError, match="exists already"):
        mux(v, np.zeros(SR), SR, link)
    mux(v, np.zeros(SR), SR, link, overwrite=True)
    assert not link.is_symlink() and probe(link)["frames"] == 15
    assert (target.read_text() == "precious") if there else not target.exists()
