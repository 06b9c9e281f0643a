"""Mixtures: weights that mean what they say, exact variances, words of their own, errors that name what is wrong."""

import re
from itertools import combinations

import numpy as np
import pytest

from flexrec.data import simulate
from flexrec.task.mixtures import find_need, is_mixture, mix_needs, parts_of, told_apart
from flexrec.task.needs import NEEDS, InterestTimes, Need, get_need, novelty


@pytest.fixture(scope="module")
def data():
    return simulate(num_users=150, num_test_users=2)


def by_hand(lst, catalogue, weights):
    """The factor, as the module's docstring has it."""
    factors = {"interest": np.ones(len(lst.candidates)), "explore": novelty(lst, catalogue), "trend": lst.trend}
    mixed = sum(
        weight * factors[name] / np.sqrt(np.mean(factors[name].astype(float) ** 2))
        for name, weight in weights.items()
        if factors[name].any()
    )
    return mixed / mixed.max()


def test_gain_is_interest_times_the_weighted_factors_and_the_variance_is_exact(data):
    need = find_need("0.5 interest + 0.3 explore + 0.2 trend")
    for lst in data.train[:10]:
        interest, doubt = lst.truth, np.linspace(0.01, 0.2, len(lst.candidates), dtype=np.float32)
        gains, variance = need.gains(lst, data.catalogue, interest, doubt)
        factor = by_hand(lst, data.catalogue, {"interest": 0.5, "explore": 0.3, "trend": 0.2})
        np.testing.assert_allclose(gains, interest * factor, rtol=1e-5)
        np.testing.assert_allclose(variance, doubt * factor**2, rtol=1e-5)
        assert gains.min() >= 0
        assert gains.max() <= 1


def test_what_has_nothing_to_offer_does_not_count(data):
    lst = next(lst for lst in data.train if lst.trend.any())
    still = type(lst)(**{**lst.__dict__, "trend": np.zeros_like(lst.trend)})
    mixed, _ = find_need("0.5 interest + 0.5 trend").gains(still, data.catalogue, lst.truth, lst.truth)
    np.testing.assert_allclose(mixed, lst.truth, rtol=1e-6)
    none, _ = find_need("0.5 explore + 0.5 trend").gains(
        type(lst)(
            **{**still.__dict__, "candidates": lst.history[:4], "trend": np.zeros(4), "history": lst.history[:4]}
        ),
        data.catalogue,
        np.ones(4, dtype=np.float32),
        np.zeros(4, dtype=np.float32),
    )
    assert np.isfinite(none).all()


def ndcg_at_5(gains, order):
    discount = 1 / np.log2(np.arange(2, 7))
    return gains[order[:5]] @ discount / (np.sort(gains)[::-1][:5] @ discount)


@pytest.mark.parametrize(("one", "other"), [("interest", "explore"), ("interest", "trend")])
def test_half_and_half_keeps_about_as_much_of_either(data, one, other):
    """Of what lies between a need's ranking by the other need alone and its best."""
    kept = {one: [], other: []}
    mixture = find_need(f"{one} + {other}")
    for lst in data.train:
        gains = {name: get_need(name).gains(lst, data.catalogue, lst.truth, lst.truth)[0] for name in (one, other)}
        mixed = mixture.gains(lst, data.catalogue, lst.truth, lst.truth)[0]
        if all(of.any() for of in gains.values()):
            for name, rival in ((one, other), (other, one)):
                worst = ndcg_at_5(gains[name], np.argsort(-gains[rival], kind="stable"))
                kept[name].append([ndcg_at_5(gains[name], np.argsort(-mixed, kind="stable")) - worst, 1 - worst])
    shares = {name: np.mean(values, axis=0) for name, values in kept.items()}
    shares = {name: gained / possible for name, (gained, possible) in shares.items()}
    assert min(shares.values()) > 0.55, shares
    assert abs(shares[one] - shares[other]) < 0.25, shares


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("0.7 interest + 0.3 explore", "0.7 interest + 0.3 explore"),
        ("0.3*explore+0.7*interest", "0.7 interest + 0.3 explore"),
        ("70% interest + 30 % explore", "0.7 interest + 0.3 explore"),
        ("7 interest + 3 explore", "0.7 interest + 0.3 explore"),
        ("interest + explore", "0.5 interest + 0.5 explore"),
        ("explore + interest", "0.5 interest + 0.5 explore"),
        ("1e+1 interest + 1e1 trend", "0.5 interest + 0.5 trend"),
        ("interest + explore + trend", "0.333 interest + 0.333 explore + 0.333 trend"),
        ("2 interest + 1 trend", "0.667 interest + 0.333 trend"),
        ("explore", "explore"),
        ("1 explore", "explore"),
    ],
)
def test_names_say_what_is_meant_and_mean_what_they_say(data, text, name):
    need = find_need(text)
    assert need.name == name
    again = find_need(need.name)
    assert (again.name, again.wordings) == (need.name, need.wordings)
    lst = data.train[0]
    for first, second in zip(
        need.gains(lst, data.catalogue, lst.truth, lst.truth),
        again.gains(lst, data.catalogue, lst.truth, lst.truth),
        strict=True,
    ):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.7 intrest + 0.3 explore", "unknown need 'intrest'; did you mean 'interest'?; known needs: interest, "),
        ("intrest", "unknown need 'intrest'; did you mean 'interest'?"),
        ("0.7 interest + -0.3 explore", "the weight of 'explore' must be positive and finite, got -0.3"),
        ("0 interest + 1 explore", "the weight of 'interest' must be positive and finite, got 0"),
        ("1e999 interest + 1 explore", "the weight of 'interest' must be positive and finite, got inf"),
        ("0.7 interest + 0.3", "'0.3' names no need; expected a weight and a need"),
        ("0.7 interest +", "'' names no need"),
        ("0.7 interest + 0.3 interest", "'interest' stands in the mixture twice"),
        ("0.7 interest + 0.3 diverse", "'diverse' cannot be mixed: it values a list as a whole, by alpha_ndcg"),
        ("0.7 interest + 0.3 odd", "'odd' cannot be mixed: its gains are not interest times a factor"),
    ],
)
def test_errors_name_what_is_wrong(text, expected):
    odd = Need("odd", ("Odd.",), lambda lst, catalogue, interest, variance: (interest, variance))
    with pytest.raises(ValueError, match=f"{re.escape(text.strip())}.*{re.escape(expected)}|^{re.escape(expected)}"):
        find_need(text, {**NEEDS, "odd": odd})


