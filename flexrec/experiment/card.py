"""The card of a run, README.md in its folder: what it is, what it was trained on, what it came to, how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexrec.experiment.files import read_json
from flexrec.experiment.needs import known_needs
from flexrec.experiment.results import BASE, TRAINED
from flexrec.experiment.run_folder import RunFolder, RunInfo
from flexrec.task.mixtures import find_need

CARD = "README.md"
_CHANGES = "changes_"  # in metrics.json, before the metric

_HEAD = """---
library_name: flexrec
pipeline_tag: text-ranking
tags:
- recommendation
- reranking
- reinforcement-learning
{base}---

# {name}: ranks by what is asked for

A language model that ranks candidates by a need in words, for somebody of whom it knows what they had before. It was
trained with FlexRec: supervision first, then reinforcement with a reward for every ranked item.

| | |
|---|---|
| began as | {model} |
| data | {data} |
| a candidate is named by | `{encoding}` |
| history | the latest {history} items |
| ranks | {ranks} |
"""
_NEEDS = """
## Needs

Those that it was trained on. A need may also be a mixture of them (`"0.7 interest + 0.3 explore"`), or an instruction
in words like these:

| need | in words |
|---|---|
{rows}
"""
_RESULTS = """
## Results

On {lists} test lists of users that were never trained on. The last column is the trained model minus the ranker, with
the 95 % interval over users.

| need | ranker | {metric} | trained minus it |
|---|---|---|---|
{rows}
"""
_USE = """
## How to use it

```python
from flexrec import Ranker

ranker = Ranker.from_pretrained("{name}")  # this folder, or its name at the hub
request = {{"need": "{need}", "history": {history_ids}, "candidates": {candidate_ids}, "top_n": 3}}
print(ranker.rank([request]))
```

or `flexrec serve --run {name}`, which speaks `/v1/rerank` and has a page to try it. `score` of an answer is the
probability that the item would be the first of all candidates; it says how the model compares them, and is no
probability that anybody likes the item.
"""


def card_of(run: RunFolder, info: RunInfo, metrics: Mapping[str, Any] | None = None) -> str:
    """The text of a run's card.

    Args:
        metrics: what metrics.json holds, or is going to; None: what is in the folder.
    """
    if metrics is None:
        path = run.path / "metrics.json"
        metrics = read_json(path) if path.is_file() else {}
    name = run.path.resolve().name
    at_the_hub = info.model.count("/") == 1 and not Path(info.model).exists()
    text = _HEAD.format(
        name=name,
        base=f"base_model: {info.model}\n" if at_the_hub else "",
        model=f"`{info.model}`" if info.model else "a small model of its own",
        data=_data(run, info),
        encoding=info.encoding,
        history=info.max_history,
        ranks="all candidates" if info.num_ranked is None else f"the best {info.num_ranked}",
    )
    text += _NEEDS.format(rows=_wordings(info))
    for key, changes in metrics.items():
        if key.startswith(_CHANGES) and (rows := _rows(changes)):
            text += _RESULTS.format(metric=key.removeprefix(_CHANGES).upper(), lists=run.num_measured(), rows=rows)
    catalogue = run.read_catalogue()[0]
    example = [list(catalogue.ids[:2]), list(catalogue.ids[2:6])]
    return text + _USE.format(
        name=name, need=info.needs[0].replace('"', '\\"'), history_ids=example[0], candidate_ids=example[1]
    )


def _data(run: RunFolder, info: RunInfo) -> str:
    path = run.path / "data.json"
    if not path.is_file():
        return _cell(info.dataset)
    about = read_json(path)
    return (
        f"{_cell(about['name'])}: {about['items']:,} items, {about['interactions']:,} interactions, "
        f"{about['train']:,} lists to train on"
    )


def _wordings(info: RunInfo) -> str:
    known = known_needs(kept=info.own_needs)
    rows = []
    for name in info.needs:
        try:
            wording = find_need(name, known).wordings[0]
        except ValueError:  # made in Python
            wording = "(made in Python: name it when the ranker is loaded)"
        rows.append(f"| {_cell(name)} | {_cell(wording)} |")
    return "\n".join(rows)


def _rows(changes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The trained model and what it is compared with, by need, the best of those first."""
    rows = []
    for need, by_ranker in changes.items():
        if BASE not in by_ranker:
            continue
        rows.append(f"| {_cell(need)} | **{TRAINED}** | **{by_ranker[BASE]['mean_new']:.3f}** | |")
        for ranker, change in sorted(by_ranker.items(), key=lambda pair: -pair[1]["mean_base"]):
            rows.append(f"| {_cell(need)} | {_cell(ranker)} | {change['mean_base']:.3f} | {_difference(change)} |")
    return "\n".join(rows)


def _difference(change: Mapping[str, Any]) -> str:
    """With its interval, which the lists of a single user do not have: null in a file, NaN before."""
    low, high = change["difference_low"], change["difference_high"]
    interval = "" if low is None or low != low else f" [{low:+.3f}, {high:+.3f}]"
    return f"{change['difference']:+.3f}{interval}"


def _cell(text: str) -> str:
    """A text in a table, on one line."""
    return " ".join(str(text).split()).replace("|", "\\|")
