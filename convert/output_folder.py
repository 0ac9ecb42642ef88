"""A folder that appears complete, by one rename, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tpserve.convert.errors import ConvertError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_out_dir(out_dir: Path) -> None:
    """Refuses a target that cannot appear by rename.

    Raises:
        ConvertError: it is a file, a folder with something in it, or a mount point.
    """
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise ConvertError(f"{out_dir} is a file; the output must be a new or empty folder")
    if any(out_dir.iterdir()):
        raise ConvertError(f"{out_dir} is not empty; choose another folder (--to) or remove it first")
    if os.path.ismount(out_dir):
        raise ConvertError(f"{out_dir} is a mount point and cannot be renamed onto; choose a folder inside it")


def check_disk_space(out_dir: Path, needed_bytes: int) -> None:
    """Compares what will be written with what is free.

    Raises:
        ConvertError: there is too little room; the message names both numbers.
    """
    said = _room(out_dir, needed_bytes)
    if _free_bytes(out_dir)[1] < needed_bytes:
        raise ConvertError(f"{said}; free some space or choose another folder (--to)")


def _free_bytes(out_dir: Path) -> tuple[Path, int]:
    """The folder that is there already, and what is free below it."""
    ancestor = next(p for p in out_dir.parents if p.exists())
    return ancestor, shutil.disk_usage(ancestor).free


def _room(out_dir: Path, needed_bytes: int) -> str:
    ancestor, free_bytes = _free_bytes(out_dir)
    free_mib, needed_mib = free_bytes >> 20, -(-needed_bytes >> 20)
    return (
        f"{ancestor} has {free_mib:,} MiB free ({free_bytes:,} bytes), "
        f"the converted checkpoint needs {needed_mib:,} MiB ({needed_bytes:,} bytes)"
    )


@contextlib.contextmanager
def new_folder(out_dir: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yields an empty folder beside `out_dir`; a normal end renames it to `out_dir`, any other end removes it.

    Args:
        out_dir: an absolute path without links.
        needed_bytes: that will be written, for the message when the disk is full.

    Raises:
        ConvertError: another conversion writes there, or the disk is full or not writable.
    """
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out_dir)
        partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
        try:
            partial.mkdir()
        except FileExistsError:
            raise ConvertError(f"another conversion is writing {out_dir}") from None
    except OSError as e:
        raise ConvertError(f"{e.filename or out_dir} cannot be written: {e.strerror}") from e
    with _terminate_as_exception():
        lock = os.open(partial, os.O_RDONLY)
        try:
            _try_lock(lock)
            yield partial
            _sync_folder(partial)
            partial.rename(out_dir)
            _sync_folder(out_dir.parent)
        except BaseException as e:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(e, OSError):
                raise ConvertError(_what_happened(e, out_dir, needed_bytes)) from e
            raise
        finally:
            os.close(lock)


def _what_happened(error: OSError, out_dir: Path, needed_bytes: int) -> str:
    if error.errno in _DISK_FULL:
        room = _room(out_dir, needed_bytes)
        return f"the disk is full ({error.strerror}) while writing {out_dir}; nothing was left behind; {room}"
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return f"{out_dir} was written by another conversion in the meantime; it was left as it is"
    return f"{error.filename or out_dir}: {error.strerror or error}; nothing was left behind"


def _remove_stale(out_dir: Path) -> None:
    """Removes what killed conversions to the same `out_dir` left.

    The lock tells: the kernel drops it with the process, and process numbers repeat (in a container they often are 1).
    Between `mkdir` and the lock a living process would look dead, so its number must be free, too.
    """
    prefix = f".{out_dir.name}.partial-"
    for partial in out_dir.parent.iterdir():
        pid = partial.name.removeprefix(prefix)
        if not partial.name.startswith(prefix) or not pid.isdecimal():
            continue
        try:
            fd = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its conversion has just ended
        try:
            if not _try_lock(fd):
                raise ConvertError(f"another conversion (process {pid}) is writing {out_dir}; wait for its end")
            if int(pid) == os.getpid() or not _is_alive(int(pid)):
                shutil.rmtree(partial)
        finally:
            os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        # File systems without locks (some NFS) answer otherwise; there the process number alone decides.
        return e.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """Turns SIGTERM into `SystemExit`, so that a terminated conversion tidies up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; there SIGTERM leaves a stale folder for the next start
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)
