"""What frozen networks compute from the data, on disk: one small file per entry, written whole or not at all.

Keyed by the network's fingerprint (a folder) and the content it read (a hash of file bytes, text and preprocessing), so that moved
or renamed pictures are found again and changed ones are not. Several processes may fill one cache at the same time.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..errors import OutputError
from ..files import whole_file
from .sample import ImageSource

TENSOR = "tensor"


class FeatureCache:
    """One kind of features of one network: `FeatureCache(folder / "eva-0123456789abcdef")`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where an entry lies, there or not; 256 subfolders keep listings short."""
        return self.folder / key[:2] / f"{key[2:]}.safetensors"

    def load(self, key: str) -> Tensor | None:
        """None if it is not there. A damaged file counts as absent and is written anew."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path(key))[TENSOR]
        except (FileNotFoundError, SafetensorError, KeyError, OSError):
            return None

    def store(self, key: str, tensor: Tensor) -> None:
        """Raises OutputError if the disk is full; what was stored before is kept."""
        from safetensors.torch import save

        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path.parent}: can't be made ({error.strerror}). Free some space or set cache.folder.") from error
        with whole_file(path) as temporary:
            temporary.write_bytes(save({TENSOR: tensor.detach().cpu().contiguous()}))

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def bytes_stored(self) -> int:
        """Of all entries."""
        total = 0
        for file in self.folder.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):
                total += file.stat().st_size
        return total


def content_key(images: Sequence[ImageSource], *details: object) -> str:
    """Hash of pictures (their bytes, as stored) and of everything else that the result depends on."""
    digest = hashlib.blake2b(digest_size=20)
    for image in images:
        content = image if isinstance(image, bytes) else image.read_bytes()
        digest.update(f"{len(content)} ".encode())
        digest.update(content)
    digest.update(repr(details).encode())
    return digest.hexdigest()
