"Media as a player shows them: what a file stores, hides, mirrors and names, before and after a sound is laid beside it"

import hashlib
import os
import shutil
import socket
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from smooth_foley.containers import picture_stream
from smooth_foley.core import FoleyError
from smooth_foley.media import SR, container_for, mux, plan_mux, probe, read_audio, read_clip, write_video, write_wav

FIXTURES = Path(__file__).parent / "fixtures" / "media"
KINDS = (".mp4", ".mkv", ".mov")
NOISE = np.random.default_rng(0).uniform(-0.3, 0.3, 3 * SR).astype(np.float32)


def picture(k, h=48, w=64):
    "Brightness tells the number of the frame, a dark corner at the upper left which side is up"
    frame = np.full((h, w, 3), 100 + 7 * k, np.uint8)
    frame[: h // 4, : w // 4] = 0
    return frame


def film(
    path, codec="libx264", n=15, first=0, times=None, options=None, streams=1, sounds=(), prepare=None, muxer=None
):
    "A film of 10 frames per second whose first frame has the number `first`: below zero, an edit list hides it"
    with av.open(str(path), "w", options=muxer or {}) as out:
        videos = [out.add_stream(codec, rate=10) for _ in range(streams)]
        for v in videos:
            v.width, v.height, v.pix_fmt, v.options = 64, 48, "yuv420p", options or {}
            v.codec_context.time_base = Fraction(1, 10)
            if prepare:
                prepare(v)
        tracks = [(sound(out, name, rate), language) for name, rate, language in sounds]
        for track, language in tracks:
            track.metadata["language"] = language
        for s, v in enumerate(videos):
            for k, t in enumerate(range(first, first + n) if times is None else times):
                frame = av.VideoFrame.from_ndarray(picture(k + 5 * s), format="rgb24")
                frame.pts, frame.time_base = t, Fraction(1, 10)
                out.mux(v.encode(frame))
            out.mux(v.encode())
        for k, (track, _) in enumerate(tracks):
            play(out, track, 200 * (k + 1))
    return path


def sound(out, codec, rate):
    track = out.add_stream(codec, rate=rate)
    track.layout = "mono"
    return track


def play(out, track, hz, seconds=1.5):
    rate, size = track.rate, track.codec_context.frame_size or 1024
    wave = 8000 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)
    to_kind = av.AudioResampler(format=track.codec_context.format, layout="mono", rate=rate, frame_size=size)
    block = av.AudioFrame.from_ndarray(wave[None].astype(np.int16), format="s16", layout="mono")
    block.sample_rate, block.pts, block.time_base = rate, 0, Fraction(1, rate)
    for part in [*to_kind.resample(block), *to_kind.resample(None)]:
        out.mux(track.encode(part))
    out.mux(track.encode())


def patched(path, box, change):
    "Change the bytes behind the last `box` of a file"
    data = bytearray(path.read_bytes())
    at = data.rindex(box) + 4
    change(data, at)
    path.write_bytes(data)
    return path


def trimmed(path, seconds):
    "An edit list that ends early"
    with av.open(str(path)) as f:
        whole = f.duration / av.time_base

    def shorter(data, at):
        (ticks,) = struct.unpack_from(">I", data, at + 8)
        struct.pack_into(">I", data, at + 8, round(ticks * seconds / whole))

    return patched(path, b"elst", shorter)


def last_is_empty(path):
    "A last packet without bytes: the picture before it again"

    def empty(data, at):
        (count,) = struct.unpack_from(">I", data, at + 8)
        struct.pack_into(">I", data, at + 12 + 4 * (count - 1), 0)

    return patched(path, b"stsz", empty)


def turned(matrix):
    return lambda v: v.set_display_matrix([*matrix[:2], 0, *matrix[2:], 0, 0, 0, 1 << 30])


def coloured(v):
    c = v.codec_context
    c.color_range, c.color_primaries, c.color_trc, c.colorspace = 1, 9, 16, 9  # BT.2020 with PQ
    wide(v)


def wide(v):
    v.codec_context.sample_aspect_ratio = Fraction(4, 3)


def tagged(v):
    v.codec_context.codec_tag = "hvc1"


