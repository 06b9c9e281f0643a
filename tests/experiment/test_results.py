"""What is read of a run: its table and sentences, and what reinforcement changed."""

import dataclasses

import numpy as np
import pytest

from flexrec.evaluation.statistics import relative_change
from flexrec.experiment.results import Results


@pytest.fixture
def results():
    users = np.repeat(np.arange(20), 2)
    rng = np.random.default_rng(0)
    means = {"base": 0.2, "warm start": 0.5, "trained": 0.55, "item-knn": 0.3, "random": 0.1, "critic": 0.4}
    needs = ("interest", "trend")
    per_list = {
        name: {need: {m: mean + rng.normal(0, 0.02, 40) for m in ("ndcg@5", "recall@5")} for need in needs}
        for name, mean in means.items()
    }
    return Results(users, per_list, {"total": 7.0})


def test_what_reinforcement_changed_is_stated_for_every_metric(results):
    for name in ("warm start", "base"):
        assert results.start == name
        stated = results.to_json()["change_by_reinforcement"]
        for need in ("interest", "trend"):
            assert set(stated[need]) == {"ndcg@5", "recall@5"}
            for metric, change in stated[need].items():
                new, old = (results.per_list[system][need][metric] for system in ("trained", name))
                assert change == dataclasses.asdict(relative_change(new, old, clusters=results.users))
        results.per_list.pop("warm start", None)  # as of a run without it


def test_the_table_has_a_row_of_what_reinforcement_changed(results):
    table = results.table()
    rows = [" ".join(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]
    changes = [row for row in rows if row.startswith(" reinforcement")]
    change = results.compare("trained", "warm start", "trend")
    assert len(changes) == 2
    assert f"{change.difference:+.3f}" in changes[1]
    assert f"{change.percent:+.1f} % [{change.percent_low:+.1f}, {change.percent_high:+.1f}] p < 0.001" in changes[1]
    assert table.caption == (
        "reinforcement: trained minus warm start. item-knn, critic: the interest they estimate x what the need "
        "multiplies it by"
    )
    assert table.title == "40 lists of 20 test users never trained on; changes are against the base"


def test_without_a_need_that_multiplies_nothing_is_said_of_it(results):
    only = {name: {"interest": needs["interest"]} for name, needs in results.per_list.items()}
    assert Results(results.users, only).table().caption == "reinforcement: trained minus warm start"


def test_printing_results_shows_table_and_sentences(results):
    shown = str(results)
    assert results.summary()[0].startswith("trained is above every baseline on every need by ndcg@5")
    for sentence in results.summary():
        assert " ".join(sentence.split()) in " ".join(shown.split())
    for text in ("item-knn", "reinforcement", "40 lists of 20 test users", "warm start"):
        assert text in shown
