"""LoRAs in the graph give the pictures of the headless pipeline; files that don't belong to the model are refused.

A file of this package through core's LoraLoaderModelOnly and through ours, on random LoRAs and on one from the trainer.
"""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from blip3o_core import Blip3oPipeline
from blip3o_core.lora.apply import for_host
from blip3o_core.lora.files import Adapter, LoraFile, read_lora, write_lora
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from ..unit.lora_samples import random_lora
from . import graphs
from .comfy_server import ComfyServer, PromptRejected, Result
from .conftest import DATA
from .hosts import REPOSITORY, Host
from .test_native_nodes import node, train_with_core
from .test_shipped_workflows import ASK_PIXELS, SAMPLING, drawn, expect_error, saved_latent, success
from .test_text_to_image import as_tensor

CHECKPOINT = DATA / "checkpoint"
STRENGTH = 0.7
VISIBLE = 30  # dB: below, a LoRA changes the picture clearly; agreement is 45 dB, as everywhere
TRAINING_STEPS = 30
PROMPT = graphs.shipped()[graphs.PROMPT]["inputs"]["prompt"]
ALL = ("dit", "language_model", "latent_queries")

Loras = Sequence[tuple[Path, float]]


@pytest.fixture(scope="module")
def checkpoint() -> Blip3oCheckpoint:
    return Blip3oCheckpoint.open(CHECKPOINT)


@pytest.fixture(scope="module")
def folder(server: ComfyServer) -> Path:
    """models/loras of the server."""
    folder = server.base_directory / "models" / "loras"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def written(folder: Path, checkpoint: Blip3oCheckpoint) -> Callable[..., Path]:
    """written(name, change, seed=, parts=, dora=) -> file of a random LoRA in the server's folder."""

    def write(name: str, change: Callable[[LoraFile], LoraFile] = lambda lora: lora, **arguments) -> Path:
        path = folder / f"{name}.safetensors"
        write_lora(path, change(random_lora(checkpoint, **arguments)))
        return path

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trainer makes of eight pictures: adapters of both networks and queries."""
    folder = tmp_path_factory.mktemp("training")
    pictures = folder / "pictures"
    pictures.mkdir()
    for index, colour in enumerate(("red", "green", "blue", "yellow", "black", "orange", "purple", "brown")):
        Image.new("RGB", (64, 64), colour).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(f"a {colour} wall")
    config = folder / "config.toml"
    config.write_text(f"""
[model]
path = {json.dumps(str(CHECKPOINT))}
vision_encoder = {json.dumps(str(DATA / "eva_clip_vision_tower"))}
[train]
steps = {TRAINING_STEPS}
batch_size = 4
device = "cpu"
[lora]
parts = ["dit", "language_model"]
rank = 4
alpha = 8.0
latent_queries = true
trigger = "xyz wall"
[optimizer]
learning_rate = 1e-2
[[data]]
path = {json.dumps(str(pictures))}
[loader]
workers = 0
[validation]
every = 0
[output]
folder = {json.dumps(str(folder / "out"))}
name = "walls"
""")
    result = subprocess.run([sys.executable, "-m", "blip3o_core.train", str(config)], cwd=REPOSITORY, text=True, capture_output=True,
                            timeout=500)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]
    return folder / "out" / "walls.safetensors"


def headless(loras: Loras = (), **arguments) -> torch.Tensor:
    """The picture of `draw`, (1, 3, H, W) in 0..1, without ComfyUI."""
    pipe = Blip3oPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype=torch.float32, loras=loras, **arguments)
    return pipe.generate([PROMPT], seeds=[7], negative=pipe.null_embedding(seed=0, steps=graphs.FEW_STEPS), output_type="pt", **SAMPLING)


def with_ours(loras: Loras, graph: graphs.Graph | None = None, **inputs) -> graphs.Graph:
    """The shipped graph for LoRAs with as many loaders in a chain; `inputs` go to each."""
    graph = graphs.tiny("text_to_image_lora") if graph is None else graph
    first = graphs.find(graph, "Blip3oLoraLoader")
    previous = [graph[first]["inputs"].pop(name) for name in ("model", "backbone")]
    loaders = [first, *(f"lora {index}" for index in range(1, len(loras)))]
    for key, (file, strength) in zip(loaders, loras, strict=True):
        graph[key] = node("Blip3oLoraLoader", model=previous[0], backbone=previous[1], lora_name=file.name, strength_model=strength,
                          strength_backbone=strength, allow_other_base=False) | {"_meta": {"title": key}}  # fmt: skip
        graph[key]["inputs"].update(inputs)
        previous = [[key, 0], [key, 1]]
    last = loaders[-1]
    for key, other in graph.items():
        if key not in loaders:
            other["inputs"] = {name: [last, value[1]] if isinstance(value, list) and value[0] == first else value
                               for name, value in other["inputs"].items()}  # fmt: skip
    return graph


def with_core(file: Path, strength: float) -> graphs.Graph:
    """The plain graph with core's loader behind the checkpoint."""
    graph = graphs.tiny("text_to_image")
    for other in graph.values():
        other["inputs"] = {name: ["core", 0] if value == ["1", 1] else value for name, value in other["inputs"].items()}
    graph["core"] = node("LoraLoaderModelOnly", model=["1", 1], lora_name=file.name, strength_model=strength)
    return graph


