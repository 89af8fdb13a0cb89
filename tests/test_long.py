"Clips of any length, several sounds, takes, a region made anew: what is wrong is one line, and what stays stays"

from pathlib import Path

import numpy as np
import pytest
import torch

from smooth_foley.compare.measure import hear
from smooth_foley.compare.takes import _hear_all
from smooth_foley.core import FoleyError
from smooth_foley.events import Event, remix
from smooth_foley.listen.judges import load_judges
from smooth_foley.media import SR, Clip, probe, read_audio, write_video
from smooth_foley.pipeline import SmoothFoleyPipeline


def noise_clip(seconds, seed=0):
    n = max(2, round(15 * seconds))
    frames = np.random.default_rng(seed).integers(0, 255, (n, 64, 64, 3), np.uint8)
    return Clip(frames, np.arange(n) / 15, seconds, Path("noise.mp4"))


@pytest.fixture(scope="module")
def pipe():
    p = SmoothFoleyPipeline.from_random(frame_position="residual")
    p.set_progress_bar_config(disable=True)
    return p


@pytest.fixture(scope="module")
def out(pipe):
    return pipe(noise_clip(14.0), label="siren", condition=[(1, 3), (12, 13)], seed=3)


def test_a_long_clip_is_as_long_as_it_is(pipe, out):
    assert out.audios[0].shape == (14 * 16000,) and np.isfinite(out.audios[0]).all()
    assert out.latents.shape == (1, 8, 8, 88) and out.mels.shape == (1, 128, 88 * 16)
    assert out.conditions[0].intervals() == [(1, 3), (12, 13)]


def test_windows_together_or_one_by_one(pipe, out):
    one = pipe(noise_clip(14.0), label="siren", condition=[(1, 3), (12, 13)], seed=3, window_batch_size=1)
    assert torch.allclose(one.latents, out.latents, atol=1e-3)


def test_a_short_clip_beside_a_long_one_stays_the_same(pipe, out):
    short = noise_clip(4.0)
    both = pipe([short, noise_clip(14.0)], label="siren", condition=[[(1, 3)], [(1, 3), (12, 13)]], seed=3)
    alone = pipe(short, label="siren", condition=[(1, 3)], seed=3)
    assert torch.equal(both.latents[0], alone.latents[0]) and torch.equal(both.latents[1], out.latents[0])


def test_the_first_columns_have_the_noise_of_a_short_clip(pipe):
    "Without steps to speak of, noise is what one sees"
    how = dict(label="siren", num_inference_steps=1, output_type="latent", guidance_scale=1, frame_scale=0)
    one, two = (pipe(noise_clip(s), **how, temporal_scale=0).latents for s in (10.24, 30))
    assert torch.allclose(one[0, ..., :20], two[0, ..., :20], atol=1e-3)


