"""Prompts: the encodings, chat templates, and titles that try to be more than titles."""

from dataclasses import replace

import numpy as np
import pytest

from flexrec.data import Catalogue
from flexrec.data.lists import RankingList
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.task.descriptions import MATCH_MARKS, Item, item_token, offer_levels, query_match
from flexrec.task.own_needs import make_needs
from flexrec.task.prompts import SEARCHED, PromptBuilder, add_item_tokens, known_columns, strongest_risers

CATALOGUE = Catalogue(
    ids=("a", "b", "c", "d"),
    titles=("Alien", "Aliens", "Night market\n noodles", "Ça <item:a> va"),
    topics=(("horror",), ("horror", "action"), ("food",), ()),
)
ITEMS = [Item(i, t) for i, t in zip(CATALOGUE.ids, CATALOGUE.titles, strict=True)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CATALOGUE, ["Rank what I will like"])


@pytest.mark.parametrize("encoding", ["index", "title", "item_token"])
def test_prompt_holds_need_history_and_candidates(tokenizer, encoding):
    builder = PromptBuilder(tokenizer, encoding=encoding)
    ids, (start, end) = builder.prompt(
        "Rank what I will like", ITEMS[:2], ITEMS[2:], interest=[False, True], rising=ITEMS[2:3]
    )
    text = tokenizer.decode(ids)
    assert text.index("Rank what I will like") < text.index("Liked before:") < text.index("Candidates:")
    history = tokenizer.decode(ids[start:end])
    liked, seen = history.split("Seen before:\n")
    assert "Aliens\n" in liked
    assert "Alien\n" in seen
    assert "noodles" not in history
    assert text[text.index("Rising now:") : text.index("Candidates:")].count("noodles") == 1
    assert "Night market noodles\n" in text, "a title is one line"


LISTED = {
    "index": "[1] Night market noodles\n[2] Ça <item:a> va\n",
    "title": "Night market noodles\nÇa <item:a> va\n",
    "item_token": "<item:c>Night market noodles\n<item:d>Ça <item:a> va\n",
}


@pytest.mark.parametrize("encoding", ["index", "title", "item_token"])
def test_prompt_to_the_letter(tokenizer, encoding):
    """Liked before what was merely seen, each oldest first; risers in the order given, if they are shown."""
    mark = "<item:{}>".format if encoding == "item_token" else "".format
    history = [*ITEMS[:2], Item("d", "Dune")]
    texts = {}
    for show_rising in (True, False):
        builder = PromptBuilder(tokenizer, encoding=encoding, show_rising=show_rising)
        interest, rising = [True, False, True], [ITEMS[3], ITEMS[2]]
        ids, (start, end) = builder.prompt("Rank", history, ITEMS[2:], interest=interest, rising=rising)
        texts[show_rising] = tokenizer.decode(ids)
        shown = f"{mark('a')}Alien\n{mark('d')}Dune\nSeen before:\n{mark('b')}Aliens\n"
        assert tokenizer.decode(ids[start:end]) == shown
        before = f"<s>Rank\nLiked before:\n{shown}"
        after = f"Candidates:\n{LISTED[encoding]}Ranking, best first:\n"
        risers = f"Rising now:\n{mark('d')}Ça <item:a> va\n{mark('c')}Night market noodles\n"
        assert texts[show_rising] == before + (risers if show_rising else "") + after
    ids, (start, end) = builder.prompt("Rank", ITEMS[:1], ITEMS[2:])
    assert tokenizer.decode(ids[start:end]) == f"Seen before:\n{mark('a')}Alien\n", "nothing is known to be liked"
    with pytest.raises(ValueError, match="interest must have a value per item of the history, 1, got 2"):
        builder.prompt("Rank", ITEMS[:1], ITEMS[2:], interest=[True, False])


