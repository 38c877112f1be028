"""Files that appear complete or not at all, and what a disk refuses in one sentence."""

import errno
import glob
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from tisdpo.errors import InputError

FULL = "no space is left on its disk; free some and give the same command again, it goes on from there"
READ_ONLY = "nothing can be written there; give a directory that can be written"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def beside(path: str | Path, *, directory: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to `path` at the end: whatever kills the writer, `path` is complete or not there.

    directory   the path to write to is a new, empty directory
    What a killed writer left is removed by the next one. Two writers at a time do not mix: the name is another one each time.

    Raises InputError where the disk is full or cannot be written.

    >>> with beside("runs/result.json") as temporary:
    ...     temporary.write_text("{}")
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.writing")
    try:
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.writing"):
            remove(left)
        (temporary if directory else path.parent).mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except Exception as error:
        remove(temporary)  # a disk that is full gets its room back
        reason = disk_trouble(error)
        if reason is None or isinstance(error, InputError):
            raise
        raise InputError(f"{path} could not be written: {reason}") from error


def remove(path: Path) -> None:
    """Remove a file or a directory with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def content_digest(path: str | Path) -> str | None:
    """16 hexadecimal digits of the content of a file; None where there is none, and of a directory, which may hold much else."""
    path = Path(path).expanduser()
    return _digest_of(path, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None


@lru_cache
def _digest_of(path: Path, size: int, time: int) -> str:
    """Read once, as long as size and time stay."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:16]


def write_json(path: str | Path, content, *, ensure_ascii: bool = True) -> None:
    """`content` as JSON in a file that appears complete or not at all."""
    with beside(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=ensure_ascii), encoding="utf-8")


def disk_trouble(error: BaseException | None) -> str | None:
    """What is wrong with the disk, with the remedy, if that is what an error (or its cause) says; else None.

    Of the libraries that write, Arrow raises OSError, safetensors an error of its own with the system's number in its text, and
    torch.save a RuntimeError that names its zip writer only: by then the place on the disk is known to be too small for the archive.
    """
    while error is not None:
        number, text = getattr(error, "errno", None), str(error)
        if number in _FULL or any(f"(os error {n})" in text for n in _FULL) or ("inline_container" in text and "unexpected pos" in text):
            return FULL
        if number in _READ_ONLY or any(f"(os error {n})" in text for n in _READ_ONLY):
            return READ_ONLY
        error = error.__cause__ or error.__context__
    return None