def test_a_narrow_window_and_a_callback(pipe):
    seen = []

    def look(pipe, i, t, tensors):
        seen.append((i, tensors["latents"].shape[-1], len(tensors["prompt_embeds"])))

    how = dict(callback_on_step_end=look, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    pipe(noise_clip(6.0), label="siren", window=2.6, overlap=0.5, num_inference_steps=2, output_type="latent", **how)
    assert seen == [(0, 38, 2), (1, 38, 2)]


def test_a_stopped_call_makes_no_further_step(pipe):
    def stop(pipe, i, t, tensors):
        pipe._interrupt = i == 0
        seen.append(i)

    seen = []
    pipe(noise_clip(12.0), label="siren", num_inference_steps=3, callback_on_step_end=stop, output_type="latent")
    assert seen == [0]


@pytest.mark.parametrize(
    "given, why",
    [
        (dict(window=11), "`window` is 11 s, and the model looks at 10.24 s at most"),
        (dict(window=0.2), "`window` is 0.2 s; give at least 0.64 s"),
        (dict(overlap=10.24), "`overlap` is 10.24 s"),
        (dict(overlap=-1), "`overlap` is -1"),
        (dict(latents=torch.zeros(1, 8, 8, 64)), "give unit noise of shape (1, 8, 8, 75)"),
        (dict(events=[]), "at least one"),
        (dict(events=[Event("siren")], label="siren"), "`label` does not go with `events`"),
        (dict(events=[Event("siren")], condition="always"), "`condition` does not go with `events`"),
        (dict(events=[Event("siren", [(11, 13)])]), "siren: a span ends at 13 s, after the clip's end at 12.00 s"),
        (dict(events=[Event("siren"), Event("siren")]), "two events are named 'siren'"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(pipe, given, why):
    with pytest.raises(FoleyError) as e:
        pipe(noise_clip(12.0), **{"label": None if "events" in given else "siren", **given})
    assert why in str(e.value) and "\n" not in str(e.value)


def test_a_file_of_irregular_frames_is_read_as_a_stream(pipe, tmp_path):
    rng = np.random.default_rng(0)
    times = np.r_[0, np.cumsum(rng.uniform(0.02, 0.4, 79))]
    frames = rng.integers(0, 255, (80, 48, 64, 3), np.uint8)
    path = write_video(tmp_path / "vfr.mkv", frames, 5, times=times)
    out = pipe(path, label="siren", num_inference_steps=1)
    assert len(out.audios[0]) == round(probe(path)["duration"] * 16000)
    assert len(out.clips[0].frames) < 250 and out.clips[0].times[-1] < out.durations[0]


def test_a_file_that_grows_is_refused(pipe, tmp_path):
    path = write_video(tmp_path / "a.mp4", noise_clip(12.0).frames, 15)
    (clip,) = pipe.read(path)
    with open(path, "ab") as f:
        f.write(b"more")
    with pytest.raises(FoleyError, match="changed while it was read"):
        pipe(clip, label="siren")


def test_stems_add_up_and_are_what_single_calls_give(pipe):
    clip = noise_clip(2.0)
    events = [Event("siren", [(0, 1)]), Event("dog barking", "always", gain_db=-6, seed=9)]
    mix = pipe(clip, events=events, seed=2)
    assert np.array_equal(mix.audios[0], sum(mix.stems.audios)) and np.abs(mix.audios[0]).max() <= 0.9501
    alone = pipe(clip, label="dog barking", condition="always", seed=9).audios[0]
    assert np.allclose(mix.stems.audios[1], alone * mix.factor * 10**-0.3, atol=2e-3)
    assert list(mix.named()) == ["siren", "dog barking"] and "siren" in mix._repr_html_()
    quiet = remix(mix, {"siren": float("-inf")})
    assert np.abs(quiet.stems.audios[0]).max() < 1e-8 and np.allclose(
        quiet.audios[0], alone * quiet.factor * 10**-0.3, atol=2e-3
    )
    assert np.allclose(remix(quiet, dict(siren=0.0)).stems.audios[0], mix.stems.audios[0], atol=1e-4)  # it comes back
    with pytest.raises(FoleyError, match="names horn"):
        remix(mix, dict(horn=3))


def test_takes_of_a_long_clip_are_judged_to_their_end():
    judges, quiet = load_judges(), np.zeros(12 * SR, np.float32)
    tone = (0.3 * np.sin(np.arange(12 * SR) * 0.3)).astype(np.float32)
    late = np.r_[quiet[: 10 * SR + SR // 2], tone[: SR + SR // 2]]
    heard = [_hear_all(judges, x, SR)["logits"] for x in (quiet, late, tone)]
    assert np.abs(heard[1] - heard[0]).max() > 0.1  # What comes after 10.24 s counts
    one, whole = _hear_all(judges, tone[: 10 * SR], SR), hear(judges, tone[: 10 * SR])
    assert all(np.allclose(one[k], whole[k]) for k in whole)


@pytest.mark.parametrize("start, end", [(0.0, 0.5), (2.0, 13.9)])
def test_redo_keeps_the_rest_to_the_sample(pipe, out, start, end):
    new = pipe.redo(out, start, end, seed=8)
    a, b = round(start * 16000), round(end * 16000)
    old, audio = out.audios[0], new.audios[0]
    assert np.array_equal(audio[:a], old[:a]) and np.array_equal(audio[b:], old[b:]) and len(audio) == len(old)
    assert not np.allclose(audio[a:b], old[a:b], atol=1e-3)
    columns = slice(round(start / 0.16 - 0.5), int(np.ceil(end / 0.16)))
    same = torch.ones(88, dtype=bool)
    same[max(0, columns.start) : columns.stop] = False
    assert torch.equal(new.latents[0][..., same], out.latents[0][..., same])


def test_an_interval_without_guidance_is_one_in_windows_too(pipe):
    clip = noise_clip(12.0)
    plain, never = (
        pipe(clip, label="siren", guidance_scale=1, num_inference_steps=2, output_type="latent", **how).latents
        for how in ({}, dict(frame_guidance_scale=4.0, guidance_interval=(0, 0)))
    )
    assert torch.allclose(plain, never, atol=1e-5)


@pytest.mark.parametrize("how", [dict(frame_wise=False), dict(guidance_rescale=0.9), dict(frame_guidance_scale=4.0)])
def test_redo_guides_as_a_call_does(pipe, out, how):
    plain, other = (pipe.redo(out, 2.0, 3.0, num_inference_steps=2, **kw).latents for kw in ({}, how))
    assert not torch.allclose(plain, other, atol=1e-4)


def test_redo_of_a_stem(pipe):
    mix = pipe(noise_clip(3.0), events=[Event("siren"), Event("dog barking", "always", gain_db=-3)], seed=2)
    new = pipe.redo(mix, 1.0, 2.0, event="dog barking", condition=[(1.2, 1.6)])
    assert np.array_equal(new.stems.audios[0], mix.stems.audios[0])
    for old, audio in ((mix.audios[0], new.audios[0]), (mix.stems.audios[1], new.stems.audios[1])):
        assert np.array_equal(audio[:16000], old[:16000]) and np.array_equal(audio[32000:], old[32000:])
        assert not np.array_equal(audio, old)
    with pytest.raises(FoleyError, match="say which one of siren, dog barking"):
        pipe.redo(mix, 1.0, 2.0)


@pytest.mark.parametrize(
    "region, how, why",
    [
        ((1.0, 1.1), {}, "shorter than a column of the latent; give 0.16 s"),
        ((13.0, 15.0), {}, "which lasts 14.00 s"),
        ((3.0, 2.0), {}, "inside the clip"),
        ((1.0, 2.0), dict(i=1), "`i` is 1"),
        ((1.0, 2.0), dict(condition="auto"), "use 'always', spans"),
    ],
)
def test_a_region_that_is_none(pipe, out, region, how, why):
    with pytest.raises(FoleyError) as e:
        pipe.redo(out, *region, **how)
    assert why in str(e.value)


def test_redo_needs_frames(pipe):
    with pytest.raises(FoleyError, match="has no frames"):
        pipe.redo(pipe.text_to_audio("siren", duration=1.0, num_inference_steps=1), 0.2, 0.6)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_track_for_each_stem(suffix, tmp_path):
    import av

    from smooth_foley.media import mux

    path = write_video(tmp_path / "a.mp4", noise_clip(2.0).frames, 15)
    tone = np.sin(np.arange(32000) * 0.2).astype(np.float32) * 0.5
    file = mux(path, tone, 16000, tmp_path / f"b{suffix}", stems={"train horning": 0.5 * tone, "dog": 0 * tone})
    with av.open(str(file)) as f:
        titles = [s.metadata.get("title" if suffix == ".mkv" else "handler_name") for s in f.streams.audio]
        assert [bool(s.disposition & s.disposition.__class__.default) for s in f.streams.audio] == [True, False, False]
    assert titles[1:] == ["train horning", "dog"]
    assert abs(np.abs(read_audio(file)).max() - 0.5) < 0.1
