"""The embedded default: a small Llama-type model and a tokenizer made from the catalogue, so nothing is downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexrec.data.lists import Catalogue, Interactions
from flexrec.task.prompts import (
    CANDIDATES,
    LIKED,
    MATCH_MARKS,
    NOVELTY_MARKS,
    RANKING,
    RISE_MARKS,
    RISING,
    SEARCHED,
    SEEN,
    item_token,
    title_words,
    word_token,
)

HIDDEN_SIZE = 128
_MAX_WORDS = 2**15


def build_tokenizer(
    catalogue: Catalogue, texts: Iterable[str], *, words: Sequence[str] = (), vocab_size: int = 2048
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the titles, the topics and ``texts``, plus one token per item.

    Args:
        words: of queries; each is a token, too.
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
    fast.add_tokens([*RISE_MARKS, *NOVELTY_MARKS], special_tokens=True)
    fast.add_tokens([item_token(item_id) for item_id in catalogue.ids], special_tokens=True)
    if words:
        fast.add_tokens([SEARCHED])
        fast.add_tokens([*MATCH_MARKS, *map(word_token, words)], special_tokens=True)
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


def topic_vectors(catalogue: Catalogue, size: int, *, seed: int = 0) -> torch.Tensor:
    """(items, size) float32: where items stand to each other by their topics, each topic a direction of its own.

    An item of n topics is the sum of their directions, divided by the root of n. Of more topics than ``size`` the
    directions are random instead of orthogonal.
    """
    topics = torch.from_numpy(catalogue.topic_matrix)
    shares = topics / topics.sum(1, keepdim=True).clamp(min=1.0).sqrt()
    directions = torch.randn(size, shares.shape[1], generator=torch.Generator().manual_seed(seed))
    if shares.shape[1] <= size:
        directions, _ = torch.linalg.qr(directions)
    return shares @ directions.T


def word_vectors(
    catalogue: Catalogue, queries: Iterable[str], size: int, *, seed: int = 0
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """The words of queries and titles, (words, size) and (items, size) float32: where both start from in one space.

    The leading singular vectors on both sides, each times the root of its singular value, of the matrix of items and
    words that weighs the words of a title by how few titles have them (latent semantic analysis, Deerwester et al.
    1990): the product of an item's vector with the sum of a query's is high where they share words, or words that stand
    in the same titles. Of more than 2^15 words the most frequent ones are kept; words of no title have a zero row.
    """
    titles = [title_words(title) for title in catalogue.titles]
    counts = Counter(word for text in queries for word in title_words(text))
    counts.update(word for title in titles for word in title)
    words = [word for word, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:_MAX_WORDS]]
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
        left, strengths, right = torch.svd_lowrank(matrix, q=rank, niter=4)
    of_items, of_words = (side * strengths.sqrt() @ _rotation(size, seed)[:rank] for side in (left, right))
    return words, of_words, of_items


def build_model(
    tokenizer: Any,
    *,
    item_ids: Sequence[str] = (),
    vectors: torch.Tensor | None = None,
    words: Sequence[str] = (),
    of_words: torch.Tensor | None = None,
    hidden_size: int = HIDDEN_SIZE,
    num_layers: int = 2,
    num_heads: int = 4,
    max_length: int = 4096,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A freshly initialised Llama-type model for ``tokenizer``; input and output embeddings are tied.

    Args:
        item_ids, vectors: the embeddings of these items' tokens start from ``vectors`` (items, hidden_size), scaled to
            the spread of the others, plus a quarter of the noise those have.
        words, of_words: the same of the tokens of words.
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
    for texts, start in ((map(item_token, item_ids), vectors), (map(word_token, words), of_words)):
        if start is not None:
            tokens = tokenizer.convert_tokens_to_ids(list(texts))
            with torch.no_grad():
                weight = model.get_input_embeddings().weight
                spread = config.initializer_range / start.square().mean().sqrt()
                weight[tokens] = start * spread + weight[tokens] / 4
    return model
