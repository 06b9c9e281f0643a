"""Metrics per list, bootstrap intervals and paired tests: values, coverage, clusters, edge cases, tables."""

import io
import itertools

import numpy as np
import pytest
import torch
from rich.console import Console

from flexrec.evaluation.statistics import (
    Comparison,
    bootstrap_interval,
    comparison_markdown,
    comparison_table,
    rank_metrics,
    relative_change,
)


def test_rank_metrics_known_values():
    got = rank_metrics(np.array([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]), ("ndcg@5", "recall@1", "mrr@5", "recall@5"))
    discount = 1 / np.log2([2, 3, 4])
    ideal = discount[0] + 0.5 * discount[1]
    np.testing.assert_allclose(got["ndcg@5"], [(discount[1] + 0.5 * discount[2]) / ideal, 0.0])
    np.testing.assert_allclose(got["recall@1"], [0.0, 0.0])
    np.testing.assert_allclose(got["mrr@5"], [0.5, 0.0])
    np.testing.assert_allclose(got["recall@5"], [1.0, 0.0])
    assert all(values.dtype == np.float64 and values.shape == (2,) for values in got.values())


def test_rank_metrics_of_lists_of_different_lengths():
    rows = [np.array([0.0, 1.0]), np.array([1.0]), np.array([0.5, 0.0, 1.0, 0.2])]
    ragged = rank_metrics(rows, ("ndcg@5", "precision"))
    padded = np.full((3, 4), 7.0)  # what lies beyond a list's length does not count
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    by_lengths = rank_metrics(padded, ("ndcg@5", "precision"), lengths=np.array([2, 1, 4]))
    for metric in ragged:
        np.testing.assert_array_equal(ragged[metric], by_lengths[metric])
        for i, row in enumerate(rows):
            np.testing.assert_allclose(ragged[metric][i], rank_metrics(row[None], (metric,))[metric][0])


def test_rank_metrics_takes_tensors_and_no_lists():
    gains = torch.rand(4, 6)
    np.testing.assert_array_equal(rank_metrics(gains)["ndcg@5"], rank_metrics(gains.numpy())["ndcg@5"])
    assert rank_metrics([])["ndcg@5"].shape == (0,)


@pytest.mark.parametrize(
    ("gains", "lengths", "message"),
    [
        ([np.zeros((2, 2))], None, r"gains\[0\] must have shape \(K,\)"),
        ([np.zeros(2)], np.array([2]), "lengths are those of the arrays"),
        (np.array([[np.nan, 1.0]]), None, "gains"),
        (np.array([[-1.0, 1.0]]), None, "gains"),
    ],
)
def test_rank_metrics_wrong_input(gains, lengths, message):
    with pytest.raises(ValueError, match=message):
        rank_metrics(gains, lengths=lengths)


