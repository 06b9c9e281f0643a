"""Adapters of PEFT: LoRA beside a frozen model, and the model as its own reference.

A model with adapters is used as it is, through its own modules; PEFT is imported where adapters are made or loaded.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

OLDEST_PEFT = "0.19.0"  # as in pyproject.toml; in older ones a second adapter breaks tied embeddings with trained rows
ADAPTER_FILE = "adapter_config.json"  # PEFT's; a folder that has it holds adapters and no whole model
BACKBONE = "backbone"  # in a run's folder: the model that its adapters belong to, where that has no name
# How what a run wrote is loaded: from its folder alone, and nothing of it is executed.
OF_A_RUN = {"local_files_only": True, "trust_remote_code": False}
REFERENCE = "reference"  # name of the frozen adapter that the policy is compared with


def require_peft() -> Any:
    """The package peft, or an ImportError that says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"LoRA needs the package peft ({error}): run `.venv/bin/pip install -e '.[peft]'`") from error
    if Version(peft.__version__) < Version(OLDEST_PEFT):
        raise ImportError(
            f"LoRA needs peft {OLDEST_PEFT} or newer, got {peft.__version__}: "
            f"run `.venv/bin/pip install -U -e '.[peft]'`"
        )
    return peft


def has_adapters(model: Any) -> bool:
    """Whether ``model`` is a ``peft.PeftModel``."""
    peft = sys.modules.get("peft")  # who has made one has imported it
    return peft is not None and isinstance(model, peft.PeftModel)


def causal_lm(model: Any) -> Any:
    """The model of transformers: what is inside of wrappers (DDP), and of a PEFT model the one that its layers are in.

    Raises:
        ValueError: adapters that are more than layers of the model (virtual tokens, activated LoRA): its own forward
            pass would leave them out.
    """
    model = getattr(model, "module", model)
    if not has_adapters(model):
        return model
    config = model.active_peft_config
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"adapters of type {config.peft_type} change the prompt or depend on it, which rankings are not scored "
            f"with: use adapters inside the layers, such as LoRA"
        )
    return model.get_base_model()


def text_config(model: Any) -> Any:
    """The configuration of a model's language part, whatever is wrapped around it."""
    return causal_lm(model).config.get_text_config()


def add_lora(
    model: Any,
    rank: int,
    *,
    alpha: int | None = None,
    targets: Sequence[str] | None = None,
    token_ids: Sequence[int] = (),
) -> Any:
    """``model`` with LoRA of this rank, which is all that is trained from now on.

    Args:
        alpha: what the product of the two factors is multiplied by is ``alpha / rank``; default: twice the rank.
        targets: ends of the names of linear layers; default: every linear layer but the output layer.
        token_ids: rows of the input and output embeddings that are trained themselves: tokens that the model was not
            trained with have nothing that a low-rank change could adapt.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: a rank or alpha below 1, or a target that cannot be adapted.
    """
    peft = require_peft()
    for name, value in (("rank", rank), ("alpha", alpha)):
        if value is not None and value < 1:
            raise ValueError(f"the {name} of LoRA must be at least 1, got {value}")
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs.weight is inputs.weight
    for target in targets or ():
        _check_target(model, target, output_is_shared=tied or len(token_ids) > 0)
    # PEFT trains the rows of tied embeddings in both places.
    embeddings = [inputs] if tied else [inputs, outputs]
    names = [next(name for name, module in model.named_modules() if module is layer) for layer in embeddings]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=list(targets) if targets else "all-linear",
        trainable_token_indices={name: list(token_ids) for name in names} if len(token_ids) else None,
    )
    return peft.get_peft_model(model, config)


def _check_target(model: Any, target: str, output_is_shared: bool) -> None:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    hit = [name for name in linear if name == target or name.endswith(f".{target}")]
    if not hit:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"no linear layer of the model is called {target!r}: LoRA can go to {', '.join(known)}")
    if output_is_shared and any(linear[name] is model.get_output_embeddings() for name in hit):
        raise ValueError(
            f"LoRA cannot go to the output layer {target!r}: its weight is also the input embedding, or has rows that "
            f"are trained themselves"
        )


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters that are trained, and the name of the model that they belong to; nothing else of it."""
    model.save_pretrained(folder, selected_adapters=[model.active_adapter], save_embedding_layers=False)


def load_model(folder: Path, tokenizer: Any, *, backbone: Path | None = None, trainable: bool = False) -> Any:
    """The causal language model of a folder: a whole one, or adapters with the model that they belong to.

    Args:
        tokenizer: where it has more tokens than the adapters' model, that model gets rows for them.
        backbone: the folder of the adapters' model; default: "backbone" in ``folder``. Where there is no such folder
            it is the model that the adapters name.
        trainable: whether adapters are to be trained further.

    Raises:
        ImportError: the folder holds adapters, and PEFT is not installed.
        ValueError: the adapters' model cannot be loaded.
    """
    if not (folder / ADAPTER_FILE).is_file():
        return AutoModelForCausalLM.from_pretrained(folder, **OF_A_RUN)
    peft = require_peft()
    backbone = folder / BACKBONE if backbone is None else backbone
    name = (
        backbone
        if backbone.is_dir()
        else peft.PeftConfig.from_pretrained(folder, local_files_only=True).base_model_name_or_path
    )
    try:
        # A model with a name may have to be fetched by it; a folder is never looked up anywhere else.
        here = isinstance(name, Path) or Path(name).is_absolute()
        model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, local_files_only=here)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds adapters of the model {str(name)!r}, which cannot be loaded: {error}"
        ) from error
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        # The rows of new items come with the adapters; no other is ever read.
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable, local_files_only=True)


def keep_reference(model: Any) -> None:
    """Make the policy as it is now the reference of :func:`reference_policy`; no weight of the model is copied.

    LoRA that was never trained changes nothing: its reference is the model with adapters switched off, and nothing is
    kept. Adapters that were trained before, by supervision for example, are part of the policy that the KL is to hold
    on to: they are copied into a second adapter, "reference", that is never trained. It is as small as the first, and
    unlike merging the first into the model it leaves the model's weights, which other adapters share and to which the
    saved adapter refers, as they were. Checkpoints hold both, so that a resumed training has the same reference. A
    model that has an adapter of this name already keeps it.
    """
    causal_lm(model)  # adapters that cannot be used at all are told from here
    if REFERENCE in model.peft_config:
        return
    peft = require_peft()
    trained = peft.get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    if all("lora_A" in name or ("lora_B" in name and not values.any()) for name, values in trained.items()):
        return
    with torch.random.fork_rng(devices=[]):  # what is drawn to initialise the copy must not change the sampling
        model.add_adapter(REFERENCE, copy.deepcopy(model.active_peft_config))
    peft.set_peft_model_state_dict(model, trained, adapter_name=REFERENCE)


@contextmanager
def reference_policy(model: Any) -> Iterator[None]:
    """Inside of it, ``model`` computes what :func:`keep_reference` has kept: in evaluation mode, without gradients."""
    active, training = model.active_adapter, model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        with torch.no_grad():
            if REFERENCE in model.peft_config:
                model.set_adapter(REFERENCE)
                yield
            else:
                with model.disable_adapter():
                    yield
    finally:
        model.set_adapter(active)
        model.train(training)
        model.requires_grad_(False)  # switching adapters trains all that it switches on
        for parameter in trained:
            parameter.requires_grad_(True)