def draw(server: ComfyServer, graph: graphs.Graph) -> torch.Tensor:
    return drawn(server, success(server, graph), graphs.find(graph, "SaveImage"))


def report_of(result: Result, graph: graphs.Graph) -> list[str]:
    return "".join(result.outputs[graphs.find(graph, "PreviewAny")]["text"]).split("\n")


@pytest.fixture(scope="module")
def plain(server: ComfyServer) -> torch.Tensor:
    """The picture without any LoRA."""
    return draw(server, graphs.tiny("text_to_image"))


def test_core_and_our_node_and_the_command_draw_the_same_picture(server, written, plain, psnr, blip3o, tmp_path):
    file = written("both ways", parts=["dit"])
    expected = headless([(file, STRENGTH)])
    found = {"core": draw(server, with_core(file, STRENGTH)), "ours": draw(server, with_ours([(file, STRENGTH)]))}
    for name, picture in found.items():
        print(f"{name}: {psnr(picture, expected):.1f} dB, without LoRA {psnr(plain, expected):.1f} dB")
        assert psnr(picture, expected) >= 45
    assert psnr(plain, expected) < VISIBLE
    assert "lora key not loaded" not in server.log()

    graph = graphs.replace_inputs(graphs.reference(graphs.shipped("text_to_image_lora")), checkpoint=graphs.TINY,
                                  decoder=graphs.TINY, width=graphs.SIDE, height=graphs.SIDE)  # fmt: skip
    blip3o("generate", PROMPT, "--model", CHECKPOINT, "--lora", f"{file}:{STRENGTH}", "--seed", 7, "--width", graphs.SIDE,
           "--height", graphs.SIDE, "--device", "cpu", "--output", tmp_path / "a.png", check=True)  # fmt: skip
    with Image.open(tmp_path / "a.png") as image:
        command = psnr(draw(server, with_ours([(file, STRENGTH)], graph)), as_tensor(image))
    print(f"command, 30 and 50 steps: {command:.1f} dB")
    assert command >= 45