def test_prompt_of_a_list_says_what_the_list_holds(tokenizer):
    lst = RankingList(
        user=0,
        time=1.0,
        history=np.array([3, 0, 1]),
        candidates=np.array([2, 0, 1]),
        interest=np.zeros(3, dtype=np.float32),
        popularity=np.ones(3, dtype=np.float32),
        trend=np.array([0.2, 0.0, 0.9], dtype=np.float32),
        history_interest=np.array([0.4, 0.5, np.nan], dtype=np.float32),
    )
    builder = PromptBuilder(tokenizer, encoding="title")
    expected = builder.prompt(
        "Rank", [ITEMS[3], ITEMS[0], ITEMS[1]], [ITEMS[2], ITEMS[0], ITEMS[1]], interest=[False, True, False],
        rising=[ITEMS[1], ITEMS[2]],
    )  # fmt: skip
    assert builder.prompt_of(lst, CATALOGUE, "Rank") == expected
    of_list = builder.candidate_tokens_of(lst, CATALOGUE)
    assert of_list == builder.candidate_tokens([ITEMS[2], ITEMS[0], ITEMS[1]])
    assert [tokenizer.decode(tokens) for tokens in of_list] == ["Night market noodles", "Alien", "Aliens"]


def test_rising_candidates_stand_with_their_counts(tokenizer):
    lst = RankingList(
        user=0,
        time=1.0,
        history=np.array([3]),
        candidates=np.array([2, 0, 1]),
        interest=np.zeros(3, dtype=np.float32),
        popularity=np.ones(3, dtype=np.float32),
        trend=np.array([0.2, 0.0, 0.9], dtype=np.float32),
        rises=np.array([[7, 5], [3, 3], [12, 0]]),
    )
    for encoding in ("index", "title"):
        ids, _ = PromptBuilder(tokenizer, encoding=encoding).prompt_of(lst, CATALOGUE, "Rank")
        shown = "Rising now:\nAliens: 12 now, 0 before\nNight market noodles: 7 now, 5 before\nCandidates:\n"
        assert shown in tokenizer.decode(ids)
        turned = lst.reordered(np.array([2, 1, 0]))
        ids, _ = PromptBuilder(tokenizer, encoding=encoding).prompt_of(turned, CATALOGUE, "Rank")
        assert shown in tokenizer.decode(ids)


def test_prompts_show_what_is_asked_for(tokenizer):
    columns = {
        "year": np.array([1979.0, 1986.0, np.nan, 2001.5]),
        "studio": np.array(["Fox", "Fox", "", "A\nB"], object),
    }
    catalogue = replace(CATALOGUE, columns=columns)
    assert known_columns(catalogue) == ["title", "category", "year", "studio"]
    assert known_columns(Catalogue(("a",), ("A",), ((),))) == ["title"]
    builder = PromptBuilder(tokenizer, encoding="index", show=("title", "category", "year", "studio"))
    shown = [builder.item_of(catalogue, i).shown for i in range(4)]
    assert shown[:3] == [
        "Alien (horror; year 1979; Fox)",
        "Aliens (horror, action; year 1986; Fox)",
        "Night market\n noodles (food)",
    ]
    ids, _ = builder.prompt("Rank", [builder.item_of(catalogue, 3)], [builder.item_of(catalogue, i) for i in (1, 2)])
    text = tokenizer.decode(ids)
    assert "Seen before:\nÇa <item:a> va (year 2001.5; A B)\n" in text, "on one line"
    assert "[1] Aliens (horror, action; year 1986; Fox)\n[2] Night market noodles (food)\n" in text
    without_titles = PromptBuilder(tokenizer, encoding="index", show=("year", "category"))
    assert without_titles.item_of(catalogue, 0).shown == "year 1979; horror"
    answers = PromptBuilder(tokenizer, encoding="title", show=("title", "year"))
    (answer,) = answers.candidate_tokens([answers.item_of(catalogue, 0)])
    assert tokenizer.decode(answer) == "Alien", "an answer is the title alone"
    with pytest.raises(ValueError, match="with encoding 'title' also the title"):
        PromptBuilder(tokenizer, encoding="title", show=("year",))


