"Data cards: YAML that the hub accepts, and numbers that are still true"

import contextlib
import io
import re
from pathlib import Path

import pytest
import yaml

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
