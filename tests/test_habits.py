"diffusers' habits, one test each: what a user of diffusers tries on a pipeline works here, or says in one line why not"

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.utils import logging as diffusers_logging

from smooth_foley.compare.foleycrafter import FoleyCrafter
from smooth_foley.core import FoleyError, mini_path
from smooth_foley.media import Clip
from smooth_foley.pipeline import SmoothFoleyPipeline

ROOT = Path(__file__).resolve().parent.parent
CALL = dict(label="siren", output_type="latent")


def noise_clip(seconds=1.0, seed=0):
    frames = np.random.default_rng(seed).integers(0, 255, (round(seconds * 15), 64, 64, 3), np.uint8)
    return Clip(frames, np.arange(len(frames)) / 15, seconds, Path(f"clip{seed}.mp4"))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder, **kwargs):
    return quiet(SmoothFoleyPipeline.from_pretrained(folder, **kwargs))


@pytest.fixture(scope="module")
def pipe():
    return quiet(SmoothFoleyPipeline.from_random())


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("habits") / "weights"
    pipe.save_pretrained(path)
    return path


def dtypes(pipe):
    return {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


# from_pretrained


def test_from_pretrained_takes_dtype(folder):
    assert load(folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(folder, torch_dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    with pytest.raises(FoleyError, match="two names of one argument"):
        load(folder, dtype=torch.bfloat16, torch_dtype=torch.float32)


def test_from_pretrained_takes_dtype_as_text(folder):
    assert load(folder, dtype="bfloat16").unet.dtype == torch.bfloat16
    assert load(folder, torch_dtype="torch.float32").unet.dtype == torch.float32
    with pytest.raises(FoleyError, match="`dtype` is 'bfloat61': use float32"):
        load(folder, dtype="bfloat61")


def test_from_pretrained_takes_dtype_for_each_component(folder):
    mixed = load(folder, dtype={"vae": "float32", "default": torch.bfloat16})
    assert (mixed.vae.dtype, mixed.unet.dtype) == (torch.float32, torch.bfloat16)
    assert np.isfinite(mixed(noise_clip(), label="siren").audios[0]).all()
    with pytest.raises(FoleyError, match="did you mean vae"):
        load(folder, dtype={"vea": "float32"})
    with pytest.raises(FoleyError, match="compute together"):
        load(folder, dtype={"unet": "bfloat16"})


def test_from_pretrained_takes_device_map(folder):
    assert load(folder, device_map="cpu").unet.device.type == "cpu"
    for spread in ("balanced", {"unet": 0}):
        with pytest.raises(FoleyError, match="`device_map` is .*one device"):
            load(folder, device_map=spread)


def test_from_pretrained_takes_use_safetensors(folder):
    assert load(folder, use_safetensors=True).labels
    with pytest.raises(FoleyError, match="`use_safetensors` is False"):
        load(folder, use_safetensors=False)


@pytest.mark.parametrize("low", [True, False])
def test_from_pretrained_takes_low_cpu_mem_usage(folder, pipe, low):
    back = load(folder, low_cpu_mem_usage=low)
    assert all(torch.equal(a, b) for a, b in zip(back.unet.parameters(), pipe.unet.parameters()))


def test_from_pretrained_names_the_near_keyword(folder):
    for wrong, near in (("frame_scales", "frame_scale"), ("torch_dtyp", "torch_dtype"), ("use_safetensor", "use_safe")):
        with pytest.raises(FoleyError, match=f"knows no {wrong}; did you mean .*{near}"):
            load(folder, **{wrong: 1})
    with pytest.raises(FoleyError, match="knows no xyzzy; components and settings are .*unet"):
        load(folder, xyzzy=1)


@pytest.mark.parametrize("name", ["quantization_config", "max_memory", "custom_pipeline", "output_loading_info"])
def test_from_pretrained_refuses_by_name(folder, name):
    with pytest.raises(FoleyError, match=f"takes no {name}: "):
        load(folder, **{name: "something"})
    assert load(folder, **{name: None}).labels


def test_name_or_path(folder, tmp_path):
    back = load(folder)
    assert back.name_or_path == str(folder)
    back.save_pretrained(tmp_path / "again")
    assert str(folder) not in (tmp_path / "again" / "model_index.json").read_text()


# variants


def test_save_and_load_a_variant(pipe, tmp_path):
    half = load_half(pipe, tmp_path)
    files = {p.relative_to(tmp_path / "w").as_posix() for p in (tmp_path / "w").rglob("*.safetensors")}
    assert {f for f in files if ".fp16." not in f} == set()
    assert len(files) == 8
    back = load(tmp_path / "w", variant="fp16", dtype="fp16")
    for name, part in half.components.items():
        if isinstance(part, torch.nn.Module):
            assert all(torch.equal(a, b) for a, b in zip(part.parameters(), back.components[name].parameters())), name


def load_half(pipe, tmp_path):
    half = SmoothFoleyPipeline(**SmoothFoleyPipeline.from_random().components, labels=pipe.labels).to(torch.float16)
    half.save_pretrained(tmp_path / "w", variant="fp16")
    return half


def test_a_variant_lies_beside_the_plain_weights(pipe, tmp_path):
    load_half(pipe, tmp_path)
    pipe.save_pretrained(tmp_path / "w")
    (tmp_path / "w" / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    back = load(tmp_path / "w", variant="fp16")  # the vae has none, and is read without
    assert all(torch.equal(a, b) for a, b in zip(back.vae.parameters(), pipe.vae.parameters()))
    plain = load(tmp_path / "w")
    assert all(torch.equal(a, b) for a, b in zip(plain.unet.parameters(), pipe.unet.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(back.unet.parameters(), pipe.unet.parameters()))


def test_a_folder_without_the_variant_says_which_it_has(folder, pipe, tmp_path):
    with pytest.raises(FoleyError, match="no weights of variant 'fp16'; it has weights without a variant only"):
        load(folder, variant="fp16")
    load_half(pipe, tmp_path)
    with pytest.raises(FoleyError, match="no weights of variant 'ema' .*it has variant fp16: give variant='fp16'"):
        load(tmp_path / "w", variant="ema")
    with pytest.raises(FoleyError, match="no weights without a variant .*give variant='fp16'"):
        load(tmp_path / "w")


@pytest.mark.parametrize(
    "wrong, why",
    [
        (dict(variant="../fp16"), "`variant` is '../fp16'"),
        (dict(variant="fp 16"), "letters, digits"),
        (dict(safe_serialization=False), "pickles may run code"),
        (dict(use_flashpack=True), "knows no use_flashpack"),
    ],
    ids=str,
)
def test_a_refused_save_leaves_nothing(pipe, tmp_path, wrong, why):
    with pytest.raises(FoleyError, match=re.escape(why)):
        pipe.save_pretrained(tmp_path / "new" / "folder", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_halfway_leaves_nothing(pipe, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pipe.label_projection), "save_pretrained", full)
    with pytest.raises(FoleyError, match="No space left on device"):
        pipe.save_pretrained(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


# DiffusionPipeline


def test_diffusion_pipeline_loads_the_folder(pipe, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
    back = quiet(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))
    assert type(back) is SmoothFoleyPipeline and back.labels == pipe.labels
    assert torch.equal(back(noise_clip(), **CALL).latents, pipe(noise_clip(), **CALL).latents)


def test_the_code_in_a_folder_only_imports(folder):
    lines = (folder / "pipeline.py").read_text().split("\n")
    assert lines == [
        "from smooth_foley.pipeline import SmoothFoleyPipeline",
        "",
        "__all__ = ['SmoothFoleyPipeline']",
        "",
    ]


def test_our_own_loading_never_runs_the_code_in_a_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "w")
    (tmp_path / "w" / "pipeline.py").write_text("raise SystemExit('was run')\n")
    assert load(tmp_path / "w", trust_remote_code=True).labels == pipe.labels


# A call


def test_return_dict_false_gives_a_tuple(pipe):
    clip = noise_clip()
    (audios,) = pipe(clip, label="siren", return_dict=False)
    assert np.array_equal(audios[0], pipe(clip, label="siren").audios[0])
    (latents,) = pipe(clip, **CALL, return_dict=False)
    assert torch.equal(latents, pipe(clip, **CALL).latents)
    (mels,) = pipe.text_to_audio("siren", 1.0, output_type="mel", return_dict=False)
    assert mels.shape[0] == 1


def test_callback_gets_the_tensors_it_asks_for(pipe):
    seen = []

    def look(p, i, t, tensors):
        seen.append((p is pipe, i, {k: tuple(v.shape) for k, v in tensors.items()}))
        return tensors

    pipe(noise_clip(), **CALL, callback_on_step_end=look)
    assert seen == [(True, i, {"latents": (1, 8, 8, 64)}) for i in range(3)]
    seen.clear()
    asked = dict(callback_on_step_end=look, callback_on_step_end_tensor_inputs=["prompt_embeds", "latents"])
    pipe([noise_clip(), noise_clip(seed=1)], **CALL, **asked)
    assert all(s[2]["prompt_embeds"][0] == 4 and s[2]["latents"][0] == 2 for s in seen)
    with pytest.raises(FoleyError, match="names noise_pred: choose from latents, prompt_embeds"):
        pipe(noise_clip(), **CALL, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["noise_pred"])


def test_callback_may_return_other_tensors(pipe):
    def silence(p, i, t, tensors):
        return {name: torch.zeros_like(value) for name, value in tensors.items()}

    plain = pipe(noise_clip(), **CALL).latents
    assert pipe(noise_clip(), **CALL, callback_on_step_end=silence).latents.abs().max() == 0
    for reuse in (True, False):
        asked = dict(callback_on_step_end_tensor_inputs=["prompt_embeds"], reuse=reuse)
        other = pipe(noise_clip(), **CALL, callback_on_step_end=silence, **asked).latents
        assert torch.isfinite(other).all() and not torch.allclose(other, plain, atol=1e-4)


def test_sd_cfg_cutoff_callback_runs(pipe):
    clip, many = noise_clip(), dict(**CALL, num_inference_steps=4, guidance_scale=5.0)
    plain, without = pipe(clip, **many).latents, pipe(clip, **many | dict(guidance_scale=1.0)).latents
    halfway = pipe(clip, **many, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5)).latents
    late = pipe(clip, **many, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3))
    assert not torch.equal(halfway, plain) and not torch.equal(halfway, without)
    assert torch.equal(late.latents, plain)  # after the last step there is nothing to cut off
    both = MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=0.5)])
    assert torch.equal(pipe(clip, **many, callback_on_step_end=both).latents, halfway)
    assert pipe.guidance_scale == 0.0 and pipe.num_timesteps == 4
    assert torch.equal(pipe(clip, **many).latents, plain)  # the next call has its own guidance