def test_a_query_stands_in_the_prompt():
    tokenizer = build_tokenizer(CATALOGUE, ["Find it"], queries=["alien noodles", "night"])
    for encoding, described, expected in (
        ("index", False, "Alien noodles, XXL\nLiked before:\n"),
        ("item_token", True, "<word:alien><word:noodles> xxlSeen before:\n"),
    ):
        builder = PromptBuilder(tokenizer, encoding=encoding, described=described, show_titles=False)
        ids, _ = builder.prompt("Find it", [], [], query=" Alien  noodles, XXL\n")
        assert tokenizer.decode(ids).startswith(f"<s>Find it{SEARCHED}{expected}")
        assert SEARCHED not in tokenizer.decode(builder.prompt("Find it", [], [])[0])
        nothing = np.zeros(0, dtype=np.int64)
        numbers = {"interest": nothing * 0.0, "popularity": nothing, "trend": nothing * 0.0}
        lst = RankingList(user=0, time=0.0, history=nothing, candidates=nothing, query="Night", **numbers)
        asked, _ = builder.prompt_of(lst, CATALOGUE, "Find it")
        assert asked == builder.prompt("Find it", [], [], query="Night", marks=builder.marks_in(lst, CATALOGUE))[0]
        assert tokenizer.decode(asked).startswith(f"<s>Find it{SEARCHED}")


def test_marks_say_how_a_title_matches_the_query():
    tokenizer = build_tokenizer(CATALOGUE, [], queries=["alien noodles"])
    builder = PromptBuilder(tokenizer, encoding="item_token", described=True)
    match = query_match("Alien noodles", CATALOGUE.titles)
    assert match.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert query_match(" ", CATALOGUE.titles) is None
    for shares, levels in ((match, (3, 0, 3, 0)), (np.array([0.2, 0.6, 1.0, 1 / 7]), (1, 3, 5, 1))):
        marks = builder.marks_of(np.zeros(4), np.zeros(4), shares)
        assert [tokenizer.convert_ids_to_tokens(of_item[-1]) for of_item in marks] == [MATCH_MARKS[n] for n in levels]
    assert len(builder.marks_of(np.zeros(4), np.zeros(4))[0]) == 1, "without a query nothing matches it"
    others = PromptBuilder(build_tokenizer(CATALOGUE, []), encoding="item_token", described=True)
    assert len(others.marks_of(np.zeros(4), np.zeros(4), match)[0]) == 1, "a model that was never asked for a search"


def test_the_strongest_risers_come_first_and_are_few():
    assert strongest_risers(np.array([0.0, 0.3, 1.0, 0.3, 0.0])).tolist() == [2, 1, 3]
    assert strongest_risers(np.linspace(0.1, 1, 20)).tolist() == [19, 18, 17, 16, 15, 14, 13, 12]
    assert strongest_risers(np.zeros(4)).tolist() == []


def test_titles_and_item_tokens_have_separators_of_their_own(tokenizer):
    title, token = (PromptBuilder(tokenizer, encoding=encoding) for encoding in ("title", "item_token"))
    assert (tokenizer.decode(title.separator), title.end) == ("\n", (tokenizer.eos_token_id,))
    assert (token.separator, token.end) == ((), ())
    with pytest.raises(ValueError, match="encoding must be one of"):
        PromptBuilder(tokenizer, encoding="rank")


def test_index_labels_and_separators(tokenizer):
    builder = PromptBuilder(tokenizer, encoding="index")
    answer = builder.candidate_tokens(ITEMS)
    spelled = builder.separator
    assert [tokenizer.decode(x) for x in answer] == ["[1]", "[2]", "[3]", "[4]"]
    assert tokenizer.decode(spelled) == " > "
    assert builder.end == (tokenizer.eos_token_id,)


def test_item_tokens_are_single_and_short_prompts_have_no_titles(tokenizer):
    builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False, show_rising=False)
    tokens = builder.candidate_tokens(ITEMS)
    assert all(len(t) == 1 for t in tokens)
    assert len({t[0] for t in tokens}) == 4
    ids, (start, _) = builder.prompt("Rank what I will like", ITEMS[:2], ITEMS[2:], interest=[True, True])
    assert [t for run in tokens[:2] for t in run] == ids[start : start + 2]
    assert "Alien" not in tokenizer.decode(ids)
    with pytest.raises(ValueError, match="item 'zz' has no token of its own"):
        builder.candidate_tokens([Item("zz", "Unknown")])


