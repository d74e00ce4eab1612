"""What passes between this machine and the hub: the listing of a repository, and files that resume and are checked.

huggingface_hub speaks with the server: tokens, mirrors, proxies, time limits and offline mode are its settings. Its own download starts a
file anew after an interruption (since version 1.20) and compares sizes only, so what is received is kept and checked here.
"""

import contextlib
import errno
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import are_progress_bars_disabled, build_hf_headers, disable_progress_bars, enable_progress_bars

from .. import __version__
from ..errors import Blip3oError, DownloadError, InputError, OutputError

LIBRARY = {"library_name": "comfyui-blip3o", "library_version": __version__}
LISTING_TIMEOUT_S = 30
WAITS_S = (1, 4, 15)  # between tries that bring nothing new
LONGEST_WAIT_S = 120  # that a server may ask for
BUSY = (408, 429, 500, 502, 503, 504)
# What hub's HTTP library raises derives from the base of hub's own errors: requests before version 1, httpx and httpx2 after it.
HTTP_ERRORS = tuple(base for base in HfHubHTTPError.__mro__ if base.__module__.split(".")[0] in ("requests", "httpx", "httpx2"))
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
CHUNK_BYTES = 2**24

T = TypeVar("T")
OnBytes = Callable[[int], None]
"""(bytes of this file so far)"""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: what the hub says of it. `sha256` is that of large files, `blob` git's hash of the small ones."""

    name: str
    size: int
    sha256: str | None
    blob: str | None

    @property
    def key(self) -> str:
        """Tells contents apart."""
        return self.sha256 or self.blob or ""

    def differs(self, path: Path, on_bytes: OnBytes = lambda _: None) -> str | None:
        """Why the file at `path` is not this one, None if it is. Reads it only if it has the size."""
        size = path.stat().st_size
        if size != self.size:
            return f"{size} bytes in place of {self.size}"
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                on_bytes(stream.tell())
        found = digest.hexdigest()
        return None if found == self.key else f"{'sha256' if self.sha256 else 'git hash'} {found} in place of {self.key}"


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    repo_id: str
    revision: str
    licence: str
    gated: bool
    files: dict[str, RemoteFile]

    @property
    def page(self) -> str:
        return f"{constants.ENDPOINT}/{self.repo_id}"


def require_online() -> None:
    """Raises InputError if huggingface_hub may not reach the network, or its endpoint is no address."""
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing is downloaded. Unset it, or copy the files from a "
                         "machine that has them.")
    if not constants.ENDPOINT.startswith(("https://", "http://")):
        raise InputError(f"HF_ENDPOINT={constants.ENDPOINT} is no address. Give one like https://huggingface.co, or unset it.")