@pytest.mark.parametrize("reuse", [True, False])
def test_cutting_off_is_what_both_halves_give(pipe, reuse):
    "Two steps with guidance and two without, against the same steps with guidance switched by hand"
    clip, many = noise_clip(), dict(**CALL, num_inference_steps=4, guidance_scale=5.0, reuse=reuse)
    cut = pipe(clip, **many, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.25)).latents

    def weaker(p, i, t, tensors):
        p._guidance_scale = 1.0 + 1e-7 if i >= 1 else p._guidance_scale  # both halves, of which one counts
        return tensors

    by_hand = pipe(clip, **many, callback_on_step_end=weaker).latents
    assert (cut - by_hand).abs().max() < 1e-3


def test_dynamic_guidance_scale(pipe):
    def stronger(p, i, t, tensors):
        p._guidance_scale = 2.0 + i
        return tensors

    clip = noise_clip()
    plain = pipe(clip, **CALL).latents
    assert not torch.equal(pipe(clip, **CALL, callback_on_step_end=stronger).latents, plain)
    assert pipe.guidance_scale == 4.0


def test_a_callback_for_one_clip_is_refused_for_two(pipe):
    with pytest.raises(FoleyError, match="1 rows for 2 clips"):
        pipe(
            [noise_clip(), noise_clip(seed=1)], **CALL, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5)
        )