def test_interval_equals_the_normal_one_for_many_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    low, high = bootstrap_interval(values, num_samples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        low, high = bootstrap_interval(rng.exponential(1.0, 60), level=0.9, num_samples=400, seed=seed)
        hits += low <= 1.0 <= high
    assert 0.83 <= hits / 300 <= 0.95  # 0.9 less the known few per cent for 60 skewed values, 3 sigma of 300 trials


def test_clusters_widen_the_interval_by_the_design_effect():
    # 100 users with 9 identical lists each hold the information of 100 lists, not of 900.
    per_user = np.random.default_rng(2).normal(size=100)
    values, users = np.repeat(per_user, 9), np.repeat(np.arange(100) * 7, 9)
    width = {
        name: np.subtract(*bootstrap_interval(values, clusters=clusters)[::-1])
        for name, clusters in (("lists", None), ("users", users))
    }
    assert width["users"] / width["lists"] == pytest.approx(3.0, rel=0.15)
    alone = bootstrap_interval(per_user)
    np.testing.assert_allclose(bootstrap_interval(values, clusters=users), alone, rtol=1e-9)


def test_one_value_and_one_user():
    """Say nothing of others: there is no interval, and there are no tests."""
    assert np.isnan(bootstrap_interval(np.array([0.4]))).all()
    assert np.isnan(bootstrap_interval(np.array([0.0, 1.0]), clusters=np.array([5, 5]))).all()
    change = relative_change(np.array([0.5, 1.0]), np.array([0.5, 0.5]), clusters=np.array([5, 5]))
    assert (change.difference, change.percent) == (0.25, 50.0)
    ends = [change.difference_low, change.difference_high, change.percent_low, change.percent_high, change.p_value]
    assert np.isnan(ends).all()


def test_tables_of_one_user_and_of_a_base_of_zeros_have_no_nan():
    users = np.array([5, 5])
    results = {
        "base": {"interest": {"ndcg@5": np.array([0.25, 0.25])}, "trend": {"ndcg@5": np.zeros(2)}},
        "trained": {"interest": {"ndcg@5": np.array([0.5, 0.5])}, "trend": {"ndcg@5": np.array([0.1, 0.3])}},
    }
    lines = comparison_markdown(results, clusters=users).splitlines()
    assert lines[3] == "| interest | trained | 0.500 | +100.0 % | one user: no interval |  |"
    assert lines[5] == "| trend | trained | 0.200 | +0.200 | one user: no interval |  |"
    cells = list(comparison_table(results, clusters=users).columns[-1].cells)
    assert cells == ["", "", "+100.0 % one user: no interval", "", "", "+0.200 one user: no interval"]
    lines = comparison_markdown(results).splitlines()
    assert lines[5].startswith("| trend | trained | 0.200 | +0.200 | +0.100, +0.300 |")


def test_pairs_are_rows_of_differences():
    rng = np.random.default_rng(2)
    users = np.repeat(np.arange(30), 2)
    results = {
        name: {"interest": {m: mean + rng.normal(0, 0.05, 60) for m in ("ndcg@5", "mrr@5")}}
        for name, mean in (("base", 0.2), ("start", 0.5), ("trained", 0.52))
    }
    pairs = {"gained": ("trained", "start")}
    row = comparison_markdown(results, clusters=users, pairs=pairs).splitlines()[-1].strip("| ").split(" | ")
    of = {
        metric: relative_change(*(results[name]["interest"][metric] for name in pairs["gained"]), clusters=users)
        for metric in ("ndcg@5", "mrr@5")
    }
    change = of["ndcg@5"]
    p_value = f"{change.p_value:.3f}" if change.p_value >= 0.001 else "< 0.001"
    interval = f"{change.percent_low:+.1f}, {change.percent_high:+.1f}"
    assert row == [
        "interest",
        "gained",
        *(f"{of[m].difference:+.3f}" for m in ("ndcg@5", "mrr@5")),
        f"{change.percent:+.1f} %",
        interval,
        p_value,
    ]
    table = comparison_table(results, clusters=users, pairs=pairs, caption="what was gained")
    assert list(table.columns[0].cells)[-1] == " gained"
    assert list(table.columns[-1].cells)[-1] == f"{change.percent:+.1f} % [{interval}] p {p_value}"
    assert table.caption == "what was gained"


def test_relative_change_of_a_clear_gain():
    rng = np.random.default_rng(3)
    base = rng.uniform(0.2, 0.6, 400)
    new = base * 1.2 + rng.normal(0, 0.02, 400)
    change = relative_change(new, base)
    assert change.mean_new == pytest.approx(new.mean())
    assert change.mean_base == pytest.approx(base.mean())
    assert change.difference == pytest.approx(new.mean() - base.mean())
    assert change.percent == pytest.approx(100 * (new.mean() / base.mean() - 1))
    assert change.difference_low < change.difference < change.difference_high
    assert change.percent_low < change.percent < change.percent_high
    assert change.percent_low > 0
    assert change.p_value == pytest.approx(1 / 2001)
    # Paired: the intervals do not feel that lists differ in difficulty.
    assert change.difference_high - change.difference_low < 0.02


def test_relative_change_percentage_interval_by_the_delta_method():
    rng = np.random.default_rng(4)
    base = rng.uniform(0.2, 0.6, 3000)
    new = base + rng.normal(0.03, 0.1, 3000)
    change = relative_change(new, base, num_samples=4000)
    ratio = new.mean() / base.mean()
    half = 196 * (new - ratio * base).std() / (base.mean() * np.sqrt(len(base)))
    assert change.percent_high - change.percent_low == pytest.approx(2 * half, rel=0.1)


def test_p_value_equals_full_enumeration():
    rng = np.random.default_rng(5)
    new, base = rng.normal(0.4, 1.0, 24), np.zeros(24)
    users = np.repeat(np.arange(8), 3)
    sums = np.array([new[users == u].sum() for u in range(8)])
    flips = np.array(list(itertools.product([-1.0, 1.0], repeat=8))) @ sums
    exact = (np.abs(flips) >= abs(sums.sum()) - 1e-12).mean()
    change = relative_change(new, base, clusters=users, num_samples=20000)
    assert change.p_value == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20000))


