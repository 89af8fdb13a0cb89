"""Reuse changes how often things are computed, and nothing else"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, UNet2DConditionModel

from smooth_foley.core import FoleyError, mini_path
from smooth_foley.frame_adapter import FrameAdapter, cross_attentions
from smooth_foley.frame_cache import EmbeddingCache
from smooth_foley.media import Clip
from smooth_foley.pipeline import SmoothFoleyPipeline
from smooth_foley.reuse import PIECES, equal_layers, reuse
from smooth_foley.running import onednn_linear
from smooth_foley.temporal_adapter import make_temporal_adapter, residuals

B, T, D, L = 2, 7, 20, 9


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    unet = (
        UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32, 32),
            cross_attention_dim=24,
            sample_size=(8, 32),
            norm_num_groups=8,
            layers_per_block=1,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        )
        .eval()
        .requires_grad_(False)
    )
    ctrl = make_temporal_adapter(unet, 1, (8, 8, 16, 16)).eval().requires_grad_(False)
    for p in ctrl.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return unet, ctrl


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(1)
    return dict(
        z=torch.randn(B, 4, 8, 32),
        t=torch.tensor(300),
        text=torch.randn(2 * B, L, 24),
        tokens=torch.randn(B, T, D),
        cond=torch.randn(B, 1, 64, 256).sign(),
    )


def adapter_for(unet, k=1, **kw):
    torch.manual_seed(2)
    adapter = FrameAdapter.from_unet(unet, D, num_tokens=k, **kw).requires_grad_(False)
    for p in adapter.parameters():
        p.add_(0.3 * torch.randn(p.shape))
    return adapter


@torch.no_grad()
def plain(nets, z, t, text, tokens=None, cond=None, cfg=True, scale=1.0):
    two = (lambda x: torch.cat([x, x])) if cfg else (lambda x: x)
    kw = {} if cond is None else residuals(nets[1], two(z), t, text, two(cond), scale)
    if tokens is not None:
        kw["added_cond_kwargs"] = {"image_embeds": [torch.cat([torch.zeros_like(tokens), tokens]) if cfg else tokens]}
    return nets[0](two(z), t, text, **kw).sample


def differ(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("frame_position", ["none", "window", "residual"])
@pytest.mark.parametrize("pieces", [(p,) for p in PIECES] + [PIECES, ()], ids="+".join)
def test_every_piece_is_equal(nets, given, k, frame_position, pieces):
    unet, ctrl = nets
    adapter = adapter_for(unet, k, frame_position=frame_position)
    with adapter.installed(unet, 0.8):
        adapter.look(unet, torch.linspace(0, 3, T).repeat(B, 1), 5.12, (8, 32))
        for tokens in (given["tokens"], given["tokens"].mean(1, keepdim=True)):
            g = {**given, "tokens": tokens}
            want = plain(nets, **g)
            with reuse(unet, ctrl, g["text"], tokens, g["cond"], pieces=pieces) as net:
                for _ in range(2):
                    assert differ(net.predict(g["z"], g["t"]), want) < 1e-5
            off = {**g, "text": g["text"][B:]}
            with reuse(unet, ctrl, off["text"], tokens, g["cond"], cfg=False, pieces=pieces) as net:
                assert differ(net.predict(g["z"], g["t"]), plain(nets, **off, cfg=False)) < 1e-5
        assert (
            differ(plain(nets, **{**given, "tokens": 0 * given["tokens"]}), plain(nets, **given)) > 1e-2
        )  # the frames do matter


@pytest.mark.parametrize("pieces", [(p,) for p in PIECES] + [PIECES, ()], ids="+".join)
def test_frames_guided_apart_are_equal(nets, given, pieces):
    unet, ctrl = nets
    adapter, (z, t, text, tokens, cond) = adapter_for(unet, 2, frame_position="residual"), given.values()
    text, three = torch.cat([text, text[B:]]), lambda x: torch.cat([x] * 3)
    with adapter.installed(unet, 0.8), torch.no_grad():
        adapter.look(unet, torch.linspace(0, 3, T).repeat(B, 1), 5.12, (8, 32))
        want = unet(
            three(z),
            t,
            text,
            **residuals(ctrl, three(z), t, text, three(cond)),
            added_cond_kwargs={"image_embeds": [torch.cat([0 * tokens, 0 * tokens, tokens])]},
        ).sample
        with reuse(unet, ctrl, text, tokens, cond, pieces=pieces) as net:
            assert differ(net.predict(z, t), want) < 1e-5
    assert differ(want[B : 2 * B], want[2 * B :]) > 1e-2


@pytest.mark.parametrize("frame_position", ["window", "residual"])
def test_the_window_is_used_and_kept(nets, given, frame_position):
    unet, ctrl = nets
    adapter, outs = adapter_for(unet, 2, frame_position=frame_position, frame_window=[0.2, 1.0]), []
    with adapter.installed(unet):
        for times in (torch.linspace(0, 5, T), torch.linspace(5, 0, T)):
            adapter.look(unet, times.repeat(B, 1), 5.12, (8, 32))
            with reuse(unet, ctrl, given["text"], given["tokens"], given["cond"]) as net:
                outs.append(net.predict(given["z"], given["t"]))
    assert differ(*outs) > 1e-3


def count(modules):
    "Counters of calls and of rows, by forward pre-hooks"
    rows, hooks = {m: [] for m in modules}, []
    for m in modules:
        hooks.append(m.register_forward_pre_hook(lambda m, x: rows[m].append(len(x[0]))))
    return rows, hooks


def test_constant_layers_run_once(nets, given):
    unet, ctrl = nets
    adapter = adapter_for(unet, 4)
    cross = cross_attentions(unet) + cross_attentions(ctrl)
    once = [m for a in cross for m in (a.to_k, a.to_v)] + [
        *adapter.to_k_ip,
        *adapter.to_v_ip,
        adapter.image_proj.image_projection_layers[0],
        ctrl.controlnet_cond_embedding.conv_in,
    ]
    rows, hooks = count([*once, *(a.to_out[0] for a in cross)])
    with adapter.installed(unet), reuse(unet, ctrl, given["text"], given["tokens"], given["cond"]) as net:
        for _ in range(5):
            net.predict(given["z"], given["t"])
    for h in hooks:
        h.remove()
    assert all(len(rows[m]) == 1 for m in once)
    assert all(len(rows[a.to_out[0]]) == 5 for a in cross)


def test_column_features_are_made_once(nets, given):
    unet, ctrl = nets
    adapter = adapter_for(unet, frame_position="residual")
    rows, hooks = count([adapter.residual.proj, *adapter.residual.convs])
    with adapter.installed(unet):
        adapter.look(unet, torch.linspace(0, 3, T).repeat(B, 1), 5.12, (8, 32))
        with reuse(unet, ctrl, given["text"], given["tokens"], given["cond"]) as net:
            for _ in range(3):
                net.predict(given["z"], given["t"])
    for h in hooks:
        h.remove()
    assert all(len(r) == 1 for r in rows.values())


def test_equal_layers_run_on_one_half(nets, given):
    unet, ctrl = nets
    inputs = []
    conv = torch.nn.functional.conv2d
    with pytest.MonkeyPatch.context() as m, reuse(unet, ctrl, given["text"], None, given["cond"]) as net:
        m.setattr(
            torch.nn.Conv2d,
            "_conv_forward",
            lambda self, x, w, bias: inputs.append((self, len(x))) or conv(x, w, bias, self.stride, self.padding),
        )
        net.predict(given["z"], given["t"])
    seen = dict(inputs)
    assert seen[unet.conv_in] == seen[ctrl.conv_in] == seen[unet.down_blocks[0].resnets[0].conv2] == B
    assert seen[unet.conv_out] == seen[unet.down_blocks[1].resnets[0].conv1] == 2 * B
    assert len(equal_layers(unet)) >= 8


def test_unconditional_half_reads_one_group(nets, given):
    unet, ctrl = nets
    adapter = adapter_for(unet, 4)
    with adapter.installed(unet), reuse(unet, ctrl, given["text"], given["tokens"], given["cond"]):
        for a in cross_attentions(unet):
            (k0, _), (k1, _) = a.processor.frames
            assert k0.shape[2] == 4 and k1.shape[2] == 4 * T


def state(net):
    return (
        {n: p.clone() for n, p in net.state_dict().items()},
        dict(net.attn_processors),
        [sorted(vars(m)) for m in net.modules()],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_given_back(nets, given, fails):
    unet, ctrl = nets
    adapter = adapter_for(unet, frame_position="residual")
    with adapter.installed(unet):
        adapter.look(unet, torch.linspace(0, 3, T).repeat(B, 1), 5.12, (8, 32))
        before = [state(n) for n in nets]
        try:
            with reuse(unet, ctrl, given["text"], given["tokens"], given["cond"]) as net:
                net.predict(given["z"], given["t"])
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        for (sd, procs, names), (sd2, procs2, names2) in zip(before, [state(n) for n in nets]):
            assert list(sd) == list(sd2) and all(torch.equal(sd[k], sd2[k]) for k in sd)
            assert procs == procs2 and names == names2
    assert torch.is_grad_enabled()


def test_setting_up_may_fail(nets, given):
    unet, ctrl = nets
    before = [sorted(vars(m)) for n in nets for m in n.modules()]
    with pytest.raises(RuntimeError):
        with reuse(unet, ctrl, given["text"], None, torch.ones(1, 3, 4, 4)):
            pass
    assert before == [sorted(vars(m)) for n in nets for m in n.modules()]
    with pytest.raises(FoleyError, match="choose from"):
        with reuse(unet, ctrl, given["text"], pieces=("everything",)):
            pass


def test_scale_zero_never_runs_the_temporal_adapter(nets, given, monkeypatch):
    def boom(*a, **k):
        raise AssertionError("was run")

    monkeypatch.setattr(nets[1], "forward", boom)
    monkeypatch.setattr(nets[1].controlnet_cond_embedding, "forward", boom)
    with reuse(*nets, given["text"], None, given["cond"], temporal_scale=0.0) as net:
        out = net.predict(given["z"], given["t"])
    assert differ(out, plain(nets, given["z"], given["t"], given["text"])) < 1e-5


def test_bfloat16(nets, given):
    import copy

    low = [copy.deepcopy(n).bfloat16() for n in nets]
    adapter = adapter_for(low[0])
    h = {k: v.bfloat16() if k != "t" else v for k, v in given.items()}
    with adapter.installed(low[0]):
        ref = plain(low, **h).float()
        with reuse(*low, h["text"], h["tokens"], h["cond"]) as net:
            got = net.predict(h["z"], h["t"])
    assert got.dtype == torch.bfloat16
    assert float((got.float() - ref).square().mean().sqrt() / ref.square().mean().sqrt()) < 2e-2


# The pipeline


def a_clip(seconds, seed=0):
    rng = np.random.default_rng(seed)
    n = round(seconds * 15)
    return Clip(
        rng.integers(0, 255, (4, 4, 4, 3), np.uint8).repeat(16, 1).repeat(16, 2)[np.arange(n) * 4 // n],
        np.arange(n) / 15,
        seconds,
        Path(f"clip{seed}.mp4"),
    )


@pytest.fixture(scope="module")
def pipe():
    pipe = SmoothFoleyPipeline.from_random()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "kw",
    [
        dict(label=["siren", "train"]),
        dict(label="siren", frame_wise=False),
        dict(label="siren", guidance_scale=1.0),
        dict(label="siren", negative_prompt=["train", ""]),
        dict(label="siren", temporal_scale=0.0),
        dict(label="siren", frame_scale=0.0),
    ],
    ids=str,
)
def test_pipeline_with_and_without(pipe, kw):
    clips = [a_clip(1.2), a_clip(2.0, 1)]
    on, off = (pipe(clips, output_type="latent", reuse=r, **kw).latents for r in (True, False))
    assert differ(on, off) < 1e-4


@pytest.mark.skipif(not (mini_path() / "model_index.json").is_file(), reason="needs the small model")
def test_mini_with_and_without():
    mini = SmoothFoleyPipeline.from_pretrained()
    mini.set_progress_bar_config(disable=True)
    on, off = (
        mini(a_clip(3.0), label="train", num_inference_steps=8, output_type="latent", reuse=r).latents
        for r in (True, False)
    )
    assert float((on - off).abs().max()) < 1e-4 and float(on.std()) > 0.1


def test_samplers_with_memory(pipe):
    before = pipe.scheduler
    pipe.scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", skip_prk_steps=True, steps_offset=1
    )
    try:
        calls = []
        hook = pipe.unet.register_forward_pre_hook(lambda m, x: calls.append(1))
        on = pipe([a_clip(1.0), a_clip(2.0, 1)], label="siren", num_inference_steps=5, output_type="latent").latents
        hook.remove()
        assert len(calls) == 2 * 6  # two groups, one call more than steps
        assert (
            differ(
                on,
                pipe(
                    [a_clip(1.0), a_clip(2.0, 1)],
                    label="siren",
                    num_inference_steps=5,
                    output_type="latent",
                    reuse=False,
                ).latents,
            )
            < 1e-4
        )
    finally:
        pipe.scheduler = before


def test_given_latents(pipe):
    noise = torch.stack(
        [torch.randn(*pipe.latent_shape, generator=g) for g in pipe._generators(None, 3, ["clip0.mp4"])]
    )
    assert torch.equal(
        pipe(a_clip(1.0), label="siren", seed=3).latents, pipe(a_clip(1.0), label="siren", latents=noise).latents
    )
    with pytest.raises(FoleyError, match="latents"):
        pipe(a_clip(1.0), label="siren", latents=noise[:, :4])


def test_no_text_at_all(pipe):
    out = pipe(a_clip(1.0), prompt="", condition="always")
    assert (out.labels, out.prompts, out.proposals) == ([None], [""], [None])
    auto = pipe(a_clip(1.0), prompt="")
    assert auto.prompts == [""] and auto.labels == [auto.proposals[0][0][0]]
    assert not torch.equal(out.latents, pipe(a_clip(1.0), prompt="siren", condition="always").latents)


def test_embeddings_are_kept_by_content(pipe):
    seen = []
    hook = pipe.frame_encoder.model.visual.register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    pipe.embeddings.clear()
    clip = a_clip(2.0, 5)
    for kw in (dict(seed=1), dict(seed=2), dict(seed=3, reuse=False, frame_batch_size=16)):
        pipe(clip, label="siren", output_type="latent", **kw)
    other = a_clip(2.0, 5)
    other.frames = 255 - other.frames
    pipe(other, label="siren", output_type="latent")
    hook.remove()
    assert seen == [4, 16, 14, 4]  # four different frames; none; all 30 in two batches; four others


def test_cache_is_bounded(pipe):
    cache = EmbeddingCache(size=2)
    for i in range(4):
        cache.encode(pipe.frame_encoder, a_clip(1.0, i).frames)
    assert len(cache.seen) == 2
    z = cache.encode(pipe.frame_encoder, a_clip(1.0, 3).frames)
    z.zero_()  # what is handed out is a copy
    assert cache.encode(pipe.frame_encoder, a_clip(1.0, 3).frames).any()


def test_stages_are_watched(pipe):
    with pipe.profile() as stages:
        pipe(a_clip(1.0), label="siren")
    assert [s.name for s in stages] == ["decode", "frames", "condition", "text", "denoise", "vae", "vocoder"]
    assert all(s.seconds >= 0 and s.peak > 1e6 for s in stages)
    pipe(a_clip(1.0), label="siren")
    assert len(stages) == 7


def test_offloading_brings_each_part_for_its_stage(pipe, monkeypatch):
    moves, names = [], {m: k for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    to = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *a, **k: (moves.append((names.get(self), str(a[0]))), to(self, *a, **k))[1]
    )
    monkeypatch.setattr(
        pipe, "_stage_device", torch.device("cpu", 0)
    )  # a second name for the CPU, to tell the directions apart
    pipe(a_clip(1.0), label="siren")
    on = [n for n, d in moves if d == "cpu:0"]
    assert [n for n in on if n != "frame_encoder"] == [
        "label_projection",
        "text_encoder",
        "unet",
        "temporal_adapter",
        "frame_adapter",
        "vae",
        "vocoder",
    ]
    last = {n: d for n, d in moves if n}
    assert set(last.values()) == {"cpu"}
    with pytest.raises(FoleyError, match="leave the call out"):
        pipe.enable_model_cpu_offload(device="cpu")


def test_offloading_takes_the_weak_model_along(pipe, monkeypatch):
    pipe.enable_autoguidance(pipe.unet)
    moves, weak, to = [], pipe.weak["weak_unet"], torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module,
        "to",
        lambda self, *a, **k: (moves.append(str(a[0])) if self is weak else 0, to(self, *a, **k))[1],
    )
    monkeypatch.setattr(pipe, "_stage_device", torch.device("cpu", 0))
    try:
        pipe(a_clip(1.0), label="siren")
    finally:
        pipe.disable_autoguidance()
    assert "cpu:0" in moves and moves[-1] == "cpu"


def test_fast_cpu_leaves_types_to_torch_that_onednn_lacks(monkeypatch):
    x, w = torch.randn(3, 8).half(), torch.randn(5, 8).half()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    assert torch.equal(onednn_linear(x, w), torch.nn.functional.linear(x, w))


def test_a_type_the_device_cannot_compute_in(pipe, monkeypatch):
    monkeypatch.setattr("smooth_foley.running._computes", lambda dtype, kind: False)
    with pytest.raises(FoleyError, match="bfloat16 or torch.float32"):
        pipe(a_clip(1.0), label="siren")
