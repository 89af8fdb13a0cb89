"Nothing that is read runs code, nothing that is printed or opened does; nothing is written elsewhere"

import ast
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from smooth_foley.core import FoleyError, atomic_path, mini_path, say
from smooth_foley.data.arrays import read_array, read_arrays, write_array, write_arrays
from smooth_foley.data.tables import RowLog, plain_row, read_rows, sheet_cell, write_cells, write_json, write_rows
from smooth_foley.train.checkpoints import TrainState, latest_checkpoint, load_checkpoint, save_checkpoint
from smooth_foley.train.loop import TrainConfig, train
from smooth_foley.train.records import CsvLog, save_average

PACKAGE = Path(__file__).resolve().parent.parent / "smooth_foley"
MODULES = {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text("utf-8")) for p in PACKAGE.rglob("*.py")}


def calls(name):
    "Every call of a dotted name in the package: module, line, keywords"
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                yield module, node.lineno, {k.arg: ast.unparse(k.value) for k in node.keywords}


class Bomb:
    "What a pickle can hold: a call"

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# --- what reads
def test_pickles_are_read_for_their_weights_only():
    assert all(k.get("weights_only") == "True" for *_, k in calls("torch.load"))
    for name in ("pickle.load", "pickle.loads", "joblib.load", "eval", "exec", "os.system", "__import__", "yaml.load"):
        assert not [m for m, *_ in calls(name) if (name, m) != ("exec", "__main__.py")], name
    assert ast.unparse(MODULES["__main__.py"]).count("exec(") == ast.unparse(MODULES["__main__.py"]).count("exec('')")
    for name in ("save_state", "load_state", "register_for_checkpointing"):  # Accelerate's own are pickles
        assert not [
            m for m, t in MODULES.items() for n in ast.walk(t) if isinstance(n, ast.Attribute) and n.attr == name
        ]


def test_arrays_are_read_in_one_place():
    assert {m for m, *_ in calls("np.load")} == {"data/arrays.py"}
    assert all(k["allow_pickle"] == "False" for *_, k in calls("np.load"))
    assert {m for m, *_ in calls("np.savez")} | {m for m, *_ in calls("np.save")} <= {"data/arrays.py"}


def test_no_class_is_chosen_by_a_file():
    "Automatic classes ask the folder what to be; ours are named here"
    text = {m: ast.unparse(t) for m, t in MODULES.items()}
    automatic = [m for m, t in text.items() if any(f"{a}." in t for a in ("AutoTokenizer", "AutoModel", "AutoConfig"))]
    assert not automatic
    tokenizers = [*calls("CLIPTokenizer.from_pretrained"), *calls("RobertaTokenizer.from_pretrained")]
    ours = ("train/diffusion.py",)  # What a run wrote itself
    assert len(tokenizers) >= 4
    assert all(k.get("trust_remote_code") == "False" for m, _, k in tokenizers if m not in ours)
    chosen = [m for m, t in text.items() if "getattr(diffusers" in t or "getattr(transformers" in t]
    assert chosen == ["schedule.py"]


def test_the_media_library_gets_files_only():
    "Paths are opened as `file:`, and what is written is a temporary name with an absolute path, or no path at all"
    opened = {m: [ast.unparse(n.args[0]) for n in ast.walk(t) if isinstance(n, ast.Call) and n.args
                  and ast.unparse(n.func) == "av.open"] for m, t in MODULES.items()}  # fmt: skip
    opened = {m: args for m, args in opened.items() if args}
    assert opened.pop("containers.py") == ["f'file:{Path(path).absolute()}'"]
    assert {a for args in opened.values() for a in args} <= {"str(tmp)", "target", "stream", "memory"}


def test_a_temporary_name_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http:/127.0.0.1:9/x.mp4", "12:30 take.mp4", "concat:a|b.wav"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(name) as tmp:
            assert tmp.is_absolute() and ":" not in tmp.name
            tmp.write_text("x")
        assert Path(name).read_text() == "x"


