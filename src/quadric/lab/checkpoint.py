"""Files that are either the old version or the new one, never something between.

A file is written beside its destination, forced to the disk, then renamed over it: a kill or a full disk at any moment
leaves the previous file as it was. Reading goes through ``weights_only=True``: nothing is unpickled.
"""

import errno
import json
import lzma
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quadric.lab import LabError

FORMAT = "quadric-checkpoint-1"
# The ways in which zipfile, torch, numpy and lzma say that a file is not what it should be.
DAMAGED = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    AttributeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    pickle.UnpicklingError,
)
REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space, then",
    errno.EDQUOT: "the disk quota is used up: free some space, then",
    errno.EFBIG: "the file is larger than this disk or this user may write: raise the limit, then",
    errno.EACCES: "no permission to write there: choose another --out, or allow it and",
    errno.EROFS: "the disk is read-only: choose another --out, or make it writable and",
}


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], again: str = "repeat with --resume") -> None:
    """Write a file in one piece or not at all.

    Args:
        path: The destination; its folder is made where it is missing.
        write: Called with a binary file open for writing.
        again: How to go on once the disk no longer refuses.

    Raises:
        LabError: When the folder or the disk refuses; the file that was there before is untouched.
    """
    # The same folder: a rename across disks would be a copy, and a copy can be interrupted. Always the same name: a
    # kill leaves at most one draft behind, which the next write takes over.
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise refusal(path, cause, again) from error
    finally:
        with suppress(OSError):  # what refused the file may refuse this too, and has been answered
            draft.unlink()


def refusal(path: Path, error: OSError, again: str = "repeat with --resume") -> LabError:
    """What to tell a person whose disk refused a file.

    Args:
        path: The file that was to be written.
        error: What the system said.
        again: How to go on once the disk no longer refuses.
    """
    remedy = REMEDIES.get(error.errno or 0, f"{error.strerror or error}: check the folder, then")
    kept = "the previous one is untouched" if path.is_file() else "nothing is lost but this file"
    return LabError(f"cannot write {path} ({kept}); {remedy} {again}", code=1)


def _system_error(error: BaseException | None) -> OSError | None:
    # torch.save's writer wraps what the file object raised in a RuntimeError of its own: the OSError is its context.
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: tensors, numbers, strings, lists and dictionaries."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that :func:`save` wrote, onto the CPU.

    Raises:
        LabError: When the file is missing, truncated, damaged or not a checkpoint of quadric.
    """
    remedy = "delete it and repeat with --resume to start this run again"
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes check sums and does not look at them again
            if archive.testzip() is not None:
                raise ValueError("a check sum does not hold")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise LabError(f"there is no checkpoint at {path}; start the run without --resume") from error
    except DAMAGED as error:
        raise LabError(f"the checkpoint {path} is truncated or damaged; {remedy}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise LabError(f"{path} is not a checkpoint of this version of quadric; {remedy}")
    return state


def write_json(path: Path, value: Any, again: str = "repeat with --resume") -> None:
    """Write plain JSON atomically; numbers that JSON does not have (NaN, infinities) become null.

    Args:
        path: The destination.
        value: Dictionaries, lists, strings, numbers, booleans and None.
        again: As :func:`write_atomically` takes it.
    """
    text = json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), again)


def read_json(path: Path, *keys: str, remedy: str = "delete it and repeat with --resume") -> dict[str, Any]:
    """Read a JSON file of a run's folder.

    Args:
        path: The file.
        *keys: What it has to hold.
        remedy: What to do where it does not.

    Raises:
        LabError: When it cannot be read, is not JSON, or lacks a key.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise LabError(f"cannot read {path} ({error}); {remedy}") from error
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        raise LabError(f"{path} is not what quadric wrote there; {remedy}")
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
