"""The snippets of docs/your-data.md run, one after the other, on a shop such as the page describes."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from flexrec.data import load_interactions, parse_columns

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-data.md"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """The page's two tables, longer."""
    text = PAGE.read_text()
    (log_names, item_names), *_ = re.findall(r"^(customer\S+) +(id\S+)$", text, flags=re.MULTILINE)
    rng = random.Random(0)
    (tmp_path / "shop").mkdir()
    rows = [
        f"C-{rng.randrange(80)},SKU-{min(int(rng.paretovariate(0.6)), 40)},"
        f"{rng.randrange(1, 29):02}.{rng.randrange(1, 13):02}.2024 {rng.randrange(24):02}:05,{rng.randrange(1, 4)}"
        for _ in range(1500)
    ]
    (tmp_path / "shop" / "interactions.csv").write_text("\n".join([log_names, *rows]) + "\n")
    items = [f"SKU-{i},Thing {i},{'Kitchen|Furniture' if i % 2 else 'Garden'},{i}.50" for i in range(1, 41)]
    (tmp_path / "shop" / "items.csv").write_text("\n".join([item_names, *items]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shop"


def test_snippets_run(shop, capsys):
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) == 3
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "amount: interest is 0 up to 0" in said
    assert "lists to train on" in said


def test_usual_names_need_no_mapping(shop):
    named = load_interactions(shop, columns="user=customer,item=sku,timestamp=when", num_candidates=10)
    found = load_interactions(shop, num_candidates=10)
    assert [lst.candidates.tolist() for lst in found.train] == [lst.candidates.tolist() for lst in named.train]
    assert found.catalogue.topics[0] == ("Kitchen", "Furniture")


def test_the_yaml_is_a_mapping(tmp_path):
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "columns.yaml").write_text(text)
    mapping = parse_columns(tmp_path / "columns.yaml")
    assert mapping.interactions["user"] == ("customer",)
    assert mapping.items["categories"] == ("department", "brand")
