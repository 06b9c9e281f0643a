"""Expressions: what they come to, exact derivatives, what they may not hold, and errors that say where."""

import re

import numpy as np
import pytest

from flexrec.data.lists import Catalogue, RankingList
from flexrec.task.expressions import Expression

CATALOGUE = Catalogue(
    ids=tuple("abcd"),
    titles=("Toy Story", "Brave", "Heat", "Up"),
    topics=(("Comedy", "Children"), ("Drama",), ("Comedy", "Drama"), ()),
    columns={
        "price": np.array([1.0, 10.0, np.nan, 30.0]),
        "year": np.array([1995.0, 2012.0, 1995.0, 2009.0]),
        "brand": np.array(["x", "Y", "", "x"], dtype=object),
        "unit price": np.array([1.0, 2.0, 3.0, 4.0]),
    },
)
INTEREST = np.array([0.2, 0.4, 0.6, 0.8], dtype=np.float32)
DOUBT = np.full(4, 0.01, dtype=np.float32)
LST = RankingList(
    user=0,
    time=0.0,
    history=np.array([0]),
    candidates=np.arange(4),
    interest=np.zeros(4, dtype=np.float32),
    popularity=np.array([1, 2, 3, 4], dtype=np.float32),
    trend=np.array([0, 0.5, 1, 0.25], dtype=np.float32),
)


def gains(text, interest=INTEREST, doubt=DOUBT):
    return Expression(text)(LST, CATALOGUE, interest, doubt)


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("interest", [1, 1, 1, 1]),
        ("interest * exp(-price / 20)", [np.exp(-0.05), np.exp(-0.5), 0, np.exp(-1.5)]),
        ("interest * trend", [0, 0.5, 1, 0.25]),
        ("interest * novelty", [0, 1, 0.5, 0]),
        ("popularity * interest / 4", [0.25, 0.5, 0.75, 1]),
        ("interest if 'Comedy' in category else 0", [1, 0, 1, 0]),
        ("interest * ('comedy' in genres)", [1, 0, 1, 0]),
        ("interest * ('Comedy' not in topics)", [0, 1, 0, 1]),
        ("interest * (category == 'Drama')", [0, 1, 1, 0]),
        ("interest * ('Drama' != categories)", [1, 0, 0, 1]),
        ("interest * (category in ('Comedy', 'Drama'))", [1, 1, 1, 0]),
        ("interest * (brand == 'y')", [0, 1, 0, 0]),
        ("interest * (brand in ['x', 'Z'])", [1, 0, 0, 1]),
        ("interest * (brand != 'x')", [0, 1, 0, 0]),
        ("interest * (default(brand, 'none') == 'none')", [0, 0, 1, 0]),
        ("interest * ('toy' in title)", [1, 0, 0, 0]),
        ("interest * (title == 'heat')", [0, 0, 1, 0]),
        ("interest * (5 < price <= 30)", [0, 1, 0, 1]),
        ("interest * (price > 5 and not price > 20 or year == 1995)", [1, 1, 0, 0]),
        ("interest * (year in (1995, 2009))", [1, 0, 1, 1]),
        ("interest * default(price, 5)", [1, 10, 5, 30]),
        ("where(year < 2000, interest, interest / 2)", [1, 0.5, 1, 0.5]),
        ("interest * clip(price, 2, 20)", [2, 10, 0, 20]),
        ("interest * max(trend, 0.3, novelty)", [0.3, 1, 1, 0.3]),
        ("min(interest * trend, interest * 0.5)", [0, 0.5, 0.5, 0.25]),
        ("interest * sqrt(abs(-4)) * log(exp(1)) ** 3", [2, 2, 2, 2]),
        ("interest * price ** -1", [1, 0.1, 0, 1 / 30]),
        ("interest * unit_price", [1, 2, 3, 4]),
        ("interest\n  * trend\n", [0, 0.5, 1, 0.25]),
        ("-interest * -2", [2, 2, 2, 2]),
        ("max(interest * (trend - 0.5), 0)", [0, 0, 0.5, 0]),
        ("interest * (True == (year < 2000))", [1, 0, 1, 0]),
    ],
)
def test_interest_times_a_factor(text, factor):
    expression = Expression(text)
    assert expression.form == "proportional"
    found, variance = gains(text)
    np.testing.assert_allclose(found, INTEREST * np.array(factor), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(variance, DOUBT * np.array(factor) ** 2, rtol=1e-5, atol=1e-12)
    assert expression.factor is not None
    np.testing.assert_allclose(expression.factor(LST, CATALOGUE), factor, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("interest ** 2", "other"),
        ("sqrt(interest)", "other"),
        ("interest ** 0.5 / 3", "other"),
        ("interest * interest + trend", "other"),
        ("clip(2 * interest, 0, 1)", "other"),
        ("interest if interest > 0.5 else 0", "other"),
        ("log(1 + interest) * popularity", "other"),
        ("1 / (1 + exp(-10 * (interest - 0.5)))", "other"),
        ("where(interest > 0.3, 1 - interest, interest)", "other"),
        ("(1 + trend) / (2 - interest)", "other"),
        ("abs(interest - 0.5)", "other"),
        ("max(interest, trend)", "other"),
        ("1 / (1 + exp(default(price, 0) * 100)) + interest", "other"),
        ("interest ** 1", "proportional"),
        ("trend", "constant"),
        ("0 * interest", "zero"),
        ("0", "zero"),
    ],
)
def test_the_variance_is_that_of_the_derivative(text, form):
    assert Expression(text).form == form
    _, variance = gains(text)
    step = 1e-3
    up, down = (gains(text, INTEREST + np.float32(sign * step))[0].astype(float) for sign in (1, -1))
    np.testing.assert_allclose(np.sqrt(variance / DOUBT), abs(up - down) / (2 * step), rtol=5e-3, atol=1e-3)
    assert (Expression(text).factor is None) == (form != "proportional")


