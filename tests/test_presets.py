"Fewer operations: every switch is off by default, changes what it says, and refuses what it cannot do"

import json
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler

from smooth_foley.core import FoleyError, mini_path
from smooth_foley.effort import Effort
from smooth_foley.media import Clip
from smooth_foley.pipeline import SmoothFoleyPipeline
from smooth_foley.presets import PRESETS, read_presets
from smooth_foley.schedule import SAMPLERS

FULL = dict(num_inference_steps=4, label="siren", seed=3)
OFF = dict(
    sampler="dpm++",  # what the tiny model has stored
    guidance_interval=(0, 1),
    temporal_interval=(0, 1),
    cache_period=1,
    clip_fps=15,
    frame_threshold=0,
    preset="quality",
)
ON = dict(
    sampler="unipc",
    guidance_interval=(0.3, 0.8),
    temporal_interval=(0.6, 1),
    cache_period=2,
    clip_fps=3,
    frame_threshold=0.3,
    preset="preview",
)
LESS = dict(  # which networks compute less
    sampler=set(),
    guidance_interval={"unet", "deep", "adapter"},
    temporal_interval={"adapter"},
    cache_period={"deep", "adapter"},
    clip_fps={"clip"},
    frame_threshold={"clip"},
    preset={"unet", "deep", "adapter", "clip"},
)


def moving_clip(seconds=3.0, seed=0):
    "Frames that all differ"
    frames = np.random.default_rng(seed).integers(0, 255, (round(seconds * 15), 64, 64, 3), np.uint8)
    return Clip(frames, np.arange(len(frames)) / 15, seconds, Path(f"clip{seed}.mp4"))


@pytest.fixture(scope="module")
def pipe():
    pipe = SmoothFoleyPipeline.from_random()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(pipe):
    return latents(pipe)


def latents(pipe, clip=None, **kw):
    return pipe(moving_clip() if clip is None else clip, **{**FULL, **kw}, output_type="latent").latents


@contextmanager
def counting(pipe):
    "How many samples each network computes"
    nets = dict(
        unet=pipe.unet.conv_in,
        deep=pipe.unet.mid_block.resnets[0],
        adapter=pipe.temporal_adapter.conv_in,
        clip=pipe.frame_encoder.model.visual,
    )
    n, hooks = dict.fromkeys(nets, 0), []
    for name, net in nets.items():

        def count(module, args, name=name):
            n[name] += len(args[0])

        hooks.append(net.register_forward_pre_hook(count))
    pipe.embeddings.clear()
    yield n
    for hook in hooks:
        hook.remove()


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", OFF)
def test_off_is_equal_to_the_bit(pipe, plain, name):
    assert same(latents(pipe, **{name: OFF[name]}), plain)


LONG = dict(window=2.56, frame_guidance_scale=3.0)


def test_off_is_equal_in_windows(pipe):
    assert same(latents(pipe, **LONG, **OFF), latents(pipe, **LONG))


@pytest.mark.parametrize("name", ON)
def test_on_computes_less_and_changes_the_sound(pipe, plain, name):
    with counting(pipe) as n:
        after = latents(pipe, **{name: ON[name]})
    assert not same(after, plain) and torch.isfinite(after).all()
    everything = dict(unet=8, deep=8, adapter=8, clip=45)
    less = {k for k in n if n[k] < everything[k]}
    assert less == LESS[name] and not any(n[k] > everything[k] for k in n)


def test_all_together_in_windows(pipe, plain):
    early = dict(guidance_interval=(0.5, 1), temporal_interval=(0.5, 1))
    on = {name: value for name, value in (ON | early).items() if name != "preset"}
    before = latents(pipe, **LONG)
    with counting(pipe) as n:
        assert not same(latents(pipe, **LONG, **on), before)
    assert n["deep"] < n["unet"] and n["clip"] < 45
    assert same(latents(pipe, **LONG), before) and same(latents(pipe), plain)  # nothing is left behind


