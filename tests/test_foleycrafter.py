"""What is no story about the baseline: the published file, switches, wrong input, the shipped detector"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models.video import r2plus1d_18

from smooth_foley.compare.foleycrafter import MINI_DETECTOR, PUBLISHED, FoleyCrafter, TimeDetector, baseline_path
from smooth_foley.compare.time_detector import (
    IMPACTS,
    detector_scores,
    frame_truth,
    impact_cache,
    impact_scene,
    train_detector,
)
from smooth_foley.core import FoleyError, mini_path
from smooth_foley.frame_adapter import FrameAdapter
from smooth_foley.media import Clip, write_video
from smooth_foley.pipeline import SmoothFoleyPipeline
from smooth_foley.temporal_condition import TemporalCondition
from smooth_foley.train.loop import TrainConfig

TINY = dict(widths=[8, 12], blocks=[1, 2], stem_width=8, head_width=8, resize=32, image_size=28)


def noise_frames(n=9, h=36, w=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def noise_clip(n=24, seed=0):
    return Clip(noise_frames(n, 32, 32, seed), np.arange(n) / 15, n / 15, Path(f"clip{seed}.mp4"))


def make(seed=0, **config):
    torch.manual_seed(seed)
    return TimeDetector(**TINY | config).eval()


def quiet(baseline):
    baseline.set_progress_bar_config(disable=True)
    return baseline


def plain_pipeline(baseline):
    "Our pipeline with the components of the baseline"
    parts, settings = SmoothFoleyPipeline._get_signature_keys(SmoothFoleyPipeline)
    return quiet(
        SmoothFoleyPipeline(
            **{k: getattr(baseline, k) for k in parts if k != "self"}, **{k: baseline.config[k] for k in settings}
        )
    )


@pytest.fixture(scope="module")
def baseline():
    return quiet(FoleyCrafter.from_random())


@pytest.fixture(scope="module")
def mini():
    return quiet(FoleyCrafter.from_pretrained())


def edited_torchvision():
    "torchvision's own network with strides over time undone, and the head"
    net = r2plus1d_18()
    for layer in (net.layer2, net.layer3, net.layer4):
        layer[0].conv1[0][3].stride, layer[0].downsample[0].stride = (1, 1, 1), (1, 2, 2)
    net.avgpool, net.fc = nn.AdaptiveAvgPool3d((None, 1, 1)), nn.Identity()
    return net, nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 1))


def test_full_size_has_the_published_names_and_shapes():
    with torch.device("meta"):
        ours, (net, head) = TimeDetector(), edited_torchvision()
    want = {f"net.model.{k}": v.shape for k, v in net.state_dict().items()} | {
        f"fc.{k}": v.shape for k, v in head.state_dict().items()
    }
    assert {k: v.shape for k, v in ours.state_dict().items()} == want and len(want) == 226
    assert set(ours.to_published_state_dict()["state_dict"]) == {f"module.{k}" for k in want}
    convs = [m for m in ours.modules() if isinstance(m, nn.Conv3d)]
    assert len(convs) == 2 + 2 * 16 + 3 and all(m.stride[0] == 1 for m in convs)
    assert sum(p.numel() for p in ours.parameters()) == 31_505_325 - (512 * 400 + 400) + (
        512 * 128 + 128 + 128 + 1
    )  # torchvision states the first


@pytest.mark.parametrize("train", [False, True])
def test_full_size_computes_what_torchvision_computes(train):
    torch.manual_seed(0)
    net, head = edited_torchvision()
    sd = {f"module.net.model.{k}": v for k, v in net.state_dict().items()} | {
        f"module.fc.{k}": v for k, v in head.state_dict().items()
    }
    ours = TimeDetector.from_published_state_dict({"state_dict": sd, "epoch": 3}, resize=32, image_size=32)
    x = ours.preprocess(noise_frames(5))
    net.train(train)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with torch.no_grad():
        y = x
        for part in (net.stem, net.layer1, net.layer2, net.layer3, net.layer4, net.avgpool):
            y = part(y)
        want = head(y.flatten(2).transpose(1, 2))[0, :, 0]
    torch.testing.assert_close(
        ours.logits(noise_frames(5), batch_statistics=train), want, rtol=1e-5, atol=1e-5 * float(want.abs().max())
    )
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())  # batch statistics leave nothing behind


def test_saved_and_loaded_answers_the_same(tmp_path):
    detector = make()
    detector.save_pretrained(tmp_path)
    back = TimeDetector.from_pretrained(tmp_path)
    assert (
        torch.equal(back.logits(noise_frames()), detector.logits(noise_frames()))
        and back.config.widths == [8, 12]
        and not back.training
    )


def test_a_clip_does_not_depend_on_the_clips_before_it():
    detector = make()
    first = detector.logits(noise_frames(seed=1))
    detector.logits(noise_frames(seed=2))
    assert torch.equal(detector.logits(noise_frames(seed=1)), first)
    detector.train()
    assert torch.equal(detector.logits(noise_frames(seed=1)), first) and detector.training  # nor on the mode it is in


def test_every_switch_changes_the_answer():
    frames, want = noise_frames(30), make().logits(noise_frames(30))
    for other in (dict(batch_statistics=False), dict(divide_by_255=True), dict(image_size=24), dict(resize=40)):
        assert not torch.allclose(make(**other).logits(frames), want, atol=1e-4), other
    clip = Clip(frames, np.arange(30) / 15, 2.0)
    assert len(make(n_frames=10).pick(clip).frames) == 10 and len(make(n_frames=None).pick(clip).frames) == 30
    picked = make(n_frames=10).pick(clip)
    np.testing.assert_array_equal(picked.frames, frames[[0, 3, 6, 9, 12, 16, 19, 22, 25, 29]])
    np.testing.assert_allclose(picked.times, np.arange(10) * 0.2)


def test_learned_statistics_with_large_pixels_are_out_of_all_proportion():
    detector = make(widths=[8] * 4, blocks=[1] * 4)
    size = {
        (own, d): detector.logits(noise_frames(), own, d).abs().max().item()
        for own in (True, False)
        for d in (True, False)
    }
    assert size[False, False] > 5 * max(v for k, v in size.items() if k != (False, False))


def test_pictures_are_squeezed_not_cropped_to_a_square():
    detector, frames = make(), np.zeros((2, 20, 60, 3), np.uint8)
    frames[:, :, 8:12] = 255  # outside the middle square
    assert (detector.preprocess(frames)[0] > 0).any() and detector.preprocess(frames).shape == (1, 3, 2, 28, 28)


@pytest.mark.parametrize(
    "frames, message",
    [
        (noise_frames(0), "is empty"),
        (noise_frames() / 255.0, "uint8"),
        (noise_frames()[0], "uint8"),
        (noise_frames()[..., :1], "uint8"),
        (noise_frames().transpose(0, 3, 1, 2), "uint8"),
    ],
)
def test_frames_that_are_none(frames, message):
    with pytest.raises(FoleyError, match=message) as e:
        make().logits(frames)
    assert "\n" not in str(e.value)


def test_times_and_thresholds_that_are_wrong():
    detector, frames = make(), noise_frames()
    for times, kw, message in (
        (np.arange(8) / 15, {}, "9 frames with 8 times"),
        (np.arange(9) / 15, dict(threshold=1.5), "threshold"),
        (np.zeros(9), dict(duration=1.0), "do not rise"),
        (np.arange(9) / 15, dict(duration=-1.0), "duration"),
    ):
        with pytest.raises(FoleyError, match=message):
            detector.probabilities(frames, times, **kw)


def test_checkpoints_that_do_not_fit_are_refused_by_name():
    good = make().to_published_state_dict()

    def load(sd):
        return TimeDetector.from_published_state_dict(sd, **TINY)

    assert torch.equal(load(good["state_dict"]).fc[0].weight, load(good).fc[0].weight)  # with or without the outer name
    lacks = {k: v for k, v in good["state_dict"].items() if k != "module.net.model.stem.0.weight"}
    with pytest.raises(FoleyError, match="missing .*net.model.stem.0.weight"):
        load(lacks)
    with pytest.raises(FoleyError, match="unexpected .*optimizer"):
        load(good["state_dict"] | {"optimizer": torch.zeros(1)})
    with pytest.raises(FoleyError, match="missing"):
        load({"epoch": torch.zeros(1)})
    with pytest.raises(FoleyError, match=r"fc.0.bias \(8,\), not \(9,\)"):
        TimeDetector.from_published_state_dict(good, **TINY | dict(head_width=9))
    with pytest.raises(FoleyError, match="widths"):
        TimeDetector(widths=[8, 8], blocks=[1])


def test_prompt_and_no_prompt_differ_at_the_same_times(baseline):
    clip = noise_clip()
    named, nameless = baseline(clip, prompt="train"), baseline(clip)
    assert (named.prompts, nameless.prompts) == (["train"], [""]) and nameless.proposals == [None]
    assert np.array_equal(named.conditions[0].active, nameless.conditions[0].active)
    assert named.audios[0].shape == nameless.audios[0].shape == (round(clip.duration * 16000),)
    assert np.abs(named.audios[0] - nameless.audios[0]).max() > 1e-4


def test_it_is_our_pipeline_with_other_guidance(baseline):
    clip = noise_clip()
    (cond,) = baseline.conditions(clip)
    ours = plain_pipeline(baseline)
    clip_wise = ours(clip, label="train", condition=cond, frame_wise=False, output_type="latent")
    assert torch.equal(baseline(clip, prompt="train", output_type="latent").latents, clip_wise.latents)
    frame_wise = ours(clip, label="train", condition=cond, output_type="latent")
    assert not torch.equal(frame_wise.latents, clip_wise.latents)


def test_a_batch_is_its_clips(baseline):
    clips = [noise_clip(seed=0), noise_clip(18, seed=1), noise_clip(seed=2)]
    together = baseline(clips, prompt=["train", None, "siren"], output_type="latent")
    assert together.prompts == ["train", "", "siren"]
    for clip, prompt, z in zip(clips, together.prompts, together.latents):
        torch.testing.assert_close(
            baseline(clip, prompt=prompt, output_type="latent").latents[0], z, rtol=1e-4, atol=1e-4
        )


def test_every_control_reaches_the_sound(baseline):
    clip = noise_clip()

    def sound(**kw):
        return baseline(clip, output_type="latent", **kw).latents

    want, p = sound(), baseline.conditions(clip)[0].similarity
    for kw in (
        dict(threshold=float(np.median(p))),
        dict(frame_scale=0),
        dict(temporal_scale=0),
        dict(temporal_scale=0.2),
        dict(prompt="train"),
        dict(seed=1),
        dict(condition="always"),
        dict(negative_prompt="siren"),
        dict(guidance_scale=3),
        dict(num_inference_steps=2),
    ):
        if "condition" in kw or "threshold" in kw:
            assert not np.array_equal(
                baseline(clip, output_type="latent", **kw).conditions[0].columns(),
                baseline.conditions(clip)[0].columns(),
            )
        assert not torch.equal(sound(**kw), want), kw


def test_the_slow_clock_is_a_switch(tmp_path):
    baseline = quiet(FoleyCrafter.from_random())
    baseline.save_pretrained(tmp_path)
    clip, cond = noise_clip(120), TemporalCondition.from_intervals([(4, 5)], 8.0)
    exact, slow = (quiet(FoleyCrafter.from_pretrained(tmp_path, compat_columns=c)) for c in (False, True))
    a, b = (x(clip, condition=cond, output_type="latent").latents for x in (exact, slow))
    torch.testing.assert_close(a, baseline(clip, condition=cond, output_type="latent").latents, rtol=0, atol=0)
    assert (a - b).abs().max() > 1e-2
    assert PUBLISHED == dict(
        compat_columns=True, temporal_scale=0.2, frame_scale=1.0, guidance_scale=7.5, num_inference_steps=25
    )


def test_a_file_and_its_clip_agree(baseline, tmp_path):
    path = tmp_path / "square.mp4"
    write_video(path, noise_frames(20, 32, 32), 15)
    (clip,) = baseline.read(path)
    assert clip.frames.shape[1:3] != (32, 32)  # CLIP reads its own size, the detector squeezes the whole picture
    assert len(baseline.conditions(path)[0].active) == len(clip.frames)
    assert baseline(path).audios[0].shape == (round(clip.duration * 16000),)


def test_wrong_words_and_folders(baseline, tmp_path):
    for kw in (dict(label="train"), dict(frame_wise=True), dict(semantic_scale=1.0)):
        with pytest.raises(FoleyError, match=f"takes no {next(iter(kw))}"):
            baseline(noise_clip(), **kw)
    with pytest.raises(FoleyError, match="no time_detector"):
        FoleyCrafter.from_pretrained(mini_path())
    with pytest.raises(FoleyError, match="no such folder"):
        FoleyCrafter.from_pretrained(tmp_path / "nowhere")
    baseline.save_pretrained(tmp_path)
    config = tmp_path / "time_detector" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"head_width": 9}))
    with pytest.raises(FoleyError, match="time_detector.*fc.0.bias"):
        FoleyCrafter.from_pretrained(tmp_path)


def test_folders_saved_before_the_detector_was_a_component_load(baseline, tmp_path):
    plain_pipeline(baseline).save_pretrained(tmp_path)
    baseline.time_detector.save_pretrained(tmp_path / "time_detector")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "SmoothFoleyPipeline"] and "time_detector" not in index
    old = quiet(FoleyCrafter.from_pretrained(tmp_path))
    want = baseline(noise_clip(), output_type="latent").latents
    assert torch.equal(old(noise_clip(), output_type="latent").latents, want)
    old.save_pretrained(tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model_index.json").read_text())
    assert index["time_detector"] == ["smooth_foley.compare.time_detector", "TimeDetector"]
    assert "time_detector" in FoleyCrafter.from_pretrained(tmp_path / "new").components


def test_semantic_adapter_of_its_own_is_used(baseline, tmp_path):
    baseline.save_pretrained(tmp_path)
    want = baseline(noise_clip(), output_type="latent").latents
    torch.testing.assert_close(
        quiet(FoleyCrafter.from_pretrained(tmp_path))(noise_clip(), output_type="latent").latents, want, rtol=0, atol=0
    )
    torch.manual_seed(5)
    other = FrameAdapter(**{k: v for k, v in baseline.frame_adapter.config.items() if not k.startswith("_")})
    other.save_pretrained(tmp_path / "semantic_adapter")
    loaded = quiet(FoleyCrafter.from_pretrained(tmp_path))
    assert torch.equal(loaded.frame_adapter.to_k_ip[0].weight, other.to_k_ip[0].weight)
    assert (loaded(noise_clip(), output_type="latent").latents - want).abs().max() > 1e-2


def test_shipped_detector_is_small_and_as_its_record_says(mini):
    folder = baseline_path() / "time_detector"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 1_000_000
    assert all(
        v.dtype in (torch.float16, torch.int64)
        for v in load_file(folder / "diffusion_pytorch_model.safetensors").values()
    )
    about = json.loads((folder / "training.json").read_text())
    assert (
        about["recipe"]["labels"] == list(IMPACTS)
        and 0 <= about["recipe"]["first_seed"]
        and about["recipe"]["first_seed"] + about["recipe"]["n_scenes"] <= 1_000_000
    )
    on, true = [], []
    for i in range(12):
        s = impact_scene(i, 1_000_000)
        on.append(mini.time_detector.probabilities(s.frames, s.times, s.duration).active), true.append(frame_truth(s))
    f1 = detector_scores(np.stack(on), np.stack(true))["f1"]
    assert abs(f1 - about["validation"]["impacts"]["stored statistics"]["f1"]) < 0.12  # twelve of the recorded scenes
    assert f1 > 1.5 * detector_scores(np.ones_like(true), np.stack(true))["f1"]  # better than calling everything sound


def test_shipped_detector_hears_nothing_in_an_empty_picture(mini):
    grey = np.full((60, 64, 64, 3), 128, np.uint8)
    assert not mini.time_detector.probabilities(grey, np.arange(60) / 15).active.any()


def test_training_goes_on_where_it_stopped(tmp_path):
    cfg = TrainConfig(
        max_train_steps=4,
        train_batch_size=2,
        lr_warmup_steps=1,
        ema_decay=0.5,
        mixed_precision="no",
        checkpointing_steps=2,
    )
    config = MINI_DETECTOR | dict(TINY, resize=16, image_size=16)

    def train(out):
        folder = train_detector(tmp_path / out, n_scenes=4, n_val=2, cfg=cfg, config=config)
        return load_file(folder / "diffusion_pytorch_model.safetensors")

    whole = train("a")
    cache = impact_cache(tmp_path / "a" / "cache", 4)
    assert cache["done"].all() and np.array_equal(cache["frames"][3], impact_scene(3).frames)
    for p in sorted((tmp_path / "a" / "run").glob("checkpoint-4")):
        shutil.rmtree(p)  # as if it had been killed after step 2
    again = train("a")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
