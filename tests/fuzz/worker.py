"""One case after another in a process of its own, so that a hang, a native crash or a flood of memory ends this one and no other.

Reads a line of JSON per case, {"target": ..., and its arguments}, and answers each with one: {"outcome": "accepted", "refused" (an
error of the Blip3oError family) or "broken" (any other), "detail", "peak_bytes": what the case added to the resident memory}.
"""

import argparse
import faulthandler
import json
import os
import re
import resource
import signal
import sys
import traceback
from html.parser import HTMLParser
from pathlib import Path

import torch

from blip3o_core.errors import Blip3oError

REPOSITORY = Path(__file__).parents[2]
SDXL, SANA = REPOSITORY / "tests" / "data" / "sdxl", REPOSITORY / "tests" / "data" / "sana"
ADDRESS_SPACE = 4 * 2**30
"""A case that maps or allocates more than this gets a MemoryError, which is no documented error."""
SIDE = 64
_models = {}


def pipeline(folder: str | Path = SDXL / "checkpoint", **arguments):
    from blip3o_core import Blip3oPipeline

    return Blip3oPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32, offload="none", **arguments)


def model():
    """The undamaged model, loaded once."""
    if "pipe" not in _models:
        _models["pipe"] = pipeline()
    return _models["pipe"]


def use(pipe) -> None:
    """Every network once: prompt -> embedding -> picture, picture and question -> text."""
    from PIL import Image

    embedding = pipe.sample_embeddings(pipe.encode_prompt(["a red circle"]), steps=1, seeds=[0])
    pipe.ask("What?", images=[Image.new("RGB", (56, 56), "red")], max_new_tokens=2)
    pipe.decode_embeddings(embedding, steps=1, guidance_scale=1.0, width=SIDE, height=SIDE, seeds=[0])


def checkpoint(folder: str) -> None:
    """Reads everything that the folder holds, the tables of `blip3o inspect` included."""
    from blip3o_core.cli.inspect import as_text, describe

    as_text(describe(folder))
    pipe = pipeline(folder)
    assert re.fullmatch("[0-9a-f]{16}", pipe.checkpoint.fingerprint)
    use(pipe)


def sana_decoder(folder: str) -> None:
    from PIL import Image

    pipe = pipeline(decoder=folder)
    pipe.reconstruct(Image.new("RGB", (40, 40), "red"), seeds=[0], steps=1)


def vision_tower(path: str) -> None:
    from PIL import Image

    pipe = pipeline(vision_encoder=path)
    pipe.embed_image(Image.new("RGB", (40, 40), "red"))


def lora(path: str) -> None:
    """`blip3o lora inspect`, and the first stage with the LoRA."""
    from blip3o_core.cli.lora import as_text, describe

    as_text(describe(Path(path)))
    pipe = pipeline(loras=[(path, 0.7)], allow_other_base=True)
    pipe.sample_embeddings(pipe.encode_prompt(["a red circle"]), steps=1, seeds=[0])


def peft_folder(path: str) -> None:
    from blip3o_core.lora.files import write_lora
    from blip3o_core.lora.peft_folder import read_peft_folder

    file = Path(path).with_suffix(".safetensors")
    write_lora(file, read_peft_folder(Path(path)))
    lora(str(file))


def training_options(file: str, overrides: list[str]) -> None:
    """A dry run; what is printed of the options gives them back."""
    from blip3o_core.train import command
    from blip3o_core.train.config import load_config, print_config

    config = load_config(file, overrides)
    printed = Path(file).with_suffix(".printed.toml")
    printed.write_text(print_config(config), "utf-8")
    assert load_config(printed) == config
    command.run(argparse.Namespace(config=file, overrides=overrides, print_config=False, dry_run=True))


def picture(path: str) -> None:
    """A file as a picture, for all three kinds of eyes."""
    from blip3o_core.images import eva_pixel_values, load_image, qwen_pixel_values, siglip_pixel_values

    image = load_image(path)
    assert image.mode == "RGB" and image.info == {} and min(image.size) >= 1
    patches, _ = qwen_pixel_values([image], max_pixels=64 * 28 * 28)
    for pixels in (patches, eva_pixel_values([image], size=56), siglip_pixel_values([image])):
        assert torch.isfinite(pixels).all()


