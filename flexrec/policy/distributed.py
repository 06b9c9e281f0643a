"""Models whose parameters are spread over processes (FSDP2, DeepSpeed ZeRO-3), and values that all processes share.

Rankings need an output layer outside of the model's forward pass, and a whole model for sampling: one process may have
more tokens to decode than another, so nothing inside of a rollout may wait for the others.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_processes() -> int:
    """How many processes work on this job together."""
    return dist.get_world_size() if _together() else 1


def process_index() -> int:
    """Which of them this is; 0 is the main process, which writes and prints."""
    return dist.get_rank() if _together() else 0


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def on_main_process(write: Callable[[], Any]) -> None:
    """Call ``write`` in the main process, while the others wait."""
    if process_index() == 0:
        write()
    if _together():
        dist.barrier()


def of_main_process(value: Result) -> Result:
    """The main process's value of what processes may see differently, such as a time."""
    values = [value]
    if _together():
        dist.broadcast_object_list(values)
    return values[0]


def leave() -> None:
    """End what the processes have together, before this one ends: else its threads may abort it at its exit.

    Models that were trained together must be out of use; what has not been collected of them would keep the threads.
    """
    if _together():
        gc.collect()
        dist.destroy_process_group()


def map_over_processes(function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
    """``function(items)``, one result per item, of which every process computes a part; all get the whole."""
    size = num_processes()
    part = function(items[process_index() :: size])
    if size == 1:
        return list(part)
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, part)
    results: list[Any] = [None] * len(items)
    for first, results_of_process in enumerate(parts):
        results[first::size] = results_of_process
    return results


def spreads_parameters() -> bool:
    """Whether ``accelerate launch`` was told to spread the parameters of the models that are trained."""
    return any(os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true" for engine in ("FSDP", "DEEPSPEED"))


def is_fsdp(model: Any) -> bool:
    """Whether ``fully_shard`` (FSDP2) has spread the parameters of ``model``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has spread one has imported it
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def _is_zero(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has spread a parameter."""
    return hasattr(parameter, "ds_id")


@contextmanager
def whole_model(model: Any, *, reshard_after_forward: bool = True) -> Iterator[Any]:
    """Inside of it, every process has all parameters of ``model`` and may run it as often as it likes, without
    gradients; yields the model inside of the wrappers.

    All processes enter together. Where parameters are not spread this does nothing.

    Args:
        model: as it is trained: the wrapper (DDP, DeepSpeed's engine) or the model that FSDP2 has been applied to.
        reshard_after_forward: what FSDP2 does after the forward passes of training, which is put back at the end.
    """
    inside = getattr(model, "module", model)
    if is_fsdp(inside):
        shards = [module for module in inside.modules() if is_fsdp(module)]
        inside.set_reshard_after_forward(False)
        for shard in shards:
            shard.unshard()
        try:
            yield inside
        finally:
            for shard in shards:
                shard.reshard()
            inside.set_reshard_after_forward(reshard_after_forward)
    elif any(map(_is_zero, inside.parameters())):
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        with unwrap_model_for_generation(model):
            yield inside
    else:
        yield inside


def gather_layer(model: Any, layer: Any) -> bool:
    """Make the parameters of ``layer``, an output layer that is used outside of its forward pass, whole.

    After a forward pass with gradients they stay whole until the backward pass, which reduces their gradient over the
    processes and spreads it, as it does for the other layers. All processes call this together.

    Returns:
        Whether they are spread at other times.
    """
    owners = [m for m in model.modules() if is_fsdp(m) and any(part is layer for part in m.modules())]
    if owners:
        owners[-1].unshard()
    spread = [parameter for parameter in layer.parameters() if _is_zero(parameter)]
    if spread:
        spread[0].all_gather(param_list=spread)
    return bool(owners or spread)


def whole_state_dict(model: Any) -> dict[str, Tensor]:
    """The state of ``model`` with whole parameters, on the CPU, in every process. All processes call this together."""
    if is_fsdp(model):
        state = model.state_dict().items()
        return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu() for name, value in state}
    with whole_model(model) as inside:
        return {name: value.detach().cpu().clone() for name, value in inside.state_dict().items()}


def place_reference(reference: Any, accelerator: Any) -> Any:
    """``reference``, a model that is not trained, where the accelerator's models are, and spread as they are."""
    reference = reference.eval().requires_grad_(False)
    if getattr(accelerator, "is_fsdp2", False):
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, reference)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        return reference.to(accelerator.device)
    import deepspeed

    precision = {name: plugin.deepspeed_config[name] for name in ("bf16", "fp16") if name in plugin.deepspeed_config}
    # No optimiser is made, so the batch size, which must be given, counts nowhere.
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **precision}
    return deepspeed.initialize(model=reference, config=config)[0]
