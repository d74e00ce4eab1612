"""A download: planned first, so that size, licence and place can be shown, then carried out file by file."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import WeakFileLock

from ..errors import OutputError
from ..files import require_writable, whole_file
from .repositories import REPOSITORIES, TASKS, Repository
from .selection import INDEX, parse_weight_map, select, whole_components
from .transfer import Listing, RemoteFile, list_repository, receive

UNFINISHED = ".blip3o-download"
"""The folder, inside that of the model, of what is not complete and checked yet."""
RESERVE_BYTES = 2**28  # left free on the disk

OnProgress = Callable[[str, int, int], None]
"""(doing, bytes, bytes in all)"""


@dataclass(frozen=True)
class Plan:
    """What a download will do; nothing is written yet.

    Attributes: `files` are needed; `missing` of them aren't in the folder, `different` are with another content, and why; `received`
    bytes of what lacks are here from an earlier try; `index` is what INDEX shall hold; `task_bytes`: task -> bytes it needs alone.
    """

    repository: Repository
    listing: Listing
    folder: Path
    tasks: tuple[str, ...]
    files: tuple[RemoteFile, ...]
    missing: tuple[RemoteFile, ...]
    different: dict[str, str]
    received: int
    index: bytes | None
    task_bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def to_receive(self) -> int:
        """Bytes that will come over the network."""
        replaced = sum(file.size for file in self.files if file.name in self.different)
        return sum(file.size for file in self.missing) + replaced - self.received

    @property
    def lacks_index(self) -> bool:
        return self.index is not None and _read(self.folder / INDEX) != self.index

    @property
    def left_out(self) -> list[RemoteFile]:
        """Files that the tasks don't read."""
        needed = {file.name for file in self.files} | {INDEX}
        return [file for name, file in self.listing.files.items() if name not in needed]


def plan_download(name: str, parent: Path, tasks: Sequence[str] = tuple(TASKS), on_progress: OnProgress | None = None) -> Plan:
    """Asks the hub what there is, and compares it with `parent`/name of the repository.

    Args:
        name: of REPOSITORIES.
        tasks: of TASKS; other shards are left out, but for those of earlier downloads into the folder.
        on_progress: while files that exist are checked.
    Raises: DownloadError, OutputError.
    """
    repository = REPOSITORIES[name]
    folder = parent / repository.folder_name
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, not a folder. Give another --dir.")
    listing = list_repository(repository.repo_id)
    index = _read_index(listing) if INDEX in listing.files else None
    weight_map = None if index is None else parse_weight_map(index)
    local = _local_weight_map(folder)
    same_model = local is not None and weight_map is not None and local.items() <= weight_map.items()
    earlier = whole_components(weight_map, local) if same_model else frozenset()
    selection = select(repository.kind, listing.files, tasks, weight_map, also=earlier)
    files = tuple(sorted((listing.files[name] for name in selection.files), key=lambda file: (file.size, file.name)))
    different = _different(files, folder, on_progress)
    if local is not None and not same_model:
        different[INDEX] = "another model's list of shards"
    missing = tuple(file for file in files if not (folder / file.name).exists())
    parts = [_part(folder, file) for file in files if file in missing or file.name in different]
    alone = {task: select(repository.kind, listing.files, [task], weight_map).files for task in TASKS}
    return Plan(
        repository, listing, folder, tuple(tasks), files, missing, different,
        received=sum(part.stat().st_size for part in parts if part.exists()),
        index=index if selection.weight_map == weight_map else _index_of(selection.weight_map),
        task_bytes={task: sum(listing.files[name].size for name in names) for task, names in alone.items()},
    )  # fmt: skip