def test_switches_do_not_depend_on_reuse(pipe):
    on = {name: value for name, value in ON.items() if name != "preset"}
    a, b = latents(pipe, **on, reuse=True), latents(pipe, **on, reuse=False)
    assert float((a - b).abs().max() / b.abs().max()) < 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_take_over_other_schedules(pipe, name):
    stored = pipe.scheduler
    try:
        pipe.scheduler = PNDMScheduler.from_config(stored.config, skip_prk_steps=True, steps_offset=1)
        z = latents(pipe, sampler=name)
    finally:
        pipe.scheduler = stored
    assert torch.isfinite(z).all() and float(z.std()) < 20


def test_outside_the_interval_it_is_a_call_without_guidance(pipe):
    a = latents(pipe, guidance_interval=(0.0, 0.01), guidance_scale=5.0)
    assert same(a, latents(pipe, guidance_scale=1.0))
    assert same(latents(pipe, temporal_interval=(0.0, 0.01)), latents(pipe, temporal_scale=0.0))


def test_callbacks_go_with_switches(pipe):
    seen = []

    def stop_guiding(p, i, t, tensors):
        seen.append(len(tensors["prompt_embeds"]))
        p._guidance_scale = 1.0 if i == 1 else p._guidance_scale
        return {}

    how = dict(callback_on_step_end=stop_guiding, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    z = latents(pipe, cache_period=2, guidance_interval=(0.3, 1), **how)
    assert torch.isfinite(z).all() and seen == [2, 2, 1, 1]


def test_redo_and_text_take_presets(pipe):
    made = pipe(moving_clip(), label="siren")
    a, b = (pipe.redo(made, 1, 2, preset=p).latents for p in (None, "preview"))
    assert not torch.equal(a, b)
    a, b = (pipe.text_to_audio("siren", 2.0, preset=p).latents for p in (None, "preview"))
    assert not torch.equal(a, b)


def test_equal_frames_are_seen_once(pipe):
    clip = moving_clip(1.0)
    clip.frames[10:] = clip.frames[10]
    with counting(pipe) as n:
        embs = pipe._see([clip], 32, None)
    assert n["clip"] == 11 and torch.equal(embs[0][10], embs[0][14])
    clip.frames[11:] -= np.uint8(clip.frames[11:] > 0)  # hardly
    with counting(pipe) as n:
        pipe._see([clip], 32, None, Effort(frame_threshold=0.02))
    assert n["clip"] == 11


def test_a_stream_of_frames_is_seen_as_a_clip_is(pipe, tmp_path):
    from smooth_foley.long_video import LongClip, read_video
    from smooth_foley.media import write_video

    path = write_video(tmp_path / "long.mp4", moving_clip(2.0).frames, 15)
    short, long = (read_video(path, 15, 64, longest) for longest in (10.24, 1.0))
    assert isinstance(long, LongClip)
    for effort in (Effort(), Effort(clip_fps=4), Effort(clip_fps=4, frame_threshold=1e-6)):
        a, b = (pipe._see([c], 8, None, effort)[0] for c in (short, long))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# presets


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_preset_runs_and_arguments_win(pipe):
    costs = []
    for name in PRESETS:
        with counting(pipe) as n:
            z = latents(pipe, preset=name, num_inference_steps=None)
        costs.append(n["deep"] + n["unet"] + n["adapter"])
        if name == "fast":
            given = {k: v for k, v in vars(pipe.effort("fast")).items() if v is not None}
            assert same(latents(pipe, **given), z)
    assert costs[1:] == sorted(costs[1:], reverse=True)
    everything = {**vars(Effort(num_inference_steps=4, clip_fps=15, sampler="dpm++")), "guidance_scale": None}
    assert same(latents(pipe, preset="fast", **everything), latents(pipe))


def test_presets_lie_in_the_folder_and_are_saved_again(folder, tmp_path):
    assert not (folder / "presets.json").exists()
    pipe = SmoothFoleyPipeline.from_pretrained(folder)
    assert pipe.effort("fast") == Effort(**PRESETS["fast"])
    (folder / "presets.json").write_text('{"fast": {"about": "mine", "cache_period": 5}}')
    assert pipe.effort("fast") == Effort(cache_period=5)
    pipe.save_pretrained(tmp_path / "again")
    again = SmoothFoleyPipeline.from_pretrained(tmp_path / "again")
    assert again.effort("fast") == Effort(cache_period=5)


@pytest.mark.skipif(not (mini_path() / "model_index.json").is_file(), reason="needs the small model")
def test_mini_has_the_four():
    found = json.loads((mini_path() / "presets.json").read_text())
    assert list(found) == ["quality", "balanced", "fast", "preview"] and all(p["about"] for p in found.values())
    assert read_presets(mini_path())["quality"] == Effort()


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "no JSON"),
        ("[]", "no presets by name"),
        ('{"fast": 3}', "no presets by name"),
        ('{"fast": {"cache_perod": 2}}', "cache_perod"),
        ('{"fast": {"cache_period": 0}}', "preset 'fast': `cache_period` is 0"),
        ('{"fast": {"guidance_interval": "0.5"}}', "preset 'fast': `guidance_interval`"),
        ('{"fast": {"sampler": "os.system"}}', "preset 'fast': `sampler`"),
        ('{"fast": {"guidance_scale": "many"}}', "preset 'fast': `guidance_scale`"),
    ],
)
def test_a_damaged_file_is_named(folder, text, says):
    (folder / "presets.json").write_text(text)
    with pytest.raises(FoleyError, match=f"presets.json: .*{says}") as e:
        SmoothFoleyPipeline.from_pretrained(folder).effort("fast")
    assert "\n" not in str(e.value)