def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(6)
    users = np.repeat(np.arange(40), 5)
    p_values = []
    for seed in range(300):
        shared = rng.normal(size=40)[users]  # lists of one user move together
        p_values.append(
            relative_change(
                shared + rng.normal(size=200) * 0.1, np.zeros(200), clusters=users, num_samples=199, seed=seed
            ).p_value
        )
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.06)


def test_equal_rankers():
    values = np.random.default_rng(7).uniform(size=50)
    change = relative_change(values, values.copy())
    assert change == Comparison(
        mean_new=change.mean_base,
        mean_base=change.mean_base,
        difference=0.0,
        difference_low=0.0,
        difference_high=0.0,
        percent=0.0,
        percent_low=0.0,
        percent_high=0.0,
        p_value=1.0,
    )


def test_base_of_zeros_has_no_percentage():
    change = relative_change(np.array([0.0, 1.0, 1.0]), np.zeros(3))
    assert np.isnan([change.percent, change.percent_low, change.percent_high]).all()
    assert change.difference == pytest.approx(2 / 3)


def test_samples_whose_base_is_zero_leave_the_interval_open():
    change = relative_change(np.array([1.0, 0.5, 0.0]), np.array([0.0, 0.0, 0.1]))
    assert change.percent_high == np.inf
    assert not np.isnan(change.percent_low)


def test_seed_decides_everything():
    rng = np.random.default_rng(8)
    new, base = rng.uniform(size=(2, 60))
    assert relative_change(new, base, seed=3) == relative_change(new, base, seed=3)
    one, other = (relative_change(new, base, seed=seed) for seed in (3, 4))
    for name in ("difference_low", "percent_high", "p_value"):
        assert getattr(one, name) != getattr(other, name), name
    assert bootstrap_interval(new, seed=3) == bootstrap_interval(new, seed=3) != bootstrap_interval(new, seed=4)