def second_is_default(path):
    film(path.with_suffix(".two.mp4"), streams=2)
    with av.open(str(path.with_suffix(".two.mp4"))) as f, av.open(str(path), "w") as out:
        copies = {s.index: out.add_stream_from_template(s) for s in f.streams}
        copies[0].disposition, copies[1].disposition = Disposition(0), Disposition.default
        for p in f.demux():
            if p.size:
                p.stream = copies[p.stream_index]
                out.mux(p)
    return path


ONE = 1 << 16
SIDES = {  # display matrices: a pixel at (x, y) is shown at (ax+cy, bx+dy); where the dark corner is seen
    "upright": ((ONE, 0, 0, ONE), (0, 0)),
    "mirrored": ((-ONE, 0, 0, ONE), (0, -1)),
    "upside down": ((ONE, 0, 0, -ONE), (-1, 0)),
    "half turn": ((-ONE, 0, 0, -ONE), (-1, -1)),
    "clockwise": ((0, ONE, -ONE, 0), (0, -1)),
    "counterclockwise": ((0, -ONE, ONE, 0), (-1, 0)),
    "transposed": ((0, ONE, ONE, 0), (0, 0)),
    "transposed the other way": ((0, -ONE, -ONE, 0), (-1, -1)),
}
CASES = {  # name: (suffix, maker, frames a player shows, seconds it shows them)
    "plain": (".mp4", lambda p: film(p, options={"bf": "2"}), 15, 1.5),
    "late": (".mp4", lambda p: film(p, first=4), 15, 1.5),
    "fragments": (".mp4", lambda p: film(p, muxer={"movflags": "frag_keyframe+empty_moov"}), 15, 1.5),
    "edit list": (".mp4", lambda p: film(p, first=-6), 9, 0.9),
    "edit list, reordered": (".mp4", lambda p: film(p, n=21, first=-6, options={"bf": "2"}), 15, 1.5),
    "edit list of a .mov": (".mov", lambda p: film(p, first=-6), 9, 0.9),
    "trimmed end": (".mp4", lambda p: trimmed(film(p, options={"bf": "0"}), 1.0), 10, 1.0),
    "trimmed end, reordered": (".mp4", lambda p: trimmed(film(p, options={"bf": "3"}), 1.0), 10, 1.0),
    "empty at the end": (".mp4", lambda p: last_is_empty(film(p, options={"bf": "0"})), 14, 1.5),
    "dropped frames": (".avi", lambda p: film(p, "mpeg4", times=[0, 1, 2, 3, 7, 8, 12, 13, 14]), 9, 1.5),
    "uneven": (".mp4", lambda p: film(p, times=[0, 1, 2, 3, 7, 8, 12, 13, 14]), 9, 1.5),
    "second is default": (".mp4", second_is_default, 15, 1.5),
    "colours and shape": (".mp4", lambda p: film(p, prepare=coloured), 15, 1.5),
    "vp9": (".webm", lambda p: film(p, "libvpx-vp9", options={"deadline": "realtime"}, prepare=wide), 15, 1.5),
    "two sounds": (
        ".mp4",
        lambda p: film(p, sounds=[("aac", 48000, language) for language in ("deu", "eng", "fra", "swe")]),
        15,
        1.5,
    ),
    "other sounds": (".mkv", lambda p: film(p, sounds=[("flac", 44100, "fra"), ("libopus", 48000, "eng")]), 15, 1.5),
    "adpcm": (".avi", lambda p: film(p, "mpeg4", sounds=[("adpcm_ms", 22050, "und")]), 15, 1.5),
    "hvc1": (".mp4", lambda p: film(p, "libx265", prepare=tagged, options={"x265-params": "log-level=none"}), 15, 1.5),
    "av1": (".mp4", lambda p: shutil.copy(FIXTURES / "av1.mp4", p), 75, 3.0),
}