def list_repository(repo_id: str) -> Listing:
    """Sizes, checksums and licence of the newest commit. Raises DownloadError."""
    require_online()
    try:
        info = _patiently(lambda: HfApi(**LIBRARY).model_info(repo_id, files_metadata=True, timeout=LISTING_TIMEOUT_S), repo_id)
        files = [RemoteFile(file.rfilename, file.lfs.size if file.lfs else file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
                 for file in info.siblings or ()]  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DownloadError(f"{constants.ENDPOINT} does not answer as a hub ({error!r}). Check HF_ENDPOINT and the proxy.") from error
    unknown = [file.name for file in files if not isinstance(file.size, int) or not file.key]
    if unknown or not files or not info.sha:
        raise DownloadError(f"{constants.ENDPOINT} does not tell size and checksum of {unknown[0] if unknown else repo_id}, without which "
                            "nothing can be checked. Use another mirror, or none: unset HF_ENDPOINT.")
    return Listing(repo_id, info.sha, _licence(info), bool(info.gated), {file.name: file for file in files})


def receive(listing: Listing, file: RemoteFile, part: Path, on_bytes: OnBytes = lambda _: None) -> None:
    """Fills `part` with the file, after the bytes that it has already, and checks it.

    Raises: DownloadError if the server doesn't give it; what was received stays in `part`, unless its checksum is wrong. OutputError if
    the disk doesn't take it.
    """
    url = hf_hub_url(listing.repo_id, file.name, revision=listing.revision)
    headers = build_hf_headers(**LIBRARY) | {"Accept-Encoding": "identity"}
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    with part.open("ab") as stream:
        on_bytes(stream.tell())

        def receive_the_rest() -> None:
            http_get(url, _Reporting(stream, on_bytes), resume_size=stream.tell(), headers=headers, expected_size=file.size,
                     displayed_filename=file.name)  # fmt: skip

        with _own_progress_bars():
            _patiently(receive_the_rest, f"{listing.repo_id}: {file.name}", received=stream.tell)
    wrong = file.differs(part)
    if wrong is not None:
        part.unlink()
        raise DownloadError(f"{listing.repo_id}: {file.name} arrived damaged ({wrong}) and was thrown away. Run the command again; if it "
                            "comes back, a proxy or mirror changes files: use another connection, or unset HF_ENDPOINT.")


class _Reporting:
    """A file that tells its length after each write."""

    def __init__(self, stream: BinaryIO, on_bytes: OnBytes) -> None:
        self._stream, self._on_bytes = stream, on_bytes

    def write(self, data: bytes) -> int:
        written = self._stream.write(data)
        self._stream.flush()  # a killed process loses nothing
        self._on_bytes(self._stream.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _patiently(action: Callable[[], T], what: str, received: Callable[[], int] = lambda: 0) -> T:
    """The result of `action`, which is tried again after what passes: a busy server, and a connection that had brought something.

    Raises DownloadError, OutputError.
    """
    waits = iter(WAITS_S)
    at_first = received()
    while True:
        before = received()
        try:
            return action()
        except (OfflineModeIsEnabled, *HTTP_ERRORS, OSError) as error:
            if isinstance(error, Blip3oError):
                raise
            if not isinstance(error, HTTP_ERRORS) and error.errno in DISK_ERRORS:
                raise OutputError(f"{what}: can't be written ({error.strerror}). Make room, or give another --dir; what was received is "
                                  "kept and the same command goes on.") from error
            if received() > before:
                waits = iter(WAITS_S)
            wait = _wait_for(error, next(waits, None), reached=received() > at_first)
            if wait is None:
                raise DownloadError(f"{what}: {_reason(error)}") from error
        time.sleep(wait)


def _wait_for(error: Exception, usual: float | None, *, reached: bool) -> float | None:
    """Seconds until it may work again; None if it won't."""
    if usual is None or isinstance(error, OfflineModeIsEnabled):
        return None
    status = _status(error)
    if status is None:  # the connection: worth another try if there was one
        return usual if reached else None
    if status not in BUSY:
        return None
    asked = error.response.headers.get("Retry-After", "")
    wait = max(usual, int(asked)) if asked.isdigit() else usual
    return wait if wait <= LONGEST_WAIT_S else None


def _reason(error: Exception) -> str:
    """What went wrong, and what to do."""
    again = "What was received is kept: the same command goes on."
    status, endpoint = _status(error), constants.ENDPOINT
    if isinstance(error, GatedRepoError) or status == 403:
        who = "the account of your token" if get_token() else "you, for there is no token"
        return (f"access is restricted, and not granted to {who} ({status}). Ask for it on the repository's page at {endpoint}, then set "
                "HF_TOKEN to a token of that account, or log in: hf auth login.")
    if status == 401:
        return f"{endpoint} says there is no such repository, or it is not for you (401). Set HF_TOKEN to a valid token, or unset it."
    if status == 404:
        return f"{endpoint} doesn't have it (404). With a mirror in HF_ENDPOINT, try without it."
    if status == 429:
        asked = error.response.headers.get("Retry-After", "")
        when = f"in {asked} seconds" if asked.isdigit() else "later"
        return f"{endpoint} has had too many requests (429). Try again {when}; with HF_TOKEN the limit is higher. {again}"
    if status == 416:
        return f"the file at {endpoint} is shorter than its listing says (416). With a mirror in HF_ENDPOINT, try without it. {again}"
    if status is not None:
        return f"{endpoint} answers {status}. Try again later. {again}"
    told = str(error).strip().splitlines()
    return f"no answer from {endpoint}, or the connection broke ({told[0] if told else type(error).__name__}). Check the network. {again}"


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _licence(info: Any) -> str:
    """As its card says."""
    card = info.card_data or {}
    licence = card.get("license_name") or card.get("license")
    tagged = next((tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")), None)
    return str(licence or tagged or "not stated")


@contextlib.contextmanager
def _own_progress_bars() -> Iterator[None]:
    """Keeps hub from drawing its own beside ours."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