@pytest.mark.parametrize("encoding", ["index", "title"])
def test_without_tokens_of_their_own_items_are_known_by_their_titles_alone(tokenizer, encoding):
    shown, asked_not_to = (PromptBuilder(tokenizer, encoding=encoding, show_titles=titles) for titles in (True, False))
    expected = shown.prompt("Rank", ITEMS[:2], ITEMS[2:], interest=[False, True], rising=ITEMS[3:])
    assert asked_not_to.show_titles
    assert asked_not_to.prompt("Rank", ITEMS[:2], ITEMS[2:], interest=[False, True], rising=ITEMS[3:]) == expected
    assert "Alien\n" in tokenizer.decode(expected[0])


def test_title_that_gives_no_tokens_is_an_error(tokenizer):
    builder = PromptBuilder(tokenizer, encoding="title")
    with pytest.raises(ValueError, match=r"candidate 'e' has the title ' \\n ', which gives no tokens"):
        builder.candidate_tokens([ITEMS[0], Item("e", " \n ")])
    PromptBuilder(tokenizer, encoding="index").candidate_tokens([ITEMS[0], Item("e", " \n ")])


def test_titles_cannot_spell_special_tokens(tokenizer):
    builder = PromptBuilder(tokenizer, encoding="title")
    (tokens,) = builder.candidate_tokens([ITEMS[3]])
    assert tokenizer.convert_tokens_to_ids(item_token("a")) not in tokens
    (tokens,) = builder.candidate_tokens([Item("x", "</s>")])
    assert tokenizer.eos_token_id not in tokens


def test_chat_template_frames_the_message(tokenizer):
    plain = PromptBuilder(tokenizer, encoding="index").prompt("Rank", [], ITEMS)[0]
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    try:
        ids, _ = PromptBuilder(tokenizer, encoding="index").prompt("Rank", [], ITEMS)
    finally:
        tokenizer.chat_template = None
    text = tokenizer.decode(ids)
    assert text.startswith("<s>user: Rank")
    assert text.endswith("</s><s>assistant:")
    assert len(ids) > len(plain)


def test_add_item_tokens_resizes_the_model():
    tokenizer = build_tokenizer(CATALOGUE, [])
    model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2)
    more = Catalogue(ids=("a", "new"), titles=("Alien", "New"), topics=((), ()))
    assert add_item_tokens(model, tokenizer, more) == 1
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert add_item_tokens(model, tokenizer, more) == 0


def test_marks_say_how_a_candidate_rises_and_how_new_it_is(tokenizer):
    """Levels begin at their bounds; what does not rise has no mark of it."""
    builder = PromptBuilder(tokenizer, encoding="item_token", described=True)
    trend = np.array([0.0, 0.001, 0.02, 0.0999, 0.1, 0.45, 0.7, 1.0], dtype=np.float32)
    novelty = np.array([0.0, 0.01, 0.2, 0.21, 0.6, 0.79, 0.81, 1.0], dtype=np.float32)
    marks = builder.marks_of(trend, novelty)
    assert [tokenizer.convert_ids_to_tokens(row) for row in marks] == [
        ["<new 0>"],
        ["<rise 1>", "<new 1>"],
        ["<rise 2>", "<new 1>"],
        ["<rise 2>", "<new 2>"],
        ["<rise 3>", "<new 3>"],
        ["<rise 6>", "<new 4>"],
        ["<rise 9>", "<new 5>"],
        ["<rise 9>", "<new 5>"],
    ]
    assert builder.marks_of(trend.astype(np.float64).round(4), novelty) == marks, "as a catalogue keeps trends"
    assert PromptBuilder(tokenizer, encoding="item_token").marks_of(trend, novelty) is None


NAMES = Catalogue(
    ids=("a", "b", "c"),
    titles=("Night Bus", "Night Train 2", "The train, the TRAIN"),
    topics=(("road",), ("rail", "night"), ("rail",)),
)


@pytest.fixture(scope="module")
def describing():
    tokenizer = build_tokenizer(NAMES, ["Rank"])
    builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False, show_rising=False, described=True)
    return builder, lambda token: tokenizer.convert_ids_to_tokens(list(token))


