"""A folder of pictures, each with its caption in a .txt of the same name."""

import os
from pathlib import Path

from ..errors import DataError
from .broken import BrokenSample
from .sample import PICTURE_TASKS, Sample

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class FolderDataset:
    """Pictures of a folder and all folders in it, in the order of their names; hidden files are left out."""

    def __init__(self, folder: Path, task: str) -> None:
        """Raises DataError if there are no pictures, two of one name, or captions are needed and there is none."""
        self.name = str(folder)
        self.task = task
        self._folder = folder
        self._files: list[str] = []  # relative to the folder
        captions = set()
        for here, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            relative = os.path.relpath(here, folder)
            for file in files:
                stem, suffix = os.path.splitext(file)
                path = os.path.normpath(os.path.join(relative, file))
                if suffix.lower() in PICTURES and not file.startswith("."):
                    self._files.append(path)
                elif suffix == ".txt":
                    captions.add(os.path.splitext(path)[0])
        self._files.sort()
        if not self._files:
            hint = f" It holds tars: give {folder}/*.tar." if next(folder.glob("*.tar"), None) else ""
            raise DataError(f"{folder}: holds no pictures ({' '.join(PICTURES)}).{hint or ' Check the path.'}")
        if task not in PICTURE_TASKS:
            self._require_captions(captions)

    def _require_captions(self, captions: set[str]) -> None:
        owners: dict[str, str] = {}
        for file in self._files:
            stem = os.path.splitext(file)[0]
            if stem in owners:
                raise DataError(f"{self._folder}: {owners[stem]} and {file} would share one caption, {stem}.txt. Rename one of them.")
            owners[stem] = file
        if captions.isdisjoint(owners):
            first = os.path.splitext(self._files[0])[0]
            raise DataError(f"{self._folder}: none of {len(self._files)} pictures has a caption, which the task {self.task} needs. "
                            f"Write them to .txt files of the same name, beginning with {first}.txt.")

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> Sample:
        path = self._folder / self._files[index]
        name = str(path)
        if not path.is_file():
            raise BrokenSample(name, "the file is gone, or a link that leads nowhere")
        text = "" if self.task in PICTURE_TASKS else _caption(path.with_suffix(".txt"), name)
        return Sample(name, self.task, text=text, images=(path,) if self.task == "reconstruct" else (), target=path)


def _caption(file: Path, name: str) -> str:
    try:
        text = file.read_text("utf-8-sig").strip()
    except FileNotFoundError:
        raise BrokenSample(name, f"has no caption {file.name}") from None
    except UnicodeDecodeError as error:
        raise BrokenSample(name, f"its caption {file.name} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise BrokenSample(name, f"its caption {file.name} can't be read ({error.strerror or error})") from error
    if not text:
        raise BrokenSample(name, f"its caption {file.name} is empty")
    return text