def test_interrupt_stops_the_call(pipe):
    steps = []

    def stop(p, i, t, tensors):
        steps.append(i)
        p._interrupt = i == 1
        return tensors

    stopped = pipe(noise_clip(), **CALL, num_inference_steps=6, callback_on_step_end=stop)
    assert steps == [0, 1] and pipe.interrupt
    assert torch.isfinite(stopped.latents).all()
    pipe(noise_clip(), **CALL)
    assert not pipe.interrupt


def test_num_timesteps_is_there(pipe):
    pipe(noise_clip(), **CALL, num_inference_steps=5)
    assert pipe.num_timesteps == 5


# Moving, LoRA, hub


def test_to_dtype_says_nothing_empty(pipe, capfd, caplog):
    other = SmoothFoleyPipeline.from_random()
    log = diffusers_logging.get_logger("diffusers")
    log.addHandler(caplog.handler)
    try:
        assert set(dtypes(other.to(torch.bfloat16)).values()) == {torch.bfloat16, torch.float32}
        other.to(dtype="float16")
        other.to("cpu", torch.float32)
    finally:
        log.removeHandler(caplog.handler)
    assert caplog.messages == [] and capfd.readouterr().err == ""
    assert torch.equal(other(noise_clip(), **CALL).latents, other(noise_clip(), **CALL).latents)