def test_a_root_states_no_doubt_where_it_is_infinitely_steep():
    nothing = np.zeros(4, dtype=np.float32)
    for text in ("sqrt(interest)", "interest ** 0.5"):
        found, variance = gains(text, nothing, DOUBT)
        assert not np.concatenate([found, variance]).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("interest * price.real", "at character 12, 'price.real': an attribute is not allowed"),
        ("().__class__", "at character 1, '().__class__': an attribute is not allowed"),
        ("__import__('os')", "at character 1, '__import__': unknown function"),
        ("interest * sqr(price)", "at character 12, 'sqr': unknown function; did you mean 'sqrt'?"),
        ("(lambda: 1)()", "unknown function"),
        ("exp.exp(1)", "unknown function"),
        ("[x for x in 'ab']", "a comprehension is not allowed"),
        ("price[0]", "at character 1, 'price[0]': a subscript is not allowed"),
        ("(x := 1)", "an assignment is not allowed"),
        ("f'{price}'", "a formatted text is not allowed"),
        ("interest * 2 ** 99", "at character 17, '99': an exponent must be a number from -8 to 8"),
        ("interest ** price", "at character 13, 'price': an exponent must be a number from -8 to 8"),
        ("2 ** 8 ** 8", "an exponent must be a number"),
        ("interest // 2", "expected one of + - * / **"),
        ("interest % 2", "expected one of + - * / **"),
        ("interest * 1e400", "at character 12, '1e400': expected a number of at most 1e+15"),
        ("interest * 1" + "0" * 400, "expected a number of at most 1e+15"),
        ("interest * 1j", "expected a number"),
        ("b'x' == brand", "expected a number of at most 1e+15 or a text"),
        ("interest ==", "at character 1"),
        ("interest * (price", "at character 12"),
        ("", "at character 1"),
        ("min(price)", "min takes 2 to 20 arguments, got 1"),
        ("clip(price, 1)", "clip takes 3 arguments, got 2"),
        ("min(price, key=3)", "min takes no arguments by name"),
        ("max(*price)", "max takes 2 to 20 arguments, got 1"),
        ("default(interest + 1, 2)", "default takes a column"),
        ("~interest", "~ is not allowed: write not"),
        ("brand is 'x'", "is is not allowed: write =="),
        ("(" * 300 + "1" + ")" * 300, "at character 201"),
        ("-" * 500 + "1", "nested at most 30 deep"),
        ("+".join("1" * 150), "nested at most 30 deep"),
        ("max(" + "max(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1), " * 19 + "1)", "at most 200 parts"),
        ("1" * 1001, "at most 1000 characters, got 1001"),
    ],
)
def test_what_may_not_stand_in_one(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Expression(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("interst", "at character 1, 'interst': unknown name; did you mean 'interest'?; known are interest, trend,"),
        ("'é' in title and é", "at character 18, 'é': unknown name"),
        ("interest * prize", "at character 12, 'prize': unknown name; did you mean 'price'?"),
        ("interest * prize", "columns of the items: price, year, brand, unit price"),
        ("'Comdy' in category", ": no item has the category 'Comdy'; did you mean 'Comedy'?"),
        ("price in category", "at character 1, 'price': expected a text, got a number"),
        ("brand in category", "expected the name of a category in quotes"),
        ("brand in title", "expected a text in quotes before in"),
        ("interest * 'x'", "expected a number, got a text"),
        ("interest * category", "at character 12, 'category': expected a number, got categories"),
        ("interest * brand", "expected a number, got a text"),
        ("interest and 1", "at character 1, 'interest': expected a condition, got a number"),
        ("where(price, 1, 2)", "at character 7, 'price': expected a condition, got a number"),
        ("price == 'x'", "expected a number, got a text"),
        ("brand == 1", "expected a text, got a number"),
        ("(1, 2)", "expected a number, got several values in brackets"),
        ("price in (1, category)", "expected a number or a text, got categories"),
        ("default(price, 'a')", "expected a number, got a text"),
    ],
)
def test_what_makes_no_sense_for_these_items(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Expression(text).check(CATALOGUE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "interest - 0.5",
            "in 'interest - 0.5' the gain of item 'a' is -0.5 (interest 0); expected a finite number that is not "
            "negative: max(.., 0) or clip(.., 0, 1) keep it there",
        ),
        ("interest / (price - 11)", "the gain of item 'a' is -0.05 (interest 0.5, price 1.0)"),
        ("1 / (price - 10) ** 2", "the gain of item 'b' is inf (interest 0, price 10.0)"),
        ("interest * log(price - 5)", "the gain of item 'a' is nan"),
        ("interest * (0.5 - trend)", "is -0.25 (interest 0.5)"),
        ("interest * (100 - popularity)", "is -4950"),
        ("interest * (novelty - 0.5)", "is -0.25 (interest 0.5)"),
        ("interest * (0.5 - novelty)", "is -0.25 (interest 0.5)"),
        ("interest / novelty", "the gain of item 'a' is nan"),
        ("exp(100 * interest)", "the variance of item 'a' is inf (interest 0.5)"),
    ],
)
def test_gains_are_finite_and_not_negative_and_that_is_seen_before_training(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Expression(text).check(CATALOGUE)


def test_what_is_not_chosen_may_be_infinite():
    found, variance = gains("interest / (price - 10) if price > 10 else interest * 0")
    np.testing.assert_allclose(found, [0, 0, 0, 0.04], rtol=1e-6)
    assert np.isfinite(variance).all()


def test_an_item_without_a_value_has_no_gain():
    expression = Expression("interest if price < 5 or year < 2000 else 0")
    np.testing.assert_array_equal(expression.lacking(np.arange(4), CATALOGUE), [False, False, True, False])
    np.testing.assert_allclose(gains(expression.text)[0], [0.2, 0, 0, 0])
    assert Expression("interest * default(price, 3)").needed == ()
    assert Expression("interest * default(price, 3) + 0 * interest * price").needed == ("price",)


def test_a_category_that_nobody_has_is_a_mistake_only_where_all_items_are_known():
    text = "interest if 'Horror' in category else interest / 2"
    np.testing.assert_allclose(gains(text)[0], INTEREST / 2)
    with pytest.raises(ValueError, match="no item has the category 'Horror'"):
        Expression(text).check(CATALOGUE)


def test_names_and_columns():
    expression = Expression("interest * exp(-price) * (brand == 'x') * novelty * ('Drama' in genre) * (title != '')")
    assert expression.names == ("brand", "genre", "interest", "novelty", "price", "title")
    assert expression.columns == ("brand", "price")


def test_interest_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="interest must have shape \\(4,\\)"):
        gains("interest", INTEREST[:2], DOUBT)
