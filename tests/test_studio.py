"The Studio: every action of a session, wrong input as one line, what is exported, and the widgets around it"

import copy
import shlex
import socket
from pathlib import Path

import numpy as np
import pytest

from smooth_foley.app import studio_command, studio_rows
from smooth_foley.app.main import main
from smooth_foley.app.studio import Studio
from smooth_foley.app.studio_rows import Stopped, shared_model
from smooth_foley.app.studio_session import StudioSession
from smooth_foley.core import FoleyError
from smooth_foley.long_video import LongClip
from smooth_foley.media import SR, Clip, probe, read_audio, write_video
from smooth_foley.pipeline import SmoothFoleyPipeline
from smooth_foley.timeline import read_timeline


def noise_video(path, seconds, audio=False):
    frames = np.random.default_rng(0).integers(0, 255, (round(15 * seconds), 48, 64, 3), np.uint8)
    sound = np.random.default_rng(1).normal(size=round(SR * seconds)) / 10 if audio else None
    return write_video(path, frames, 15, audio=sound)


@pytest.fixture(scope="module")
def random_pipe():
    pipe = SmoothFoleyPipeline.from_random()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def mini():
    return shared_model("mini", "cpu")


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    "Four seconds of an airplane on a test seed, without a sound"
    from smooth_foley.world.passby import scene

    frames = scene(2_000_001, audio=False).frames[:60]
    return write_video(tmp_path_factory.mktemp("video") / "plane.mp4", frames, fps=15)


@pytest.fixture(scope="module")
def made(random_pipe, tmp_path_factory):
    "An untrained session with one row and two takes of two steps, not to be changed"
    s = StudioSession(noise_video(tmp_path_factory.mktemp("made") / "noise.mp4", 3, audio=True), random_pipe)
    s.add("siren")
    s.edit("siren", spans=[(0.5, 1.5)])
    s.change(takes=2, num_inference_steps=2)
    s.generate()
    return s


@pytest.fixture
def s(made):
    "The same, to be changed"
    s = copy.copy(made)
    s.rows = dict(made.rows)
    return s


# ---- Rows -----------------------------------------------------------------------------------------------------------


def test_a_row_follows_its_threshold_until_its_spans_are_set(mini, plane):
    s = StudioSession(plane, mini)
    assert [label for label, _ in s.proposals][:1] and abs(sum(p for _, p in s.proposals) - 1) < 1e-3
    row = s.add("  Airplane FLYBY ")
    assert row.title == "airplane flyby" and s.add("airplane flyby").title == "airplane flyby 2"
    assert s.edit(row.title, threshold=-1).spans == [(0.0, 4.0)]
    high = s.edit(row.title, threshold=1)
    assert high.spans == [] and high.curve.threshold == 1
    middle = float(np.median(high.curve.similarity))
    assert s.edit(row.title, threshold=middle).spans == s.edit(row.title, spans="auto").spans != []
    assert s.edit(row.title, spans="0.5-1.25, 2-3").spans == [(0.5, 1.25), (2.0, 3.0)]
    assert s.edit(row.title, prompt="A jet").prompt == "A jet" and s.edit(row.title, prompt=" ").prompt is None
    assert s.edit(row.title, spans="always").spans == [(0.0, 4.0)] and s.edit(row.title, spans=" ").spans == []
    s.remove("airplane flyby 2")
    assert list(s.rows) == ["airplane flyby"]
    with pytest.raises(FoleyError, match="mini does not know it; did you mean 'airplane flyby'"):
        s.add("airplane")


