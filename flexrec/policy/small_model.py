"""The embedded default: a small Llama-type model and a tokenizer made from the catalogue, so nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexrec.data.lists import Catalogue, Interactions
from flexrec.task.descriptions import (
    describing_tokens,
    item_token,
    known_words,
    title_words,
    topic_token,
    word_token,
)
from flexrec.task.prompts import CANDIDATES, LIKED, RANKING, RISING, SEARCHED, SEEN

HIDDEN_SIZE = 128


def build_tokenizer(
    catalogue: Catalogue,
    texts: Iterable[str],
    *,
    queries: Sequence[str] = (),
    needs: Iterable[str] = (),
    vocab_size: int = 2048,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the titles, the topics and ``texts``, plus one token per item, and those by
    which items are described (:mod:`flexrec.task.descriptions`).

    Args:
        queries: of the training lists, whose words have tokens, too.
        needs: names of those by what is offered to which candidates are described.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The texts stand in many prompts: they weigh as much as all titles, so that they take few tokens.
    corpus = [*list(texts) * len(catalogue), *catalogue.titles, *catalogue.topic_names]
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.add_tokens([LIKED, SEEN, RISING, CANDIDATES, RANKING])  # what stands in every prompt: one token each
    if queries:
        fast.add_tokens([SEARCHED])
    fast.add_tokens(describing_tokens(catalogue, queries, needs), special_tokens=True)
    return fast


def item_vectors(log: Interactions, num_items: int, size: int, *, seed: int = 0) -> torch.Tensor:
    """(items, size) float32: where items stand to each other by who had them, to start their embeddings from.

    The leading right singular vectors, each times the root of its singular value, of the user-item matrix with entries
    1 + interest and columns divided by the root of their norm, so that popular items do not fill the space (PureSVD,
    Cremonesi et al. 2010, between raw counts and cosines). Items that nobody had get a zero row.
    """
    users, rows = np.unique(log.users, return_inverse=True)
    matrix = np.zeros((len(users), num_items), dtype=np.float32)
    matrix[rows, log.items] = 1.0 + log.interest
    matrix /= np.sqrt(np.maximum(np.linalg.norm(matrix, axis=0), 1e-6))
    rank = min(size, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, values, right = torch.svd_lowrank(torch.from_numpy(matrix), q=rank, niter=4)
    vectors = torch.zeros(num_items, size)
    vectors[:, :rank] = right * values.sqrt()
    return vectors @ _rotation(size, seed)


def _rotation(size: int, seed: int) -> torch.Tensor:
    """(size, size) at random, so that no coordinate of an embedding is larger than another."""
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))
    return rotation


def word_vectors(catalogue: Catalogue, words: Sequence[str], size: int, *, seed: int = 0) -> torch.Tensor:
    """(words, size) float32: where words stand to each other by the titles that they are in.

    The leading right singular vectors, each times the root of its singular value, of the matrix of items and words that
    weighs the words of a title by how few titles have them (latent semantic analysis, Deerwester et al. 1990): the
    product of the sums of a title's and a query's rows is high where they share words, or words that stand in the same
    titles. Words of no title have a zero row.
    """
    titles = [title_words(title) for title in catalogue.titles]
    column = {word: j for j, word in enumerate(words)}
    pairs = np.array([(i, column[word]) for i, title in enumerate(titles) for word in title if word in column])
    pairs = pairs.reshape(-1, 2)
    occurrences = np.bincount(pairs[:, 1], minlength=len(words))
    weights = np.log((1 + len(titles)) / (1 + occurrences))[pairs[:, 1]]
    norms = np.sqrt(np.bincount(pairs[:, 0], weights**2, minlength=len(titles)))
    values = torch.from_numpy(weights / np.maximum(norms, 1e-6)[pairs[:, 0]]).float()
    places, shape = torch.from_numpy(pairs.T.copy()), (len(titles), len(words))
    matrix = torch.sparse_coo_tensor(places, values, shape, check_invariants=True).coalesce()
    rank = min(size, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, strengths, right = torch.svd_lowrank(matrix, q=rank, niter=4)
    return right * strengths.sqrt() @ _rotation(size, seed)[:rank]


def starting_rows(
    catalogue: Catalogue, vectors: torch.Tensor, *, queries: Sequence[str] = (), seed: int = 0
) -> dict[str, torch.Tensor]:
    """(size,) float32 by token, what the rows of the tokens that describe a catalogue's items start from.

    An item's own row is its vector. Each topic is a direction of its own, random instead of orthogonal where there are
    more than ``size``. Over the items, a row has a mean square of 1, of which topics make a half, plus noise of a
    quarter of that spread, the item's own: noise of its topics and words would add up. Words of titles start at 0, or,
    where there are queries, from :func:`word_vectors`, scaled to a mean square of 1.

    Args:
        vectors: (items, size), from :func:`item_vectors`.
        queries: of the training lists.
    """
    size = vectors.shape[1]
    words = known_words(catalogue, queries)
    of_words = word_vectors(catalogue, words, size, seed=seed) if queries else torch.zeros(len(words), size)
    of_words = of_words * of_words.square().mean().clamp(min=1e-12).rsqrt() if len(words) else of_words
    rows = dict(zip(map(word_token, words), of_words, strict=True))
    topics = torch.from_numpy(catalogue.topic_matrix)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(size, topics.shape[1], generator=generator)
    if topics.shape[1] <= size:
        directions, _ = torch.linalg.qr(directions)
    parts = [vectors] + [topics @ directions.T] * bool(catalogue.topic_names)
    scales = [(len(parts) * part.square().mean().clamp(min=1e-12)).rsqrt() for part in parts]
    own = vectors * scales[0] + torch.randn(vectors.shape, generator=generator) / 4
    rows |= dict(zip(map(item_token, catalogue.ids), own, strict=True))
    if catalogue.topic_names:
        pairs = zip(catalogue.topic_names, directions.T, strict=True)
        rows |= {topic_token(topic): direction * scales[1] for topic, direction in pairs}
    return rows


def build_model(
    tokenizer: Any,
    *,
    rows: Mapping[str, torch.Tensor] | None = None,
    hidden_size: int = HIDDEN_SIZE,
    num_layers: int = 2,
    num_heads: int = 4,
    max_length: int = 4096,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A freshly initialised Llama-type model for ``tokenizer``; input and output embeddings are tied.

    Args:
        rows: (hidden_size,) by token, what some tokens' embeddings start from, in units of the spread of the others.
    """
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    if rows:
        tokens = tokenizer.convert_tokens_to_ids(list(rows))
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            weight[tokens] = torch.stack(list(rows.values())) * config.initializer_range
    return model
