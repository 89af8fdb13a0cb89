"""What is no story about the pipeline: damaged weights, other samplers, other types and devices, real files"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file

from smooth_foley.autoencoder import PatchAutoencoder
from smooth_foley.backbone import load_backbone, make_unet
from smooth_foley.compare.systems import Loaded, with_parts
from smooth_foley.core import FoleyError
from smooth_foley.frame_adapter import is_installed
from smooth_foley.media import Clip, write_video
from smooth_foley.pipeline import SmoothFoleyPipeline
from smooth_foley.temporal_adapter import make_temporal_adapter
from smooth_foley.temporal_condition import TemporalCondition
from smooth_foley.vocoder import PhaseVocoder

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vocoder": "model.safetensors",
    "frame_encoder": "open_clip_model.safetensors",
    "frame_adapter": "diffusion_pytorch_model.safetensors",
    "label_projection": "diffusion_pytorch_model.safetensors",
    "temporal_adapter": "diffusion_pytorch_model.safetensors",
}


def noise_clip(seconds, seed=0):
    rng = np.random.default_rng(seed)
    n = max(1, round(seconds * 15))
    return Clip(
        rng.integers(0, 255, (4, 4, 4, 3), np.uint8).repeat(16, 1).repeat(16, 2)[np.arange(n) * 4 // n],
        np.arange(n) / 15,
        seconds,
        Path(f"clip{seed}.mp4"),
    )


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return quiet(SmoothFoleyPipeline.from_random())


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_saved_and_loaded_sounds_the_same(pipe, folder):
    back = quiet(SmoothFoleyPipeline.from_pretrained(folder))
    for kw in (dict(label="siren"), dict(), dict(label="train", condition="always", frame_wise=False)):
        assert np.array_equal(back(noise_clip(3.0), **kw).audios[0], pipe(noise_clip(3.0), **kw).audios[0])
    for k in ("labels", "fps", "threshold", "guidance_scale", "frame_scale", "temporal_scale", "num_inference_steps"):
        assert back.config[k] == pipe.config[k]


def test_an_autoencoder_of_principal_components_is_a_part_like_any_other(tmp_path):
    small = SmoothFoleyPipeline.from_random()
    torch.manual_seed(1)
    unet = make_unet(6, block_out_channels=(16, 16, 32), cross_attention_dim=24, norm_num_groups=8)
    vae = PatchAutoencoder(latent_channels=6, hidden_channels=8, num_blocks=1).fit(torch.randn(2, 16, 32, 256)).eval()
    parts = {**small.components, "unet": unet, "vae": vae}
    parts["temporal_adapter"] = make_temporal_adapter(unet, 16, (16, 16, 16))
    pipe = quiet(SmoothFoleyPipeline(**parts, labels=small.labels, threshold=-0.33, num_inference_steps=2))
    assert pipe.latent_shape == (6, 8, 64)
    pipe.save_pretrained(tmp_path)
    again = quiet(SmoothFoleyPipeline.from_pretrained(tmp_path))
    assert isinstance(again.vae, PatchAutoencoder) and isinstance(load_backbone(tmp_path).vae, PatchAutoencoder)
    first, second = (p(noise_clip(1.0), label="siren", seed=3).audios[0] for p in (pipe, again))
    assert np.array_equal(first, second) and np.abs(first).max() > 0


def test_saving_leaves_no_adapter_in_the_unet(pipe, folder):
    assert not any("_ip." in k for k in load_file(folder / "unet" / WEIGHTS["unet"]))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"] and index["temporal_adapter"] == [
        "diffusers",
        "ControlNetModel",
    ]


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_misfitting_weights_are_refused_by_name(copy, part, damage):
    file = copy / part / WEIGHTS[part]
    sd = load_file(file)
    key = sorted(sd)[0]
    if damage == "missing":
        sd.pop(key)
    if damage == "unexpected":
        sd[key := "stranger.weight"] = torch.ones(2)
    if damage == "shape":
        sd[key] = torch.ones(5, 7)
    save_file(sd, file)
    with pytest.raises(FoleyError) as e:
        SmoothFoleyPipeline.from_pretrained(copy)
    assert key in str(e.value) and part in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("damage", ["truncated", "gone", "text"])
def test_damaged_files_are_refused(copy, part, damage, capsys):
    file = copy / part / WEIGHTS[part]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    if damage == "gone":
        file.unlink()
    if damage == "text":
        file.write_text("these are no weights")
    with pytest.raises(FoleyError, match=part):
        SmoothFoleyPipeline.from_pretrained(copy)
    assert "error occurred" not in capsys.readouterr().err


def test_damaged_folders_are_refused(copy):
    shutil.rmtree(copy / "vae")
    with pytest.raises(FoleyError, match="vae"):
        SmoothFoleyPipeline.from_pretrained(copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "mel"}))
    with pytest.raises(FoleyError, match="mel"):
        SmoothFoleyPipeline.from_pretrained(copy)
    (copy / "model_index.json").write_text(json.dumps({**index, "mel": ["os", "system"]}))
    with pytest.raises(FoleyError, match="none of ours"):
        SmoothFoleyPipeline.from_pretrained(copy)
    (copy / "model_index.json").write_text("{")
    with pytest.raises(FoleyError, match="model_index"):
        SmoothFoleyPipeline.from_pretrained(copy)


def test_adapter_of_another_unet_is_refused(pipe, folder):
    other = SmoothFoleyPipeline.from_random()
    from smooth_foley.frame_adapter import FrameAdapter

    mixed = quiet(SmoothFoleyPipeline.from_pretrained(folder, frame_adapter=FrameAdapter(24, 24, [16] * 3)))
    with pytest.raises(FoleyError, match="widths"):
        mixed(noise_clip(1.0), label="siren")
    assert other is not mixed and not is_installed(mixed.unet)


def test_unknown_arguments_and_places(folder, tmp_path):
    with pytest.raises(FoleyError, match="knows no controlnet"):
        SmoothFoleyPipeline.from_pretrained(folder, controlnet=None)
    with pytest.raises(FoleyError, match="no such folder"):
        SmoothFoleyPipeline.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(FoleyError, match="no such folder"):
        SmoothFoleyPipeline.from_pretrained("nowhere")
    with pytest.raises(FoleyError, match="from the hub"):
        SmoothFoleyPipeline.from_pretrained("owner/name", local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "given, why",
    [
        (dict(frame_scale=float("nan")), "frame_scale"),
        (dict(frame_scale="1"), "frame_scale"),
        (dict(frame_scale=True), "frame_scale"),
        (dict(temporal_scale=-1), "temporal_scale"),
        (dict(guidance_scale=float("inf")), "guidance_scale"),
        (dict(frame_guidance_scale=-1), "frame_guidance_scale"),
        (dict(guidance_rescale=2), "guidance_rescale"),
        (dict(num_inference_steps=0), "num_inference_steps"),
        (dict(num_inference_steps=2.5), "whole number"),
        (dict(label=""), "label"),
        (dict(label=["a", "b"]), "2 entries for 1"),
        (dict(label=3), "label"),
        (dict(prompt=" "), "prompt"),
        (dict(condition="sometimes"), "condition"),
        (dict(condition=[(2, 1)]), "start < end"),
        (dict(condition=[(5, 6)]), "4.20 s"),
        (dict(output_type="wav"), "output_type"),
        (dict(seed=-1), "seed"),
        (dict(seed=0.5), "seed"),
        (dict(generator=3), "generator"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_one_clear_line(pipe, given, why):
    with pytest.raises(FoleyError, match=why) as e:
        pipe(noise_clip(4.2), **{"label": "siren", **given})
    assert "\n" not in str(e.value)


def test_videos_that_are_none(pipe):
    with pytest.raises(FoleyError, match="no such file"):
        pipe("nowhere.mp4", label="siren")
    clip = noise_clip(4.2)
    with pytest.raises(FoleyError, match="63 frames with 62 times"):
        pipe([clip, Clip(clip.frames, clip.times[1:], 4.2)], label="siren")


def test_numpy_numbers_are_numbers(pipe):
    want = pipe(noise_clip(1.0), label="siren", guidance_scale=3.0, frame_scale=0.5, seed=2).latents
    numbers = dict(guidance_scale=np.float32(3), frame_scale=np.float64(0.5), seed=np.int64(2))
    assert torch.equal(pipe(noise_clip(1.0), label="siren", **numbers).latents, want)


def test_a_batch_of_four_is_four_batches_of_one(pipe):
    clips = [noise_clip(s, i) for i, s in enumerate((4.2, 1.0, 4.2, 10.24))]
    for kw in (
        dict(),
        dict(label="siren", frame_wise=False),
        dict(prompt="train", frame_scale=0.0),
        dict(label="siren", guidance_scale=1.0, guidance_rescale=0.5),
    ):
        together = pipe(clips, **kw)
        for c, audio, label in zip(clips, together.audios, together.labels):
            one = pipe(c, **kw)
            assert one.labels[0] == label and len(audio) == round(c.duration * 16000)
            assert np.abs(audio - one.audios[0]).max() < 1e-5
            assert np.abs(audio).max() > 0.01


def test_the_noise_belongs_to_the_name(pipe):
    a, b = noise_clip(1.0), noise_clip(1.0)
    b.path = Path("other/folder") / a.path.name
    assert np.array_equal(pipe(a, label="siren").audios[0], pipe(b, label="siren").audios[0])
    b.path = Path("another.mp4")
    assert not np.array_equal(pipe(a, label="siren").audios[0], pipe(b, label="siren").audios[0])


def test_a_video_file(pipe, tmp_path):
    clip = noise_clip(2.0)
    write_video(tmp_path / "a.mp4", clip.frames, 15)
    out = pipe(str(tmp_path / "a.mp4"), label="siren")
    assert len(out.audios[0]) == 32000 and out.durations == [2.0]
    assert pipe([tmp_path / "a.mp4", clip], label=["siren", "train"]).labels == ["siren", "train"]
    with pytest.raises(FoleyError, match="b.mp4"):
        pipe([tmp_path / "a.mp4", tmp_path / "b.mp4"], label="siren")


def test_the_unet_is_given_back_whatever_happens(pipe):
    def stop(*a):
        raise KeyboardInterrupt

    before = list(pipe.unet.state_dict())
    with pytest.raises(KeyboardInterrupt):
        pipe(noise_clip(1.0), label="siren", callback_on_step_end=stop)
    assert not is_installed(pipe.unet) and list(pipe.unet.state_dict()) == before


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_other_samplers(pipe, folder, scheduler):
    skip = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    other = quiet(
        SmoothFoleyPipeline.from_pretrained(
            folder, scheduler=scheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", **skip)
        )
    )
    out = other([noise_clip(1.0), noise_clip(1.0, 1)], label="siren")
    assert np.isfinite(out.audios[0]).all()
    assert np.abs(other(noise_clip(1.0, 1), label="siren").audios[0] - out.audios[1]).max() < 1e-5


def test_time_code_reaches_the_unet():
    timed = quiet(SmoothFoleyPipeline.from_random(frame_position="sinusoidal"))
    clip, back = noise_clip(2.0), noise_clip(2.0)
    back.frames = back.frames[::-1].copy()
    kw = dict(label="siren", condition="always")
    assert not np.allclose(timed(clip, **kw).latents, timed(back, **kw).latents, atol=1e-4)
    plain = quiet(SmoothFoleyPipeline.from_random())
    assert np.allclose(plain(clip, **kw).latents, plain(back, **kw).latents, atol=1e-4)


def test_no_labels_to_propose(folder):
    bare = quiet(SmoothFoleyPipeline.from_pretrained(folder, labels=[]))
    with pytest.raises(FoleyError, match="give a label"):
        bare(noise_clip(1.0))


def test_skipped_adapters_are_never_run(pipe, monkeypatch):
    def boom(*a, **k):
        raise AssertionError("was run")

    monkeypatch.setattr(pipe.temporal_adapter, "forward", boom)
    monkeypatch.setattr(pipe.frame_adapter.image_proj, "forward", boom)
    pipe(noise_clip(1.0), label="siren", frame_scale=0, temporal_scale=0)


def test_bfloat16(folder, pipe):
    half = quiet(SmoothFoleyPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16))
    assert half.unet.dtype == half.frame_adapter.dtype == torch.bfloat16
    out, full = half(noise_clip(1.0), label="siren"), pipe(noise_clip(1.0), label="siren")
    assert out.audios[0].dtype == np.float32 and out.latents.dtype == torch.float32
    assert (out.latents - full.latents).abs().mean() < 0.1 * full.latents.abs().mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_cpu(folder, pipe):
    there = quiet(SmoothFoleyPipeline.from_pretrained(folder)).to("cuda")
    clips = [noise_clip(2.0), noise_clip(1.0, 1)]
    out, here = there(clips, label="siren"), pipe(clips, label="siren")
    assert out.latents.device.type == "cuda"
    assert (out.latents.cpu() - here.latents).abs().max() < 2e-2
    frozen, text = (
        there(clips[0], label="siren", frame_scale=0, temporal_scale=0),
        there.text_to_audio("siren", 2.0, name=clips[0].name),
    )
    assert torch.equal(frozen.latents, text.latents)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_generator_may_live_on_the_gpu(folder):
    there = quiet(SmoothFoleyPipeline.from_pretrained(folder)).to("cuda")
    one, two, other = (
        there(
            noise_clip(1.0), label="siren", generator=torch.Generator("cuda").manual_seed(k), output_type="latent"
        ).latents
        for k in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_the_phases_stay_where_there_is_float64():
    class OnMPS:
        device = torch.device("mps")

    vocoder = PhaseVocoder()
    vocoder._apply(lambda tensor: OnMPS())
    assert vocoder.window.device.type == "cpu"
    assert vocoder.to("meta").window.device.type == "meta"


@pytest.mark.parametrize("scale", [-1.0, float("nan")])
def test_a_scale_that_is_refused_leaves_the_unet_as_it_was(scale):
    pipe = SmoothFoleyPipeline.from_random()
    for put_on in (pipe.frame_adapter.install, pipe.frame_adapter.installed):
        with pytest.raises(FoleyError, match="`frame_scale` is"):
            with put_on(pipe.unet, scale):
                pass
        assert not is_installed(pipe.unet)


def test_windows_come_in_groups_of_one_or_more(pipe):
    with pytest.raises(FoleyError, match="window_batch_size"):
        pipe(noise_clip(1.0), label="siren", window_batch_size=0)


def test_a_condition_may_say_how_sure_it_is(tmp_path):
    pipe = quiet(SmoothFoleyPipeline.from_random())
    doubt = TemporalCondition.from_similarity([0.0, 1.0], [0.6, 0.4], 2.0)
    by_hand = TemporalCondition.from_intervals([(0, 1)], 2.0)
    sure = [pipe._condition_image([c]) for c in (doubt, by_hand)]
    assert torch.equal(*sure)
    pipe.register_to_config(soft_condition=True)
    soft = [pipe._condition_image([c]) for c in (doubt, by_hand)]
    assert torch.equal(soft[1], sure[1]) and torch.equal(soft[0] > 0, sure[0] > 0)
    assert soft[0].max() < 1


def test_another_temporal_adapter_is_told_yes_and_no_unless_one_says_otherwise(tmp_path):
    pipe = SmoothFoleyPipeline.from_random()
    pipe.register_to_config(soft_condition=True)
    pipe.save_pretrained(tmp_path)
    load = SmoothFoleyPipeline.from_pretrained
    assert load(tmp_path).config.soft_condition
    assert not load(tmp_path, temporal_adapter=pipe.temporal_adapter).config.soft_condition
    assert load(tmp_path, temporal_adapter=pipe.temporal_adapter, soft_condition=True).config.soft_condition
    other = with_parts(Loaded(load(tmp_path)), temporal_adapter=tmp_path / "temporal_adapter")
    assert not other.pipe.config.soft_condition
