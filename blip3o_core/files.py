"""Files that appear whole or not at all."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import OutputError

STALE_AFTER_S = 600  # a temporary file lives for milliseconds; one this old belongs to a process that was killed


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """`with whole_file(path) as temporary`: what is written to `temporary` becomes `path` at the end, and only then.

    The temporary name is short and does not contain the final one, which may already be as long as the file system allows.
    Raises: OutputError if it can't be written; `path` is then as before.
    """
    temporary = path.with_name(f".blip3o-{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written ({error.strerror or error}). Files written before it are kept.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """UTF-8 with the line feeds as they are. The bytes are on the disk before the file gets its name."""
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        stream.write(text.encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())


def remove_stale_files(folders: Iterable[Path]) -> None:
    """Removes what a killed process left of `whole_file`."""
    for folder in folders:
        for path in folder.glob(".blip3o-*.tmp"):
            with contextlib.suppress(OSError):  # another run may have removed it
                if time.time() - path.stat().st_mtime > STALE_AFTER_S:
                    path.unlink()


def require_writable(folders: Iterable[Path], named: Path) -> None:
    """Makes the folders, so that a wrong place is found before the work is done. Raises OutputError about `named`."""
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise OutputError(f"{named}: can't write there ({error.strerror or error}). Give another place.") from error
