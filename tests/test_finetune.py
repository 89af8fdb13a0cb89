"""Adapters from shards: the same as from arrays in memory, killed and resumed, in two processes, with wrong input"""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from launch import in_two_processes
from safetensors.torch import load_file
from test_habits import Hub
from test_published import TINY, write_published
from test_training import loss_on_cuda

from smooth_foley.app import main
from smooth_foley.core import FoleyError, only_writer
from smooth_foley.data.audioset import read_strong
from smooth_foley.data.shard_reader import Shard, Shards
from smooth_foley.data.shard_rows import TrainRows
from smooth_foley.data.shards import ShardConfig, write_shards
from smooth_foley.data.store import measure_clips
from smooth_foley.data.vggsound import join_clips
from smooth_foley.frame_adapter import FrameAdapter
from smooth_foley.loading import load_component, read_weights
from smooth_foley.media import Clip
from smooth_foley.pipeline import SmoothFoleyPipeline
from smooth_foley.published import convert
from smooth_foley.scale import finetune as ft
from smooth_foley.scale.adapters import STAGES, Frames, start_adapter
from smooth_foley.scale.cost import full_batch, full_stage
from smooth_foley.scale.feed import ClipFeed, local_shards
from smooth_foley.scale.finetune import Finetune, finetune, finetune_config
from smooth_foley.scale.other_layouts import export_adapter
from smooth_foley.temporal_condition import LabelProjection
from smooth_foley.train import diffusion, parts
from smooth_foley.train.checkpoints import latest_checkpoint
from smooth_foley.train.loop import Draw, train
from smooth_foley.train.records import peak_memory
from smooth_foley.world.as_vggsound import passby_folder

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
SHORT = dict(
    max_train_steps=6,
    train_batch_size=4,
    learning_rate=1e-3,
    lr_warmup_steps=2,
    ema_decay=0.9,
    mixed_precision="no",
    log_steps=1,
    checkpointing_steps=3,
    validation_steps=0,
    sample_steps=0,
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A tiny untrained pipeline"
    folder = tmp_path_factory.mktemp("model") / "tiny"
    SmoothFoleyPipeline.from_random().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = passby_folder(tmp_path_factory.mktemp("clips") / "passby", 12, seed=40, seconds=1.5)
    strong = read_strong(folder / "audioset_strong.tsv", folder / "mid_to_display_name.tsv", duration=1.5)
    return join_clips(strong, folder / "video")


@pytest.fixture(scope="module")
def shards(items, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "train"
    write_shards(items, out, ShardConfig(weights=str(model), per_shard=3))
    return out


@pytest.fixture
def settings(model, shards, tmp_path):
    "A short run of a stage"

    def make(stage="temporal-adapter", config=None, **kw):
        how = dict(shards=(shards,), out=tmp_path / "run", model=str(model), init="random")
        return Finetune(stage, train=finetune_config(**SHORT | (config or {})), **how | kw)

    return make


def column(path, name):
    with open(path, newline="") as f:
        return [float(row[name]) for row in csv.DictReader(f)]


def same(a, b, tol=0.0):
    a, b = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max().item() for k in a) <= tol


# --- the same as from memory
def from_memory(stage, s, model, monkeypatch):
    "`batch_of` as mini's recipe makes it, of the clips that the shards hold"
    data = Shards(s.shards[0])
    rows = TrainRows(data, timeline=stage != "frame-adapter")
    clips = [(data[i], label or data[i]["label"]) for i, label in rows.rows]
    labels = sorted({label for _, label in clips})
    n_cols = dict(projection=1, **dict.fromkeys(("temporal-adapter", "frame-adapter"), 1024))[stage]
    arrays = dict(
        label=np.array([labels.index(label) for _, label in clips]), sounding=np.zeros((len(clips), n_cols), bool)
    )
    if stage == "temporal-adapter":
        arrays["sounding"] = np.stack([rows._mask(sample, label) for sample, label in clips])
    emb = np.zeros((len(clips), 153, 24), np.float16)
    on = np.zeros((len(clips), 153), bool)
    for k, (sample, label) in enumerate(clips):
        emb[k, : len(sample["clip"])] = sample["clip"]
        if stage == "projection":
            on[k] = rows.projection_example(sample, label, labels)["sounding"]
    if stage == "projection":
        plain = parts._projection_rows(arrays, dict(emb=emb, frame_sounding=on))

        def in_order(i):  # The recipe sorts the scenes of a batch
            back = np.argsort(np.argsort(i))
            return {k: v[back] for k, v in plain(i).items()}

        return in_order, len(clips)
    monkeypatch.setattr(diffusion, "stored_caption", lambda arrays, i, long=True: labels[arrays["label"][i]])
    text = load_component(model, "tokenizer"), load_component(model, "text_encoder")
    plain = diffusion.diffusion_rows(arrays, np.stack([sample["latent"] for sample, _ in clips]), *text)
    return diffusion._frame_rows(plain, dict(emb=emb), 15.0) if stage == "frame-adapter" else plain, len(clips)


@pytest.mark.parametrize("stage", STAGES)
def test_losses_from_shards_are_those_from_memory(stage, settings, model, tmp_path, monkeypatch):
    s = settings(stage)
    finetune(s)
    batch_of, n = from_memory(stage, s, model, monkeypatch)
    torch.manual_seed(0)
    frozen = ft._load_parts(s, model)
    adapter = load_component(model, STAGES[stage]) if stage == "projection" else ft._start(s, model, frozen)
    labels = ft._read_data(s, model, frozen, *ft._find_data(s, model)).labels
    text_emb = ft._text_embeddings(model, labels) if labels else None
    train(ft.make_stage(s, frozen, adapter, text_emb), batch_of, n, s.train, tmp_path / "memory")
    ours, theirs = (column(folder / "log.csv", "loss") for folder in (tmp_path / "run", tmp_path / "memory"))
    assert len(ours) == 6 and len(set(ours)) == 6
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


# --- interrupted, and in two processes
def command(s, *words):
    "The same run on the command line"
    names = {k: v for k, v in SHORT.items()} | dict(max_train_steps=s.train.max_train_steps)
    options = [w for k, v in names.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    where = ["--model", s.model, "--init", s.init, "--shards", *map(str, s.shards), "--out", str(s.out)]
    return ["-m", "smooth_foley", "train", s.stage, *where, *options, *words]


def test_killed_and_resumed_ends_with_the_same_weights(settings, tmp_path):
    s = settings(config=dict(max_train_steps=30))
    whole = finetune(replace(s, out=tmp_path / "whole"))
    words = [sys.executable, *command(s, "--dataloader-num-workers", "1")]
    p = subprocess.Popen(words, env=ENV, stderr=subprocess.PIPE)
    until = time.time() + 600
    while not list(Path(s.out).glob("checkpoint-*")) and time.time() < until and p.poll() is None:
        time.sleep(0.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (s.out / "done.json").exists(), "it finished before it was killed"
    assert latest_checkpoint(s.out), p.stderr.read().decode()[-2000:]
    until = time.time() + 120
    while time.time() < until:  # Until its worker process is gone, too
        try:
            with only_writer(s.out):
                break
        except FoleyError:
            time.sleep(0.1)
    finetune(s)
    same(whole, s.out)
    assert column(s.out / "log.csv", "step") == list(range(1, 31))


def test_two_processes_do_the_work_of_one(settings, tmp_path):
    s = settings()
    finetune(replace(s, out=tmp_path / "one"))
    r = subprocess.run(in_two_processes(command(s), 29583), env=ENV, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr[-3000:]
    assert (latest_checkpoint(s.out) / "random-1.json").exists(), "it ran in one process"
    same(tmp_path / "one", s.out, tol=2e-4)


def test_fsdp_goes_on_where_one_process_stopped_and_one_process_where_fsdp_did(settings, shards, tmp_path):
    often = dict(checkpointing_steps=1, validation_steps=3)
    val = shards / "shard-000001.tar"
    how = dict(frame_position="residual", frame_motion=True, val_shards=(val,), validation_clips=2)
    s = settings("frame-adapter", often, **how)
    finetune(replace(s, out=tmp_path / "one"))
    finetune(s, stop_at=2)
    words = ["--frame-position", "residual", "--frame-motion", "--val-shards", str(val), "--validation-clips", "2"]
    words += [w for k, v in often.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    launched = in_two_processes(command(s, *words), 29585, "--use_fsdp")
    r = subprocess.run(launched, env=ENV, capture_output=True, text=True, timeout=280)
    assert r.returncode == 0, r.stderr[-3000:]
    assert (s.out / "checkpoint-5" / "random-1.json").exists(), "it ran in one process"
    for log in ("log.csv", "validation.csv"):
        np.testing.assert_allclose(column(s.out / log, "loss"), column(tmp_path / "one" / log, "loss"), atol=2e-4)
    same(tmp_path / "one", s.out, tol=2e-4)
    shutil.rmtree(s.out / "checkpoint-6")
    (s.out / "done.json").unlink()
    finetune(s)
    same(tmp_path / "one", s.out, tol=2e-4)


@pytest.mark.parametrize("name,said", [("OFFLOAD_PARAMS", "leave it out"), ("ACTIVATION_CHECKPOINTING", "gradient_ch")])
def test_parts_of_fsdp_that_are_not_used_are_refused(name, said, settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(f"FSDP_{name}", "true")
    with pytest.raises(FoleyError, match=f"fsdp_{name.lower()}: .*{said}"):
        finetune(settings("projection"))


# --- where it begins
PATTERNS = [
    Frames(),
    Frames("sinusoidal"),
    Frames("none", True),
    Frames("window", None, 1e7),
    Frames("residual", True, 1e7),
]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "FoleyCrafter's files, and the model made of them"
    folder = tmp_path_factory.mktemp("published")
    sources = write_published(folder / "files")
    return sources, convert(sources, folder / "model", configs=TINY)


def sound(model, **replaced):
    pipe = SmoothFoleyPipeline.from_pretrained(model, **replaced).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (4, 32, 32, 3)).astype(np.uint8)
    clip = Clip(frames, np.arange(4) * 0.004, 0.016)
    call = dict(label="train", condition=[(0.004, 0.012)], num_inference_steps=2, output_type="latent")
    return pipe(clip, temporal_scale=1.0, **call).latents


@pytest.mark.parametrize("frames", PATTERNS, ids=lambda f: f"{f.frame_position}-{f.frame_motion}")
def test_a_frame_adapter_begins_at_the_outputs_of_foleycrafters(published, frames):
    sources, model = published
    unet = load_component(model, "unet")
    ours = [
        start_adapter("frame-adapter", init, model, unet, frames=frames)
        for init in ("foleycrafter", str(sources["foleycrafter"]))
    ]
    want = sound(model)
    for adapter in ours:
        if frames.frame_position in ("window", "residual"):  # Added to attention scores: rounding
            assert torch.allclose(sound(model, frame_adapter=adapter), want, rtol=0, atol=1e-5)
        else:
            assert torch.equal(sound(model, frame_adapter=adapter), want)


def test_a_temporal_adapter_begins_at_the_outputs_of_foleycrafters(published):
    sources, model = published
    unet, want = load_component(model, "unet"), sound(model)
    for init in ("foleycrafter", str(sources["foleycrafter"]), str(model)):
        assert torch.equal(sound(model, temporal_adapter=start_adapter("temporal-adapter", init, model, unet)), want)
    other = start_adapter("temporal-adapter", "random", model, unet)
    assert not torch.equal(sound(model, temporal_adapter=other), want)


def test_foleycrafter_has_no_projection(published):
    with pytest.raises(FoleyError, match="no label projection"):
        start_adapter("projection", "foleycrafter", published[1])


# --- devices and types
def batch_for(s, model):
    "A stage with its first batch"
    s.out.mkdir()
    frozen = ft._load_parts(s, model)
    data = ft._read_data(s, model, frozen, *ft._find_data(s, model))
    text_emb = ft._text_embeddings(model, data.labels) if data.labels else None
    return ft.make_stage(s, frozen, ft._start(s, model, frozen), text_emb), data.train([0, 1])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_on_cuda_with_all_it_reads(stage, settings, model, monkeypatch):
    stage, batch = batch_for(settings(stage), model)
    loss_on_cuda(stage, batch, monkeypatch)


KINDS = [("temporal-adapter", {})] + [
    ("frame-adapter", dict(frame_position=p, frame_motion=p == "residual")) for p in ("none", "window", "residual")
]


@pytest.mark.parametrize("kind,how", KINDS, ids=lambda x: x if isinstance(x, str) else x.get("frame_position", ""))
def test_frozen_parts_keep_their_own_type_and_only_the_adapter_learns(kind, how, settings, model):
    s = settings(
        kind, dict(mixed_precision="bf16", gradient_checkpointing=True, max_train_steps=1, lr_warmup_steps=0), **how
    )
    stage, batch = batch_for(s, model)
    stage.place("cpu").equip(s.train)
    assert stage.frozen["unet"].conv_in.weight.dtype == torch.bfloat16
    trained = {id(p) for p in stage.parameters() if p.requires_grad}
    assert {p.dtype for p in stage.parameters()} == {torch.float32} and len(trained) == len(list(stage.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage(batch, Draw(0, 0, 2))
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.parameters())
    frozen = [p for m in stage.frozen.parts.values() for p in m.parameters() if id(p) not in trained]
    assert frozen and all(p.grad is None for p in frozen)


@pytest.mark.skipif(not os.environ.get("FULL_SIZE"), reason="takes minutes and some 10 GB: FULL_SIZE=1")
@pytest.mark.parametrize("stage", ["temporal-adapter", "frame-adapter"])
def test_one_step_of_full_size_changes_the_adapter_alone(stage, tmp_path):
    made = full_stage(stage, device="cpu", dtype=torch.bfloat16)
    adapter, unet = next(iter(made.trained.values())), made.frozen["unet"]
    frozen = unet.conv_in.weight.clone(), unet.mid_block.resnets[0].conv1.weight.clone()
    before = {k: v.detach().clone() for k, v in adapter.named_parameters()}
    batch = full_batch(stage, 1, "cpu")
    batch["z"] = torch.randn_like(batch["z"])
    cfg = finetune_config(**SHORT | dict(max_train_steps=1, train_batch_size=1, mixed_precision="bf16", ema_decay=0.0))
    train(made, lambda i: batch, 1, replace(cfg, gradient_checkpointing=True, lr_warmup_steps=0), tmp_path)
    assert torch.equal(unet.conv_in.weight, frozen[0])
    assert torch.equal(unet.mid_block.resnets[0].conv1.weight, frozen[1])
    assert any(not torch.equal(v, before[k]) for k, v in adapter.named_parameters())
    print(f"{stage}: peak memory {peak_memory() / 1e9:.1f} GB")
    assert peak_memory() < 20e9


# --- what is looked at, and the command line
def test_the_command_leaves_samples_and_a_component_that_loads(model, shards, tmp_path, capsys):
    file, out = tmp_path / "run.yaml", tmp_path / "run"
    out_options = {**SHORT, "max_train_steps": 2, "sample_steps": 2, "validation_steps": 1, "lr_warmup_steps": 0}
    rows = dict(out_options, shards=[str(shards)], val_shards=[str(shards / "shard-000001.tar")], model=str(model))
    rows |= dict(init="random", sample_clips=2, num_inference_steps=2, frame_position="window", learning_rate=9.0)
    file.write_text(json.dumps(rows))
    words = ["train", "frame-adapter", "--config", str(file), "--out", str(out), "--learning-rate", "1e-3"]
    assert main.main(words) == 0 and "frame_adapter=" in capsys.readouterr().out
    assert json.loads((out / "settings.json").read_text())["learning_rate"] == 1e-3
    assert len(column(out / "validation.csv", "loss")) == 16
    assert len(column(out / "samples.csv", "mel_distance")) == 2
    assert {p.suffix for p in (out / "samples").iterdir()} == {".png", ".wav"}
    pipe = SmoothFoleyPipeline.from_pretrained(model, frame_adapter=out)
    assert pipe.frame_adapter.config.frame_position == "window" and not (out / "ip_adapter.safetensors").exists()
    assert "SmoothFoleyPipeline.from_pretrained" in (out / "README.md").read_text()
    assert main.main([*words, "--seed", "1"]) == 2 and "seed 0 there and 1 now" in capsys.readouterr().err


def test_a_compiled_network_learns_the_same(settings, tmp_path):
    plain = finetune(replace(settings("projection"), out=tmp_path / "plain"))
    compiled = finetune(settings("projection", config=dict(dynamo_backend="eager")))
    same(plain, compiled, tol=1e-5)


# --- to the hub
def test_a_finished_run_goes_to_the_hub_with_its_card(model, shards, tmp_path, monkeypatch, capsys):
    hub, out = Hub(monkeypatch), tmp_path / "my-run"
    short = {**SHORT, "max_train_steps": 2, "validation_steps": 1, "lr_warmup_steps": 0}
    rows = dict(short, shards=[str(shards)], val_shards=[str(shards / "shard-000001.tar")], model=str(model))
    (tmp_path / "run.yaml").write_text(json.dumps(rows | dict(init="random", push_to_hub=True)))
    words = ["train", "temporal-adapter", "--config", str(tmp_path / "run.yaml"), "--out", str(out)]
    assert main.main([*words, "--hub-model-id", "owner/name"]) == 0
    assert "pushed: https://hub/commit" in capsys.readouterr().out
    assert hub.calls[0][0] == "owner/name" and hub.calls[-1]["repo_id"] == "owner/name"
    assert {"config.json", WEIGHTS, "README.md", "settings.json", "done.json", "log.csv"} <= set(hub.files)
    assert not [f for f in hub.files if f.startswith("checkpoint") or f == "faults.csv"]
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "snapshot_download('owner/name')" in card
    assert str(tmp_path) not in card and str(model) not in card
    for fact in (
        "`max_train_steps` | 2",
        "random (fingerprint",
        "validation, averaged weights | 2",
        "| training | 12 |",
    ):
        assert fact in card
    hub.calls.clear()
    assert main.main(words) == 0  # It is finished: nothing is trained, and the folder gives the name
    assert hub.calls[0][0] == "my-run"


def test_the_hub_is_asked_before_the_training(shards, model, tmp_path, monkeypatch, capsys):
    def denied(*args, **kwargs):
        raise PermissionError("401 Client Error\nmore")

    monkeypatch.setattr("huggingface_hub.create_repo", denied)
    words = ["train", "projection", "--shards", str(shards), "--model", str(model), "--out", str(tmp_path / "run")]
    assert main.main([*words, "--push-to-hub", "--hub-model-id", "owner/name"]) == 2
    assert "owner/name: cannot be uploaded (401 Client Error)" in capsys.readouterr().err
    assert main.main([*words, "--hub-model-id", "owner/name"]) == 2
    assert "add --push-to-hub" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_every_label_of_a_clip_has_a_sample_of_its_own(items, model, settings, tmp_path):
    both = replace(items[0], events=[(0.0, 0.5, "dog barking"), (0.5, 1.0, "train horning")])
    write_shards([both], tmp_path / "two", ShardConfig(weights=str(model)))
    how = dict(max_train_steps=1, sample_steps=1)
    out = finetune(settings(config=how, val_shards=(tmp_path / "two",), num_inference_steps=1))
    with open(out / "samples.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["label"] for row in rows] == ["dog barking", "train horning"]
    sounds = {f"step-1-{row['clip']}.wav" for row in rows}
    assert len(sounds) == 2 and sounds == {p.name for p in (out / "samples").glob("*.wav")}


# --- to other tools
def test_published_adapters_come_back_as_they_were_published(published, tmp_path):
    sources, model = published
    unet, theirs = load_component(model, "unet"), sources["foleycrafter"]
    (semantic,) = export_adapter(model / "frame_adapter", tmp_path / "semantic", num_tokens=None)
    temporal, folder = export_adapter(model / "temporal_adapter", tmp_path / "temporal")
    was = read_weights(theirs / "semantic" / "semantic_adapter.bin")
    was = {f"{a}.{k}": v for a, d in was.items() for k, v in d.items()} if "image_proj" in was else was
    now = load_file(semantic)
    assert now.keys() == was.keys() and all(torch.equal(now[k], v.float()) for k, v in was.items())
    was, now = load_component(model, "temporal_adapter").state_dict(), load_file(temporal)
    assert now.keys() == was.keys() and all(torch.equal(now[k], v) for k, v in was.items())
    want = sound(model)
    for stage, home in (("frame-adapter", tmp_path / "semantic"), ("temporal-adapter", tmp_path / "temporal")):
        adapter = start_adapter(stage, str(home), model, unet)
        assert torch.equal(sound(model, **{STAGES[stage]: adapter}), want)
    assert torch.equal(sound(model, temporal_adapter=folder), want)


@pytest.mark.parametrize("tokens,projection", [(1, "linear"), (2, "linear"), (1, "mlp")])
def test_diffusers_reads_a_frame_adapter_as_an_ip_adapter(tokens, projection, published, tmp_path):
    unet = load_component(published[1], "unet")
    torch.manual_seed(0)
    adapter = FrameAdapter.from_unet(unet, 12, tokens, projection=projection)
    torch.nn.init.normal_(adapter.to_v_ip[0].weight)
    adapter.save_pretrained(tmp_path / "adapter")
    (file,) = export_adapter(tmp_path / "adapter", tmp_path / "out")
    weights, nested = load_file(file), dict(image_proj={}, ip_adapter={})
    for name, value in weights.items():
        part, _, key = name.partition(".")
        nested[part][key] = value
    z, text, emb = torch.randn(2, 4, 8, 8), torch.randn(2, 7, unet.config.cross_attention_dim), torch.randn(2, 5, 12)
    how = dict(encoder_hidden_states=text, added_cond_kwargs={"image_embeds": [emb]})
    with torch.no_grad():
        plain = unet(z, 3, text).sample
        with adapter.installed(unet):
            ours = unet(z, 3, **how).sample
        unet._load_ip_adapter_weights([nested], low_cpu_mem_usage=False)
        theirs = unet(z, 3, **how).sample
    assert not torch.allclose(ours, plain, atol=1e-4)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_diffusers_reads_a_temporal_adapter_from_one_file(published, tmp_path):
    file, folder = export_adapter(published[1] / "temporal_adapter", tmp_path / "out", dtype="float16")
    read = ControlNetModel.from_single_file(str(file), config=str(folder), local_files_only=True)
    want = load_component(published[1], "temporal_adapter").state_dict()
    assert all(torch.equal(v, want[k].half().float()) for k, v in read.float().state_dict().items())


NOT_EXPORTED = {
    "holds a LabelProjection": lambda at: LabelProjection(4).save_pretrained(at),
    "no config.json in it": lambda at: at.mkdir(),
    "frame_position is 'window' and motion False": lambda at: FrameAdapter(4, 8, [8], 1, "linear", "window"),
    "frame_position is 'residual' and motion True": lambda at: FrameAdapter(
        4, 8, [8], frame_position="residual", motion=True, conv_in_dim=8
    ),
    "num_tokens is 4: give a multiple of the adapter's 3": lambda at: FrameAdapter(4, 8, [8], 3),
}


@pytest.mark.parametrize("said", NOT_EXPORTED)
def test_what_other_tools_cannot_read_is_refused(said, tmp_path, capsys):
    made = NOT_EXPORTED[said](tmp_path / "run")
    if isinstance(made, FrameAdapter):
        made.save_pretrained(tmp_path / "run")
    assert main.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    found = capsys.readouterr().err
    assert said.replace("num_tokens", "--num-tokens") in found.replace("\n", " ") or said in found
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_finished_is_not_exported(settings, tmp_path):
    out = finetune(settings("frame-adapter"), stop_at=3)
    FrameAdapter(4, 8, [8]).save_pretrained(out)
    with pytest.raises(FoleyError, match="is not finished"):
        export_adapter(out, tmp_path / "out")


# --- data from elsewhere, and without events
def test_shards_at_an_address_are_copied_once(shards, tmp_path):
    import fsspec

    there = fsspec.filesystem("memory")
    for file in shards.iterdir():
        there.pipe(f"/set/{file.name}", file.read_bytes())
    (copy,) = local_shards("memory://set", tmp_path)
    assert {p.name: p.read_bytes() for p in copy.glob("shard-*")} == {
        p.name: p.read_bytes() for p in shards.glob("shard-*")
    }
    there.rm("/set", recursive=True)
    assert local_shards("memory://set", tmp_path) == [copy]
    with pytest.raises(FoleyError, match="memory://other/plan.json: cannot be fetched"):
        local_shards("memory://other", tmp_path)


@pytest.fixture(scope="module")
def silent(items, model, tmp_path_factory):
    "Shards of clips without events"
    out = tmp_path_factory.mktemp("silent") / "shards"
    write_shards([replace(i, events=None) for i in items[:4]], out, ShardConfig(weights=str(model), content=("clip",)))
    return out


def test_curves_of_grounding_stand_in_for_events(items, silent, settings, tmp_path):
    with pytest.raises(FoleyError, match="none of its clips has a timeline"):
        finetune(settings("projection", shards=(silent,)))
    times = np.arange(15) / 10

    class Listener:
        settings = {}

        def __call__(self, item):
            return dict(times=times, probabilities=1.0 * (times > 0.2), duration=1.5)

    assert measure_clips(items[:3], tmp_path / "grounding", Listener()) == []  # As `data continuous filter` keeps them
    s = settings("projection", shards=(silent,), grounding=str(tmp_path), out=tmp_path / "heard")
    out = finetune(s)
    assert len(column(out / "log.csv", "loss")) == 6
    with open(out / "faults.csv", newline="") as f:
        faults = list(csv.DictReader(f))
    assert [(f["reason"], items[3].name in f["id"]) for f in faults] == [("events", True)]


def test_a_damaged_member_is_skipped_counted_and_named(shards, settings, tmp_path, capsys):
    bad = tmp_path / "bad"
    shutil.copytree(shards, bad)
    shard = Shard(bad / "shard-000001.tar")
    at, data = int(shard.offset[1, shard.fields.index("latent.npy")]) + 500, bytearray(shard.path.read_bytes())
    data[at] ^= 1
    shard.path.write_bytes(bytes(data))
    for how in ({}, dict(resume=False), dict(resume=False)):
        out = finetune(settings(shards=(bad,), config=dict(dataloader_num_workers=2)), **how)
        assert f"1 clips could not be used: {shard.keys[1]}" in capsys.readouterr().out
        assert len(column(out / "log.csv", "loss")) == 6
        assert len((out / "faults.csv").read_text().splitlines()) == 2


# --- wrong input
def test_shards_of_another_mel_are_refused(model, settings, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "mel" / "config.json").read_text())
    (other / "mel" / "config.json").write_text(json.dumps(config | dict(fmin=20.0)))
    with pytest.raises(FoleyError, match="encoded by other networks: mel [0-9a-f]{16} there"):
        finetune(settings(model=str(other)))
    finetune(settings("projection", model=str(other)))  # Reads no mel


WRONG = {
    "proportion_empty_prompts is 2": dict(proportion_empty_prompts=2),
    "stage is 'base'": dict(stage="base"),
    "frame_wise is False": dict(stage="frame-adapter", frame_wise=False, frame_position="window"),
    "nowhere: no such folder; begin from": dict(init="nowhere"),
    "nowhere: no such folder or tar": dict(shards=("nowhere",)),
    "was not made from FoleyCrafter": dict(init="foleycrafter"),
    "holds no clip": dict(stage="frame-adapter", shards="latents"),
    "no folder `grounding`": dict(grounding="nowhere"),
    "dynamo_backend is 'abacus'": dict(config=dict(dynamo_backend="abacus")),
    "use_8bit_adam": dict(config=dict(use_8bit_adam=True)),
    "report_to is 'abacus'": dict(config=dict(report_to="abacus")),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_input_is_one_line(said, settings, items, model, tmp_path):
    change = dict(WRONG[said])
    if change.get("shards") == "latents":
        change["shards"] = (tmp_path / "latents",)
        write_shards(items[:1], tmp_path / "latents", ShardConfig(weights=str(model), content=("latent",)))
    with pytest.raises(FoleyError, match=said) as e:
        finetune(settings(**change))
    assert "\n" not in str(e.value) and not list(tmp_path.glob("run/checkpoint-*"))


def test_a_checkpoint_cut_short_or_of_another_stage_is_refused(settings, tmp_path):
    s = settings()
    finetune(s, stop_at=3)
    state = latest_checkpoint(s.out) / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:1000])
    with pytest.raises(FoleyError, match="cannot be read"):
        finetune(s)
    state.write_bytes(whole)
    with pytest.raises(FoleyError, match="stage 'temporal-adapter' there and 'frame-adapter' now"):
        finetune(replace(s, stage="frame-adapter"))
    other = replace(s, stage="frame-adapter", out=tmp_path / "frames")
    finetune(other, stop_at=3)
    shutil.copy(state, latest_checkpoint(other.out) / "state.safetensors")
    with pytest.raises(FoleyError, match="does not fit this run"):
        finetune(other)


def test_a_loss_that_is_not_finite_names_step_and_clips(settings, shards):
    with pytest.raises(FoleyError, match=r"loss is (nan|inf) at step \d+, of the examples") as e:
        finetune(settings(config=dict(learning_rate=1e30, lr_warmup_steps=0, max_grad_norm=1e9)))
    keys = {key for k in range(len(list(shards.glob("*.tar")))) for key in Shards(shards).shard(k).keys}
    assert any(key in str(e.value) for key in keys)


def test_a_full_disk_keeps_the_last_checkpoint(settings):
    s = settings()
    finetune(s, stop_at=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(FoleyError, match="no checkpoint written .*make room and run again"):
            finetune(s)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert latest_checkpoint(s.out).name == "checkpoint-3" and not list(s.out.glob(".tmp-*"))
    finetune(s)


def test_feeds_name_their_clips(shards):
    feed = ClipFeed(TrainRows(Shards(shards), timeline=True))
    assert feed.names([0]) == [Shards(shards)[0]["key"]]
