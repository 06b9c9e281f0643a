"""Files that are whole or not there, on the disk, and folders of which a manifest says so.

A manifest has the size and checksum of every file in its folder, and is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from flexrec.trainer.callbacks import to_json

MANIFEST, PARTIAL = "manifest.json", ".partial"


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a file whole or not at all, to the disk."""
    write_text(path, to_json(content, indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, to the disk."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, to the disk."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of a run holds; a ValueError names a file that holds none, a FileNotFoundError one that is
    not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: copy the whole folder of the run, or train it again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    return content


def seal(folder: Path, run: str) -> None:
    """Say that a folder is whole, and whose: sizes and checksums of its files, all of which are on the disk."""
    write_json(folder / MANIFEST, {"run": run, "files": settle(folder)}, indent=2)


def check_sealed(folder: Path, run: str) -> None:
    """Raise an error that names the first file that is not as it was written, or says whose folder it is."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is missing or was not written to its end: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sealed_by = manifest["run"]
        files = [(folder / name, [size, checksum]) for name, (size, checksum) in manifest["files"].items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete {folder.name} to go on without it") from None
    if sealed_by != run:
        raise ValueError(f"{folder} is of another run: delete it to go on without it")
    for file, written in files:
        if not file.is_file() or [file.stat().st_size, _checksum(file)] != written:
            state = "is not as it was written" if file.is_file() else "is missing"
            raise ValueError(f"{file} {state}: delete {folder.name} to go on without it")


def settle(folder: Path, deep: bool = True) -> dict[str, tuple[int, str]]:
    """Give the files of a folder the mode that others have, make sure that they are on the disk, and return the size
    and checksum of each."""
    umask = os.umask(0)
    os.umask(umask)
    found = {}
    for path in sorted(folder.rglob("*") if deep else folder.glob("*")):
        if path.is_file() and not path.name.startswith(MANIFEST):
            path.chmod(0o666 & ~umask)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            found[path.relative_to(folder).as_posix()] = (path.stat().st_size, _checksum(path))
    return found


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