@pytest.mark.parametrize(
    "action, why",
    [
        (lambda s: s.add(" "), "the label is empty"),
        (lambda s: s.row("dog"), "the rows are siren"),
        (lambda s: s.edit("siren", spans=[(1, 2), (1.5, 2.5)]), "before the one before it ends"),
        (lambda s: s.edit("siren", spans=[(1, 9)]), "after the clip's end at 3.00 s"),
        (lambda s: s.edit("siren", spans=[(2, 1)]), "0 <= start < end"),
        (lambda s: s.edit("siren", spans="soon"), "siren: when it sounds must be auto, always, or spans"),
        (lambda s: s.edit("siren", spans=[3]), "give (start, end) pairs"),
        (lambda s: s.edit("siren", threshold=2), "give a cosine in [-1, 1]"),
        (lambda s: s.edit("siren", gain_db=99), "60 at most"),
        (lambda s: s.change(takes=0), "`takes` is 0"),
        (lambda s: s.change(takes=17), "give 16 at most"),
        (lambda s: s.change(num_inference_steps=2.5), "`num_inference_steps` is 2.5"),
        (lambda s: s.change(speed=2), "the settings are negative_prompt"),
        (lambda s: s.choose(2), "take 2: is not there; give 0 to 1"),
        (lambda s: s.redo("siren", 1.0, 1.01), "shorter than a column of the latent"),
        (lambda s: s.redo("siren", 2.0, 4.0), "inside the clip"),
        (lambda s: s.redo("dog", 1.0, 2.0), "row 'dog': is not there"),
        (lambda s: s.export(s.path), "is the input itself"),
        (lambda s: s.export(s.path.with_suffix(".txt")), "cannot write .txt"),
        (lambda s: s.export(s.path.parent / "none" / "a.mp4"), "no such folder"),
    ],
)
def test_what_is_wrong_is_one_line_and_changes_nothing(made, action, why):
    s = made
    rows, takes, settings, files = dict(s.rows), s.takes, s.settings, sorted(s.path.parent.rglob("*"))
    with pytest.raises(FoleyError) as e:
        action(s)
    assert why in str(e.value) and "\n" not in str(e.value)
    assert (s.rows, s.takes, s.settings) == (rows, takes, settings) and sorted(s.path.parent.rglob("*")) == files


def test_nothing_to_generate_or_to_hear(random_pipe, tmp_path):
    s = StudioSession(noise_video(tmp_path / "a.mp4", 1), random_pipe)
    for action, why in ((s.generate, "add a label first"), (s.export, "generate one first"), (s.finish, "generate")):
        with pytest.raises(FoleyError, match=why):
            action()
    with pytest.raises(FoleyError, match="no such file"):
        StudioSession(tmp_path / "none.mp4", random_pipe)


# ---- Takes ----------------------------------------------------------------------------------------------------------


def test_takes_that_are_kept_stay(s):
    assert [t.seed for t in s.takes] == [0, 1] and s.take().agreement == max(t.agreement for t in s.takes)
    s.keep(1)
    kept = s.takes[1]
    s.change(seed=7)
    s.generate()
    assert [t.seed for t in s.takes] == [1, 7, 8] and s.takes[0] is kept and s.chosen in (1, 2)
    s.choose(0)
    assert s.take() is kept and not s.is_stale(kept)
    s.edit("siren", spans=[(1, 2)])
    assert s.is_stale(kept)
    assert s.finish().call["num_inference_steps"] == s.pipe.config.num_inference_steps and s.take().seed == 1
    assert not s.is_stale(s.take())


def test_a_take_is_what_a_call_gives(s):
    from smooth_foley.events import Event

    call = dict(num_inference_steps=2, **{k: s.settings[k] for k in ("temporal_scale", "frame_scale")})
    alone = s.pipe(s.path, events=[Event("siren", [(0.5, 1.5)])], seed=1, **call)
    assert call["temporal_scale"] == 4 * s.pipe.config.temporal_scale
    assert np.allclose(s.heard(1).audios[0], alone.audios[0], atol=2e-3)


def test_work_that_is_stopped_changes_nothing(s):
    takes, told = s.takes, []

    def tell(done, total, what):
        told.append((done, total, what))
        if done == 1:
            s.stop()

    s.tell = tell
    for action in (s.generate, lambda: s.redo("siren", 1.0, 2.0)):
        told.clear()
        with pytest.raises(Stopped, match="nothing was changed"):
            action()
        assert s.takes is takes and [t[:2] for t in told] == [(0, 0), (1, 2)]
    s.tell = lambda *told: None
    assert len(s.generate()) == 2  # and it works again


def test_a_region_is_made_anew_and_the_rest_stays(s):
    old = s.heard().audios[0]
    s.edit("siren", spans=[(0.5, 1.5), (2.0, 2.4)])
    take = s.redo("siren", 1.8, 2.6)
    new = s.heard().audios[0]
    a, b = round(1.8 * SR), round(2.6 * SR)
    factor = take.mix.factor / s.takes[0].mix.factor
    assert len(s.takes) == 3 and s.chosen == 2 and take.redone == (("siren", 1.8, 2.6, 2),)
    assert np.allclose(new[:a], old[:a], atol=1e-4) and np.allclose(new[b:], old[b:], atol=1e-4), factor
    assert not np.allclose(new[a:b], old[a:b], atol=1e-3) and not s.is_stale(take)
    assert s.redo("siren", 0.2, 0.6).redone[1][3] == 3  # another seed every time
    s.add("dog barking")
    with pytest.raises(FoleyError, match="is not in the chosen take"):
        s.redo("dog barking", 1.0, 2.0)


