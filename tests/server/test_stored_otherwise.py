"""Checkpoints that are no plain copy of the published one: split from their Qwen2.5-VL, in ComfyUI's folders, and in 8 and 4 bits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip3o_core.cli.main import main
from blip3o_core.variants.blip3o import NANO_FOLDER

from . import graphs
from .comfy_server import ComfyServer, PromptRejected
from .conftest import MODELS
from .hosts import Host

QWEN_FILE = "text_encoders/qwen_2.5_vl.safetensors"
COSINES = {"fp8": 0.99, "int8": 0.999, "int4": 0.9}
"""Least similarity of a sampled embedding to that of the plain checkpoint."""


@pytest.fixture(scope="module")
def server(
    host: Host, split_checkpoint: Path, qwen: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    models = {**MODELS, "blip3o/split": split_checkpoint, "blip3o/Qwen2.5-VL": qwen, QWEN_FILE: qwen / "model.safetensors"}
    for kind in COSINES:
        models[f"blip3o/{kind}"] = tmp_path_factory.mktemp("quantised") / kind
        assert main(["quantize", str(tiny_checkpoint), "--format", kind, "--output", str(models[f"blip3o/{kind}"])]) == 0
    base = tmp_path_factory.mktemp("comfyui")
    (base / "models").mkdir()
    assert main(["convert", str(NANO_FOLDER), "--comfyui", str(base / "models"), "--name", "parts"]) == 0
    with ComfyServer(host, base, models=models) as running:
        yield running


def embedding(server: ComfyServer, **loader: str) -> torch.Tensor:
    """Sampled with the shipped solver."""
    graph = graphs.embedding_only(steps=None)
    graph[graphs.LOADER]["inputs"].update(loader)
    assert server.run(graph).status == "success", server.log()[-3000:]
    return load_file(newest(server, "embedding_*.latent"))["latent_tensor"]


def newest(server: ComfyServer, pattern: str) -> Path:
    return max((server.base_directory / "output").glob(pattern), key=lambda file: file.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def plain(server: ComfyServer) -> torch.Tensor:
    return embedding(server)


@pytest.mark.parametrize("where", ["Qwen2.5-VL", QWEN_FILE], ids=["folder", "file"])
def test_a_split_with_its_qwen_samples_what_the_whole_model_samples(server: ComfyServer, plain: torch.Tensor, where: str) -> None:
    assert torch.equal(embedding(server, checkpoint="split", qwen=where), plain)


def test_a_split_answers_questions(server: ComfyServer) -> None:
    split, whole = (graphs.ask("What is this?") for _ in range(2))
    split["loader"]["inputs"] = {"checkpoint": "split", "qwen": QWEN_FILE}
    answers = [server.run(graph).outputs["text"]["text"] for graph in (split, whole)]
    assert answers[0] == answers[1]


def test_a_model_in_comfyuis_folders_draws_and_sees_what_the_whole_one_does(server: ComfyServer) -> None:
    parts = {"checkpoint": "parts", "decoder": "parts", "qwen": "text_encoders/parts_qwen2.5_vl.safetensors",
             "vision_encoder": "clip_vision/parts_eva_clip.safetensors"}  # fmt: skip
    pictures, embeddings = [], []
    for names in (parts, dict.fromkeys(("checkpoint", "decoder", "vision_encoder"), "nano")):
        drawn = server.run(graphs.replace_inputs(graphs.shipped(), **names))
        assert drawn.status == "success", server.log()[-3000:]
        pictures.append(server.images(drawn)[0].tobytes())
        encode = graphs.encode_image(["image", 0], vision_encoder=names["vision_encoder"])
        seen = server.run({"image": graphs.empty_image(128, 128), **encode})
        assert seen.status == "success", server.log()[-3000:]
        embeddings.append(load_file(newest(server, "embedding_*.latent"))["latent_tensor"])
    assert pictures[0] == pictures[1] and torch.equal(*embeddings)


def test_a_split_alone_says_what_it_needs(server: ComfyServer) -> None:
    result = server.run(graphs.replace_inputs(graphs.embedding_only(1), checkpoint="split"))
    assert result.status == "error" and "in ComfyUI the loader's input qwen" in result.error["exception_message"]


def test_a_whole_model_takes_no_qwen_and_a_qwen_must_be_there(server: ComfyServer) -> None:
    graph = graphs.embedding_only(1)
    graph[graphs.LOADER]["inputs"]["qwen"] = "Qwen2.5-VL"
    result = server.run(graph)
    assert result.status == "error" and "has a backbone of its own" in result.error["exception_message"]
    graph[graphs.LOADER]["inputs"]["qwen"] = "text_encoders/../blip3o/tiny/model.safetensors"
    with pytest.raises(PromptRejected, match="value_not_in_list"):
        server.run(graph)


@pytest.mark.parametrize("kind", COSINES)
def test_fewer_bits_sample_nearly_the_same(server: ComfyServer, plain: torch.Tensor, kind: str) -> None:
    found = embedding(server, checkpoint=kind)
    similar = torch.nn.functional.cosine_similarity(found.flatten(), plain.flatten(), dim=0)
    assert COSINES[kind] <= similar < 1, similar
    answer = server.run(graphs.ask("What is this?", checkpoint=kind))
    assert answer.status == "success" and answer.outputs["text"]["text"]
