"""The embedded default: a small Llama-type model and a tokenizer made from the catalogue, so nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexrec.data.lists import Catalogue, Interactions
from flexrec.task.prompts import CANDIDATES, LIKED, NOVELTY_MARKS, RANKING, RISE_MARKS, RISING, SEEN, item_token

HIDDEN_SIZE = 128


def build_tokenizer(catalogue: Catalogue, texts: Iterable[str], *, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the titles, the topics and ``texts``, plus one token per item."""
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
    # A random rotation, so that no coordinate of the embedding is larger than another.
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))
    return vectors @ rotation


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


def build_model(
    tokenizer: Any,
    *,
    item_ids: Sequence[str] = (),
    vectors: torch.Tensor | None = None,
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
    if vectors is not None:
        tokens = tokenizer.convert_tokens_to_ids([item_token(item_id) for item_id in item_ids])
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            spread = config.initializer_range / vectors.square().mean().sqrt()
            weight[tokens] = vectors * spread + weight[tokens] / 4
    return model
