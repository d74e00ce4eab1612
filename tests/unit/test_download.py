"""`blip3o download` in a process of its own, against a hub on this machine."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from blip3o_core import Blip3oPipeline, CheckpointError
from blip3o_core.hub.repositories import REPOSITORIES
from blip3o_core.variants.blip3o import KEY_TABLE

from .hub_server import Hub, serving

REPOSITORY = REPOSITORIES["4b"].repo_id
FOLDER = REPOSITORY.partition("/")[2]
INDEX = "model.safetensors.index.json"
SHARDS = {"language_model": 1, "queries": 1, "dit": 2, "vision_tower": 3, "output_head": 3, "vision_encoder": 4}
LARGEST = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def published(tiny_checkpoint: Path) -> dict[str, bytes]:
    """The tiny checkpoint as a repository lays it out: in shards, one of them for reconstruction alone, beside files that nothing reads."""
    files = {path.relative_to(tiny_checkpoint).as_posix(): path.read_bytes() for path in tiny_checkpoint.rglob("*") if path.is_file()}
    del files["model.safetensors"]
    shards: dict[int, dict] = {}
    for name, tensor in load_file(tiny_checkpoint / "model.safetensors").items():
        part = next(part for prefix, part, _ in KEY_TABLE if name.startswith(prefix))
        shards.setdefault(SHARDS.get(part, 1), {})[name] = tensor
    names = {number: f"model-{number:05d}-of-00004.safetensors" for number in shards}
    files |= {names[number]: save(tensors, {"format": "pt"}) for number, tensors in shards.items()}
    weight_map = {name: names[number] for number, tensors in shards.items() for name in tensors}
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files | {"trainer_state.json": b"{}", "pytorch_model.bin": b"x" * 5000, "README.md": b"# A model\n", ".gitattributes": b""}


@pytest.fixture
def hub(published: dict[str, bytes]) -> Iterator[Hub]:
    with serving(Hub({REPOSITORY: dict(published)})) as hub:
        yield hub


@pytest.fixture
def download(blip3o: Callable, hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """download("--for", "ask"): of the 4B of `hub`, to tmp_path."""

    def run(*args: object, **environment: str) -> subprocess.CompletedProcess:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        return blip3o("download", "4b", "--dir", tmp_path, *args, **settings | environment)

    return run


def received(hub: Hub) -> list[str]:
    return [name for name, _ in hub.requests if name != INDEX]


def test_a_whole_model_arrives_and_draws(download, hub, tmp_path, published):
    shown = download("--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert f"{hub.endpoint}/{REPOSITORY}" in shown.stdout and "licence: apache-2.0" in shown.stdout and received(hub) == []
    result = download("--yes")
    assert result.returncode == 0, result.stderr
    assert "complete, every checksum is right" in result.stdout and "downloading" in result.stderr and "B/s" in result.stderr
    here = {path.relative_to(tmp_path / FOLDER).as_posix(): path.read_bytes() for path in (tmp_path / FOLDER).rglob("*") if path.is_file()}
    unread = {"trainer_state.json", "pytorch_model.bin", ".gitattributes"}
    assert here == {name: content for name, content in published.items() if name not in unread}
    pipe = Blip3oPipeline.from_pretrained(tmp_path / FOLDER, device="cpu")
    [picture] = pipe.generate(["a cat"], steps=1, decoder_steps=1, width=64, height=64)
    assert picture.size == (64, 64)

    hub.requests.clear()
    again = download("--yes")
    assert again.returncode == 0 and "complete" in again.stdout and received(hub) == []


def test_only_what_a_task_reads_and_the_rest_later(download, hub, tmp_path):
    result = download("--yes", "--for", "generate")
    assert result.returncode == 0, result.stderr
    assert {name for name in received(hub) if name.startswith("model-")} == {"model-00001-of-00004.safetensors", LARGEST}
    pipe = Blip3oPipeline.from_pretrained(tmp_path / FOLDER, device="cpu")
    assert pipe.encode_prompt(["a cat"]).shape[1] == 64
    with pytest.raises(CheckpointError):
        pipe.ask("What is this?", max_new_tokens=1)
    hub.requests.clear()
    assert download("--yes", "--for", "ask").returncode == 0
    assert {name for name in received(hub) if name.startswith("model-")} == {"model-00003-of-00004.safetensors"}
    Blip3oPipeline.from_pretrained(tmp_path / FOLDER, device="cpu").ask("What is this?", max_new_tokens=1)


def test_what_had_arrived_is_not_sent_again(blip3o, tmp_path):
    """After a broken connection in the same command, and after a command that ended. The library writes pieces of 10 MiB."""
    content, repository = bytes(range(256)) * 2**17, REPOSITORIES["eva-clip"].repo_id  # 32 MiB
    files = {"config.json": b"{}", "model.safetensors": content}
    with serving(Hub({repository: files}, cut={"model.safetensors": 24 * 2**20})) as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        result = blip3o("download", "eva-clip", "--dir", tmp_path / "broken", "--yes", **settings)
        assert result.returncode == 0, result.stderr
        folder = repository.partition("/")[2]
        assert (tmp_path / "broken" / folder / "model.safetensors").read_bytes() == content
        first, second = (start for name, start in hub.requests if name == "model.safetensors")
        assert first == 0 and second == 20 * 2**20

        hub.requests.clear()
        part = tmp_path / "killed" / folder / ".blip3o-download" / f"{hashlib.sha256(content).hexdigest()}.part"
        part.parent.mkdir(parents=True)
        part.write_bytes(content[: 5 * 2**20])  # as a killed process leaves it
        result = blip3o("download", "eva-clip", "--dir", tmp_path / "killed", "--yes", **settings)
        assert result.returncode == 0, result.stderr
        assert ("model.safetensors", 5 * 2**20) in hub.requests and not part.parent.exists()
        assert (tmp_path / "killed" / folder / "model.safetensors").read_bytes() == content


def test_a_model_that_did_not_arrive_wholly_does_not_look_whole(download, hub, tmp_path):
    hub.statuses[LARGEST] = [(403, {})]
    assert download("--yes").returncode == 1
    assert not (tmp_path / FOLDER / LARGEST).exists() and not (tmp_path / FOLDER / INDEX).exists(), "the index comes last"
    assert download("--yes").returncode == 0 and (tmp_path / FOLDER / INDEX).exists()


def test_a_wrong_checksum_leaves_no_file(download, hub, tmp_path):
    hub.damaged.add(LARGEST)
    result = download("--yes")
    assert result.returncode == 1
    assert LARGEST in result.stderr and "arrived damaged" in result.stderr and "Run the command again" in result.stderr
    assert not (tmp_path / FOLDER / LARGEST).exists()


@pytest.mark.parametrize(
    ("status", "says"),
    [(403, "access is restricted"), (404, "doesn't have it (404)")],
)
def test_refusals_say_what_to_do(download, hub, status, says):
    hub.statuses["config.json"] = [(status, {})]
    result = download("--yes")
    assert result.returncode == 1 and says in result.stderr and "Traceback" not in result.stderr


def test_a_busy_server_is_asked_again_when_it_says(download, hub):
    hub.statuses["config.json"] = [(429, {"Retry-After": "1"})]
    result = download("--yes")
    assert result.returncode == 0, result.stderr
    assert received(hub).count("config.json") == 2


def test_offline_is_respected_and_nobody_is_asked_without_a_terminal(download, hub, tmp_path):
    offline = download("--yes", HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "HF_HUB_OFFLINE" in offline.stderr and hub.requests == []
    silent = download()
    assert silent.returncode == 1 and "--yes is needed" in silent.stderr and received(hub) == [] and not (tmp_path / FOLDER).exists()


def test_other_files_of_the_same_names_are_not_replaced(download, hub, tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "config.json").write_text("{}")
    result = download("--yes")
    assert result.returncode == 1 and "config.json: 2 bytes in place of" in result.stderr and "--overwrite" in result.stderr
    assert (tmp_path / FOLDER / "config.json").read_text() == "{}"
    assert download("--yes", "--overwrite").returncode == 0
    assert (tmp_path / FOLDER / "config.json").read_bytes() == hub.files[REPOSITORY]["config.json"]


def test_a_full_disk_is_found_before_anything_is_received(hub, tmp_path, monkeypatch):
    from blip3o_core.errors import OutputError
    from blip3o_core.hub import download as module
    from blip3o_core.hub.transfer import Listing, RemoteFile

    file = RemoteFile("model.safetensors", 2**40, "0" * 64, None)
    plan = module.Plan(REPOSITORIES["4b"], Listing(REPOSITORY, "0" * 40, "none", False, {file.name: file}), tmp_path / "new" / FOLDER,
                       ("generate",), (file,), (file,), {}, 0, None, {})  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    if usage.free > 2**40:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**30))
    with pytest.raises(OutputError, match=r"GiB free, the download takes 1024.0 GiB. Make room"):
        module.require_space(plan)
