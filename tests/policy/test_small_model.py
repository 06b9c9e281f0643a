"""The embedded default: a tokenizer and a model made from a catalogue and a log."""

import numpy as np
import pytest
import torch

from flexrec.data import Catalogue, Interactions
from flexrec.policy.small_model import build_model, build_tokenizer, item_vectors, starting_rows, word_vectors
from flexrec.task.descriptions import (
    INTEREST_MARKS,
    NOVELTY_MARKS,
    RISE_MARKS,
    UNKNOWN_ITEM,
    describing_tokens,
    item_token,
    known_words,
    title_words,
    word_token,
)
from flexrec.task.prompts import CANDIDATES, LIKED, RANKING, RISING, SEEN

CATALOGUE = Catalogue(ids=("a", "b", "c", "d"), titles=("Alien", "Ça va", "Night 3", "東京"), topics=((), (), (), ()))


def log_of(pairs):
    users, items = np.array(pairs).T
    return Interactions(users, items, np.ones(len(pairs), dtype=np.float32), np.arange(len(pairs), dtype=np.float64))


def test_tokenizer_spells_everything_and_fixed_text_is_one_token():
    tokenizer = build_tokenizer(CATALOGUE, ["Rank what I will like"])
    for text in (*CATALOGUE.titles, "something never seen: ÿ☃\n"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    for text in (LIKED, SEEN, RISING, CANDIDATES, RANKING, *(item_token(i) for i in CATALOGUE.ids)):
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1


def test_item_vectors_put_items_of_the_same_users_together():
    log = log_of([(u, i) for u in range(6) for i in ((0, 1) if u < 3 else (2, 3))])
    vectors = item_vectors(log, 5, 8, seed=1)
    assert vectors.shape == (5, 8)
    unit = torch.nn.functional.normalize(vectors[:4], dim=1)
    similarity = unit @ unit.T
    assert similarity[0, 1] > 0.99
    assert similarity[2, 3] > 0.99
    assert similarity[:2, 2:].abs().max() < 1e-3
    assert not vectors[4].any(), "nobody had the last item"
    torch.testing.assert_close(vectors, item_vectors(log, 5, 8, seed=1))
    assert not torch.allclose(vectors, item_vectors(log, 5, 8, seed=2))


def test_word_vectors_put_queries_beside_the_titles_that_share_their_words():
    titles = ("Red running shoes", "Blue shoes for running", "Desk lamp, LED", "Lamp LED white", "Novel")
    catalogue = Catalogue(tuple("abcde"), titles, ((),) * 5)
    queries = ["cheap running shoes", "red blue desk white LED"]
    words = known_words(catalogue, queries)
    assert words[:4] == ["running", "shoes", "lamp", "led"], "those of several titles first"
    assert set(words[4:]) == {"cheap", "red", "blue", "desk", "white"}

    def scores(vectors, query):
        row = dict(zip(words, vectors, strict=True))
        of_titles = [sum(row[word] for word in title_words(title) if word in row) for title in titles[:4]]
        return torch.stack(of_titles) @ sum(row[word] for word in query.split())

    exact, few = (word_vectors(catalogue, words, size, seed=1) for size in (8, 2))
    assert exact.shape == (9, 8)
    assert scores(exact, "running shoes")[:2].min() > 0.3
    assert scores(exact, "running shoes")[2:].abs().max() < 1e-3
    assert scores(few, "red")[1] > 0.1, "red stands beside shoes elsewhere"
    assert exact[words.index("cheap")].abs().max() < 1e-3, "no title has it"
    torch.testing.assert_close(exact, word_vectors(catalogue, words, 8, seed=1))
    rows = starting_rows(catalogue, torch.ones(5, 8), queries=queries)
    assert torch.stack([rows[word_token(word)] for word in words]).square().mean() == pytest.approx(1.0)
    assert not starting_rows(catalogue, torch.ones(5, 8))[word_token("shoes")].any()


def test_liked_items_have_longer_vectors():
    """Entries are 1 + interest: of two items that the same users had, the liked one has the longer vector."""
    users, items = np.repeat(np.arange(6), 2), np.tile([0, 1], 6)
    interest = np.tile([0.0, 1.0], 6).astype(np.float32)
    log = Interactions(users, items, interest, np.arange(12, dtype=np.float64))
    vectors = item_vectors(log, 2, 4)
    lengths = vectors.norm(dim=1)
    # Of rank one: the column c of equal entries a has the norm a sqrt(6), divided by its root.
    torch.testing.assert_close(lengths[1] / lengths[0], torch.tensor(2.0**0.5))
    # All on one line, which the seed turns to another place.
    torch.testing.assert_close(vectors[1] / lengths[1], vectors[0] / lengths[0], rtol=0.01, atol=1e-3)
    assert not torch.allclose(item_vectors(log, 2, 4, seed=1).abs(), vectors.abs(), rtol=0.05)


def test_model_starts_from_the_vectors_at_the_usual_spread():
    tokenizer = build_tokenizer(CATALOGUE, [])
    vectors = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 50
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "seed": 3}
    rows = {item_token(i): row / 50 for i, row in zip(CATALOGUE.ids, vectors, strict=True)}
    model = build_model(tokenizer, rows=rows, **sizes)
    weight = model.get_input_embeddings().weight.detach()
    tokens = tokenizer.convert_tokens_to_ids([item_token(i) for i in CATALOGUE.ids])
    cosine = torch.nn.functional.cosine_similarity(weight[tokens], vectors)
    assert cosine.min() > 0.9
    assert 0.5 < weight[tokens].std() / model.config.initializer_range < 2
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    plain = build_model(tokenizer, **sizes).get_input_embeddings().weight.detach()
    others = [i for i in range(len(plain)) if i not in tokens]
    torch.testing.assert_close(weight[others], plain[others])


