"""Atomic writes: a file is written completely or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to. The file at that path replaces `path` at the end.

    A reader of `path` finds the previous file or the new one, even if this process is killed or the disk is full. The
    parent folder is made if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        with aside.open("rb+") as file:  # Windows syncs no file that is open for reading alone
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())  # safetensors lets only the owner read its files
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # not on Windows, which opens no folders
        _sync_folder(path.parent)


def append_whole(path: Path, text: str) -> None:
    """Appends lines to a file. If it raises OSError, the file is as before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left = text.encode()
    with path.open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(before)
            raise


def remove_partial(folder: Path) -> None:
    """Removes the partial files that killed processes left in a folder."""
    for path in folder.glob(".*.partial"):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the names of new files durable too."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(opened)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