def test_mute_solo_and_gain_make_nothing_anew(s, tmp_path):
    s.add("dog barking")
    s.edit("dog barking", spans="always")
    s.change(takes=1)
    s.generate()
    stems = s.take().mix.named()
    s.edit("siren", mute=True)
    assert s.audible() == ["dog barking"] and np.abs(s.heard().named()["siren"]).max() < 1e-8
    s.edit("siren", mute=False, solo=True, gain_db=-6)
    assert s.audible() == ["siren"]
    ratio = np.abs(s.heard().audios[0]).max() / np.abs(stems["siren"] / s.take().mix.factor).max()
    assert abs(20 * np.log10(ratio / s.heard().factor) + 6) < 0.01
    s.edit("siren", mute=True)
    with pytest.raises(FoleyError, match="every row is muted"):
        s.export()
    s.remove("siren")
    assert s.audible() == ["dog barking"] and s.is_stale(s.take())
    assert [e.title for e in read_timeline(s.export(tmp_path / "dog.wav")[1])] == ["dog barking"]


# ---- Files ----------------------------------------------------------------------------------------------------------


def level(audio, start, end):
    part = audio[round(start * SR) : round(end * SR)]
    return 10 * np.log10(np.mean(part.astype(float) ** 2) + 1e-12)


def test_what_is_exported_follows_the_edited_span_and_the_command_makes_it_again(mini, plane, tmp_path):
    s = StudioSession(plane, mini)
    s.add("airplane flyby")
    s.change(takes=1, num_inference_steps=4, negative_prompt="it's raining")
    spans, audios = [(0.5, 1.5), (2.5, 3.5)], []
    for k, span in enumerate(spans):
        s.edit("airplane flyby", spans=[span], prompt=" an airplane flies by, far away ")
        s.generate()
        files = s.export(tmp_path / f"my film {k}.mp4")
        audios.append(read_audio(files[0]))
    out = files[0]
    assert [f.name for f in files] == ["my film 1.mp4", "my film 1.json", "plane_airplane_flyby.wav"]
    assert probe(out)["codec"] == "h264" and abs(probe(out)["duration"] - 4) < 0.05
    for k, (start, end) in enumerate(spans):
        on, off = (level(a, start + 0.1, end - 0.1) for a in (audios[k], audios[1 - k]))
        assert on > off + 10
    (event,) = read_timeline(files[1])
    assert (event.condition, event.seed, event.prompt) == ([(2.5, 3.5)], 0, "an airplane flies by, far away")
    stem = read_audio(files[2])
    for file in (out, files[2]):
        file.unlink()
    words = shlex.split(s.command(out))
    assert main([*words[1:], "-q"]) == 0
    assert np.allclose(read_audio(files[2]), stem, atol=5e-3) and out.is_file()


def test_the_film_has_our_sound_or_the_one_that_came_with_it(s, tmp_path):
    for film, other in ((s.film(), None), (s.film(s.heard()), s.heard().audios[0])):
        path = tmp_path / "film.mp4"
        path.write_bytes(film)
        assert probe(path)["audio"] == "aac" and (probe(path)["width"], probe(path)["height"]) == (64, 48)
        want = read_audio(s.path) if other is None else other
        got = read_audio(path)
        assert abs(level(got, 0.5, 1.5) - level(want, 0.5, 1.5)) < 2
    assert s.has_original


def test_a_minute_of_irregular_frames(random_pipe, tmp_path):
    rng = np.random.default_rng(0)
    times = np.r_[0, np.cumsum(rng.uniform(0.05, 1.4, 99))]
    frames = rng.integers(0, 255, (100, 48, 64, 3), np.uint8)
    told, path = [], write_video(tmp_path / "vfr.mkv", frames, 5, times=times)
    s = StudioSession(path, random_pipe, tell=lambda *t: told.append(t[2]))
    assert s.duration > 60 and isinstance(s.clip, Clip) and "reading the video" in told
    s.add("siren")
    s.edit("siren", spans=[(30.0, 50.0)])
    s.change(takes=1, num_inference_steps=1)
    s.generate()
    s.redo("siren", 40.0, 41.0)
    files = s.export(tmp_path / "long.wav")
    assert len(read_audio(files[0])) == round(probe(path)["duration"] * SR)
    assert probe_bytes(s.film(s.heard()), tmp_path)["duration"] > 60