def test_the_seed_and_the_sizes_are_the_models():
    tokenizer = build_tokenizer(CATALOGUE, [])
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "max_length": 77}
    one, same, other = (build_model(tokenizer, **sizes, seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        if a.ndim > 1:
            assert not torch.allclose(a, c)
    config = one.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 2, 4)
    assert config.max_position_embeddings == 77
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    build_model(tokenizer, **sizes)
    torch.testing.assert_close(torch.rand(2), expected)


def test_texts_that_stand_in_many_prompts_take_few_tokens():
    texts = ["Rank the candidates by how much this user will enjoy them."]
    with_them = build_tokenizer(CATALOGUE, texts, vocab_size=400)
    without = build_tokenizer(CATALOGUE, [], vocab_size=400)
    assert len(with_them.encode(texts[0])) < len(without.encode(texts[0])) / 2


TOPICS = (("x",), ("x", "y"), ("y",), ("z",), ())


def test_what_describes_items_starts_from_vectors_and_directions_of_topics():
    """Half of the mean square of an item's row is its own, half its topics'; words start at nothing."""
    catalogue = Catalogue(ids=tuple("abcde"), titles=("Up", "Down", "Up 2", "Down", ""), topics=TOPICS)
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 30
    rows = starting_rows(catalogue, vectors, seed=1)
    named = [token for token in describing_tokens(catalogue) if ":" in token]
    assert sorted(rows) == sorted(named), "marks start as any token does"
    own = torch.stack([rows[item_token(i)] for i in catalogue.ids])
    scaled = vectors / vectors.square().mean().sqrt() * 0.5**0.5
    assert (own - scaled).std().item() == pytest.approx(0.25, rel=0.2), "and noise of its own"
    x, y, z = (rows[f"<topic:{topic}>"] for topic in "xyz")
    directions = torch.stack([x, y, z])
    torch.testing.assert_close(directions @ directions.T, (x @ x) * torch.eye(3), atol=1e-5, rtol=1e-5)
    topics = torch.stack([x, x + y, y, z, torch.zeros(8)])
    assert topics.square().mean().item() == pytest.approx(0.5)
    assert not rows["<word:up>"].any()
    assert not torch.allclose(x, starting_rows(catalogue, vectors, seed=2)["<topic:x>"])
    assert starting_rows(catalogue, vectors[:, :2])["<topic:x>"].shape == (2,), "more topics than dimensions"
    plain = starting_rows(Catalogue(catalogue.ids, catalogue.titles, ((),) * 5), vectors)
    alone = torch.stack([plain[item_token(i)] for i in catalogue.ids])
    assert (alone - scaled * 2**0.5).std().item() == pytest.approx(0.25, rel=0.2), "without topics all is its own"


def test_a_catalogue_is_described_by_its_items_topics_and_shared_words():
    titles = ("The Matrix (1999)", "The Matrix Reloaded (2003)", "Election (1999)", "Matrix, matrix", "")
    found = describing_tokens(Catalogue(ids=tuple("abcde"), titles=titles, topics=TOPICS))
    items, topics = [f"<item:{i}>" for i in "abcde"], [f"<topic:{t}>" for t in "xyz"]
    assert found[:8] == items + topics
    assert set(found[8:11]) == {"<word:matrix>", "<word:the>", "<word:1999>"}
    assert found[11:] == [UNKNOWN_ITEM, *INTEREST_MARKS, *RISE_MARKS, *NOVELTY_MARKS]