def random_lora(net, layers=("to_q", "to_out.0"), rank=2, into_all=0):
    names = [n for n, m in net.named_modules() if n.endswith(layers) and isinstance(m, torch.nn.Linear)]
    g, found = torch.Generator().manual_seed(1), {}
    for name in names:
        out, into = net.get_submodule(name).weight.shape
        found[f"unet.{name}.lora_A.weight"] = torch.randn(rank, into + into_all, generator=g)
        found[f"unet.{name}.lora_B.weight"] = torch.randn(out, rank, generator=g)
    return found


def test_load_lora_weights(tmp_path):
    pytest.importorskip("peft")
    from safetensors.torch import save_file

    pipe, clip = quiet(SmoothFoleyPipeline.from_random()), noise_clip()
    before = pipe(clip, **CALL).latents
    save_file(random_lora(pipe.unet), tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path, adapter_name="loud")
    assert pipe.get_active_adapters() == ["loud"]
    loud = pipe(clip, **CALL).latents
    assert not torch.allclose(loud, before, atol=1e-3)
    assert torch.allclose(pipe(clip, **CALL, reuse=False).latents, loud, atol=1e-3)
    pipe.set_adapters("loud", 0.0)
    assert torch.allclose(pipe(clip, **CALL).latents, before, atol=1e-4)
    with pytest.raises(FoleyError, match="a LoRA is in unet: call fuse_lora"):
        pipe.save_pretrained(tmp_path / "w")
    assert not (tmp_path / "w").exists()
    pipe.unload_lora_weights()
    assert torch.equal(pipe(clip, **CALL).latents, before)


def test_a_fused_lora_is_saved(tmp_path):
    pytest.importorskip("peft")
    pipe, clip = quiet(SmoothFoleyPipeline.from_random()), noise_clip()
    pipe.load_lora_weights(random_lora(pipe.unet))
    loud = pipe(clip, **CALL).latents
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    assert torch.allclose(load(tmp_path)(clip, **CALL).latents, loud, atol=1e-3)


def test_a_lora_of_another_model_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pipe = quiet(SmoothFoleyPipeline.from_random())
    with pytest.raises(FoleyError, match="cannot be loaded as a LoRA"):
        pipe.load_lora_weights(random_lora(pipe.unet, into_all=3))
    with pytest.raises(FoleyError, match="nowhere: cannot be loaded as a LoRA"):
        pipe.load_lora_weights(str(tmp_path / "nowhere"))
    monkeypatch.setattr("smooth_foley.lora.is_peft_available", lambda: False)
    with pytest.raises(FoleyError, match=r"pip install 'smooth_foley\[lora\]'"):
        pipe.load_lora_weights(random_lora(pipe.unet))


class Hub:
    "Stands for the hub: remembers what is uploaded"

    def __init__(self, monkeypatch):
        self.files, self.calls = {}, []
        monkeypatch.setattr("huggingface_hub.create_repo", self.create_repo)
        monkeypatch.setattr("huggingface_hub.upload_folder", self.upload_folder)

    def create_repo(self, repo_id, **kwargs):
        self.calls.append((repo_id, kwargs))
        return type("Repo", (), dict(repo_id=repo_id))

    def upload_folder(self, *, folder_path, **kwargs):
        self.calls.append(kwargs)
        root = Path(folder_path)
        self.files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return "https://hub/commit"