def probe_bytes(film, folder):
    path = Path(folder) / "probe.mp4"
    path.write_bytes(film)
    return probe(path)


def test_a_video_too_long_for_memory_is_read_again(random_pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(studio_rows, "_HELD", 1000)
    s = StudioSession(noise_video(tmp_path / "a.mp4", 11), random_pipe)
    assert isinstance(s.clip, LongClip)
    s.add("siren")
    s.change(takes=1, num_inference_steps=1)
    assert len(s.generate()[0].mix.audios[0]) == 11 * SR


def test_one_model_for_all_sessions(mini, plane):
    assert shared_model("mini", "cpu") is mini is StudioSession(plane, device="cpu").pipe


# ---- Widgets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def studio(random_pipe, tmp_path):
    return Studio(noise_video(tmp_path / "noise.mp4", 2, audio=True), random_pipe).wait()


def test_a_missing_video_is_a_line_of_the_page(random_pipe):
    studio = Studio("<b>none.mp4", random_pipe).wait()
    assert "&lt;b&gt;none.mp4: no such file" in studio.error.value and studio.generate.disabled


def test_buttons_from_label_to_file(studio, tmp_path):
    assert [b.description.split(" (")[0] for b in studio.labels.children] == [n for n, _ in studio.session.proposals]
    assert studio.generate.disabled and studio.export.disabled and studio.versions.disabled
    studio.other.value = "<i>rain</i>"
    studio.add.click()
    (panel,) = studio.wait()._panels.values()
    assert "&lt;i&gt;rain" in panel.box.children[0].children[0].value
    panel.when.value = "0.2-0.8"
    assert studio.session.rows["<i>rain</i>"].spans == [(0.2, 0.8)] and len(panel.spans.children) == 1
    panel.spans.children[0].children[0].value = (0.2, 1.0)
    assert panel.when.value == "0.2-1"
    panel.when.value = "0.2-0.8, 0.5-1"
    assert "before the one before it ends" in studio.error.value and panel.when.value == "0.2-1"
    studio.settings["takes"].value, studio.settings["num_inference_steps"].value = 2, 2
    studio.generate.click()
    assert studio.generate.disabled and panel.gain.disabled and not studio.stop.disabled
    studio.generate.click()  # does nothing while there is work
    studio.wait()
    assert (studio.error.value, len(studio.strip.children), studio.stop.disabled) == ("", 2, True)
    assert not studio.versions.disabled
    ours = bytes(studio.video.value)
    studio.versions.value = "original"
    assert bytes(studio.wait().video.value) != ours
    studio.versions.value = "ours"
    studio.wait()
    panel.gain.value = -12
    assert bytes(studio.wait().video.value) != ours
    panel.when.value = "0-1.5"
    assert "generate again" in studio.note.value
    studio.strip.children[0].children[2].children[1].value = True
    assert studio.wait().session.takes[0].kept
    studio.redo.click()
    assert (studio.wait().error.value, len(studio.strip.children)) == ("", 3)
    studio.export.click()
    assert "without what was made anew" in studio.wait().written.value and (tmp_path / "noise_foley.mp4").is_file()
    panel.remove.click()
    assert not studio.wait().rows.children and studio.generate.disabled


def test_stop_leaves_what_was_there(studio):
    studio.labels.children[0].click()
    studio.wait()
    studio.settings["num_inference_steps"].value = 100
    told = studio.session.tell

    def tell(done, total, what):
        told(done, total, what)
        if done == 1:
            studio.stop.click()

    studio.session.tell = tell
    studio.generate.click()
    assert "stopped; nothing was changed" in studio.wait().error.value and not studio.session.takes
    assert not studio.generate.disabled and studio.stop.disabled


def test_opening_can_be_stopped(random_pipe, tmp_path, monkeypatch):
    def slow(self, _open=StudioSession._open):
        holder[0].stop.click()
        _open(self)

    holder = []
    monkeypatch.setattr(StudioSession, "_open", slow)
    monkeypatch.setattr(
        Studio, "_start", lambda self, work, _start=Studio._start: holder.append(self) or _start(self, work)
    )
    studio = Studio(noise_video(tmp_path / "a.mp4", 1), random_pipe).wait()
    assert "stopped" in studio.error.value and studio.session is None and studio.generate.disabled


def test_a_port_that_is_taken_is_refused_before_its_address_is_told():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(FoleyError, match=f"--port {s.getsockname()[1]}: cannot be used"):
            studio_command._check_port(s.getsockname()[1])
    studio_command._check_port(0)