def test_all_three_parts_draw_the_headless_picture(server, written, plain, psnr):
    file = written("all parts", seed=1)
    graph = with_ours([(file, STRENGTH)])
    result = success(server, graph)
    picture, expected = drawn(server, result, graphs.find(graph, "SaveImage")), headless([(file, STRENGTH)])
    print(f"{psnr(picture, expected):.1f} dB, without LoRA {psnr(plain, expected):.1f} dB")
    assert psnr(picture, expected) >= 45
    assert psnr(plain, expected) < VISIBLE
    assert report_of(result, graph) == [
        "all parts.safetensors", "base model: checkpoint (7c89fcb6e7a1de96)", "rank: 2, 4", "alpha: 3, 7", "trigger word: xyz style",
        "diffusion model: 30 of 30 matched, strength 0.7", "language model: 12 of 12 matched, strength 0.7",
        "learned queries: 1 of 1 matched, strength 0.7",
    ]  # fmt: skip


@pytest.mark.parametrize("part", ALL)
def test_each_part_reaches_the_picture_by_itself(server, written, plain, psnr, part):
    file = written(f"only {part}", seed=2, parts=[part])
    picture, expected = draw(server, with_ours([(file, 1.0)])), headless([(file, 1.0)])
    print(f"{part}: {psnr(picture, expected):.1f} dB, without LoRA {psnr(plain, expected):.1f} dB")
    assert psnr(picture, expected) >= 45
    assert psnr(plain, expected) < 40, "or the test can't fail"


def test_strengths_of_model_and_backbone_are_told_apart(server, written, psnr):
    file, dit = written("two strengths", seed=3), written("their dit", seed=3, parts=["dit"])
    rest = written("their rest", lambda lora: replace(lora, adapters={"language_model": lora.adapters["language_model"]}), seed=3)
    picture = draw(server, with_ours([(file, 0.0)], strength_model=0.4, strength_backbone=0.9))
    assert psnr(picture, headless([(dit, 0.4), (rest, 0.9)])) >= 45
    assert psnr(picture, headless([(dit, 0.9), (rest, 0.4)])) < 45


def test_a_trained_lora_draws_the_headless_picture(server, folder, trained, plain, psnr):
    file = Path(shutil.copy(trained, folder / "walls.safetensors"))
    graph = with_ours([(file, 1.0)])
    result = success(server, graph)
    picture, expected = drawn(server, result, graphs.find(graph, "SaveImage")), headless([(file, 1.0)])
    print(f"ours: {psnr(picture, expected):.1f} dB, without LoRA {psnr(plain, expected):.1f} dB")
    assert psnr(picture, expected) >= 45
    assert psnr(plain, expected) < VISIBLE
    lines = report_of(result, graph)
    assert lines[1:5] == ["base model: checkpoint (7c89fcb6e7a1de96)", "rank: 4", "alpha: 8", "trigger word: xyz wall"]
    assert [line.partition(":")[0] for line in lines[5:]] == ["diffusion model", "language model", "learned queries"], lines

    only_dit = folder / "walls dit.safetensors"  # core knows nothing of the rest
    write_lora(only_dit, replace(read_lora(file), adapters={"dit": read_lora(file).adapters["dit"]}, queries=None))
    expected = headless([(only_dit, STRENGTH)])
    print(f"core: {psnr(draw(server, with_core(file, STRENGTH)), expected):.1f} dB, without LoRA {psnr(plain, expected):.1f} dB")
    assert psnr(draw(server, with_core(file, STRENGTH)), expected) >= 45
    assert psnr(plain, expected) < 40


def test_answers_come_from_the_patched_backbone(server, written):
    file = written("talks", seed=4, parts=["language_model"])
    graph = graphs.ask("Tell me about rain.", backbone=["lora", 1], max_new_tokens=16)
    graph["lora"] = node("Blip3oLoraLoader", model=["loader", 1], backbone=["loader", 0], lora_name=file.name, strength_model=1.0,
                         strength_backbone=3.0, allow_other_base=False)  # fmt: skip
    graph |= {"picture": graphs.empty_image(56, 56)}
    graph["ask"]["inputs"]["images"] = ["picture", 0]
    image = Image.new("RGB", (56, 56), (0x33, 0x66, 0xCC))
    pipe, plain = (Blip3oPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype=torch.float32, loras=loras)
                   for loras in ([(file, 3.0)], []))  # fmt: skip
    expected, other = (each.ask("Tell me about rain.", images=[image], max_new_tokens=16, **ASK_PIXELS) for each in (pipe, plain))
    assert other != expected, "or the test can't fail"
    assert success(server, graph).outputs["text"]["text"] == [expected]
    graph["ask"]["inputs"]["backbone"] = ["loader", 0]
    assert success(server, graph).outputs["text"]["text"] == [other]