# wrong input


WRONG = {
    "near preset": (dict(preset="fats"), "did you mean fast"),
    "no preset": (dict(preset="zzz"), "know quality, balanced, fast, preview"),
    "no name": (dict(preset=3), "`preset` is 3"),
    "guidance above 1": (dict(guidance_interval=(0.2, 1.5)), "`guidance_interval` is (0.2, 1.5): give two noise"),
    "guidance below 0": (dict(guidance_interval=(-0.2, 1)), "`guidance_interval`"),
    "guidance turned": (dict(guidance_interval=(0.8, 0.2)), "the lower first"),
    "guidance one": (dict(guidance_interval=0.5), "`guidance_interval` is 0.5"),
    "adapter nan": (dict(temporal_interval=(0, float("nan"))), "`temporal_interval`"),
    "period 0": (dict(cache_period=0), "`cache_period` is 0: give a whole number of 1 or more"),
    "period 1.5": (dict(cache_period=1.5), "`cache_period` is 1.5"),
    "fps of the clip": (dict(clip_fps=30), "`clip_fps` is 30: clip0.mp4 has 15 frames per second"),
    "fps 0": (dict(clip_fps=0), "`clip_fps` is 0"),
    "fps -1": (dict(clip_fps=-1), "`clip_fps` is -1"),
    "threshold": (dict(frame_threshold=2), "`frame_threshold` is 2"),
    "near sampler": (dict(sampler="DDIM2"), "did you mean ddim"),
    "no sampler": (dict(sampler="heun"), "choose from ddim, dpm++, unipc"),
}


@pytest.mark.parametrize("wrong, says", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line(pipe, wrong, says):
    with pytest.raises(FoleyError) as e:
        latents(pipe, **wrong)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_preset_of_a_slow_video_sees_all_frames(pipe):
    clip = moving_clip()
    slow = Clip(clip.frames[:6], np.arange(6) / 2, 3.0, clip.path)
    assert torch.isfinite(latents(pipe, slow, preset="balanced")).all()
    with pytest.raises(FoleyError, match="has 2 frames per second"):
        latents(pipe, slow, clip_fps=5)


def test_switches_are_arguments_of_the_call():
    import inspect

    names = set(inspect.signature(SmoothFoleyPipeline.__call__).parameters)
    assert {f.name for f in fields(Effort)} <= names


def test_compile_without_a_compiler(monkeypatch):
    from smooth_foley.app.bench import bench

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FoleyError, match="`compile`: no compiler 'no-such-compiler' on this machine") as e:
        bench(device="cpu", compile=True)
    assert "\n" not in str(e.value)


# the command line and the comparison


def test_generate_knows_presets():
    from smooth_foley.app.cli import GENERATE, _call_options, check_preset
    from smooth_foley.app.options import parse

    args = parse(GENERATE, [str(mini_path().parents[1] / "assets" / "sample.mp4"), "--preset", "fast"])
    assert _call_options(args)["preset"] == "fast"
    check_preset("fast", "mini")
    with pytest.raises(FoleyError, match="^--preset fats: did you mean fast"):
        check_preset("fats", "mini")