# --- checkpoints
class Alone:
    is_main_process, process_index = True, 0

    def wait_for_everyone(self):
        pass


def state(width=2, decays=(0.5,)):
    torch.manual_seed(0)
    model = nn.Linear(width, 1)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    opt.step()
    return TrainState(model, opt, [EMAModel(model.parameters(), decay=d) for d in decays])


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(Alone(), tmp_path, state())
    return latest_checkpoint(tmp_path)


def test_a_checkpoint_holds_no_pickle(saved):
    assert {p.suffix for p in saved.iterdir()} == {".json", ".safetensors"}
    for path in saved.iterdir():
        assert not zipfile.is_zipfile(path) and path.read_bytes()[:1] != b"\x80"


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "random-0.json"])
def test_a_planted_pickle_is_not_run(saved, name, tmp_path):
    (saved / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    (saved / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(FoleyError, match="cannot be read"):
        load_checkpoint(saved, state())
    assert not (tmp_path / "ran").exists()


def test_an_old_checkpoint_is_refused_in_one_line_and_not_run(tmp_path):
    old = tmp_path / "checkpoint-5"
    old.mkdir()
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"):
        torch.save(Bomb(tmp_path / "ran"), old / name)
    cfg = TrainConfig(max_train_steps=1, train_batch_size=1, mixed_precision="no")
    with pytest.raises(FoleyError, match="checkpoint-5: holds pickles of an older version, which are not read"):
        train(nn.Linear(1, 1), None, 1, cfg, tmp_path)
    assert not (tmp_path / "ran").exists()


CHANGES = {
    "missing average.0.0": lambda t: t.pop("average.0.0"),
    "missing model.bias": lambda t: t.pop("model.bias"),
    "missing optimizer.0.exp_avg_sq": lambda t: t.pop("optimizer.0.exp_avg_sq"),
    "unexpected average.1.0": lambda t: t.update({"average.1.0": torch.zeros(1, 2)}),
    "another shape or type average.0.0": lambda t: t.update({"average.0.0": torch.zeros(3, 2)}),
    "another shape or type optimizer.1.exp_avg": lambda t: t.update({"optimizer.1.exp_avg": torch.zeros(2)}),
    "another shape or type model.weight": lambda t: t.update({"model.weight": torch.zeros(1, 2).half()}),
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_checkpoint_that_does_not_fit_changes_nothing(saved, said):
    tensors = load_file(saved / "state.safetensors")
    CHANGES[said](tensors)
    save_file(tensors, saved / "state.safetensors")
    mine = state()
    before = [p.clone() for p in (*mine.params, *mine.emas[0].shadow_params)]
    with pytest.raises(FoleyError, match=f"does not fit this run.*{said}"):
        load_checkpoint(saved, mine)
    assert all(torch.equal(a, b) for a, b in zip(before, (*mine.params, *mine.emas[0].shadow_params)))


def test_averages_of_other_decays_and_stages_of_other_sizes_are_refused(saved):
    for other in (state(decays=(0.9,)), state(decays=()), state(width=3)):
        with pytest.raises(FoleyError, match="does not fit this run"):
            load_checkpoint(saved, other)


BROKEN = ["", "{", "[]", "null", '"x"', '{"step": "many"}', '{"step": 1e999, "seconds": 0, "averages": []}', "[" * 9999]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("name", ["state.json", "random-0.json"])
def test_broken_json_of_a_checkpoint_is_one_line(saved, name, text):
    (saved / name).write_text(text)
    with pytest.raises(FoleyError, match=r"--no-resume"):
        load_checkpoint(saved, state())


def test_folders_and_files_that_are_called_like_checkpoints(tmp_path):
    for name in ("checkpoint-x", "checkpoint-", "checkpoint--3", "checkpoint-7 (copy)"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("")
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(Alone(), tmp_path, state())
    assert latest_checkpoint(tmp_path).name == "checkpoint-0"


# --- folders of models
@pytest.fixture
def model(tmp_path):
    "The shipped folder, cheap to copy"
    copy = tmp_path / "model"
    shutil.copytree(mini_path(), copy, copy_function=os.symlink)
    return copy


def rewrite(path, **change):
    text = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(text | change))


INDEX = json.loads((mini_path() / "model_index.json").read_text())
COMPONENTS = [k for k, v in INDEX.items() if isinstance(v, list) and len(v) == 2 and (mini_path() / k).is_dir()]
FOREIGN = [
    ["os", "system"],
    ["diffusers", "DiffusionPipeline"],
    ["diffusers.utils.dynamic_modules_utils", "get_class_from_dynamic_module"],
    ["transformers", "AutoModel"],
    ["transformers", "CLIPVisionModel"],
    ["smooth_foley.train.loop", "train"],
    ["smooth_foley.core"],
    ["a", "b", "c"],
    None,
    3,
    {"x": 1},
]


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_of_a_known_class(model, name):
    from smooth_foley.loading import load_parts
    from smooth_foley.pipeline import SmoothFoleyPipeline

    others = {k: None for k in COMPONENTS if k != name}
    for spec in FOREIGN:
        rewrite(model / "model_index.json", **{name: spec})
        with pytest.raises(FoleyError, match=f"{name} is a .* which is none of ours"):
            load_parts(model, SmoothFoleyPipeline, others)


@pytest.mark.parametrize("part", ["tokenizer", "frame_encoder"])
def test_code_beside_a_tokenizer_is_not_run(model, part, tmp_path, monkeypatch):
    from smooth_foley.clip import FrameEncoder
    from smooth_foley.loading import load_part

    ran = tmp_path / "ran"
    code = f"from transformers import CLIPTokenizer as Mine\nopen({str(ran)!r}, 'w')\n"
    (model / part / "mine.py").write_text(code)
    rewrite(
        model / part / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]}, tokenizer_class="Mine"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(FoleyError, match="names code to load"):
        if part == "tokenizer":
            load_part(model / part, "transformers", "CLIPTokenizer")
        else:
            FrameEncoder.from_pretrained(model / part)
    assert not ran.exists()


def test_networks_of_other_libraries_are_not_built():
    from smooth_foley.clip import build_clip, mini_clip_cfg

    for tower, key in (("text_cfg", "hf_model_name"), ("vision_cfg", "timm_model_name")):
        cfg = mini_clip_cfg(520)
        cfg[tower][key] = "hf-hub:somebody/something"
        with pytest.raises(FoleyError, match="of another library"):
            build_clip(cfg)


def test_an_attention_from_the_hub_is_refused(model):
    from smooth_foley.loading import load_part

    rewrite(model / "text_encoder" / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(FoleyError, match="names code to load .somebody/kernel."):
        load_part(model / "text_encoder", "transformers", "CLIPTextModel")


# --- arrays
def npz(path, **members):
    "A zip whose members are given as bytes"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items():
            z.writestr(name.replace("__", "/") + ".npy", data)
    return path


def npy(shape, dtype="<f8", body=b""):
    "The head of a `.npy`, with any body"
    head = repr(dict(descr=dtype, fortran_order=False, shape=shape)).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + body


@pytest.mark.parametrize(
    "data",
    [
        npy((10**12,)),
        npy((2**62, 2**62)),
        npy((-1,)),
        npy((3,), body=b"12"),
        npy((1,), "|O", pickle.dumps([1])),
        npy((3,))[:7],
        b"",
        npy((0, 10**15), body=b""),
    ],
    ids=["claims too much", "overflows", "negative", "short", "object", "no head", "empty", "no values"],
)
def test_a_head_that_lies_takes_no_memory(tmp_path, data):
    path = npz(tmp_path / "x.npz", a=data)
    try:
        found = read_arrays(path, ("a",))
        assert found["a"].size == 0
    except FoleyError as e:
        assert "x.npz" in str(e)


def test_bombs_strangers_and_doubles_are_refused(tmp_path):
    bomb = write_arrays(tmp_path / "bomb.npz", compress=True, a=np.zeros(10**7))
    with pytest.raises(FoleyError, match="would take 80 MB"):
        read_arrays(bomb, ("a",))
    with pytest.raises(FoleyError, match="would take 80 MB"):
        read_arrays(bomb, (), also=None)
    few = write_arrays(tmp_path / "few.npz", a=1, b=2)
    for names, said in ((("a",), "unknown b"), (("a", "b", "c"), "no c")):
        with pytest.raises(FoleyError, match=said):
            read_arrays(few, names)
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "text.npy").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for read, name in ((lambda p: read_arrays(p, ()), "text.npz"), (read_array, "text.npy"), (read_array, "none.npy")):
        with pytest.raises(FoleyError, match="cannot be read"):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


# --- what is shown
NASTY = "\x1b]0;t\x07\x1b[2J <script>alert(1)</script>\n=cmd|' /C calc'!A0 \u202egnp.\udce9"


def test_lines_are_printed_in_one_place():
    printed = {m for m, *_ in calls("print")}
    assert printed <= {"core.py", "data/audit.py"}  # audit.py: JSON between two processes
    assert len(list(calls("say"))) > 40


def test_what_is_printed_is_one_line_of_text(capsys):
    say(f"wrote {NASTY}", 3)
    said = capsys.readouterr().out
    assert said.count("\n") == 2 and all(c.isprintable() for c in said.replace("\n", ""))
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("café", file=narrow)
    narrow.flush()
    assert narrow.buffer.getvalue() == b"caf\\xe9\n"


def test_html_is_escaped_wherever_it_is_made():
    for module, tree in MODULES.items():
        text = ast.unparse(tree)
        if module != "_modidx.py" and ("HTML(" in text or "_repr_html_" in text):
            assert "html.escape" in text or ".players import" in text or module == "players.py", module


def test_a_widget_shows_names_as_text(tmp_path):
    pytest.importorskip("ipywidgets")
    from smooth_foley.app.review import review
    from smooth_foley.data.items import Item

    items = [Item("<img src=x onerror=y>", 0.0, "<b>dog</b>", "test"), Item("b", 0.0, "dog barking", "test")]
    r = review(items, tmp_path / "<i>.csv", notes={items[0].name: NASTY})
    for title in (r.title.value, r.go(2) or r.title.value):
        assert "<" not in title and "\x1b" not in title and "&lt;" in title


CELLS = [
    "=1+1",
    "+1+1",
    "-1+1|x",
    "@SUM(A1)",
    "\t=1",
    "'=1",
    "''@x",
    " =x",
    "-0DLPzsiXXE",
    "-1.5",
    "+3",
    "=",
    "ok",
]


def test_tables_do_not_compute(tmp_path):
    rows = [dict(id=c, n=-1.5, note=f"{c} more") for c in CELLS]
    write_rows(tmp_path / "t.csv", rows, ("id", "n", "note"))
    back = read_rows(tmp_path / "t.csv", ("id", "n", "note"))
    assert [(r["id"], r["note"]) for r in back] == [(r["id"], r["note"]) for r in rows]
    assert sheet_cell("dog\r=1") == r"dog\r=1"
    for cell in CELLS:
        shown = str(sheet_cell(cell))
        harmless = not shown.strip().startswith(("=", "+", "-", "@")) or shown in ("-0DLPzsiXXE", "-1.5", "+3")
        assert harmless and plain_row({"x": shown}) == {"x": cell}


def test_every_table_goes_through_the_writer_that_escapes():
    "`csv` writes only in the tables' room, and where each cell is passed through `sheet_cell`"
    for module, tree in MODULES.items():
        text = ast.unparse(tree)
        if ("csv.writer(" in text or "DictWriter(" in text) and module not in ("data/tables.py", "train/records.py"):
            assert "sheet_cell" in text, module


# --- where it is written
def png(path):
    from smooth_foley.listen.ground_files import plot_files

    plot_files({"a.wav": (np.arange(3.0), np.zeros(3))}, path)


def wav(path):
    from smooth_foley.media import write_wav

    write_wav(path, np.zeros(10))


def video(path):
    from smooth_foley.media import write_video

    write_video(path, np.zeros((2, 16, 16, 3), np.uint8))


def results(path):
    from smooth_foley.compare.folders import write_results

    write_results(path, [dict(a=1.0)], ["a"])


def average(path):
    s = state()
    save_average(path, s.model, s.params, s.emas[0])


def log(path):
    with RowLog(path) as f:
        f.append(dict(a=1))


def jsonl(path):
    CsvLog(path)(step=1, loss=0.5)


def arrays_in_place(path):
    from smooth_foley.train.scenes import open_arrays

    open_arrays(path.parent, {path.stem: ("uint8", (3,))}, "w")[path.stem].flush()


WHOLE = {
    "out.csv": lambda p: write_rows(p, [dict(a=1)], ("a",)),
    "cells.tsv": lambda p: write_cells(p, [(1, 2)], delimiter="\t"),
    "results.csv": results,
    "out.json": lambda p: write_json(p, {}),
    "out.npz": lambda p: write_arrays(p, a=1),
    "out.npy": lambda p: write_array(p, np.arange(3)),
    "out.png": png,
    "out.wav": wav,
    "out.mp4": video,
    "ema.safetensors": average,
}
GROWING = {"log.jsonl": log, "log.csv": jsonl, "mel.npy": arrays_in_place}


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing"])
@pytest.mark.parametrize("name", [*WHOLE, *GROWING])
def test_no_writer_follows_a_link_that_leads_out(tmp_path, name, there):
    target, link = tmp_path / "else" / name, tmp_path / "out" / name
    target.parent.mkdir()
    link.parent.mkdir()
    if there:
        target.write_text("precious")
    link.symlink_to(target)
    (WHOLE | GROWING)[name](link)
    assert link.is_file() and not link.is_symlink()
    assert target.read_text() == "precious" if there else not target.exists()


@pytest.mark.parametrize("name", WHOLE)
def test_writers_follow_a_link_inside_and_keep_the_mode(tmp_path, name):
    real, link = tmp_path / f"real-{name}", tmp_path / name
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real.name)
    WHOLE[name](link)
    assert link.is_symlink() and real.read_bytes() != b"old"
    assert real.stat().st_mode & 0o777 == 0o640


def library_layout(folder):
    from smooth_foley.train.loop import save_trained
    from smooth_foley.vocoder import make_vocoder

    save_trained(make_vocoder(8, 16, (5, 4, 4, 2), (11, 8, 8, 4), (3,), ((1,),)), folder)


def mel(folder):
    from smooth_foley.mel import MelTransform

    MelTransform.mini().save_pretrained(folder)


@pytest.mark.parametrize("write", [library_layout, mel])
def test_no_folder_is_written_through_a_link(tmp_path, write):
    target, folder = tmp_path / "precious", tmp_path / "out"
    target.write_text("precious")
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(target)
    write(folder)
    assert target.read_text() == "precious" and (folder / "config.json").is_file()


def test_a_checkpoint_in_the_place_of_a_link(tmp_path):
    target, out = tmp_path / "precious", tmp_path / "out"
    target.mkdir()
    (target / "file").write_text("precious")
    out.mkdir()
    for name in ("checkpoint-0", ".tmp-0", ".tmp-9"):
        (out / name).symlink_to(target)
    save_checkpoint(Alone(), out, state())
    assert (target / "file").read_text() == "precious" and len(list(target.iterdir())) == 1
    assert not latest_checkpoint(out).is_symlink()


def test_what_writes_a_file_goes_through_a_temporary_name_or_drops_links():
    "A module that opens files to write says how it treats links"
    guards = ("atomic_path", "own_file", "own_folder", "new_folder", "mkdtemp(", "_remove(", "write_text('5')")
    for module, tree in MODULES.items():
        text = ast.unparse(tree)
        writes = any(w in text for w in ("write_text(", "savefig(", "'wb')", "'ab')", "save_file(", "open_memmap("))
        if writes and module not in ("paper/figures.py", "app/review.py", "players.py"):  # these draw into memory
            assert any(g in text for g in guards), module