def test_two_loras_in_a_chain(server, written, psnr):
    loras = [(written("first", seed=5), 0.6), (written("second", seed=6), -0.4)]
    picture = draw(server, with_ours(loras))
    expected = headless(loras)
    print(f"chain: {psnr(picture, expected):.1f} dB, the first alone {psnr(headless(loras[:1]), expected):.1f} dB")
    assert psnr(picture, expected) >= 45
    for alone in (loras[:1], loras[1:]):
        assert psnr(headless(alone), expected) < VISIBLE


def test_ours_behind_the_loader_of_core(server, written, psnr):
    first, second = written("of core", seed=7, parts=["dit"]), written("of ours", seed=8)
    graph = with_ours([(second, STRENGTH)])
    graph["core"] = node("LoraLoaderModelOnly", model=["1", 1], lora_name=first.name, strength_model=0.5)
    graph[graphs.find(graph, "Blip3oLoraLoader")]["inputs"]["model"] = ["core", 0]
    assert psnr(draw(server, graph), headless([(first, 0.5), (second, STRENGTH)])) >= 45


def test_strength_zero_is_the_picture_without(server, written, plain):
    file = written("off", seed=9, dora=True)
    graph = with_ours([(file, 0.0)])
    result = success(server, graph)
    assert torch.equal(drawn(server, result, graphs.find(graph, "SaveImage")), plain)
    assert "diffusion model: 30 of 30 matched, strength 0, unchanged" in report_of(result, graph)


def test_the_loaded_model_stays_as_it_was_in_the_same_graph(server, written, pipe, relative_error):
    """Both branches are sampled: plain, patched, and plain again behind it. Each sampler waits for the one before."""
    file = written("in between", seed=10)
    graph = graphs.embedding_only(graphs.FEW_STEPS, noise_seed=11)
    sampler = graph[graphs.EMBEDDING]
    graph["lora"] = node("Blip3oLoraLoader", model=["1", 1], backbone=["1", 0], lora_name=file.name, strength_model=1.0,
                         strength_backbone=1.0, allow_other_base=False)  # fmt: skip
    graph["patched prompt"] = node("Blip3oTextEncode", **graph[graphs.PROMPT]["inputs"] | {"backbone": ["lora", 1]})
    # at sigma 1 the latent is all noise, so the link below only sets the order
    patched = {"model": ["lora", 0], "positive": ["patched prompt", 0], "negative": ["patched prompt", 1],
               "latent_image": [graphs.EMBEDDING, 0]}  # fmt: skip
    graph["patched"] = node("SamplerCustom", **sampler["inputs"] | patched)
    graph["again"] = node("SamplerCustom", **sampler["inputs"] | {"latent_image": ["patched", 0]})
    graph["save patched"], graph["save again"] = graphs.save_latent(["patched", 0]), graphs.save_latent(["again", 0])
    result = success(server, graph)
    merged = Blip3oPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype=torch.float32, loras=[(file, 1.0)])
    expected, changed = (each.sample_embeddings(each.encode_prompt([PROMPT]), solver="euler", steps=graphs.FEW_STEPS, seeds=[11])
                         for each in (pipe, merged))  # fmt: skip
    assert relative_error(changed, expected) > 0.1, "or the test can't fail"
    for saver, reference in (("save", expected), ("save patched", changed), ("save again", expected)):
        error = relative_error(saved_latent(server, result, saver), reference)
        print(f"{saver}: {error:.1e}")
        assert error <= 1e-3
    prompt = "and the backbone too"  # not in the cache: read now, after the patched backbone was
    graph = graphs.embedding_only(graphs.FEW_STEPS, noise_seed=11)
    graph[graphs.PROMPT]["inputs"]["prompt"] = prompt
    expected = pipe.sample_embeddings(pipe.encode_prompt([prompt]), solver="euler", steps=graphs.FEW_STEPS, seeds=[11])
    assert relative_error(saved_latent(server, success(server, graph), "save"), expected) <= 1e-3