def tensor(shape: list[int], dtype: str, values: list[float], channels_last: bool | None) -> None:
    """A tensor as pictures."""
    from blip3o_core.images import to_rgb_images

    count = torch.Size(shape).numel()
    flat = torch.tensor(values, dtype=torch.float64).repeat(-(-count // len(values)))[:count]
    for image in to_rgb_images(flat.to(getattr(torch, dtype)).reshape(shape), channels_last=channels_last):
        assert image.mode == "RGB" and min(image.size) >= 1


def prompt(text: str, template: bool) -> None:
    """As a prompt and as a question. Whatever the text says, only templates place special tokens."""
    pipe = model()
    specials = set(pipe.tokenizer._full.get_added_vocab().values())

    def placed(words: str) -> list[int]:
        return [token for token in pipe.tokenizer.generation_ids(words, template=template) if token in specials]

    assert placed(text) == placed("x"), "the text has placed a special token"
    assert torch.isfinite(pipe.encode_prompt([text], template=template)).all()
    pipe.ask(text, max_new_tokens=1)


def conversation(text: str) -> None:
    """A saved chat, and one more turn of it."""
    from blip3o_core.pipelines.chat import Chat

    Chat.from_json(model(), text).say("And now?", max_new_tokens=1)


class _Page(HTMLParser):
    """Fails for markup that no report has of itself: whatever a log says is text."""

    TAGS = ("!doctype", "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "section", "details", "summary", "pre", "dl",
            "dt", "dd", "div", "table", "tr", "th", "td", "svg", "line", "text", "polyline", "circle", "span", "i", "figure", "figcaption",
            "a", "img", "ol", "li")  # fmt: skip

    def handle_starttag(self, tag: str, attributes: list) -> None:
        assert tag in self.TAGS, f"the report has a <{tag}>"
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("srcdoc", "action", "formaction"), f"the report has an attribute {name}"
            if name in ("href", "src"):
                assert not re.match(r"[^/?#]*:|//", value or ""), f"the report has a link to {value}"

    handle_startendtag = handle_starttag


def report(folder: str) -> None:
    """The page of a run, from its log."""
    from blip3o_core.train.report import write_report

    page = _Page()
    page.feed(write_report(Path(folder)).read_text("utf-8"))
    page.close()


def resumed(folder: str, base: str) -> None:
    """What a run reads of a checkpoint when it goes on."""
    from blip3o_core.train.state import load_optimizer, load_state, load_tensors

    state = load_state(Path(folder), {}, base)
    assert state.step >= 0 and state.position >= 0 and state.seconds >= 0
    assert all(isinstance(table, dict) for table in (state.broken, state.config, state.topology))
    load_tensors(Path(folder), {"weight": torch.zeros(4, 2)})
    load_optimizer(Path(folder))


TARGETS = {function.__name__: function for function in (
    checkpoint, sana_decoder, vision_tower, lora, peft_folder, training_options, picture, tensor, prompt, conversation,
    report, resumed,
)}  # fmt: skip


def run(case: dict) -> dict:
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    try:
        TARGETS[case.pop("target")](**case)
        outcome, detail = "accepted", ""
    except Blip3oError as error:
        outcome, detail = "refused", f"{type(error).__name__}: {error}"
    except Exception:
        outcome, detail = "broken", traceback.format_exc()
    return {"outcome": outcome, "detail": detail, "peak_bytes": status("VmHWM") - before}


def status(key: str) -> int:
    """Of this process, in bytes."""
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def warm_up() -> None:
    """Loads what every case needs once, so that its time and memory are not counted as those of the first case."""
    use(model())
    sana_decoder(SANA / "checkpoint")
    vision_tower(SDXL / "eva_clip_vision_tower")


def main() -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # shows where a hanging case is
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    warm_up()
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ADDRESS_SPACE, resource.RLIM_INFINITY))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
