"""The embedded default: a tokenizer and a model made from a catalogue and a log."""

import numpy as np
import torch

from flexrec.data import Catalogue, Interactions
from flexrec.embedded import build_model, build_tokenizer, item_vectors
from flexrec.prompts import CANDIDATES, LIKED, RANKING, RISING, SEEN, item_token

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