def test_push_to_hub_uploads_the_card(pipe, folder, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    assert pipe.push_to_hub("owner/name", private=True, variant="fp16") == "https://hub/commit"
    assert hub.calls[0] == ("owner/name", dict(private=True, token=None, exist_ok=True))
    assert hub.calls[1]["commit_message"] == "Upload SmoothFoleyPipeline"
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.files and "pipeline.py" in hub.files
    assert hub.files["README.md"].startswith(b"---\n") and b"# Smooth-Foley" in hub.files["README.md"]

    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    (folder / "training").mkdir()
    (folder / "training" / "base.csv").write_text("step,loss\n")
    load(folder).save_pretrained(tmp_path / "w", push_to_hub=True, repo_id="owner/other")
    assert hub.files["README.md"].endswith(b"# Mine\n") and "training/base.csv" in hub.files
    assert hub.calls[-1]["repo_id"] == "owner/other" and (tmp_path / "w" / "model_index.json").is_file()


def test_push_to_hub_keeps_the_card_in_the_root(pipe, tmp_path, monkeypatch):
    hub = Hub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("upload").write_text("a file of that name")
    pipe.push_to_hub("owner/name", subfolder="mini")
    assert {"README.md", "mini/model_index.json", "mini/pipeline.py"} <= set(hub.files)
    assert "mini/README.md" not in hub.files and "path_in_repo" not in hub.calls[-1]


@pytest.mark.parametrize("sizes", [("30KB", None), (None, "30KB"), ("30KB", "60KB")])
def test_weights_of_an_earlier_save_are_never_read_again(sizes, tmp_path):
    pipe = quiet(SmoothFoleyPipeline.from_random())
    pipe.save_pretrained(tmp_path, variant="kept")
    others = [
        tmp_path / "unet" / "pytorch_lora_weights.safetensors",
        tmp_path / "frame_adapter" / "ip_adapter.safetensors",
    ]
    for path in others:
        path.write_bytes(b"of somebody else")
    for value, size in enumerate(sizes):
        for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.frame_adapter, pipe.temporal_adapter):
            next(part.parameters()).data.fill_(value)
        pipe.save_pretrained(tmp_path, max_shard_size=size)
    back = load(tmp_path)
    for name in ("unet", "vae", "text_encoder", "frame_adapter", "temporal_adapter"):
        assert (next(getattr(back, name).parameters()) == 1).all(), name
    assert load(tmp_path, variant="kept").unet.dtype == torch.float32 and all(path.exists() for path in others)


def test_a_folder_that_is_given_says_which_class_it_holds(folder, tmp_path):
    EulerAncestralDiscreteScheduler(num_train_timesteps=1000).save_pretrained(tmp_path / "scheduler")
    pipe = load(folder, scheduler=str(tmp_path / "scheduler"), vocoder=mini_path() / "vocoder")
    assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert type(pipe.vocoder).__name__ == "PhaseVocoder" and type(load(folder).vocoder).__name__ == "SpeechT5HifiGan"


@pytest.mark.parametrize("how", [dict(dtype=torch.bfloat16), dict(torch_dtype="bfloat16"), dict(dtype="bf16")])
def test_the_baseline_takes_the_same_words(how):
    baseline = FoleyCrafter.from_pretrained(**how)
    assert baseline.unet.dtype == baseline.frame_adapter.dtype == baseline.temporal_adapter.dtype == torch.bfloat16


def test_push_to_hub_is_refused_before_a_repository_is_made(pipe, monkeypatch):
    hub = Hub(monkeypatch)
    with pytest.raises(FoleyError, match="pickles"):
        pipe.push_to_hub("owner/name", safe_serialization=False)
    assert hub.calls == []

    def denied(*args, **kwargs):
        raise PermissionError("401 Client Error\nmore")

    monkeypatch.setattr("huggingface_hub.create_repo", denied)
    with pytest.raises(FoleyError, match="owner/name: cannot be uploaded .401 Client Error.; check"):
        pipe.push_to_hub("owner/name")


# The table of habits


def test_the_table_of_habits_names_every_test():
    cells = json.loads((ROOT / "nbs" / "12a_habits.ipynb").read_text(encoding="utf-8"))["cells"]
    page = "\n".join("".join(c["source"]) for c in cells)
    named = set(re.findall(r"`(test_\w+)`", page))
    there = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.M))
    assert named == there - {"test_the_table_of_habits_names_every_test"}
