"""Logs for trackers, through the callbacks of transformers: into the run's folder, a run of theirs for each stage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from flexrec.policy.distributed import process_index

FOLDER = "trackers"


def require_trackers(names: Sequence[str]) -> None:
    """Raise an ImportError for the first of these that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ImportError(f"--report-to {name} needs {name}: .venv/bin/pip install -e '.[trackers]'")


def tracking(names: Sequence[str], run: Path, stage: str, config: dict[str, Any]) -> list[TrainerCallback]:
    """Callbacks that log a stage to each of these, in the main process.

    TensorBoard's files are in ``trackers/tensorboard``, one folder for each stage. Weights & Biases is offline, with a
    run for each stage in ``trackers/wandb``, unless WANDB_MODE says otherwise; ``wandb sync`` sends what is there.
    """
    found: list[TrainerCallback] = []
    if process_index() > 0:
        return found
    for name in names:
        folder = run / FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations import TensorBoardCallback

            found.append(TensorBoardCallback(SummaryWriter(str(folder / stage.replace(" ", "-")))))
        else:
            found.append(_wandb(folder, run.resolve().name, stage, config))
    return found


def _wandb(folder: Path, run: str, stage: str, config: dict[str, Any]) -> TrainerCallback:
    import wandb
    from transformers.integrations import WandbCallback

    class OneStage(WandbCallback):
        """One run for a stage, which ends with it."""

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_end(*args, **kwargs)
            wandb.finish()

    os.environ.setdefault("WANDB_MODE", "offline")
    wandb.init(
        project=os.environ.get("WANDB_PROJECT", "flexrec"),
        name=f"{run} {stage}",
        group=run,
        dir=str(folder),
        config=config,
        settings=wandb.Settings(silent=True, console="off"),
    )
    return OneStage()