def test_mixtures_of_one_or_of_mixtures_are_refused():
    with pytest.raises(ValueError, match="at least two needs, got \\['interest'\\]"):
        mix_needs([(1.0, get_need("interest"))])
    with pytest.raises(ValueError, match="is a mixture itself"):
        mix_needs([(1.0, get_need("interest")), (1.0, find_need("explore + trend"))])


def test_needs_of_ones_own_are_mixed_like_others(data):
    cheap = Need("cheap", ("Cheap.",), InterestTimes(lambda lst, catalogue: np.arange(len(lst.candidates)) / 10))
    need = find_need("0.6 interest + 0.4 cheap", {**NEEDS, "cheap": cheap})
    assert [part.name for part in parts_of(need)] == ["interest", "cheap"]
    assert parts_of(cheap) == (cheap,)
    assert "cheap" in need.wordings[0]
    gains, _ = need.gains(data.train[0], data.catalogue, np.ones(30, np.float32), np.zeros(30, np.float32))
    assert gains.argmax() == 29


WEIGHTS = [(0.9, 0.1), (0.75, 0.25), (0.6, 0.4), (0.5, 0.5), (0.4, 0.6), (0.25, 0.75), (0.1, 0.9)]


def test_distinct_mixtures_have_distinct_words():
    mixable = [name for name, need in NEEDS.items() if need.metric is None]
    texts = [f"{a} {x} + {b} {y}" for x, y in combinations(mixable, 2) for a, b in WEIGHTS]
    texts += ["interest + explore + trend", "0.6 interest + 0.3 explore + 0.1 trend", "2 trend + explore + interest"]
    needs = [*NEEDS.values(), *map(find_need, texts)]
    wordings = [wording for need in needs for wording in need.wordings]
    assert len(set(wordings)) == len(wordings)
    for need in needs:
        assert len(need.wordings) >= 4
        assert all(wording == wording.strip() and "{" not in wording for wording in need.wordings)


def test_the_larger_part_is_said_to_be_the_larger():
    assert find_need("0.7 interest + 0.3 explore").wordings[1] == (
        "Above all what I will like, but leave some room for topics that are new to me."
    )
    assert find_need("0.3 interest + 0.7 explore").wordings[1] == (
        "Above all topics that are new to me, but leave some room for what I will like."
    )


def test_words_that_would_mean_two_mixtures_are_left_out():
    close = [find_need("0.7 interest + 0.3 explore"), find_need("0.72 interest + 0.28 explore"), get_need("interest")]
    apart = told_apart(close)
    wordings = [wording for need in apart for wording in need.wordings]
    assert len(set(wordings)) == len(wordings)
    assert all(len(need.wordings) >= 2 for need in apart)
    assert [need.wordings[0] for need in apart] == [need.wordings[0] for need in close]
    assert apart[2] is close[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.7 interest + 0.3 explore", True),
        ("0.7 interest", True),
        ("interest", False),
        ("2 for the price of one", False),
        ("Something new, please.", False),
    ],
)
def test_what_is_meant_as_a_mixture(text, expected):
    assert is_mixture(text) == expected
