"""The embedded default: a tokenizer and a model made from a catalogue and a log."""

import numpy as np
import torch

from flexrec.data import Catalogue, Interactions
from flexrec.policy.small_model import build_model, build_tokenizer, item_vectors, topic_vectors, word_vectors
from flexrec.task.prompts import CANDIDATES, LIKED, RANKING, RISING, SEEN, item_token, word_token

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
    words, of_words, of_items = word_vectors(catalogue, ["cheap running shoes", "LED"], 8, seed=1)
    assert words[:4] == ["led", "running", "shoes", "lamp"], "the most frequent first"
    assert {"cheap", "novel", "for"} <= set(words)
    assert of_words.shape == (len(words), 8)
    assert of_items.shape == (5, 8)
    query = of_words[[words.index(word) for word in ("running", "shoes")]].sum(0)
    scores = of_items @ query
    assert scores[:2].min() > 0.5
    assert scores[2:].abs().max() < 1e-3
    assert of_words[words.index("cheap")].abs().max() < 1e-3, "no title has it"
    _, in_few, items_in_few = word_vectors(catalogue, ["cheap running shoes", "LED"], 3, seed=1)
    assert items_in_few[1] @ in_few[words.index("red")] > 0.1, "red stands beside shoes elsewhere"
    torch.testing.assert_close(of_items, word_vectors(catalogue, ["cheap running shoes", "LED"], 8, seed=1)[2])
    tokenizer = build_tokenizer(catalogue, [], words=words)
    model = build_model(tokenizer, hidden_size=8, num_layers=1, num_heads=2, words=words, of_words=100 * of_words)
    rows = model.get_input_embeddings().weight.detach()[
        tokenizer.convert_tokens_to_ids([word_token(word) for word in words])
    ]
    assert torch.corrcoef(torch.stack([rows.flatten(), of_words.flatten()]))[0, 1] > 0.9
    assert rows.square().mean().sqrt() < 0.03


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
    model = build_model(tokenizer, item_ids=CATALOGUE.ids, vectors=vectors, **sizes)
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


def test_topic_vectors_are_sums_of_directions():
    topics = (("x",), ("x", "y"), ("y",), ("z",), ())
    catalogue = Catalogue(ids=tuple("abcde"), titles=tuple("abcde"), topics=topics)
    vectors = topic_vectors(catalogue, 8, seed=1)
    cosines = vectors @ vectors.T
    half = 0.5**0.5
    expected = [[1, half, 0, 0, 0], [half, 1, half, 0, 0], [0, half, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    torch.testing.assert_close(cosines, torch.tensor(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(vectors, topic_vectors(catalogue, 8, seed=2))
    assert topic_vectors(catalogue, 2).shape == (5, 2), "more topics than dimensions"