def test_chunks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(9)
    new, base = rng.uniform(size=(2, 60))
    whole = relative_change(new, base, num_samples=500)
    monkeypatch.setattr("flexrec.evaluation.statistics._CHUNK", 60 * 7)
    chunked = relative_change(new, base, num_samples=500)
    np.testing.assert_allclose(
        [whole.difference_low, whole.percent_high, whole.p_value],
        [chunked.difference_low, chunked.percent_high, chunked.p_value],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": np.zeros(3)}, "same lists, got 3 and 4"),
        ({"new": np.zeros((2, 2))}, r"new must have shape \(N,\)"),
        ({"new": np.zeros(0), "base": np.zeros(0)}, "N >= 1"),
        ({"base": np.array([0, 1, np.nan, 2])}, "base must be finite, got nan at index 2"),
        ({"clusters": np.zeros(3)}, r"clusters must have shape \(4,\), got \(3,\)"),
        ({"level": 95}, r"level must lie in \(0, 1\), got 95"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {"new": np.zeros(4), "base": np.zeros(4)} | change
    with pytest.raises(ValueError, match=message):
        relative_change(**arguments)


def test_num_ranked_hides_the_rest():
    gains = np.array([[0.0, 1.0, 1.0]])
    assert rank_metrics(gains, ("recall@5",), num_ranked=2)["recall@5"] == 0.5
    assert rank_metrics(gains, ("recall@5",), num_ranked=np.array([1]))["recall@5"] == 0.0


def enumerated_interval(statistic, clusters, level):
    """Ends of the interval over every equally likely draw of as many clusters; ``statistic`` takes a draw's rows."""
    rows = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    draws = itertools.product(range(len(rows)), repeat=len(rows))
    values = np.sort([statistic(np.concatenate([rows[c] for c in draw])) for draw in draws])
    ends = (np.ceil(np.array([(1 - level) / 2, (1 + level) / 2]) * len(values)) - 1).astype(int)
    return values[ends]


# Users with 1, 4, 1, 3 and 6 lists, in no order.
UNEQUAL = np.array([7, 3, 3, 9, 4, 9, 3, 4, 9, 11, 3, 11, 11, 11, 11])


def test_interval_of_unequal_clusters_equals_full_enumeration():
    values = np.random.default_rng(11).uniform(size=15)
    expected = enumerated_interval(lambda rows: values[rows].mean(), UNEQUAL, 0.8)
    got = bootstrap_interval(values, clusters=UNEQUAL, level=0.8, num_samples=60_000)
    np.testing.assert_allclose(got, expected, atol=0.003)
    assert np.abs(np.subtract(bootstrap_interval(values, level=0.8, num_samples=60_000), expected)).max() > 0.01
    # A user's mean is no list: those with many lists weigh more.
    of_users = np.array([values[user == UNEQUAL].mean() for user in np.unique(UNEQUAL)])
    assert np.abs(np.subtract(bootstrap_interval(of_users, level=0.8, num_samples=60_000), expected)).max() > 0.01


def test_change_of_unequal_clusters_equals_full_enumeration():
    rng = np.random.default_rng(12)
    base = rng.uniform(0.1, 1.0, 15)
    new = base * rng.uniform(0.5, 2.0, 15)
    change = relative_change(new, base, clusters=UNEQUAL, level=0.8, num_samples=60_000, seed=1)
    difference = enumerated_interval(lambda rows: new[rows].mean() - base[rows].mean(), UNEQUAL, 0.8)
    percent = enumerated_interval(lambda rows: 100 * (new[rows].mean() / base[rows].mean() - 1), UNEQUAL, 0.8)
    np.testing.assert_allclose([change.difference_low, change.difference_high], difference, atol=0.003)
    np.testing.assert_allclose([change.percent_low, change.percent_high], percent, atol=0.8)
    sums = np.array([(new - base)[user == UNEQUAL].sum() for user in np.unique(UNEQUAL)])
    flips = np.array(list(itertools.product([-1.0, 1.0], repeat=5))) @ sums
    exact = (np.abs(flips) >= abs(sums.sum()) - 1e-12).mean()
    assert change.p_value == pytest.approx(exact, abs=0.01)


@pytest.fixture
def users():
    """1 to 7 lists of each of 20 users."""
    return np.repeat(np.arange(20) * 3, np.arange(20) % 7 + 1)


@pytest.fixture
def results(users):
    """Noisy ratios: lists differ, and users among themselves."""
    rng = np.random.default_rng(10)
    base = {need: rng.uniform(0.1, 0.5, len(users)) for need in ("interest", "explore")}
    strength = {"base": 1.0, "random": 0.5, "trained": 1.5}

    def values(need, factor):
        of_users = rng.lognormal(0.0, 0.4, users.max() + 1)[users]
        return base[need] if factor == 1.0 else factor * base[need] * of_users * rng.lognormal(0.0, 0.1, len(users))

    return {
        ranker: {need: {"ndcg@5": (v := values(need, factor)), "mrr@5": np.sqrt(v) / 2} for need in base}
        for ranker, factor in strength.items()
    }


def change_of(results, need, ranker, headline="ndcg@5", **options):
    return relative_change(results[ranker][need][headline], results["base"][need][headline], **options)


def test_markdown_states_means_changes_and_intervals_over_users(results, users):
    lines = comparison_markdown(results, clusters=users).splitlines()
    assert lines[0] == "| need | ranker | ndcg@5 | mrr@5 | ndcg@5 against base | 95 % interval | p |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:2] for row in cells] == [
        [need, ranker] for need in ("interest", "explore") for ranker in ("base", "random", "trained")
    ]
    for need, ranker, ndcg, mrr, percent, interval, p_value in cells:
        assert ndcg == f"{results[ranker][need]['ndcg@5'].mean():.3f}"
        assert mrr == f"{results[ranker][need]['mrr@5'].mean():.3f}"
        if ranker == "base":
            assert (percent, interval, p_value) == ("", "", "")
            continue
        change = change_of(results, need, ranker, clusters=users)
        assert percent == f"{change.percent:+.1f} %"
        assert interval == f"{change.percent_low:+.1f}, {change.percent_high:+.1f}"
        assert p_value == ("< 0.001" if change.p_value < 0.001 else f"{change.p_value:.3f}")
        lists = change_of(results, need, ranker)
        assert change.percent_high - change.percent_low > 1.2 * (lists.percent_high - lists.percent_low)


def test_tables_pass_on_how_to_resample(results, users):
    options = {"level": 0.6, "num_samples": 50, "seed": 4}
    change = change_of(results, "explore", "trained", "mrr@5", clusters=users, **options)
    expected = f"{change.percent_low:+.1f}, {change.percent_high:+.1f}"
    for name, value in {"level": 0.9, "num_samples": 51, "seed": 5}.items():
        other = change_of(results, "explore", "trained", "mrr@5", clusters=users, **{**options, name: value})
        assert expected != f"{other.percent_low:+.1f}, {other.percent_high:+.1f}", name
    lines = comparison_markdown(results, headline="mrr@5", clusters=users, **options).splitlines()
    assert lines[0].endswith("| mrr@5 against base | 60 % interval | p |")
    assert f"| {change.percent:+.1f} % | {expected} |" in lines[-1]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table(results, headline="mrr@5", clusters=users, **options))
    assert f"{change.percent:+.1f} % [{expected}]" in console.export_text()