def test_systems_with_presets(pipe):
    from smooth_foley.compare.systems import Loaded, build, parse_system

    spec = parse_system("ours@fast")
    assert (spec.name, spec.base, spec.options) == ("ours@fast", "ours", {"preset": "fast"})
    assert parse_system("mine=always@fast:cache_period=3").options == {"preset": "fast", "cache_period": 3}
    assert build(parse_system("ours"), Loaded(pipe))[1].keys() == {*"base options weights settings seed steps".split()}
    about = build(spec, Loaded(pipe))[1]
    assert about["steps"] == 10 and about["effort"]["guidance_interval"] == [0.3, 1.0]
    assert build(spec, Loaded(pipe), steps=3)[1]["steps"] == 3
    json.dumps(about)


@pytest.mark.parametrize(
    "text, says",
    [
        ("ours@fats", "did you mean fast"),
        ("a=ours:guidance_interval=0.5", "is no interval such as 0.2-0.8"),
        ("a=ours:guidance_interval=0.5-2", "`guidance_interval` is"),
        ("a=ours:cache_period=0", "`cache_period` is 0"),
        ("a=ours:cache_period=two", "is no number"),
        ("a=ours:sampler=heun", "choose from ddim"),
    ],
)
def test_wrong_systems(pipe, text, says):
    from smooth_foley.compare.systems import Loaded, build, parse_system

    with pytest.raises(FoleyError, match=says):
        build(parse_system(text), Loaded(pipe))


def test_bench_of_points_refuses_what_it_does_not_use(tmp_path):
    from smooth_foley.app.bench_command import BENCH
    from smooth_foley.app.options import parse

    for words, says in ((["--steps", "3"], "--steps: does not go"), (["--out", str(tmp_path / "a.json")], ".csv")):
        args = parse(BENCH, ["--points", "presets", *words])
        with pytest.raises(FoleyError, match=says):
            args.run(args)
    with pytest.raises(FoleyError, match="--repeats: goes with --points"):
        BENCH.run(parse(BENCH, ["--repeats", "3"]))


def test_bench_of_points():
    from smooth_foley.app.bench import bench_points
    from smooth_foley.app.bench_command import points_table
    from smooth_foley.compare.points import Point

    which = [Point("preset", "ours"), Point("clip_fps", "fps3=ours:clip_fps=3:num_inference_steps=1")]
    rows = bench_points(random_weights=True, seconds=1.0, device="cpu", repeats=1, which=which)
    assert [r["system"] for r in rows] == ["ours", "fps3"] and rows[0]["seconds_ratio"] == 1
    assert rows[1]["gflop_frames"] < rows[0]["gflop_frames"] and rows[1]["gflop_denoise"] < rows[0]["gflop_denoise"]
    assert "fps3" in points_table(rows) and "ref." not in points_table(rows)


SLOW = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="minutes on a CPU without bfloat16")


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=SLOW)])
def test_bench_of_points_beside_the_reference(dtype):
    from smooth_foley.app.bench import bench_points
    from smooth_foley.app.bench_command import points_table
    from smooth_foley.compare.points import Point

    how = dict(random_weights=True, seconds=1.0, device="cpu", repeats=0, reference=True, dtype=dtype)
    ours, theirs = bench_points(**how, which=[Point("preset", "ours")])
    assert (theirs["system"], theirs["reference_ratio"]) == ("reference", 1)
    assert theirs["gflop_denoise"] > ours["gflop_denoise"] and theirs["gflop_ratio"] < 1
    assert ours["reference_ratio"] == pytest.approx(theirs["seconds"] / ours["seconds"], abs=1e-3)
    assert points_table([ours, theirs]).split("\n")[0].endswith("than ref.")


def test_what_was_not_measured_is_said(tmp_path):
    from smooth_foley.paper.frontier import frontier

    with pytest.raises(FoleyError, match="no summary.csv, differences.csv, cost.csv in it"):
        frontier(tmp_path)
