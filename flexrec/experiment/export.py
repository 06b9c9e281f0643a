"""A run for others: what of its folder ranking needs, where it is found by name, and its card."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexrec.experiment.card import CARD, card_of
from flexrec.experiment.files import settle, write_json, write_text
from flexrec.experiment.run_folder import RunFolder, RunInfo, save_model
from flexrec.policy.lora import BACKBONE, has_adapters


def folder_of(name: str | Path, revision: str | None = None) -> Path:
    """The folder of this name, or what the repository of this name at the hub holds, fetched.

    Raises:
        FileNotFoundError: there is neither, or the hub cannot be reached.
    """
    folder = Path(name)
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        if not folder.is_dir():
            raise FileNotFoundError(f"{name} is neither the folder of a run nor a repository's name (owner/name)")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision))
    except Exception as error:  # of the hub, of the network, of its client
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub has no repository of this name that could be fetched: {reason}"
        ) from None


def write_export(
    run: RunFolder, folder: Path, model: Any, tokenizer: Any, info: RunInfo, *, histories: bool = True
) -> None:
    """Write the model of a run with what requests are answered by, and its card; nothing else of the run, nor where its
    data were. Without ``histories`` no user can be asked for.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: choose another folder, nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.path / "catalogue.json", folder / "catalogue.json")
    write_json(folder / "histories.json", run.read_histories() if histories else {})
    if has_adapters(model):
        _write_backbone(run, folder, model)
    save_model(folder, model, tokenizer, replace(info, data=None))
    # Last, in place of the one that PEFT may have written.
    own = run.path / CARD
    text = own.read_text(encoding="utf-8") if own.is_file() and _is_ours(own) else card_of(run, info)
    write_text(folder / CARD, text)
    settle(folder)


def _write_backbone(run: RunFolder, folder: Path, model: Any) -> None:
    """The model that adapters belong to, where it has no name that others could load it by."""
    if run.backbone.is_dir():
        shutil.copytree(run.backbone, folder / BACKBONE)
    elif Path(model.active_peft_config.base_model_name_or_path).is_absolute():
        copy.deepcopy(model).unload().save_pretrained(folder / BACKBONE)


def _is_ours(card: Path) -> bool:
    return "library_name: flexrec" in card.read_text(encoding="utf-8")[:400]
