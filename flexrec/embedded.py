"""The embedded default: a small Llama-type model and a tokenizer made from the catalogue, so nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexrec.data.lists import Catalogue
from flexrec.prompts import CANDIDATES, LIKED, RANKING, RISING, SEEN, item_token


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
    fast.add_tokens([item_token(item_id) for item_id in catalogue.ids], special_tokens=True)
    return fast


def build_model(
    tokenizer: Any,
    *,
    hidden_size: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
    max_length: int = 4096,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A freshly initialised Llama-type model for ``tokenizer``; input and output embeddings are tied."""
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
        return LlamaForCausalLM(config)
