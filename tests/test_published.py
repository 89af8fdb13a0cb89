"Published checkpoints become a folder that loads; what is wrong with them is one line, and leaves no trace"

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from smooth_foley import clip_names, hub, layout, published_parts
from smooth_foley import published as P
from smooth_foley.compare.foleycrafter import READERS, TimeDetector, _add_detector
from smooth_foley.core import FoleyError
from smooth_foley.loading import read_weights
from smooth_foley.pipeline import SmoothFoleyPipeline

FIXTURES = Path(__file__).parent / "fixtures" / "foleycrafter_full"
DETECTOR = dict(widths=(4, 8), blocks=(1, 1), stem_width=4, head_width=4)
TINY = dict(mel=dict(n_cols=64), time_detector=DETECTOR)


def write_published(folder):
    "The fixtures in the layouts of their authors: Auffusion, FoleyCrafter, and CLIP's two towers"
    base, fc, clip = (Path(folder) / n for n in ("auffusion", "foleycrafter", "clip"))
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(FIXTURES / part, base / part)
    for d in ("semantic", "vocoder"):
        (fc / d).mkdir(parents=True)
    flat = load_file(FIXTURES / "semantic_adapter.safetensors")
    torch.save(
        {
            a: {k.removeprefix(a + "."): v for k, v in flat.items() if k.startswith(a + ".")}
            for a in ("image_proj", "ip_adapter")
        },
        fc / "semantic" / "semantic_adapter.bin",
    )
    torch.save(
        {"state_dict": load_file(FIXTURES / "temporal_adapter.safetensors"), "optimizer": {"state": {0: {"step": 7}}}},
        fc / "temporal_adapter.ckpt",
    )
    shutil.copy(FIXTURES / "vocoder" / "config.json", fc / "vocoder")
    torch.save({"generator": load_file(FIXTURES / "vocoder" / "vocoder.safetensors")}, fc / "vocoder" / "vocoder.pt")
    torch.manual_seed(0)
    torch.save(
        {**TimeDetector(**DETECTOR).to_published_state_dict(), "epoch": 9, "best": np.float64(0.5)},
        fc / "timestamp_detector.pth.tar",
    )
    shutil.copytree(FIXTURES / "image_encoder", clip / "vision")
    text = CLIPTextModelWithProjection(
        CLIPTextConfig.from_pretrained(FIXTURES / "text_encoder", projection_dim=24, hidden_act="gelu")
    )
    text.save_pretrained(clip / "text")
    for f in (FIXTURES / "tokenizer").iterdir():
        shutil.copy(f, clip / "text")
    return dict(auffusion=base, foleycrafter=fc, frame_encoder=(clip / "vision", clip / "text"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def sources(home):
    return write_published(home / "files")


@pytest.fixture(scope="module")
def full(home, sources):
    return P.convert(sources, home / "full", configs=TINY, readers=READERS)


@pytest.fixture(scope="module")
def pipe(full):
    return SmoothFoleyPipeline.from_pretrained(full)


@pytest.fixture(scope="module")
def open_clip_folder(home, pipe):
    pipe.frame_encoder.save_pretrained(home / "open_clip")
    return home / "open_clip"


def snapshot(folder):
    return {f: (f.stat().st_mtime_ns, f.stat().st_size) for f in Path(folder).rglob("*")}


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(x, y) for x, y in zip(a.values(), b.values()))


# --- what comes out


def test_every_weight_is_the_published_one(pipe):
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        want = load_file(FIXTURES / part / f"{name}.safetensors")
        got = getattr(pipe, part).state_dict()
        assert set(got) == set(want) and all(torch.equal(got[k], v.float()) for k, v in want.items())
    want = {
        k.removeprefix("text_model."): v
        for k, v in load_file(FIXTURES / "text_encoder" / "model.safetensors").items()
        if "position_ids" not in k
    }
    got = {
        k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items() if "position_ids" not in k
    }
    assert set(got) == set(want) and all(torch.equal(got[k], v.float()) for k, v in want.items())
    want = load_file(FIXTURES / "temporal_adapter.safetensors")
    assert all(torch.equal(v, want[f"module.{k}"].float()) for k, v in pipe.temporal_adapter.state_dict().items())
    want, got = load_file(FIXTURES / "semantic_adapter.safetensors"), pipe.frame_adapter.to_ip_adapter_state_dict()
    assert set(got) == set(want) and all(torch.equal(got[k], v.float()) for k, v in want.items())


def test_the_vocoder_plays_what_foleycrafters_plays(pipe):
    data = load_file(FIXTURES / "expected.safetensors")
    mel = pipe.mel.from_image(data["pipe_clip_image"] * 2 - 1)
    heard = pipe.vocoder(mel.transpose(1, 2))
    torch.testing.assert_close(
        heard[0].float(), data["pipe_clip_wav"], atol=1e-4 * data["pipe_clip_wav"].abs().max().item(), rtol=0
    )


def test_both_libraries_see_the_same(sources, pipe):
    torch.manual_seed(1)
    x, (vision, text) = torch.randn(2, 3, 224, 224), sources["frame_encoder"]
    a = CLIPVisionModelWithProjection.from_pretrained(vision, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(pipe.frame_encoder.model.encode_image(x), a(x).image_embeds, atol=1e-5, rtol=0)
    ids = load_file(FIXTURES / "inputs.safetensors")["input_ids"]
    b = CLIPTextModelWithProjection.from_pretrained(text, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(pipe.frame_encoder.model.encode_text(ids), b(ids).text_embeds, atol=1e-5, rtol=0)


def test_clip_names_there_and_back(pipe):
    ours = pipe.frame_encoder.model.state_dict()
    theirs = clip_names.clip_to_transformers(ours)
    assert {"logit_scale", "visual_projection.weight", "text_model.final_layer_norm.bias"} < set(theirs)
    back = clip_names.clip_from_transformers(theirs)
    assert set(back) == set(ours) and all(torch.equal(back[k], v) for k, v in ours.items())
    with pytest.raises(FoleyError, match="unexpected visual.extra"):
        clip_names.clip_to_transformers({**ours, "visual.extra": torch.zeros(1)})


def test_settings_are_foleycrafters(pipe, full):
    c, s = pipe.config, pipe.scheduler
    assert (
        c.num_inference_steps,
        c.guidance_scale,
        c.frame_scale,
        c.temporal_scale,
        c.compat_columns,
        c.fps,
        c.threshold,
        list(c.labels),
    ) == (25, 7.5, 1.0, 0.2, True, 15.0, 0.5, [])
    assert type(s).__name__ == "PNDMScheduler" and s.config.skip_prk_steps and s.config.beta_end == 0.012
    m = pipe.mel.config
    assert (m.n_mels, m.hop_length, m.n_fft, m.win_length, m.image_channels, m.flip) == (32, 4, 2048, 1024, 3, True)
    assert math.isclose(m.log_max, math.log(200)) and math.isclose(m.log_min, math.log(1e-5))
    told = json.loads((full / "sources.json").read_text())
    assert told["files"]["temporal_adapter"][0]["file"] == "temporal_adapter.ckpt"


def test_the_detector_lies_beside_the_pipeline(full, sources):
    got = TimeDetector.from_pretrained(full / "time_detector").state_dict()
    want = read_weights(sources["foleycrafter"] / "timestamp_detector.pth.tar")["state_dict"]
    assert all(torch.equal(v, want[f"module.{k}"]) for k, v in got.items()) and len(got) == len(want)
    assert "time_detector" not in json.loads((full / "model_index.json").read_text())


def test_without_a_trained_projection_cosines_are_calibrated_and_it_is_said_once(pipe, caplog):
    from smooth_foley.temporal_condition import _logged_calibration

    _logged_calibration.cache_clear()
    text = torch.eye(24)[0]
    frames = torch.stack([torch.tensor([c, (1 - c * c) ** 0.5, *[0.0] * 22]) for c in (0.1, 0.175, 0.25)])
    with torch.no_grad():
        got = [pipe.label_projection(frames, text) for _ in range(3)]
    torch.testing.assert_close(got[0], torch.tensor([0.0, 0.5, 1.0]), atol=1e-5, rtol=0)
    assert len([r for r in caplog.records if "no trained label projection" in r.message]) == 1


def test_converting_what_was_converted_in_half_the_bytes(sources, pipe, tmp_path):
    half = P.convert(sources, tmp_path / "half", "bfloat16", TINY)
    loaded = SmoothFoleyPipeline.from_pretrained(half, torch_dtype=torch.bfloat16)
    for part in ("unet", "temporal_adapter", "frame_adapter"):
        assert equal(
            getattr(loaded, part).state_dict(), {k: v.bfloat16() for k, v in getattr(pipe, part).state_dict().items()}
        )


# --- other spellings of the same


def test_spellings_of_the_adapters(sources, pipe, tmp_path):
    sd = load_file(FIXTURES / "temporal_adapter.safetensors")
    torch.save({k.removeprefix("module."): v for k, v in sd.items()}, tmp_path / "bare.ckpt")
    shutil.copy(FIXTURES / "semantic_adapter.safetensors", tmp_path)
    found = layout.locate({**sources, "temporal_adapter": tmp_path / "bare.ckpt", "semantic_adapter": tmp_path})
    parts = published_parts.read_parts(found, TINY)
    assert all(
        torch.equal(v.float(), pipe.temporal_adapter.state_dict()[k])
        for k, v in parts["temporal_adapter"].weights.items()
    )
    assert equal(parts["frame_adapter"].model.state_dict(), pipe.frame_adapter.state_dict())


def test_pickled_auffusion_with_the_old_names_of_attention(sources, pipe, tmp_path):
    sd = load_file(FIXTURES / "vae" / "diffusion_pytorch_model.safetensors")
    for old, new in published_parts._OLD_VAE.items():
        sd = {k.replace(new, old) if ".attentions." in k else k: v for k, v in sd.items()}
    assert any(".proj_attn." in k for k in sd) and any(".query." in k for k in sd)
    shutil.copytree(sources["auffusion"] / "vae", tmp_path / "vae", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(sd, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    parts = published_parts.read_parts(layout.locate({**sources, "vae": tmp_path / "vae"}), TINY)
    assert all(torch.equal(v.float(), pipe.vae.state_dict()[k]) for k, v in parts["vae"].weights.items())


def test_open_clips_own_layout(sources, pipe, open_clip_folder):
    found = layout.locate({k: v for k, v in sources.items() if k != "frame_encoder"} | {"clip": open_clip_folder})
    part = published_parts._encoder_part(found["frame_encoder"])
    assert all(torch.equal(part.weights[k], v) for k, v in pipe.frame_encoder.model.state_dict().items())


def test_without_the_detector_everything_else_converts(sources, tmp_path):
    fc = shutil.copytree(sources["foleycrafter"], tmp_path / "fc", ignore=shutil.ignore_patterns("*.tar"))
    said = []
    out = P.fetch(tmp_path / "out", folders={**sources, "foleycrafter": fc}, configs=TINY, say=said.append)
    assert not (out / "time_detector").exists() and any("time detector" in s for s in said)
    SmoothFoleyPipeline.from_pretrained(out)


def test_a_detector_is_added_to_a_full_made_without_it(sources, full, tmp_path):
    made = P.convert(sources, tmp_path / "full", configs=TINY)
    assert not (made / "time_detector").exists()
    into_cache(tmp_path / "cache", hub.REPOSITORIES[1], sources["foleycrafter"])
    _add_detector(made, DETECTOR, cache_dir=tmp_path / "cache", local_files_only=True)
    a, b = (TimeDetector.from_pretrained(f / "time_detector").state_dict() for f in (made, full))
    assert equal(a, b)
    _add_detector(
        made, DETECTOR, cache_dir=tmp_path / "nowhere", local_files_only=True
    )  # As the second of two processes
    assert not list(made.glob(".*"))


# --- what is refused


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f'mkdir "{self.mark}"',)


@pytest.mark.parametrize(
    "part, protocol",
    [(p, "zip") for p in ("semantic_adapter", "temporal_adapter", "time_detector", "vocoder", "unet")]
    + [("temporal_adapter", n) for n in (2, 3, 4, 5)],
)
def test_a_pickle_that_wants_to_run_something(part, protocol, sources, tmp_path):
    mark, file = tmp_path / "it-ran", tmp_path / "files" / "evil.ckpt"
    file.parent.mkdir()
    for c in (FIXTURES / part / "config.json",):
        if c.is_file():
            shutil.copy(c, file.parent)
    bad = {"state_dict": {"w": torch.zeros(2)}, "more": Evil(mark)}
    if protocol == "zip":
        torch.save(bad, file)
    else:
        file.write_bytes(pickle.dumps(bad, protocol))
    with pytest.raises(FoleyError, match="wants to run posix.system|nothing of it was run") as e:
        P.convert({**sources, part: file}, tmp_path / "out", configs=TINY, readers=READERS)
    assert "\n" not in str(e.value) and str(file) in str(e.value)
    assert not mark.exists() and not (tmp_path / "out").exists()
    if protocol != "zip":
        pickle.loads(file.read_bytes())
        assert mark.exists()  # the trap was real


@pytest.mark.parametrize(
    "name",
    [
        "auffusion/unet/diffusion_pytorch_model.safetensors",
        "auffusion/vae/diffusion_pytorch_model.safetensors",
        "auffusion/text_encoder/model.safetensors",
        "auffusion/unet/config.json",
        "auffusion/scheduler/scheduler_config.json",
        "auffusion/tokenizer/vocab.json",
        "foleycrafter/semantic/semantic_adapter.bin",
        "foleycrafter/temporal_adapter.ckpt",
        "foleycrafter/timestamp_detector.pth.tar",
        "foleycrafter/vocoder/vocoder.pt",
        "foleycrafter/vocoder/config.json",
    ],
)
@pytest.mark.parametrize("harm", ["half", "gone"])
def test_half_a_download_or_none(name, harm, home, sources, tmp_path):
    files = shutil.copytree(home / "files", tmp_path / "files")
    mine = dict(
        auffusion=files / "auffusion",
        foleycrafter=files / "foleycrafter",
        frame_encoder=(files / "clip" / "vision", files / "clip" / "text"),
    )
    data = (files / name).read_bytes()
    if harm == "half":
        (files / name).write_bytes(data[: len(data) // 2])
    else:
        (files / name).unlink()
    before = snapshot(tmp_path)
    if harm == "gone" and name.endswith(".tar"):
        assert "time_detector" not in layout.locate(mine)
        return  # the only one that may be missing
    with pytest.raises(FoleyError) as e:
        P.convert(mine, tmp_path / "out", configs=TINY, readers=READERS)
    assert Path(name).parent.name in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600
    assert snapshot(tmp_path) == before


def _misfits(sources, d):
    "Part -> a well-made file of another model, and what must be said of it"
    temporal, semantic = (load_file(FIXTURES / f"{n}_adapter.safetensors") for n in ("temporal", "semantic"))
    save_file({k: v for k, v in temporal.items() if "mid_block" not in k}, d / "headless.safetensors")
    save_file({**temporal, "module.extra": torch.zeros(2)}, d / "extra.safetensors")
    save_file(
        {k: v[:8].contiguous() if k == "module.conv_in.weight" else v for k, v in temporal.items()},
        d / "thin.safetensors",
    )
    save_file(
        {k: v[:, :16].contiguous() if k.endswith("_ip.weight") else v for k, v in semantic.items()},
        d / "narrow.safetensors",
    )
    save_file({k: v for k, v in semantic.items() if not k.startswith("ip_adapter.5.")}, d / "fewer.safetensors")
    save_file(
        {k: v[:, :12].contiguous() if k == "image_proj.proj.weight" else v for k, v in semantic.items()},
        d / "eyes.safetensors",
    )
    torch.save({"state_dict": {"net.model.stem.0.weight": torch.zeros(1)}}, d / "detector.tar")
    shutil.copy(FIXTURES / "vocoder" / "config.json", d)
    torch.save({"generator": {"conv_pre.weight": torch.zeros(2)}}, d / "vocoder.pt")
    (d / "list.json").write_text("[1]")
    torch.save([1, 2], d / "list.ckpt")
    return [
        ("temporal_adapter", "headless.safetensors", "missing controlnet_mid_block.weight"),
        ("temporal_adapter", "extra.safetensors", "unexpected extra"),
        ("temporal_adapter", "thin.safetensors", "another shape conv_in.weight"),
        ("temporal_adapter", "list.ckpt", "holds a list"),
        ("semantic_adapter", "narrow.safetensors", "another architecture"),
        ("semantic_adapter", "fewer.safetensors", "cross-attentions of widths|do not fit"),
        ("semantic_adapter", "eyes.safetensors", "size of a frame embedding 12 and 24"),
        ("semantic_adapter", "headless.safetensors", "IP-Adapter"),
        ("time_detector", "detector.tar", "missing"),
        ("vocoder", "vocoder.pt", "missing"),
        ("temporal_adapter", "nowhere.ckpt", "no temporal_adapter there"),
    ]


@pytest.mark.parametrize("i", range(11))
def test_checkpoints_of_other_models(i, sources, tmp_path):
    part, file, why = _misfits(sources, tmp_path)[i]
    before = snapshot(tmp_path)
    with pytest.raises(FoleyError, match=why) as e:
        P.convert({**sources, part: tmp_path / file}, tmp_path / "out", configs=TINY, readers=READERS)
    assert file in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600
    assert snapshot(tmp_path) == before


def test_another_unet(sources, tmp_path):
    d = shutil.copytree(FIXTURES / "unet", tmp_path / "unet")
    cfg = json.loads((d / "config.json").read_text())
    os.chmod(d / "config.json", 0o644)
    (d / "config.json").write_text(json.dumps({**cfg, "cross_attention_dim": 24}))
    with pytest.raises(FoleyError, match="of another shape .*instead of"):
        P.convert({**sources, "unet": d}, tmp_path / "out", configs=TINY, readers=READERS)
    (d / "config.json").write_text(json.dumps({**cfg, "_class_name": "UNet3DConditionModel"}))
    with pytest.raises(FoleyError, match="describes UNet3DConditionModel"):
        P.convert({**sources, "unet": d}, tmp_path / "out", configs=TINY, readers=READERS)


def test_folders_that_lack_parts_or_have_them_twice(sources, tmp_path):
    with pytest.raises(FoleyError, match="no vocoder .*semantic_adapter.*temporal_adapter.*frame_encoder"):
        layout.locate(sources["auffusion"])
    with pytest.raises(FoleyError, match="no such folder"):
        layout.locate([sources["auffusion"], tmp_path / "nowhere"])
    shutil.copytree(FIXTURES / "vocoder", tmp_path / "vocoder")
    with pytest.raises(FoleyError, match="vocoder: found in .* and in"):
        layout.locate({**sources, "more": tmp_path})
    assert (
        layout.locate({**sources, "more": tmp_path, "vocoder": tmp_path / "vocoder"})["vocoder"]
        == tmp_path / "vocoder" / "vocoder.safetensors"
    )


# --- the disk


def test_no_room_is_noticed_before_anything_is_written(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 5 * 10**6))
    with pytest.raises(FoleyError, match=r"needs .* MB and 5.0 MB are free"):
        P.convert(sources, tmp_path / "out", configs=TINY, readers=READERS)
    assert not list(tmp_path.iterdir())
    P.convert(sources, tmp_path / "out", "float16", TINY)  # half the bytes fit


def test_a_disk_that_fills_up_keeps_the_old_folder(sources, tmp_path, monkeypatch):
    old = tmp_path / "out"
    old.mkdir()
    (old / "kept").write_text("old")
    real, calls = P.save_file, []

    def fails(*a, **k):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(*a, **k)

    monkeypatch.setattr(P, "save_file", fails)
    with pytest.raises(FoleyError, match="no space left"):
        P.convert(sources, old, configs=TINY, overwrite=True)
    assert [f.name for f in tmp_path.rglob("*")] == ["out", "kept"]
    monkeypatch.setattr(P, "save_file", real)
    with pytest.raises(FoleyError, match="is there already"):
        P.convert(sources, old, configs=TINY, readers=READERS)
    P.convert(sources, old, configs=TINY, overwrite=True)
    assert (old / "model_index.json").is_file() and not (old / "kept").exists() and len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_leaves_nothing(sources, tmp_path, monkeypatch):
    def stop(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(P, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        P.convert(sources, tmp_path / "out", configs=TINY, readers=READERS)
    assert not list(tmp_path.iterdir())


# --- the hub


def into_cache(cache, source, folder):
    "Lay files out as `huggingface_hub` keeps them"
    commit, repo = source.revision or "0" * 40, Path(cache) / f"models--{source.repo.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)


def test_the_plan_names_what_there_is():
    text = hub.show_plan(hub.plan())
    for s in (
        "auffusion/auffusion-full-no-adapter",
        "semantic/semantic_adapter.bin",
        "temporal_adapter.ckpt",
        "timestamp_detector.pth.tar",
        "vocoder/vocoder.pt",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "CC BY-NC-SA 4.0",
        "Apache-2.0",
        "MIT",
        "no commit known",
        "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    ):
        assert s in text
    rows = hub.plan()
    assert {r["part"] for r in rows} == set(layout.LAYOUT) and all(r["size"] > 0 for r in rows)
    assert [r["file"] for r in rows if r["exact"]] == ["open_clip_model.safetensors"]


def test_dry_run_touches_nothing(tmp_path, monkeypatch, capsys):
    import socket

    monkeypatch.setenv("SMOOTH_FOLEY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("a dry run reached for the network"))
    assert P.fetch(dry_run=True) == tmp_path / "home" / "full"
    assert "together ~13.1 GB" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_full_is_made_from_the_cache_and_found_again(sources, pipe, open_clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SMOOTH_FOLEY_HOME", str(tmp_path / "home"))
    with pytest.raises(FoleyError, match="smooth-foley fetch full") as e:
        P.resolve_full(cache_dir=tmp_path / "empty")
    assert "\n" not in str(e.value) and not (tmp_path / "home").exists()
    fc = shutil.copytree(
        sources["foleycrafter"], tmp_path / "fc", ignore=shutil.ignore_patterns("*.tar")
    )  # the tiny detector is not of the published shape
    for s, d in zip(hub.REPOSITORIES, (sources["auffusion"], fc, open_clip_folder)):
        into_cache(tmp_path / "cache", s, d)
    before = snapshot(tmp_path / "cache")
    made = P.resolve_full(cache_dir=tmp_path / "cache")
    assert made == P.full_path() == tmp_path / "home" / "full" and snapshot(tmp_path / "cache") == before
    stamp = snapshot(made)
    assert P.resolve_full(local_files_only=True, cache_dir=tmp_path / "empty") == made and snapshot(made) == stamp
    files = json.loads((made / "sources.json").read_text())["files"]
    assert files["frame_encoder"][0]["commit"] == hub.REPOSITORIES[2].revision
    got = SmoothFoleyPipeline.from_pretrained("full")
    assert equal(got.unet.state_dict(), pipe.unet.state_dict()) and got.mel.config.n_cols == 1024
    with pytest.raises(FoleyError, match="three repositories"):
        P.resolve_full(revision="main")


def test_full_is_made_once_however_many_ask_for_it(full, tmp_path, monkeypatch):
    monkeypatch.setenv("SMOOTH_FOLEY_HOME", str(tmp_path / "home"))
    asked = []

    def slow(**how):
        asked.append(how)
        time.sleep(0.5)
        return shutil.copytree(full, P.full_path())

    monkeypatch.setattr(P, "fetch", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: P.resolve_full(), range(4)))
    assert set(found) == {P.full_path()} and len(asked) == 1
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["full"]


def test_what_is_converted_is_not_replaced(tmp_path):
    files = tmp_path / "files"
    given, before = write_published(files), snapshot(files)
    (tmp_path / "link").symlink_to(files)
    for out in (files, tmp_path, tmp_path / "link"):
        with pytest.raises(FoleyError, match="which is read; choose another place"):
            P.fetch(out, folders=given, overwrite=True, configs=TINY, readers=READERS)
    assert snapshot(files) == before


def test_a_folder_without_index_is_not_taken_for_full(tmp_path, monkeypatch):
    monkeypatch.setenv("SMOOTH_FOLEY_HOME", str(tmp_path))
    (tmp_path / "full").mkdir()
    with pytest.raises(FoleyError, match="no model_index.json"):
        P.resolve_full(local_files_only=True)


class Hub(BaseHTTPRequestHandler):
    "Enough of the hub to download from: one commit, plain files; may break off in the middle of one"

    protocol_version = "HTTP/1.1"

    def log_message(self, *a):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        hub = self.server
        m = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        file = hub.files.get(m[1], Path("/nonexistent")) / m[3] if m else None
        if not (file and file.is_file()):
            return self.head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
        if body and hub.broken:
            return self.head(503, {"Content-Length": "0"})
        data = file.read_bytes()
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        if body:
            hub.asked.append((m[3], start))
        self.head(
            206 if start else 200,
            {
                "ETag": f'"{abs(hash(data)):x}"',
                "X-Repo-Commit": "c" * 40,
                "Accept-Ranges": "bytes",
                "Content-Length": str(len(data) - start),
                "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}",
            },
        )
        if not body:
            return
        if m[3] == hub.breaks:
            hub.breaks, hub.broken, data = None, hub.for_good, data[: len(data) // 2]
        self.wfile.write(data[start:])

    def head(self, code, headers):
        self.send_response(code)
        for k, v in headers.items():
            self.send_header(k, v)
        self.send_header("Connection", "close")  # said, and done: a client must not send its next question here
        self.end_headers()


@pytest.fixture
def server(sources, open_clip_folder, tmp_path):
    fc = shutil.copytree(sources["foleycrafter"], tmp_path / "on-the-hub")
    torch.save(
        {
            "state_dict": load_file(FIXTURES / "temporal_adapter.safetensors"),
            "optimizer": {"exp_avg": torch.zeros(8_000_000)},
        },
        fc / "temporal_adapter.ckpt",
    )  # larger than a chunk of a download
    http = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    http.files = dict(zip((s.repo for s in hub.REPOSITORIES), (sources["auffusion"], fc, open_clip_folder)))
    http.asked, http.broken, http.breaks, http.for_good = [], False, None, False
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


FETCH = (
    f"TINY = {TINY!r}"
    + """
import sys
from dataclasses import replace
from smooth_foley import hub, published as P
from smooth_foley.compare.foleycrafter import READERS
from smooth_foley.core import FoleyError
*known, clip = hub.REPOSITORIES
tokenizer = tuple(hub.HubFile('frame_encoder', (n,), 1e3) for n in ('tokenizer.json', 'tokenizer_config.json'))
sources = (*known, replace(clip, revision=None, files=clip.files+tokenizer))
try: P.fetch(sys.argv[1], sources=sources, configs=TINY, readers=READERS)
except FoleyError as e: sys.exit(f'refused: {e}')
"""
)


def run_fetch(server, out, cache):
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
        "no_proxy": "*",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run([sys.executable, "-c", FETCH, str(out)], env=env, capture_output=True, text=True, timeout=300)


def test_a_connection_that_breaks_goes_on_where_it_was(server, pipe, tmp_path):
    server.breaks = "temporal_adapter.ckpt"
    got = run_fetch(server, tmp_path / "full", tmp_path / "cache")
    assert got.returncode == 0, got.stderr
    assert got.stdout.index("licence") < got.stdout.index("together")
    starts = [n for f, n in server.asked if f == "temporal_adapter.ckpt"]
    assert starts[0] == 0 and starts[1] > 0 and len(starts) == 2  # only the rest was asked for
    assert equal(
        SmoothFoleyPipeline.from_pretrained(tmp_path / "full").temporal_adapter.state_dict(),
        pipe.temporal_adapter.state_dict(),
    )
    server.asked.clear()
    again = run_fetch(server, tmp_path / "full", tmp_path / "cache")
    assert again.returncode and "is there already" in again.stderr and not server.asked


def test_a_download_that_fails_keeps_the_files_that_are_whole(server, tmp_path):
    server.breaks, server.for_good = "temporal_adapter.ckpt", True
    first = run_fetch(server, tmp_path / "full", tmp_path / "cache")
    assert (
        first.returncode
        and "refused: ymzhang319/FoleyCrafter/temporal_adapter.ckpt: cannot be downloaded from the hub" in first.stderr
        and not (tmp_path / "full").exists()
    ), first.stderr
    assert not list((tmp_path / "cache").rglob("snapshots/*/temporal_adapter.ckpt"))
    server.breaks, server.broken, server.asked[:] = None, False, []
    second = run_fetch(server, tmp_path / "full", tmp_path / "cache")
    assert second.returncode == 0, second.stderr
    asked = [f for f, _ in server.asked]
    assert "temporal_adapter.ckpt" in asked and "unet/diffusion_pytorch_model.safetensors" not in asked


def test_a_repository_that_has_changed(server, tmp_path):
    server.files["ymzhang319/FoleyCrafter"] = tmp_path / "nothing"
    got = run_fetch(server, tmp_path / "full", tmp_path / "cache")
    assert (
        got.returncode
        and "refused: ymzhang319/FoleyCrafter: has no semantic/semantic_adapter.bin" in got.stderr
        and not (tmp_path / "full").exists()
    ), got.stderr
