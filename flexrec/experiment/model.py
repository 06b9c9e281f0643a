"""The model of a run: made or loaded, with adapters where it is to have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexrec.data.cold import new_items
from flexrec.data.lists import RankingDataset
from flexrec.experiment.config import EMBEDDED, ExperimentConfig
from flexrec.experiment.run_folder import RunFolder
from flexrec.policy.gguf import converted, is_gguf
from flexrec.policy.lora import ADAPTER_FILE, OF_A_RUN, add_lora, has_adapters
from flexrec.policy.small_model import HIDDEN_SIZE, build_model, build_tokenizer, item_vectors, starting_rows
from flexrec.task.descriptions import describing_tokens, item_token
from flexrec.task.needs import Need
from flexrec.task.own_needs import asks_of_data, written
from flexrec.task.prompts import PromptBuilder, add_item_tokens, known_columns


def make_model(
    config: ExperimentConfig, dataset: RankingDataset, needs: list[Need], say: Callable[[str], None] = print
) -> tuple[Any, Any, PromptBuilder]:
    """Model, tokenizer and prompt builder: the embedded default, one from a hub or a folder, or a resumed run's."""
    encoding = config.encoding
    assert encoding is not None  # the configuration knows the model's
    described = config.model == EMBEDDED and encoding == "item_token"
    # Where items are described, new ones are told by what they are, and have no row that was never trained.
    known = np.flatnonzero(~new_items(dataset)) if described else np.arange(len(dataset.catalogue))
    catalogue = dataset.catalogue.select(known)
    queries = [lst.query for lst in dataset.train if lst.query]
    own = [need for need, _ in written(needs)] if described else []
    names = [need.name for need in own]
    if strange := [name for name in config.show if name not in known_columns(dataset.catalogue)]:
        they_have = ", ".join(known_columns(dataset.catalogue))
        raise ValueError(f"--show {strange[0]}: nothing of that name is known of the items, but {they_have}")
    folder = RunFolder(config.output)
    if config.resume and folder.is_whole(folder.base):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder.base, **OF_A_RUN)
        model: Any = folder.load_stage(folder.base, tokenizer, config.lora)
    elif config.model == EMBEDDED:
        wordings = [wording for need in needs for wording in need.wordings]
        tokenizer = build_tokenizer(catalogue, wordings, queries=queries, needs=names)
        vectors = item_vectors(dataset.log, len(dataset.catalogue), HIDDEN_SIZE, seed=config.seed)[known]
        rows = starting_rows(catalogue, vectors, queries=queries, seed=config.seed)
        model = build_model(tokenizer, hidden_size=HIDDEN_SIZE, rows=rows, seed=config.seed)
    else:
        given = converted(config.model, say) if is_gguf(config.model) else Path(config.model)
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
            add_item_tokens(model, tokenizer, catalogue)
    if config.lora is not None and not has_adapters(model):
        tokens = [item_token(item_id) for item_id in catalogue.ids] if encoding == "item_token" else []
        tokens = describing_tokens(catalogue, queries, names) if described else tokens
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
        max_title_tokens=config.max_title_tokens,
        show_rising=not described and any("trend" in asks_of_data(need) for need in needs),  # which marks say better
        described=described,
        described_needs=own,
        one_pass=config.mode == "one-pass",
        reasoning_end=config.reasoning_end,
        max_reasoning_tokens=config.max_reasoning_tokens,
    )
    return model, tokenizer, builder