def test_an_item_is_its_token_its_topics_and_the_words_that_titles_share(describing):
    """One that is not known is the rest; what nobody has a token for is left out."""
    builder, texts = describing
    items = [
        Item("b", "Night Train 2", ("rail", "night")),
        Item("c", "The train, the TRAIN", ("rail",)),
        Item("new", "Train to Mars", ("rail", "space")),
        Item("", "Mars"),
    ]
    assert [texts(token) for (token,) in builder.candidate_tokens(items)] == [
        ["<item:b>", "<topic:rail>", "<topic:night>", "<word:night>", "<word:train>"],
        ["<item:c>", "<topic:rail>", "<word:train>"],
        ["<unknown item>", "<topic:rail>", "<word:train>"],
        ["<unknown item>"],
    ]
    assert builder.knows("a")
    assert not builder.knows("new")


def test_a_described_history_stands_in_order_with_the_interest_in_each(describing):
    builder, texts = describing
    history = [Item(i, "") for i in "abcaba"]
    interest = [0.0, 0.2499, 0.25, 0.5, 1.0, np.nan]
    marks = [(builder.tokenizer.convert_tokens_to_ids("<new 3>"),)]
    candidate = [Item("c", "Night")]
    ids, (start, end) = builder.prompt("Rank", history, candidate, interest=interest, marks=marks)
    levels = ["<interest 1>", "<interest 1>", "<interest 2>", "<interest 3>", "<interest 4>"]
    shown = [[f"<item:{i}>", level] for i, level in zip("abcab", levels, strict=True)]
    assert [texts(token) for token in ids[start : end - 1]] == [*shown, ["<item:a>"]]
    (listed,) = [token for token in ids[end:] if isinstance(token, tuple)]
    assert texts(listed) == ["<item:c>", "<word:night>", "<new 3>"]
    assert builder.candidate_tokens(candidate, marks) == [[listed]], "the answer names what the prompt lists"
    plain, _ = builder.prompt("Rank", history, candidate, marks=marks)
    assert plain[start : end - 1] == [(ids[start + n][0],) for n in (0, 1, 2, 0, 1, 0)], "nothing is known"


def test_the_lists_of_a_data_set_are_described_with_their_topics_and_marks(describing):
    builder, texts = describing
    lst = RankingList(
        user=0,
        time=1.0,
        history=np.array([0]),
        candidates=np.array([1, 2]),
        interest=np.zeros(2, dtype=np.float32),
        popularity=np.ones(2, dtype=np.float32),
        trend=np.array([0.0, 0.9], dtype=np.float32),
        history_interest=np.array([0.9], dtype=np.float32),
    )
    ids, (start, _) = builder.prompt_of(lst, NAMES, "Rank")
    assert texts(ids[start]) == ["<item:a>", "<topic:road>", "<word:night>", "<interest 4>"]
    (first,), (second,) = builder.candidate_tokens_of(lst, NAMES)
    assert texts(second) == ["<item:c>", "<topic:rail>", "<word:train>", "<rise 9>", "<new 5>"]
    assert [token for token in ids if token in (first, second)] == [first, second]
    nameless, _ = builder.prompt_of(lst, NAMES, "Rank", nameless={0, 2})
    assert texts(nameless[start])[:2] == ["<unknown item>", "<topic:road>"]
    of_answer = [texts(token)[0] for (token,) in builder.candidate_tokens_of(lst, NAMES, nameless={0, 2})]
    assert of_answer == ["<item:b>", "<unknown item>"]


def test_descriptions_need_item_tokens_and_tokens_of_their_own(tokenizer):
    with pytest.raises(ValueError, match="use encoding 'item_token', got 'index'"):
        PromptBuilder(tokenizer, encoding="index", described=True)
    strange = build_tokenizer(CATALOGUE, [])
    vocabulary = {text: number for text, number in strange.get_vocab().items() if text != "<rise 1>"}
    strange.get_vocab = lambda: vocabulary
    with pytest.raises(ValueError, match="no token '<rise 1>'"):
        PromptBuilder(strange, encoding="item_token", described=True)


def test_levels_of_what_a_need_is_offered():
    """Beside the list's best, in steps of the root of 2; the least is 1, and nothing is 0."""
    offer = np.array([0.0, 1e-9, 4 / 2**6, 1.0, 4 / np.sqrt(2), 4 / 2.1, 4.0])
    assert offer_levels(offer).tolist() == [0, 1, 1, 8, 11, 10, 12]
    assert offer_levels(offer / 1000).tolist() == offer_levels(offer).tolist()
    assert offer_levels(np.zeros(3)).tolist() == [0, 0, 0]
    assert offer_levels(np.zeros(0)).tolist() == []


