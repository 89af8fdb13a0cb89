"Data cards and model cards: YAML that the hub accepts, and numbers that are still true"

import contextlib
import csv
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from smooth_foley.core import FoleyError
from smooth_foley.model_card import model_card

ROOT = Path(__file__).resolve().parent.parent
MINI, RESULTS = ROOT / "smooth_foley" / "weights" / "mini", ROOT / "results" / "evaluate"

CARDS = sorted((Path(__file__).resolve().parent.parent / "data_cards").glob("*.md"))


def parts(card):
    head = re.match(r"---\n(.*?)\n---\n(.*)", card.read_text(encoding="utf-8"), re.S)
    assert head, f"{card.name} has no YAML front matter"
    return yaml.safe_load(head[1]), head[2]


def test_there_are_cards():
    assert any(c.name == "passby.md" for c in CARDS)


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.name)
def test_front_matter(card):
    meta, body = parts(card)
    assert {"pretty_name", "license", "tags", "size_categories", "configs"} <= set(meta)
    assert re.fullmatch(r"n<1K|1K<n<10K|10K<n<100K|100K<n<1M|1M<n<10M", meta["size_categories"][0])
    assert all("config_name" in c for c in meta["configs"])
    assert "More Information Needed" not in body and "## Citation" in body and "\nTABLE\n" not in body


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.name)
def test_the_hub_can_read_it(card):
    from huggingface_hub import DatasetCard

    assert DatasetCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=False).data.license


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.name)
def test_numbers_come_from_their_commands(card):
    "What the code blocks of a card print stands in the card, word for word"
    _, body = parts(card)
    for code in re.findall(r"```python\n(.*?)```", body, re.S):
        if code.startswith("# not run"):
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, card.name, "exec"), {})
        assert said.getvalue().strip() in body


# Model cards


def front(text):
    "Front matter and body of a card"
    head = re.match(r"---\n(.*?)\n---\n(.*)", text, re.S)
    return yaml.safe_load(head[1]), head[2]


def light(folder, to):
    "A copy of a folder without its weights"
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))


def write_results(folder, rows):
    folder.mkdir()
    with open(folder / "summary.csv", "w", newline="") as f:
        w = csv.DictWriter(f, ["split", "measure", "system", "n", "value", "low", "high", "better"])
        w.writeheader()
        w.writerows(rows)
    return folder


def test_the_card_of_mini_says_what_files_and_results_say():
    spec = importlib.util.spec_from_file_location("cards_script", ROOT / "tools" / "cards.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.is_current(), "run: python tools/cards.py"


def test_the_hub_can_read_the_card_of_mini():
    from huggingface_hub import ModelCard

    card = ModelCard((MINI / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=False)
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("apache-2.0", "diffusers", "other")
    assert card.data.datasets == ["passby"] and "video-to-audio" in card.data.tags
    for section in ("Use", "Intended use", "Limits", "Training", "Results", "Components", "Settings"):
        assert f"\n## {section}\n" in card.text


def test_numbers_of_a_card_are_those_of_the_results(tmp_path):
    row = dict(split="passby", measure="MKL", system="ours", n=20, value=0.125, low=0.1, high=0.2, better=-1)
    other = row | dict(split="passby_continuous", value=0.5)
    results = write_results(tmp_path / "results", [row, other, row | dict(system="foleycrafter", value=0.75)])
    (results / "cost.json").write_text(json.dumps(dict(generate=dict(ours=1.25), hardware=dict(device="abacus"))))
    meta, body = front(model_card(light(MINI, tmp_path / "mini"), results))
    found = {r["dataset"]["config"]: r["metrics"] for r in meta["model-index"][0]["results"]}
    assert found["passby"] == [dict(type="mkl", value=0.125, name="MKL")]
    assert found["passby_continuous"][0]["value"] == 0.5
    assert "| MKL ↓ | passby | 20 | 0.125 [0.1, 0.2] | 0.75 [0.1, 0.2] | – |" in body
    assert "A clip takes 1.2 s (abacus)." in body
    assert re.search("Not measured: condition F1, .*FAD text", body)


def test_a_card_without_results_claims_nothing(tmp_path):
    meta, body = front(model_card(light(MINI, tmp_path / "mini"), tmp_path / "nowhere"))
    assert "model-index" not in meta and "metrics" not in meta
    assert "Not measured: condition F1" in body and "A clip takes" not in body


def test_training_of_a_card_is_what_the_logs_say(tmp_path):
    folder = light(MINI, tmp_path / "mini")
    shutil.rmtree(folder / "training")
    assert "## Training" not in model_card(folder)
    (folder / "training").mkdir()
    (folder / "training" / "recipe.json").write_text(json.dumps(dict(n_scenes=12, stages=dict(vae={}, base={}))))
    abacus = dict(device="abacus", cores=8, threads=4, torch="9.9")
    for name, seconds in (("base", 1800), ("vae", 900)):
        done = dict(stage=name, seconds_of_last_run=1.0, hardware=abacus, config=dict(train_batch_size=16))
        (folder / "training" / f"{name}.json").write_text(json.dumps(done))
        (folder / "training" / f"{name}.csv").write_text(f"step,loss,seconds\n25,1,1\n50,1,{seconds}\n")
    (folder / "training" / "scenes.json").write_text(json.dumps(dict(stage="scenes", config=None)))  # Not trained
    card = model_card(folder)
    assert "| scenes" not in card
    assert "0.8 hours of training in all. Recipe: `n_scenes` 12;" in card
    table = re.findall(r"^\| (?:vae|base) .*", card, re.M)
    assert table[0] == "| vae | 50 | 16 | 0.25 | abacus, 4 of 8 cores, torch 9.9 |" and table[1].startswith("| base")


def test_a_converted_folder_has_the_terms_of_its_checkpoints(tmp_path):
    folder = light(MINI, tmp_path / "full")
    shutil.rmtree(folder / "training")
    hub = [dict(repo="a/base", licence="CC BY-NC-SA 4.0 (code)"), dict(repo="b/clip", licence="MIT")]
    (folder / "sources.json").write_text(json.dumps(dict(dtype="float16", hub=hub)))
    meta, body = front(model_card(folder))
    assert meta["license"] == "cc-by-nc-sa-4.0" and meta["base_model"] == ["a/base", "b/clip"]
    assert "| b/clip | MIT |" in body and "stored as float16" in body and "converted and not trained" in body
    (folder / "sources.json").write_text(json.dumps(dict(dtype="float16", files={})))  # made from local files
    assert "auffusion/auffusion-full-no-adapter" in front(model_card(folder))[0]["base_model"]


def test_a_damaged_record_is_named(tmp_path):
    folder = light(MINI, tmp_path / "mini")
    (folder / "training" / "base.json").write_text("{")
    with pytest.raises(FoleyError, match="base.json: is no JSON"):
        model_card(folder)
    with pytest.raises(FoleyError, match="no model_index.json"):
        model_card(tmp_path)
