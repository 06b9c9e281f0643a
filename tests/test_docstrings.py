"""Every public name has an example in its docstring, and the example runs."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import math
import pkgutil
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexrec
from flexrec import checks
from flexrec.data import simulate
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.run_folder import RunFolder, RunInfo
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder

# Not flexrec.experiment: a run takes minutes, and README shows how to start one.
FRONTS = (
    "flexrec",
    "flexrec.trainer",
    "flexrec.task",
    "flexrec.data",
    "flexrec.rankings",
    "flexrec.decoding",
    "flexrec.evaluation",
)


def public_objects() -> dict[str, Any]:
    """Functions and classes of the fronts by name, each once; what functions return is shown by the functions."""
    found: dict[str, Any] = {}
    for front in FRONTS:
        module = importlib.import_module(front)
        for name in module.__all__:
            thing = getattr(module, name)
            is_class = inspect.isclass(thing) and not issubclass(thing, tuple)
            if (inspect.isfunction(thing) or is_class) and thing not in found.values():
                found[f"{front}.{name}"] = thing
    return found


OBJECTS = public_objects()
TRAINER = "flexrec.trainer.FlexRecTrainer"


def run(name: str, world: dict[str, Any]) -> dict[str, Any]:
    """Run the examples of a docstring; the names that they have made."""
    text = inspect.getdoc(OBJECTS[name]) or ""
    assert ">>>" in text, f"the docstring of {name} has no example"
    names = {"flexrec": flexrec, "math": math, "np": np, "torch": torch, **world}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)
    return test.globs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The model and the examples that trainers' docstrings take from the first of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trainer"))
        names = run(TRAINER, {})
    return {name: names[name] for name in ("model", "examples")}


def make_run(folder: Path) -> None:
    """The folder of a run that knows items by whole numbers, untrained."""
    folder.mkdir(parents=True)
    dataset = simulate(num_users=24, num_items=70, num_topics=4, num_test_users=6, num_candidates=8)
    catalogue = dataclasses.replace(dataset.catalogue, ids=tuple(map(str, range(70))))
    dataset = dataclasses.replace(dataset, catalogue=catalogue)
    tokenizer = build_tokenizer(catalogue, get_need("interest").wordings)
    builder = PromptBuilder(tokenizer, encoding="item_token")
    info = RunInfo.of(ExperimentConfig(output=str(folder)), builder, dataset, [get_need("interest")])
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    RunFolder(folder).save(model, tokenizer, info, dataset)


@pytest.mark.parametrize("name", [name for name in OBJECTS if name != TRAINER])
def test_example_runs(name: str, world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "flexrec.data.draw_description":
        pytest.importorskip("matplotlib")
    if name == "flexrec.Ranker":
        make_run(tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "_value_checks", checks._value_checks)  # which one of them switches
    run(name, world)


NAMED = re.compile(r"`(flexrec(?:\.\w+)+)`")
HEAVY = "flexrec.integrations."  # modules that import what may not be installed


def names_in(path: Path) -> set[str]:
    return {name for name in NAMED.findall(path.read_text(encoding="utf-8")) if not name.startswith(HEAVY)}


SOURCES = sorted(Path(flexrec.__file__).parent.rglob("*.py"))


def exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_what_docstrings_name_exists() -> None:
    named = {name: path.name for path in SOURCES for name in names_in(path)}
    assert len(named) > 20
    assert not {name: place for name, place in named.items() if not exists(name)}
    assert not exists("flexrec.validation")