def test_candidates_are_described_by_needs_of_ones_own():
    catalogue = Catalogue(tuple("abc"), tuple("ABC"), ((),) * 3, {"price": np.array([20.0, 0.0, np.nan])})
    needs = make_needs([{"name": "cheap", "wordings": "Cheap.", "gain": "interest * exp(-price / 20)"}])
    tokenizer = build_tokenizer(catalogue, [], needs=["cheap"])
    builder = PromptBuilder(tokenizer, encoding="item_token", described=True, described_needs=needs)
    lst = RankingList(0, 0.0, np.zeros(0, np.int64), np.arange(3), *np.zeros((3, 3), np.float32))
    marks = [tokenizer.convert_ids_to_tokens(list(of_one)) for of_one in builder.marks_in(lst, catalogue)]
    assert [of_one[1:] for of_one in marks] == [["<need:cheap 10>"], ["<need:cheap 12>"], ["<need:cheap 0>"]]
    for (tokens,), of_one in zip(builder.candidate_tokens_of(lst, catalogue), marks, strict=True):
        assert tokenizer.convert_ids_to_tokens(list(tokens))[-2:] == of_one
    with pytest.raises(ValueError, match="no token '<need:cheap 0>'"):
        PromptBuilder(build_tokenizer(catalogue, []), encoding="item_token", described=True, described_needs=needs)


def test_labels_are_tokens_of_letters_that_say_nothing(tokenizer):
    builder = PromptBuilder(tokenizer, encoding="label", show_rising=False)
    items = [Item(str(i), f"Title {i}") for i in range(5)]
    prompt, _ = builder.prompt("Rank them", [], items)
    tokens = builder.candidate_tokens(items)
    letters = [tokenizer.decode(sequence) for sequence in tokens]
    assert sorted(letters) == list("ABCDE")
    assert (builder.separator, builder.end) == ((), ())
    text = tokenizer.decode(prompt)
    for item, letter in zip(items, letters, strict=True):
        assert f"\n{letter}: {item.title}\n" in text
    for sequence in tokens:  # the token of the answer is that of the prompt
        assert len(sequence) == 1
        assert prompt.count(sequence[0]) >= 1
    # Whoever is shown where: over many lists no candidate's place has a label of its own.
    first = [builder.candidate_tokens([Item(f"{n}-{i}", "a") for i in range(5)])[0][0] for n in range(60)]
    assert len(set(first)) == 5
    assert builder.candidate_tokens(items) == tokens


def test_a_tokenizer_with_too_few_letters_cannot_label(tokenizer):
    from flexrec.task.labels import label_tokens

    assert len(set(label_tokens(tokenizer, 26))) == 26
    with pytest.raises(ValueError, match="a token for each of 5000 candidates, and the tokenizer has"):
        label_tokens(tokenizer, 5000)


@pytest.mark.parametrize("encoding", ["index", "label", "score"])
def test_what_is_shown_is_cut_to_its_length_and_places_follow(tokenizer, encoding):
    long = [Item(str(i), " ".join(["Aliens"] * (3 + 4 * i))) for i in range(3)]
    whole = PromptBuilder(tokenizer, encoding=encoding, show_rising=False)
    cut = PromptBuilder(tokenizer, encoding=encoding, show_rising=False, max_title_tokens=4)
    assert len(tokenizer.encode(long[1].title, add_special_tokens=False)) > 4
    before, after = (builder.prompt("Rank", [], long)[0] for builder in (whole, cut))
    assert len(after) < len(before)
    lines = tokenizer.decode(after).splitlines()
    assert len({len(tokenizer.encode(line, add_special_tokens=False)) for line in lines if "Aliens" in line}) <= 2
    if encoding == "score":
        for item, (place,) in zip(long, cut.candidate_tokens(long), strict=True):
            text = tokenizer.decode(after[: len(after) - place.before_end + 1])
            assert text.endswith("| match?"), item
        assert len({place.before_end for (place,) in cut.candidate_tokens(long)}) == 3