def require_space(plan: Plan) -> int:
    """Free bytes of the disk. Raises OutputError if the download doesn't fit."""
    existing = next(folder for folder in (plan.folder.absolute(), *plan.folder.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if plan.to_receive + RESERVE_BYTES > free:
        raise OutputError(f"{plan.folder}: the disk has {free / 2**30:.1f} GiB free, the download takes {plan.to_receive / 2**30:.1f} GiB. "
                          "Make room, give another --dir, or download for fewer tasks (--for).")
    return free


def download(plan: Plan, *, overwrite: bool = False, on_progress: OnProgress | None = None) -> None:
    """Carries the plan out. Every file appears under its name when it is complete and its checksum right; the index of shards is the last.

    Raises: OutputError if a file would be replaced without `overwrite`, the disk is full or another process downloads to the same folder;
    DownloadError if a file can't be had. What was received is kept, and the next download goes on from there.
    """
    if plan.different and not overwrite:
        listed = "\n".join(f"  {name}: {why}" for name, why in plan.different.items())
        raise OutputError(f"{plan.folder}: {len(plan.different)} files are there with another content than the published ones; --overwrite "
                          f"replaces them, --dir names another place:\n{listed}")  # fmt: skip
    require_space(plan)
    todo = [file for file in plan.files if file in plan.missing or file.name in plan.different]
    folders = {(plan.folder / file.name).parent for file in todo} | {plan.folder, plan.folder / UNFINISHED}
    require_writable(folders, plan.folder)
    total, done = sum(file.size for file in todo), 0
    with _only_one_process(plan.folder):
        for file in todo:
            part = _part(plan.folder, file)

            def report(size: int, before: int = done) -> None:
                if on_progress is not None:
                    on_progress("downloading", before + size, total)

            receive(plan.listing, file, part, report)
            _rename(part, plan.folder / file.name, overwrite=overwrite)
            done += file.size
        if plan.lacks_index:
            with whole_file(plan.folder / INDEX) as temporary:
                temporary.write_bytes(plan.index)
    shutil.rmtree(plan.folder / UNFINISHED, ignore_errors=True)


def _read_index(listing: Listing) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        receive(listing, listing.files[INDEX], Path(scratch, "index"))
        return Path(scratch, "index").read_bytes()


def _index_of(weight_map: dict[str, str] | None) -> bytes | None:
    return None if weight_map is None else (json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n").encode()


def _local_weight_map(folder: Path) -> dict[str, str] | None:
    """None if there is no index; an unreadable one is like that of another model."""
    text = _read(folder / INDEX)
    try:
        return None if text is None else {str(tensor): str(shard) for tensor, shard in json.loads(text)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {"": ""}


def _different(files: Sequence[RemoteFile], folder: Path, on_progress: OnProgress | None) -> dict[str, str]:
    """Name -> why, of files that exist with another content."""
    there = [file for file in files if (folder / file.name).exists()]
    total, done, different = sum(file.size for file in there), 0, {}
    for file in there:

        def report(size: int, before: int = done) -> None:
            if on_progress is not None:
                on_progress("checking", before + size, total)

        path = folder / file.name
        try:
            why = file.differs(path, report) if path.is_file() else "a folder"
        except OSError as error:
            raise OutputError(f"{path}: can't be read ({error.strerror}). Give another --dir.") from error
        if why is not None:
            different[file.name] = why
        done += file.size
    return different


def _part(folder: Path, file: RemoteFile) -> Path:
    """Where a file grows; named after its content, so that an update of the repository is never mixed with what came before."""
    return folder / UNFINISHED / f"{file.key}.part"


def _rename(part: Path, path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise OutputError(f"{path} has appeared meanwhile and is not replaced. Run the command again.")
    try:
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written ({error.strerror}). Give another --dir.") from error


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


@contextlib.contextmanager
def _only_one_process(folder: Path) -> Iterator[None]:
    """Raises OutputError if another process downloads to the folder."""
    try:
        with WeakFileLock(folder / UNFINISHED / "lock", timeout=1):
            yield
    except TimeoutError as error:
        raise OutputError(f"{folder}: another download into this folder is running. Wait for it, or stop it.") from error