def test_models_freed_by_the_host_are_patched_again(server, written):
    file = written("freed", seed=12)
    first = draw(server, with_ours([(file, STRENGTH)]))
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert torch.equal(draw(server, with_ours([(file, STRENGTH)])), first)


def test_a_file_that_is_replaced_is_read_again(server, written, psnr):
    file = written("replaced", seed=13)
    before = draw(server, with_ours([(file, 1.0)]))
    file = written("replaced", seed=14)
    after = draw(server, with_ours([(file, 1.0)]))
    assert psnr(before, after) < VISIBLE
    assert psnr(after, headless([(file, 1.0)])) >= 45


def of_another_base(lora: LoraFile) -> LoraFile:
    return replace(lora, metadata=lora.metadata | {"blip3o.base_fingerprint": "0123456789abcdef", "blip3o.base_model": "BLIP3o-Model-8B"})


def test_a_lora_of_another_base_is_refused_unless_allowed(server, written, psnr):
    file = written("of 8B", of_another_base, seed=15)
    expect_error(server, with_ours([(file, STRENGTH)]), "Blip3oLoraLoader",
                 "of 8B.safetensors: trained on BLIP3o-Model-8B (0123456789abcdef), this MODEL is of tiny (7c89fcb6e7a1de96)")  # fmt: skip
    allowed = draw(server, with_ours([(file, STRENGTH)], allow_other_base=True))
    assert psnr(allowed, headless([(file, STRENGTH)], allow_other_base=True)) >= 45