def facts(path):
    "What matters of a file: packets that are needed, when pictures are shown, how they look, what is known about them"
    with av.open(str(path)) as f:
        v = picture_stream(f, path)
        about = dict(
            codec=v.codec_context.codec.canonical_name, tag=v.codec_context.codec_tag, shape=v.sample_aspect_ratio or 1
        )
        c = v.codec_context
        about["colour"] = (c.color_range, c.color_primaries, c.color_trc, c.colorspace)
        about["sounds"] = [
            (s.codec_context.codec.canonical_name, s.language, bool(s.disposition & Disposition.default))
            for s in f.streams.audio
        ]
        rows = [p for p in f.demux(v) if p.size]
        shown = [i for i, p in enumerate(rows) if not p.is_discard]
        about["bytes"] = [hashlib.sha256(bytes(p)).hexdigest() for p in rows[: shown[-1] + 1]]
        times = np.array(sorted(float(rows[i].pts * rows[i].time_base) for i in shown))
    return about | dict(times=times - times[0]) | {k: probe(path)[k] for k in ("frames", "start", "duration")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Every case once"
    folder, files = tmp_path_factory.mktemp("made"), {}

    def make(name):
        suffix, maker, *_ = CASES[name]
        if name not in files:
            files[name] = Path(maker(folder / f"{name}{suffix}"))
        return files[name]

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_before_and_after(made, tmp_path, name, kind):
    source, (_, _, frames, seconds) = made(name), CASES[name][:4]
    before, notes = facts(source), []
    assert before["frames"] == frames and abs(before["duration"] - seconds) < 0.002
    if name in ("av1", "vp9") and kind == ".mov":
        with pytest.raises(FoleyError, match=r"\.mov cannot hold its picture .*; write an \.mp4"):
            plan_mux(source, kind)
        return
    out = mux(source, NOISE, SR, tmp_path / f"out{kind.upper()}", keep_original=True, tell=notes.append)
    after = facts(out)
    assert (after["frames"], after["start"]) == (frames, 0)
    assert abs(after["duration"] - seconds) < 0.002 or name in ("empty at the end", "dropped frames", "uneven")
    assert np.abs(after["times"] - before["times"]).max() < 0.002
    assert 0 <= len(read_audio(out)) - round(seconds * SR) < (1100 if kind == ".mkv" else 2)
    assert after["colour"] == before["colour"] and after["shape"] == before["shape"]
    anew = [n for n in notes if "encoded again" in n]
    left_out = [n for n in notes if "is left out" in n]
    assert len(anew) + len(left_out) == len(notes)
    if anew:  # only where the container cannot hide what has to be hidden
        assert kind == ".mkv" and name.startswith("edit") or name == "trimmed end, reordered"
        seen, truth = (read_clip(p, 10).frames.astype(int) for p in (out, source))
        assert np.abs(seen - truth).max() < 12
    else:
        assert after["bytes"] == before["bytes"]
        assert (read_clip(source, 10).frames == read_clip(out, 10).frames).all()
    if kind == ".mp4" and source.suffix == ".mp4":
        assert after["tag"] == before["tag"]
    spelt = {"deu": "ger", "swe": "sve"} if kind == ".mov" else {}
    kept = [(codec, spelt.get(language, language)) for codec, language, _ in before["sounds"]]
    kept = [s for k, s in enumerate(kept, 1) if not any(f"its sound {k} (" in n for n in left_out)]
    assert [s[:2] for s in after["sounds"][1:]] == kept
    assert [s[2] for s in after["sounds"]] == [True] + [False] * len(kept)  # the new sound is the one that plays


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", SIDES)
def test_every_display_matrix_is_seen_as_a_player_shows_it(tmp_path, side, kind):
    matrix, corner = SIDES[side]
    source = film(tmp_path / "v.mp4", n=3, prepare=turned(matrix))
    out = mux(source, NOISE, SR, tmp_path / f"out{kind}")
    for path in (source, out):
        frame = read_clip(path, 10).frames[0][..., 0]
        assert frame.shape == ((64, 48) if matrix[0] == 0 else (48, 64))
        corners = {(y, x): frame[y, x] for y in (0, -1) for x in (0, -1)}
        assert min(corners, key=corners.get) == corner, corners


def test_the_default_stream_is_seen_and_heard(made, tmp_path):
    first = read_clip(film(tmp_path / "v.mp4"), 10).frames
    assert read_clip(made("second is default"), 10).frames[0, -1, -1, 0] > first[0, -1, -1, 0] + 20
    with av.open(str(tmp_path / "two.mkv"), "w") as out:
        tracks = [sound(out, "aac", 48000) for _ in range(2)]
        tracks[0].disposition, tracks[1].disposition = Disposition(0), Disposition.default
        for k, track in enumerate(tracks):
            play(out, track, 500 * (k + 1))
    spectrum = np.abs(np.fft.rfft(read_audio(tmp_path / "two.mkv")[:SR]))
    assert abs(int(spectrum.argmax()) - 1000) < 3


def test_the_container_is_known_before_a_sound_is(tmp_path):
    webm = FIXTURES / "vp8_vorbis.webm"
    gif = film(tmp_path / "a.gif", "gif", prepare=lambda v: setattr(v, "pix_fmt", "rgb8"))
    assert (container_for(webm), container_for(gif), container_for(FIXTURES / "av1.mp4")) == (".mkv", ".mov", ".mp4")
    for source in (webm, gif):
        works = container_for(source, keep_original=True)
        for kind in KINDS:
            out = tmp_path / f"{source.stem}{kind}"
            try:
                mux(source, NOISE, SR, out, keep_original=True)
            except FoleyError as e:
                assert str(e).endswith(f"write an {works}") and not out.exists()
            else:
                assert probe(out)["frames"] == probe(source)["frames"]
        assert (tmp_path / f"{source.stem}{works}").exists()
    assert [s[0] for s in facts(tmp_path / "vp8_vorbis.mkv")["sounds"]] == ["aac", "vorbis"]


def test_a_sound_that_does_not_fit_is_named(tmp_path):
    source = film(tmp_path / "v.mkv", sounds=[("aac", 44100, "fra"), ("ac3", 48000, "eng"), ("wavpack", 44100, "deu")])
    notes = []
    out = mux(source, NOISE, SR, tmp_path / "out.mp4", keep_original=True, tell=notes.append)
    assert [s[1] for s in facts(out)["sounds"][1:]] == ["fra", "eng"]
    assert len(notes) == 1 and ".mp4 cannot hold its sound 3 (deu: " in notes[0] and notes[0].endswith("it is left out")
    assert container_for(source) == ".mp4" and container_for(source, keep_original=True) == ".mkv"  # which holds all


def test_hevc_without_a_tag_gets_the_one_that_plays(tmp_path):
    source = film(tmp_path / "v.mkv", "libx265", options={"x265-params": "log-level=none"})
    assert facts(mux(source, NOISE, SR, tmp_path / "out.mp4"))["tag"] == "hvc1"


@pytest.mark.parametrize("fps", [15, 24, 30, Fraction(30000, 1001)])
def test_an_mkv_of_whole_milliseconds_gives_every_frame_once(tmp_path, fps):
    films = [
        write_video(tmp_path / f"v{kind}", np.stack([picture(k) for k in range(20)]), fps=fps)
        for kind in (".mp4", ".mkv")
    ]
    first, second = (read_clip(f, float(fps)).frames for f in films)
    assert (first == second).all() and len(np.unique(first[:, -1, -1, 0])) == 20


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
def test_what_is_cut_short_is_still_told(tmp_path, name):
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    whole = film(tmp_path / name, codec, muxer={"movflags": "faststart"} if codec == "libx264" else None)
    whole.write_bytes(whole.read_bytes()[:-2500])
    with pytest.raises(FoleyError, match="truncated|broken"):
        read_clip(whole)


def test_codecs_that_nothing_here_decodes(tmp_path):
    def change(data, at):
        data[at - 4 : at] = b"zzzz"

    source = patched(film(tmp_path / "v.mp4"), b"avc1", change)
    for f in (probe, read_clip):
        with pytest.raises(FoleyError, match="cannot be decoded here|no picture"):
            f(source)
    source = patched(film(tmp_path / "s.mov", sounds=[("pcm_s16le", 48000, "eng")]), b"sowt", change)
    notes = []
    assert probe(source)["audio"] == "unknown"
    with pytest.raises(FoleyError, match="its sound is in a format that cannot be decoded"):
        read_audio(source)
    out = mux(source, NOISE, SR, tmp_path / "out.mp4", keep_original=True, tell=notes.append)
    assert len(facts(out)["sounds"]) == 1 and len(notes) == 1 and "cannot hold its sound" in notes[0]


@pytest.mark.parametrize("fps,n", [(Fraction(30000, 1001), 307), (24, 246), (25, 256), (Fraction(60000, 1001), 614)])
def test_a_cut_at_the_limit_is_not_too_long(tmp_path, fps, n):
    clip = read_clip(write_video(tmp_path / "v.mp4", np.zeros((n, 32, 32, 3), np.uint8), fps=fps), max_duration=10.24)
    assert clip.duration <= 10.24 and len(clip.frames) == 154
    write_video(tmp_path / "w.mp4", np.zeros((n + 3, 32, 32, 3), np.uint8), fps=fps)
    with pytest.raises(FoleyError, match="at most 10.24"):
        read_clip(tmp_path / "w.mp4", max_duration=10.24)


# Paths are paths

NAMES = [
    "12:30 take.mp4",
    "http:/127.0.0.1/x.mp4",
    "concat:a|b.mp4",
    "file:x.mp4",
    "a%03d.mp4",
    "-i.mp4",
    "a?b#c.mp4",
    b"caf\xe9.mp4",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    name, plain = Path(os.fsdecode(name)), write_video(tmp_path / "plain.mp4", np.stack([picture(k) for k in range(5)]))
    name.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(plain, name)
    out = mux(name, NOISE, SR, name.with_name("foley_" + name.name))
    assert probe(out)["frames"] == probe(name)["frames"] == 5
    assert len(read_audio(out)) == round(5 / 15 * SR)
    assert write_video(name, np.stack([picture(k) for k in range(7)])) and len(read_clip(name).frames) == 7
    assert len(read_audio(write_wav(name.with_suffix(".wav"), NOISE))) == len(NOISE)


def test_nothing_that_is_read_opens_a_connection(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.mp4"
        video = write_video(tmp_path / "v.mp4", np.stack([picture(k) for k in range(5)]))
        texts = {
            "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
            "hls.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{video}\n#EXT-X-ENDLIST\n",
            "concat.mp4": f"ffconcat version 1.0\nfile '{url}'\n",
            "own.mp4": "ffconcat version 1.0\nfile v.mp4\n",
            "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        }
        for name, text in texts.items():
            Path(name).write_text(text)
        for name in [url, Path(url), *texts]:
            for f in (probe, read_clip, read_audio):
                with pytest.raises(FoleyError) as e:
                    f(name)
                assert "\n" not in str(e.value)
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_tags_that_are_no_text_stay(tmp_path):
    title = "caf\udce9"
    video = write_video(tmp_path / "v.mp4", np.stack([picture(k) for k in range(5)]))
    with av.open(str(video)) as f, av.open(str(tmp_path / "t.mp4"), "w", metadata_errors="surrogateescape") as out:
        out.metadata["title"] = title
        copy = out.add_stream_from_template(f.streams.video[0])
        for p in f.demux(f.streams.video[0]):
            if p.size:
                p.stream = copy
                out.mux(p)
    result = mux(tmp_path / "t.mp4", NOISE, SR, tmp_path / "out.mp4")
    with av.open(str(result), metadata_errors="surrogateescape") as f:
        assert f.metadata["title"] == title


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    pipe, video = tmp_path / "pipe.mp4", write_video(tmp_path / "v.mp4", np.stack([picture(k) for k in range(5)]))
    os.mkfifo(pipe)
    for f in (probe, read_clip, read_audio, lambda p: mux(p, NOISE, SR, tmp_path / "out.mp4")):
        with pytest.raises(FoleyError, match="is a pipe; save it to a file first"):
            f(pipe)
    with pytest.raises(FoleyError, match="is a device; save it"):
        probe("/dev/null")
    with pytest.raises(FoleyError, match="no ordinary file"):
        mux(video, NOISE, SR, pipe, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe.mp4", "v.mp4"]


@pytest.mark.parametrize("letter", ["x", "é", "語"])
def test_names_as_long_as_the_system_allows(tmp_path, letter):
    video, longest = (
        write_video(tmp_path / "v.mp4", np.stack([picture(k) for k in range(5)])),
        os.pathconf(tmp_path, "PC_NAME_MAX"),
    )
    name = letter * ((longest - 4) // len(letter.encode())) + ".mp4"
    assert mux(video, NOISE, SR, tmp_path / name).exists()
    with pytest.raises(FoleyError, match="cannot be written .file name too long") as e:
        mux(video, NOISE, SR, tmp_path / (letter * longest + ".mp4"))
    assert "\n" not in str(e.value) and len(list(tmp_path.iterdir())) == 2
