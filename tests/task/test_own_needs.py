"""Needs from a file: they are what they say, a run can keep them, and what is wrong is named."""

import re

import numpy as np
import pytest

from flexrec.data import simulate
from flexrec.data.lists import Catalogue
from flexrec.task.mixtures import find_need
from flexrec.task.needs import NEEDS, get_need
from flexrec.task.own_needs import asks_of_data, check_needs, definitions_of, make_needs, read_needs

FILE = """
- name: cheap but good
  wordings:
    - Show me what I will like and can afford.
    - |
      The best for little money,
      please.
  gain: interest * exp(-price / 20)
  phrase: what costs little
- name: short
  wordings: I am tired of long names.
  gain: >
    interest
    if len_of_title < 12 else 0
"""


@pytest.fixture
def needs(tmp_path):
    path = tmp_path / "needs.yaml"
    path.write_text(FILE)
    return read_needs(path)


def test_a_file_of_needs(needs):
    cheap, short = needs
    assert (cheap.name, cheap.phrase) == ("cheap but good", "what costs little")
    assert cheap.wordings == ("Show me what I will like and can afford.", "The best for little money, please.")
    assert cheap.gains.text == "interest * exp(-price / 20)"
    assert short.wordings == ("I am tired of long names.",)
    assert short.gains.columns == ("len_of_title",)


def test_a_list_under_needs_is_the_same(tmp_path, needs):
    path = tmp_path / "under.yaml"
    path.write_text("needs:\n" + "".join(f"  {line}\n" for line in FILE.splitlines()))
    assert read_needs(path) == needs


def test_what_a_run_keeps_makes_them_again(needs):
    mixed = find_need("0.6 interest + 0.4 short", {**NEEDS, **{need.name: need for need in needs}})
    kept = definitions_of([get_need("trend"), needs[0], mixed])
    assert make_needs(kept) == needs
    assert definitions_of([get_need("trend")]) == []


def test_what_data_must_be_able_to_answer(needs):
    (rising,) = make_needs([{"name": "rising", "wordings": "Up.", "gain": "interest * (trend + novelty)"}])
    assert asks_of_data(needs[0]) == ("cheap but good",)
    assert asks_of_data(rising) == ("rising", "trend", "explore")
    assert asks_of_data(find_need("0.5 interest + 0.5 trend")) == ("interest", "trend")
    assert asks_of_data(find_need("0.5 interest + 0.5 rising", {**NEEDS, "rising": rising})) == (
        *("interest", "rising", "trend", "explore"),
    )


def test_what_is_worth_saying(needs):
    columns = {"price": np.array([1.0, np.nan, np.nan]), "len_of_title": np.array([1.0, 2.0, 3.0])}
    catalogue = Catalogue(tuple("abc"), tuple("ABC"), ((),) * 3, columns)
    others = make_needs(
        [
            {"name": "squared", "wordings": "Twice.", "gain": "interest ** 2"},
            {"name": "dear", "wordings": "Dear.", "gain": "default(price, 0)"},
        ]
    )
    mixed = find_need("0.6 interest + 0.4 short", {**NEEDS, "short": needs[1]})
    assert check_needs([*needs, *others, mixed, get_need("trend")], catalogue) == [
        "need 'cheap but good': 2 of 3 items have nothing in price: their gain is 0",
        "need 'squared': its gain is not interest times a factor: its variance is that of the first order, and it "
        "cannot be mixed with others",
        "need 'dear': its gain does not mention interest: what the user likes does not count",
    ]
    with pytest.raises(ValueError, match=r"^need 'short': gain: at character 13, 'len_of_title': unknown"):
        check_needs([mixed], Catalogue(tuple("abc"), tuple("ABC"), ((),) * 3))


def test_lists_of_a_data_set_have_gains(needs):
    data = simulate(num_users=4, num_items=80, num_topics=4, num_test_users=1, num_candidates=6)
    price = np.linspace(0, 100, 80)
    catalogue = Catalogue(data.catalogue.ids, data.catalogue.titles, data.catalogue.topics, {"price": price})
    lst = data.test[0]
    gains, variance = needs[0].gains(lst, catalogue, lst.truth, np.full_like(lst.truth, 0.1))
    factor = np.exp(-price[lst.candidates] / 20)
    np.testing.assert_allclose(gains, lst.truth * factor, rtol=1e-5)
    np.testing.assert_allclose(variance, 0.1 * factor**2, rtol=1e-5)


GOOD = "- {name: a, wordings: [W.], gain: interest}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list of needs, each with name, wordings, gain; got None"),
        ("a: b", "expected a list of needs"),
        ("needs: 3", "expected a list of needs, each with name, wordings, gain; got 3"),
        ("- 3", "need 1 must have name, wordings, gain; got 3"),
        ("- {name: a, wordings: [W.], gian: interest}", "need 'a': unknown field 'gian'; did you mean 'gain'?"),
        ("- {wordings: [W.], gain: interest}", "need 1: name must be a text of at most 40 letters"),
        ("- {name: 3, wordings: [W.], gain: interest}", "need 3: name must be a text"),
        ("- {name: 3 apples, wordings: [W.], gain: interest}", "that begins with a letter; got '3 apples'"),
        ("- {name: a + b, wordings: [W.], gain: interest}", "got 'a + b'"),
        ("- {name: a/b, wordings: [W.], gain: interest}", "got 'a/b'"),
        (f"- {{name: {'a' * 41}, wordings: [W.], gain: interest}}", "name must be a text of at most 40 letters"),
        ("- {name: interest, wordings: [W.], gain: interest}", "need 'interest' is one of FlexRec's own"),
        (GOOD + GOOD, "need 'a' is defined twice: give it another name"),
        (GOOD + GOOD.replace("name: a", "name: b"), "need 'b' has a wording of 'a', 'W.': say it otherwise"),
        ("- {name: a, gain: interest}", "need 'a': wordings must be a list of texts, one or more"),
        ("- {name: a, wordings: [], gain: interest}", "need 'a': wordings must be a list"),
        ("- {name: a, wordings: ['  '], gain: interest}", "need 'a': wordings must be a list"),
        ("- {name: a, wordings: [3], gain: interest}", "got [3]"),
        (f"- {{name: a, wordings: [{'w' * 1001}], gain: interest}}", "of at most 1000 characters"),
        ("- {name: a, wordings: [W.]}", "need 'a': gain must be an expression, a text such as"),
        ("- {name: a, wordings: [W.], gain: 3}", "need 'a': gain must be an expression"),
        ("- {name: a, wordings: [W.], gain: interest, phrase: [b]}", "need 'a': phrase must be a text; got ['b']"),
        (
            "- {name: a, wordings: [W.], gain: interest * price.real}",
            "need 'a': gain: at character 12, 'price.real': an attribute is not allowed",
        ),
        (GOOD * 101, "expected at most 100 needs, got 101"),
        ("- {name: a\n  b: [", "is no YAML"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
    ],
)
def test_errors_name_file_need_and_field(tmp_path, text, message):
    path = tmp_path / "needs.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{re.escape(message)}") as caught:
        read_needs(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="needs: there is no file"):
        read_needs(tmp_path / "nothing.yaml")