def test_a_backbone_of_another_base_is_refused(server, written, edit_tensors):
    def shift(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.latent_queries"] += 1

    other = server.base_directory / "models" / "blip3o" / "other"
    shutil.copytree(CHECKPOINT, other)
    edit_tensors(other / "model.safetensors", shift)
    graph = with_ours([(written("of tiny", seed=16), STRENGTH)])
    graph["other"] = node("Blip3oCheckpointLoader", checkpoint="other")
    graph[graphs.find(graph, "Blip3oLoraLoader")]["inputs"]["backbone"] = ["other", 0]
    expect_error(server, graph, "Blip3oLoraLoader", "this backbone is of other (")


def test_a_file_that_names_no_base_is_taken(server, written, psnr):
    file = written("nameless", lambda lora: replace(lora, metadata={}), seed=17)
    graph = with_ours([(file, STRENGTH)])
    result = success(server, graph)
    assert psnr(drawn(server, result, graphs.find(graph, "SaveImage")), headless([(file, STRENGTH)])) >= 45
    assert {"base model: not recorded", "trigger word: none recorded"} <= set(report_of(result, graph))


def test_the_decoder_takes_no_lora(server, written):
    graph = with_ours([(written("wrong model", seed=18), 1.0)], model=[graphs.DECODER, 0])
    expect_error(server, graph, "Blip3oLoraLoader", "this MODEL is SdxlDecoderModel, not the BLIP3-o diffusion model")


def without_backbone(file: Path) -> graphs.Graph:
    """The language side of the graph goes past the LoRA."""
    graph = with_ours([(file, STRENGTH)])
    loader = graphs.find(graph, "Blip3oLoraLoader")
    del graph[loader]["inputs"]["backbone"]
    for other in graph.values():
        if other["class_type"] == "Blip3oTextEncode":
            other["inputs"]["backbone"] = ["1", 0]
    return graph


def test_without_a_backbone_the_diffusion_model_is_patched_and_the_report_says_so(server, written, psnr):
    graph = without_backbone(written("no backbone", seed=19))
    result = success(server, graph)
    alone = written("no backbone, dit", lambda lora: replace(lora, adapters={"dit": lora.adapters["dit"]}, queries=None), seed=19)
    picture = drawn(server, result, graphs.find(graph, "SaveImage"))
    assert psnr(picture, headless([(alone, STRENGTH)])) >= 45
    assert psnr(picture, headless([(alone.with_name("no backbone.safetensors"), STRENGTH)])) < 45
    assert report_of(result, graph)[-2:] == [
        "language model: 12 in the file, not applied: no backbone is connected",
        "learned queries: 1 in the file, not applied: no backbone is connected",
    ]


def test_a_file_for_the_language_side_alone_needs_a_backbone(server, written):
    graph = without_backbone(written("language alone", seed=20, parts=["language_model", "latent_queries"]))
    expect_error(server, graph, "Blip3oLoraLoader", "is only for the language side, and no backbone is connected")


def with_misfits(lora: LoraFile) -> LoraFile:
    """One layer too many, and one of another shape."""
    dit = dict(lora.adapters["dit"])
    dit["layers.9.attn1.to_q"] = dit["layers.0.attn1.to_v"]
    narrow = dit["layers.0.attn1.to_v"]
    dit["layers.0.attn1.to_v"] = Adapter(narrow.down[:, :40], narrow.up, narrow.alpha)
    return replace(lora, adapters={**lora.adapters, "dit": dit})


def test_keys_that_fit_nothing_are_left_out_and_listed(server, written, psnr):
    graph = with_ours([(written("misfits", with_misfits, seed=21), STRENGTH)])
    result = success(server, graph)
    fitting = written("misfits, fitting", lambda lora: replace(lora, adapters={**lora.adapters, "dit": {
        path: adapter for path, adapter in lora.adapters["dit"].items() if path != "layers.0.attn1.to_v"}}), seed=21)  # fmt: skip
    assert psnr(drawn(server, result, graphs.find(graph, "SaveImage")), headless([(fitting, STRENGTH)])) >= 45
    lines = report_of(result, graph)
    assert "diffusion model: 29 of 31 matched, strength 0.7" in lines
    assert {"  not matched: diffusion_model.layers.9.attn1.to_q.weight",
            "  not matched: diffusion_model.layers.0.attn1.to_v.weight (is (48, 48), not (48, 40))"} <= set(lines)  # fmt: skip


def test_a_file_of_which_nothing_fits(server, written):
    def renamed(lora: LoraFile) -> LoraFile:
        return LoraFile({"dit": {f"layers.{10 + i}.attn1.to_q": adapter for i, adapter in enumerate(lora.adapters["dit"].values())}})

    graph = with_ours([(written("nothing fits", renamed, seed=22), 1.0)])
    expect_error(server, graph, "Blip3oLoraLoader", "none of its 30 keys fits this model: diffusion_model.layers.10.attn1.to_q.weight")


def test_files_that_are_damaged_or_no_lora(server, written, folder):
    whole = written("whole", seed=23)
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(whole.read_bytes()[:-1000])
    other = folder / "sdxl.safetensors"
    save_file({"lora_unet_down_blocks_1.lora_up.weight": torch.zeros(4, 2)}, other)
    pointer = folder / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    for file, message in ((damaged, "cut off"), (other, "that no BLIP3-o LoRA has"), (pointer, "not a safetensors file")):
        expect_error(server, with_ours([(file, 1.0)]), "Blip3oLoraLoader", message)
    with pytest.raises(PromptRejected, match="lora_name"):
        server.run(with_ours([(folder / "nowhere.safetensors", 1.0)]))
    with pytest.raises(PromptRejected, match="lora_name"):
        server.run(with_ours([(Path("../blip3o/tiny/model.safetensors"), 1.0)], lora_name="../blip3o/tiny/model.safetensors"))


@pytest.mark.parametrize("strength", [1.0, STRENGTH])
def test_dora_draws_the_headless_picture(server, written, psnr, strength):
    first, file = written("before the dora", seed=24), written("dora", seed=25, dora=True)
    loras = [(first, 0.5), (file, strength)]  # rows are normalised after the first one's update
    picture, expected = draw(server, with_ours(loras)), headless(loras)
    print(f"dora at {strength}: {psnr(picture, expected):.1f} dB, without {psnr(headless(loras[:1]), expected):.1f} dB")
    assert psnr(picture, expected) >= 45
    assert psnr(headless(loras[:1]), expected) < VISIBLE


def test_dora_with_the_magnitudes_of_comfyui(server, written, checkpoint, psnr):
    """Such a file draws the same in core's loader, in ours and headless; the one it was made from doesn't in core's."""
    dit = checkpoint.load_dit(dtype=torch.float32)
    host = written("dora of the host", lambda lora: for_host(lora, {"dit": dit}), seed=26, parts=["dit"], dora=True)
    paper = written("dora of the paper", seed=26, parts=["dit"], dora=True)
    expected = headless([(paper, STRENGTH)])
    found = {
        "core": draw(server, with_core(host, STRENGTH)),
        "ours": draw(server, with_ours([(host, STRENGTH)])),
        "ours, paper's magnitudes": draw(server, with_ours([(paper, STRENGTH)])),
        "headless": headless([(host, STRENGTH)]),
    }
    for name, picture in found.items():
        print(f"{name}: {psnr(picture, expected):.1f} dB")
        assert psnr(picture, expected) >= 45
    assert psnr(draw(server, with_core(paper, STRENGTH)), expected) < 45


def test_what_core_trained_and_saved(server, folder, psnr, plain):
    file = Path(shutil.copy(train_with_core(server), folder / "of core's trainer.safetensors"))
    strength = 30.0  # two steps change little
    graph = with_ours([(file, strength)])
    result = success(server, graph)
    picture = drawn(server, result, graphs.find(graph, "SaveImage"))
    by_core, alone = draw(server, with_core(file, strength)), headless([(file, strength)])
    print(f"core's own file: ours and core {psnr(picture, by_core):.1f} dB, headless {psnr(picture, alone):.1f} dB, "
          f"without {psnr(picture, plain):.1f} dB")  # fmt: skip
    assert psnr(picture, by_core) >= 45
    assert psnr(picture, alone) >= 45
    assert psnr(picture, plain) < 40
    assert not [line for line in report_of(result, graph) if "not matched" in line]


def test_the_node_offers_safetensors_files_only(server, folder):
    (folder / "notes.txt").write_text("x")
    (folder / "old.pt").write_bytes(b"x")
    written = {file.name for file in folder.glob("*.safetensors")}
    kind, *rest = server.object_info()["Blip3oLoraLoader"]["input"]["required"]["lora_name"]
    offered = set(kind if isinstance(kind, list) else rest[0]["options"])
    assert written <= offered
    assert all(name.endswith(".safetensors") for name in offered)


def test_the_log_has_no_unloaded_keys(server):
    """Core's loader warns of keys that it has no place for: those of the language side, in the trained file, and no others."""
    warned = [line for line in server.log().splitlines() if "lora key not loaded" in line]
    assert not [line for line in warned if "language_model." not in line and "latent_queries" not in line], warned[:3]


PARTLY_LOADED = """
import importlib.util, json, sys
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, ".")
import comfy.options
comfy.options.enable_args_parsing()
import torch
from pathlib import Path
root, checkpoint, files, part = {arguments}
spec = importlib.util.spec_from_file_location("blip3o_pack", root + "/__init__.py", submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules["blip3o_pack"] = pack
spec.loader.exec_module(pack)
from blip3o_pack.blip3o_core.lora.files import read_lora
from blip3o_pack.blip3o_core.pipelines.language import encode_prompts
from blip3o_pack.blip3o_core.variants.blip3o import Blip3oCheckpoint
from blip3o_pack.nodes.adapters import loading
from blip3o_pack.nodes.adapters.lora import apply_lora

cpu = torch.device("cpu")
with torch.inference_mode():
    opened = Blip3oCheckpoint.open(checkpoint)
    dit, backbone = loading.load_dit(opened), loading.load_backbone(opened)
    original = dit if part == "dit" else backbone.patcher
    for file in files:
        dit, backbone, _ = apply_lora(read_lora(Path(file)), file, dit, backbone, strength_model={strength}, strength_backbone={strength})
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 48, 8, 8, generator=generator), torch.randn(2, 64, 64, generator=generator)
    if part == "dit":
        patcher = dit
        run = lambda: patcher.model.diffusion_model(x, torch.tensor([600.0, 33.0]), context=z)
    else:
        patcher = backbone.patcher
        run = lambda: encode_prompts(backbone, ["a cat", "two dogs on a red sofa"], max_tokens=1000)
    assert patcher is not original and patcher.model is original.model
    plain = run()
    patcher.partially_load(cpu, 1e32)
    full = run()
    patcher.detach()
    unloaded = run()
    patcher.partially_load(cpu, patcher.model_size() // 3)
    streamed, partly, resident = run(), bool(patcher.model.model_lowvram), patcher.model.model_loaded_weight_memory
    original.partially_load(cpu, 1e32)  # the host goes from a clone to the original without a detour
    back = run()
torch.save(full, {output})
difference = lambda a, b: ((a - b).abs().max() / b.abs().max()).item()
print("RESULT", json.dumps({{"partly": partly, "resident": resident, "size": patcher.model_size(), "streamed": difference(streamed, full),
                            "lora": difference(full, plain), "unloaded": difference(unloaded, plain), "back": difference(back, plain)}}))
"""


@pytest.mark.parametrize("part", ["dit", "backbone"])
def test_a_partly_loaded_network_gives_the_same_numbers(host: Host, checkpoint, tmp_path, relative_error, part):
    """Two files, the second with DoRA. Weights that stay in system memory are patched on use."""
    files = [tmp_path / "lora.safetensors", tmp_path / "dora.safetensors"]
    write_lora(files[0], random_lora(checkpoint, seed=30))
    write_lora(files[1], random_lora(checkpoint, seed=31, dora=True))
    output = tmp_path / "full.pt"
    code = PARTLY_LOADED.format(arguments=repr((str(REPOSITORY), str(CHECKPOINT), [*map(str, files)], part)), strength=STRENGTH,
                                output=repr(str(output)))  # fmt: skip
    result = subprocess.run([str(host.python), "-c", code], cwd=host.tree, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    measured = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("RESULT")).removeprefix("RESULT"))
    print(measured)
    assert measured["partly"], "the host must have left weights behind, or nothing is tested"
    assert measured["resident"] < measured["size"]
    assert measured["streamed"] <= 1e-6
    assert measured["lora"] > 0.1
    assert measured["unloaded"] == measured["back"] == 0

    pipe = Blip3oPipeline.from_pretrained(CHECKPOINT, device="cpu", dtype=torch.float32, loras=[(file, STRENGTH) for file in files])
    if part == "dit":
        generator = torch.Generator().manual_seed(0)
        x, z = torch.randn(2, 48, 8, 8, generator=generator), torch.randn(2, 64, 64, generator=generator)
        with torch.inference_mode():
            reference = pipe.dit(x, torch.tensor([600.0, 33.0]), z)
    else:
        reference = pipe.encode_prompt(["a cat", "two dogs on a red sofa"])
    full = torch.load(io.BytesIO(output.read_bytes()))
    print(f"{part}: {relative_error(full, reference):.1e}")
    assert relative_error(full, reference) <= 1e-4