def test_tables_compare_with_the_base_that_is_named(results, users):
    change = relative_change(
        results["base"]["explore"]["ndcg@5"], results["random"]["explore"]["ndcg@5"], clusters=users
    )
    lines = comparison_markdown(results, base="random", clusters=users).splitlines()
    (line,) = [line for line in lines if line.startswith("| explore | base |")]
    assert f"| {change.percent:+.1f} % | {change.percent_low:+.1f}, {change.percent_high:+.1f} |" in line


@pytest.mark.parametrize("width", [48, 60, 72, 80, 120])
def test_a_table_has_the_metrics_for_which_a_terminal_has_room(results, users, width):
    for needs in results.values():
        for metrics in needs.values():
            metrics |= dict.fromkeys(("ndcg@10", "ndcg@30", "recall@5"), metrics["ndcg@5"])
    console = Console(width=width, record=True, file=io.StringIO())
    pairs = {"reinforcement": ("trained", "random")}
    table = comparison_table(results, clusters=users, pairs=pairs, caption="as said", width=width)
    console.print(table)
    text = console.export_text()
    assert "…" not in text
    shown = [column.header for column in table.columns][1:-1]
    names = ["ndcg@5", "mrr@5", "ndcg@10", "ndcg@30", "recall@5"]
    assert shown == names[: len(shown)]
    assert (shown == names) == (width == 120)
    left_out = ", ".join(names[len(shown) :])
    assert table.caption == ("as said" if not left_out else f"as said. no room for {left_out}: see metrics.json")
    change = change_of(results, "interest", "trained", clusters=users)
    assert f"{change.percent:+.1f} % [{change.percent_low:+.1f}, {change.percent_high:+.1f}]" in text


def test_table_of_five_metrics_fits_80_columns(results, users):
    for needs in results.values():
        for metrics in needs.values():
            metrics |= dict.fromkeys(("ndcg@10", "ndcg@30", "recall@5"), metrics["ndcg@5"])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(results, clusters=users, title="test users"))
    text = console.export_text()
    assert "test users" in text
    assert text.count("explore") == 1  # a need is named once
    for need in ("interest", "explore"):
        for ranker in ("random", "trained"):
            change = change_of(results, need, ranker, clusters=users)
            assert text.count(f"{change.percent:+.1f} % [{change.percent_low:+.1f}, {change.percent_high:+.1f}]") == 1
    assert "…" not in text


def test_table_names_what_is_missing(results):
    with pytest.raises(ValueError, match="results must hold 'start' to compare with, got base, random, trained"):
        comparison_table(results, base="start")
    with pytest.raises(ValueError, match=r"\['base'\]\['interest'\] has no recall@5"):
        comparison_markdown(results, headline="recall@5")
    del results["trained"]["explore"]["mrr@5"]
    with pytest.raises(ValueError, match=r"\['trained'\]\['explore'\] has no mrr@5"):
        comparison_markdown(results)


def test_a_need_with_a_metric_of_its_own_is_compared_by_it():
    rng = np.random.default_rng(0)

    def values(**shift):
        return {name: rng.random(20) + more for name, more in shift.items()}

    results = {
        name: {
            "interest": values(**{"ndcg@5": 0.0, "mrr@5": 0.0}),
            "diverse": values(**{"alpha_ndcg@5": 0.0, "ndcg@5": 0.0}),
        }
        for name in ("base", "trained")
    }
    header, _, *rows = [line.strip("| ").split(" | ") for line in comparison_markdown(results).splitlines()]
    assert header[2:6] == ["ndcg@5", "mrr@5", "alpha_ndcg@5", "ndcg@5 or alpha_ndcg@5 against base"]
    for row, need, metric in ((rows[1], "interest", "ndcg@5"), (rows[3], "diverse", "alpha_ndcg@5")):
        assert row[:2] == [need, "trained"]
        assert (
            row[5]
            == f"{relative_change(results['trained'][need][metric], results['base'][need][metric]).percent:+.1f} %"
        )
    assert rows[1][4] == "", "interest has no alpha_ndcg"
    assert rows[3][3] == "", "diverse has no mrr here"
