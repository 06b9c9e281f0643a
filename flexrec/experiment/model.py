"""The model of a run: made or loaded, with adapters where it is to have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexrec.data.lists import RankingDataset
from flexrec.experiment.config import EMBEDDED, ExperimentConfig
from flexrec.experiment.run_folder import RunFolder
from flexrec.policy.lora import ADAPTER_FILE, OF_A_RUN, add_lora, has_adapters
from flexrec.policy.small_model import (
    HIDDEN_SIZE,
    build_model,
    build_tokenizer,
    item_vectors,
    topic_vectors,
    word_vectors,
)
from flexrec.task.needs import Need
from flexrec.task.prompts import (
    MATCH_MARKS,
    NOVELTY_MARKS,
    RISE_MARKS,
    PromptBuilder,
    add_item_tokens,
    item_token,
    known_columns,
)


def make_model(config: ExperimentConfig, dataset: RankingDataset, needs: list[Need]) -> tuple[Any, Any, PromptBuilder]:
    """Model, tokenizer and prompt builder: the embedded default, one from a hub or a folder, or a resumed run's."""
    encoding = config.encoding or ("item_token" if config.model == EMBEDDED else "index")
    marked = config.model == EMBEDDED and encoding == "item_token"
    if strange := [name for name in config.show if name not in known_columns(dataset.catalogue)]:
        known = ", ".join(known_columns(dataset.catalogue))
        raise ValueError(f"--show {strange[0]}: nothing of that name is known of the items, but {known}")
    queries = [lst.query for lst in dataset.train if lst.query]
    folder = RunFolder(config.output)
    if config.resume and folder.has_base():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder.base, **OF_A_RUN)
        model: Any = folder.load_base(tokenizer, config.lora)
    elif config.model == EMBEDDED:
        ids, size = dataset.catalogue.ids, HIDDEN_SIZE
        words: list[str] = []
        of_words = None
        if queries:  # items are alike by the words of their titles, which queries have in common with them
            words, of_words, vectors = word_vectors(dataset.catalogue, queries, size, seed=config.seed)
        else:
            vectors = item_vectors(dataset.log, len(ids), size, seed=config.seed)
        wordings = [wording for need in needs for wording in need.wordings]
        tokenizer = build_tokenizer(dataset.catalogue, wordings, words=words)
        if dataset.catalogue.topic_names:  # items are alike by who had them and by their topics, as much by either
            topics = topic_vectors(dataset.catalogue, size, seed=config.seed)
            vectors = vectors / vectors.square().mean().sqrt() + topics / topics.square().mean().sqrt()
        model = build_model(
            tokenizer,
            hidden_size=size,
            item_ids=ids,
            vectors=vectors,
            words=words,
            of_words=of_words,
            seed=config.seed,
        )
    else:
        given = Path(config.model)
        if (given / ADAPTER_FILE).is_file():
            raise ValueError(
                f"--model {config.model!r} holds adapters: give a whole model, such as a run with --lora-save merged"
            )
        name = str(given.absolute()) if given.is_dir() else config.model  # adapters remember it
        # What is trained is kept in float32: in bfloat16 a parameter of 0.02 does not change by steps of 5e-5. What
        # LoRA leaves alone may stay as it was saved.
        dtype = torch.float32 if config.lora is None else "auto"
        try:
            how = {"trust_remote_code": False, "local_files_only": given.is_dir()}
            tokenizer = AutoTokenizer.from_pretrained(name, **how)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **how)
        except (OSError, ValueError) as error:
            raise ValueError(f"--model {config.model!r} cannot be loaded: {error}") from error
        if encoding == "item_token":
            add_item_tokens(model, tokenizer, dataset.catalogue)
    if config.lora is not None and not has_adapters(model):
        tokens = [item_token(item_id) for item_id in dataset.catalogue.ids] if encoding == "item_token" else []
        tokens += [*RISE_MARKS, *NOVELTY_MARKS] if marked else []
        tokens += MATCH_MARKS if marked and queries else []
        model = add_lora(
            model,
            config.lora,
            alpha=config.lora_alpha,
            targets=config.lora_targets,
            token_ids=tokenizer.convert_tokens_to_ids(tokens),
        )
    if torch.cuda.is_available():
        model.to("cuda")
    builder = PromptBuilder(
        tokenizer,
        encoding=encoding,
        show_titles=config.model != EMBEDDED or encoding != "item_token",
        show=config.show,
        show_rising=not marked and any(need.name == "trend" for need in needs),  # which marks say better
        marked=marked,
        by_words=config.model == EMBEDDED and bool(queries),
    )
    return model, tokenizer, builder
