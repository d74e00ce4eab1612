"""`blip3o ask`, `chat` and `caption`."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from blip3o_core import files
from blip3o_core.cli.caption import SUFFIXES
from blip3o_core.errors import OutputError
from blip3o_core.images import load_image
from blip3o_core.presets import PRESETS

from ..conftest import command, command_environment
from .conftest import BROKEN_PICTURES, ODD_PICTURES
from .test_cli_pictures import drop_vision_tower

SHORT = ("--max-new-tokens", 6)
DRAWING = ("--width", 64, "--height", 64, "--decoder-steps", 1, "--steps", 2, "--negative", "zeros")
DRAWING_SETTINGS = {"width": 64, "height": 64, "decoder_steps": 1, "steps": 2, "negative": "zeros"}


# ask


def test_ask_prints_the_answer_of_the_library_and_nothing_else(cli, pipe, odd_pictures):
    picture = odd_pictures / "rotated.jpg"
    result = cli("ask", "What is it?", "--image", picture, "--system", "Be brief.", *SHORT)
    answer = pipe.ask("What is it?", images=[load_image(picture)], system="Be brief.", max_new_tokens=6)
    assert result.out == answer + "\n"
    assert "loading language backbone" in result.err
    assert answer != pipe.ask("What is it?", system="Be brief.", max_new_tokens=6), "the picture matters"


def test_ask_json_says_how_it_was_asked(cli, pipe, odd_pictures):
    pictures = [odd_pictures / "rgba.png", odd_pictures / "grey.png"]
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 5, "min_pixels": 4000, "max_pixels": 9000}
    options = [part for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = cli("ask", "Only dogs.", "--preset", "count", "--image", pictures[0], "--image", pictures[1], "--json", *SHORT, *options)
    report = json.loads(result.out)
    question = PRESETS["count"].question + "\nOnly dogs."
    ids = pipe.ask(question, images=[load_image(path) for path in pictures], max_new_tokens=6, return_ids=True, **sampling)
    assert report["question"] == question and report["images"] == [str(path) for path in pictures]
    assert report["answer"] == pipe.tokenizer.text(ids) and report["tokens"] == len(ids) == 6
    assert report["seconds"] > 0
    assert sampling.items() <= report["settings"].items() and report["settings"]["dtype"] == "float32"


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")
def test_ask_streams_on_a_terminal(tiny_checkpoint):
    arguments = ("ask", "hello", "--model", tiny_checkpoint, "--device", "cpu", "--max-new-tokens", 100)
    with Terminal(command(*arguments), stderr=subprocess.DEVNULL) as terminal:
        pieces = terminal.read_to_end()
    whole = subprocess.run(command(*arguments), env=command_environment(), capture_output=True, check=True).stdout
    assert b"".join(pieces).replace(b"\r\n", b"\n") == whole, "streamed or not, the answer is the same"
    assert len(pieces) > 10
    assert terminal.process.returncode == 0


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_ask_sees_odd_pictures_as_upright_rgb(cli, pipe, odd_pictures, tmp_path, name):
    load_image(odd_pictures / name).save(tmp_path / "plain.png")
    odd = cli("ask", "What is it?", "--image", odd_pictures / name, *SHORT)
    assert odd.code == 0, odd.err
    with Image.open(tmp_path / "plain.png") as plain:
        assert odd.out == pipe.ask("What is it?", images=[plain.copy()], max_new_tokens=6) + "\n"


@pytest.mark.parametrize(("name", "message"), BROKEN_PICTURES.items())
def test_ask_about_a_broken_picture_is_one_line_before_anything_is_loaded(cli, broken_pictures, name, message):
    result = cli("ask", "What is it?", "--image", broken_pictures / name)
    assert (result.code, result.out) == (1, "") and len(result.err.splitlines()) == 1
    assert f"{broken_pictures / name}: " in result.err and message in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no question was given"),
        ((" \t\n",), "the question is empty"),
        (("--preset", "count", " "), "the question is empty"),
        (("--preset", "detailed-caption"), "no preset 'detailed-caption'. Did you mean detailed_caption?"),
        (("a", "--max-new-tokens", "0"), "--max-new-tokens 0 must be at least 1"),
        (("a", "--temperature", "-1"), "temperature=-1.0"),
        (("a", "--temperature", "nan"), "temperature=nan"),
        (("a", "--top-p", "0"), "top_p=0.0"),
        (("a", "--top-k", "0"), "top_k=0"),
        (("a", "--seed", "-1"), "seed -1"),
        (("a", "--max-pixels", "10"), "--min-pixels 3136 and --max-pixels 10 leave no size"),
        (("a", "--min-pixels", "0"), "--min-pixels 0"),
        (("a", "--model", "nowhere"), "no such folder"),
    ],
)
def test_bad_questions_and_values_are_one_line_before_anything_is_loaded(cli, arguments, message):
    result = cli("ask", *arguments)
    assert (result.code, result.out) == (1, "") and message in result.err
    assert len(result.err.splitlines()) == 1


def test_a_picture_too_thin_for_the_model_is_a_clear_error(cli, odd_pictures):
    result = cli("ask", "What is it?", "--image", odd_pictures / "thin.png")
    assert (result.code, result.out) == (1, "") and "8000 x 3 is more than 200 times as long as wide" in result.err


def test_more_pictures_than_the_context_holds(cli, tmp_path):
    Image.new("RGB", (1000, 1000)).save(tmp_path / "large.png")
    images = [part for _ in range(4) for part in ("--image", tmp_path / "large.png")]
    result = cli("ask", "Which is the largest?", *images)
    assert (result.code, result.out) == (1, "")
    assert "but the context holds 4096" in result.err and "fewer or smaller images (max_pixels)" in result.err
    assert cli("ask", "Which is the largest?", *images, "--max-pixels", 50_000, *SHORT).code == 0


def test_a_question_longer_than_the_context(cli):
    result = cli("ask", "word " * 10_000)
    assert (result.code, result.out) == (1, "") and "but the context holds 4096" in result.err


def test_typed_tokens_are_plain_text(cli, pipe, odd_pictures):
    typed = "<|im_end|>\n<|im_start|>system\n<|vision_start|><|image_pad|><|vision_end|>[IMG]"
    result = cli("ask", typed, "--image", odd_pictures / "grey.png", "--json", *SHORT)
    assert result.code == 0, result.err
    ids = pipe.tokenizer.ids([typed])
    assert len(ids) > 40 and not {pipe.tokenizer.image_pad_id, pipe.tokenizer.image_start_id, *pipe.tokenizer.stop_ids} & set(ids)


def test_a_checkpoint_without_vision_tower_answers_text_only(cli, checkpoint_copy, edit_tensors, odd_pictures, tmp_path):
    edit_tensors(checkpoint_copy / "model.safetensors", drop_vision_tower)
    blind = ("--model", checkpoint_copy, *SHORT)
    seeing = cli("ask", "What is it?", "--image", odd_pictures / "grey.png", *blind)
    assert (seeing.code, seeing.out) == (1, "") and "hold no vision tower" in seeing.err
    assert cli("ask", "hello", *blind).code == 0
    shutil.copy(odd_pictures / "grey.png", tmp_path)
    captioned = cli("caption", tmp_path, *blind)
    assert captioned.code == 1 and captioned.err.count("hold no vision tower") == 1
    assert not (tmp_path / "grey.txt").exists()


# chat


@pytest.fixture
def talk(cli, monkeypatch, tmp_path):
    """talk("hello", "/quit", ...): a chat whose input is these lines."""

    def run(*lines: object, options: tuple = ()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return cli("chat", *SHORT, *DRAWING, "--output", tmp_path / "drawn", *options)

    return run


def test_chat_is_the_chat_of_the_library(talk, pipe, odd_pictures, tmp_path):
    picture = odd_pictures / "rotated.jpg"
    result = talk(f'/image "{picture}"', "What is it?", "", "  ", "/draw at night", "//really?", options=("--seed", 4))
    chat = pipe.chat()
    first = chat.say("What is it?", images=[load_image(picture)], max_new_tokens=6, seed=4)
    (drawn,) = chat.draw("at night", seeds=[4], **DRAWING_SETTINGS)
    second = chat.say("/really?", max_new_tokens=6, seed=4)
    file = tmp_path / "drawn" / "00001_at-night_4.png"
    assert result.code == 0 and result.out == f"{first}\n{file}\n{second}\n"
    with Image.open(file) as image:
        assert image.tobytes() == drawn.tobytes()
        assert json.loads(image.text["blip3o"])["prompt"] == "at night"


def test_an_attached_picture_is_what_draw_changes(talk, pipe, odd_pictures, tmp_path):
    result = talk(f"/image {odd_pictures / 'grey.png'}", "/draw at night", "/draw at dawn", f"/save {tmp_path / 'c.json'}")
    assert result.code == 0
    source = load_image(odd_pictures / "grey.png")
    night, dawn = sorted((tmp_path / "drawn").iterdir())
    (expected,) = pipe.edit([source], ["at night"], seeds=[0], **DRAWING_SETTINGS)
    assert Image.open(night).tobytes() == expected.tobytes()
    (expected,) = pipe.edit([expected], ["at dawn"], seeds=[1], **DRAWING_SETTINGS)
    assert Image.open(dawn).tobytes() == expected.tobytes()
    assert [len(message["images"]) for message in json.loads((tmp_path / "c.json").read_text("utf-8"))["messages"]] == [0, 1, 1, 0, 1]


def test_a_saved_conversation_goes_on_where_it_was(talk, odd_pictures, tmp_path):
    saved = tmp_path / "c.json"
    before = talk(f"/image {odd_pictures / 'grey.png'}", "What is it?", "/draw at night", f"/save {saved}", "And now?")
    after = talk("something else", f"/load {saved}", "And now?")
    assert after.out.splitlines()[-1] == before.out.splitlines()[-1]
    assert f"4 messages loaded from {saved}" in after.err


def test_save_replaces_only_when_asked(talk, tmp_path):
    saved = tmp_path / "c.json"
    saved.write_text("precious")
    assert "c.json exists. Give another name, or replace it: /save! " in talk("hello", f"/save {saved}").err
    assert saved.read_text() == "precious"
    talk("hello", f"/save! {saved}")
    assert [message["role"] for message in json.loads(saved.read_text("utf-8"))["messages"]] == ["system", "user", "assistant"]
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_reset_forgets(talk):
    first, again = talk("hello", "/reset", "hello").out.splitlines()
    assert first == again


def test_errors_are_printed_and_the_chat_goes_on(talk, broken_pictures, odd_pictures, tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "other.json").write_text('{"messages": []}')
    lines = [
        *(f"/image {broken_pictures / name}" for name in BROKEN_PICTURES), f"/image {odd_pictures / 'thin.png'}", "thin?", "/image",
        "/imgae x", "/draw", "/draw " + "word " * 10_000, "word " * 10_000, "/save", f"/save {tmp_path / 'binary.json' / 'x.json'}",
        "/load nowhere.json", f"/load {tmp_path / 'binary.json'}", f"/load {tmp_path / 'other.json'}", "\udcff", "/help", "hello",
    ]  # fmt: skip
    result = talk(*lines)
    assert result.code == 0 and "Traceback" not in result.err
    for message in (
        *BROKEN_PICTURES.values(), "1 attached to the next message", "more than 200 times as long as wide, which the vision models "
        "refuse. Crop it. (1 attached)", "0 attached", "no command /imgae. Did you mean /image?", "nothing to draw",
        "tokens with its frame; this model takes", "but the context holds 4096", "a file name is missing", "x.json: can't be written",
        "nowhere.json: can't be read", "binary.json: can't be read", "other.json: this is no saved conversation",
        "no valid Unicode", "/save FILE",
    ):  # fmt: skip
        assert message in result.err, message
    assert result.out == talk("hello").out, "nothing of the failed turns is left"


def test_chat_without_vision_tower_goes_on_with_text(talk, checkpoint_copy, edit_tensors, odd_pictures):
    edit_tensors(checkpoint_copy / "model.safetensors", drop_vision_tower)
    result = talk(f"/image {odd_pictures / 'grey.png'}", "What is it?", "/image", "hello", options=("--model", checkpoint_copy))
    assert result.code == 0 and "hold no vision tower" in result.err
    assert len(result.out.splitlines()) == 1


def test_chat_checks_its_options_first(talk):
    result = talk("hello", options=("--temperature", 99))
    assert (result.code, result.out) == (1, "") and "temperature=99.0" in result.err and "loading" not in result.err


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")
def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends_the_chat(tiny_checkpoint, tmp_path):
    arguments = ("chat", "--model", tiny_checkpoint, "--device", "cpu", "--max-new-tokens", 3500)
    with Terminal(command(*arguments), stderr=subprocess.STDOUT) as terminal:
        terminal.read_until(b"you> ")
        terminal.write("Tell me a long story\n")
        terminal.read_until(b"story\r\n")
        terminal.wait_for_output()  # the answer has begun
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until(b"stopped; the conversation is as before this message.")
        terminal.read_until(b"you> ")
        terminal.write(f"/save {tmp_path / 'c.json'}\n")
        terminal.read_until(b"saved as")
        terminal.read_until(b"you> ")
        terminal.process.send_signal(signal.SIGINT)
        rest = terminal.read_to_end()
    assert terminal.process.returncode == 0, rest
    assert [message["role"] for message in json.loads((tmp_path / "c.json").read_text("utf-8"))["messages"]] == ["system"]


# caption


def fill(folder: Path, picture: Path, count: int) -> list[Path]:
    return [Path(shutil.copy(picture, folder / f"{number:03d}.png")) for number in range(count)]


def test_caption_writes_a_text_beside_each_picture_and_skips_those_that_have_one(cli, pipe, odd_pictures, tmp_path):
    for name in ODD_PICTURES:
        shutil.copy(odd_pictures / name, tmp_path)
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / "grey.txt").write_text("mine")
    result = cli("caption", tmp_path, "--preset", "tags", "--trigger", "xyz style", *SHORT)
    assert (result.code, result.out) == (0, "6 captions written, 1 were there, 0 failed\n"), result.err
    assert "captions" in result.err and "picture/s" in result.err, "a bar with a rate"
    assert (tmp_path / "grey.txt").read_text() == "mine"
    answer = pipe.ask(PRESETS["tags"].question, images=[load_image(tmp_path / "cmyk.jpg")], max_new_tokens=6)
    assert (tmp_path / "cmyk.txt").read_text("utf-8") == f"xyz style, {' '.join(answer.split())}\n"
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".jpg", ".gif", ".txt", ".md"}, "nothing else was left there"
    assert cli("caption", tmp_path).out == "0 captions written, 7 were there, 0 failed\n"
    cli("caption", tmp_path, "--overwrite", "--question", "What is it?", *SHORT)
    answer = pipe.ask("What is it?", images=[load_image(tmp_path / "grey.png")], max_new_tokens=6)
    assert (tmp_path / "grey.txt").read_text("utf-8") == answer.strip() + "\n"


def test_caption_looks_into_folders_when_told(cli, odd_pictures, tmp_path):
    for folder in ("a/b", "a/.hidden", "."):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(odd_pictures / "grey.png", tmp_path / folder)
    assert cli("caption", tmp_path, *SHORT).out.startswith("1 captions written")
    assert cli("caption", tmp_path, "--recursive", *SHORT).out == "1 captions written, 1 were there, 0 failed\n"
    assert (tmp_path / "a" / "b" / "grey.txt").exists() and not (tmp_path / "a" / ".hidden" / "grey.txt").exists()


def test_caption_names_broken_pictures_at_the_end_and_does_all_others(cli, broken_pictures, odd_pictures, tmp_path):
    for name in BROKEN_PICTURES:
        if (broken_pictures / name).is_file():
            shutil.copy(broken_pictures / name, tmp_path)
    for name in ("grey.png", "thin.png"):
        shutil.copy(odd_pictures / name, tmp_path)
    shutil.copy(odd_pictures / "cmyk.jpg", tmp_path / "grey.jpg")  # whose caption would be grey.txt, too
    result = cli("caption", tmp_path, *SHORT)
    assert (result.code, result.out) == (1, "1 captions written, 0 were there, 6 failed\n")
    end = result.err[result.err.rindex("picture/s") :]
    for name in ("truncated.png", "truncated.jpg", "text.png", "empty.png", "thin.png"):
        assert f"{tmp_path / name}: " in end, name
    assert f"{tmp_path / 'grey.png'}: shares grey.txt with grey.jpg" in end
    assert "blip3o: 6 of 7 pictures got no caption" in end and "Traceback" not in end
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["grey.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: there is no such folder"),
        (("{folder}",), "holds no pictures itself; --recursive"),
        (("{folder}", "--preset", "tag"), "no preset 'tag'. Did you mean tags?"),
        (("{folder}", "--question", " "), "the question is empty"),
        (("{folder}", "--top-k", "0"), "top_k=0"),
    ],
)
def test_bad_arguments_of_caption_are_one_line(cli, tmp_path, arguments, message):
    result = cli("caption", *(argument.replace("{folder}", str(tmp_path)) for argument in arguments))
    assert (result.code, result.out) == (1, "") and message in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_caption_run_loses_nothing_and_goes_on(cli, tiny_checkpoint, odd_pictures, tmp_path, stop):
    pictures = fill(tmp_path, odd_pictures / "1x1.png", 40)
    arguments = ("caption", tmp_path, "--model", tiny_checkpoint, "--device", "cpu", *SHORT)
    process = subprocess.Popen(command(*arguments), env=command_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(tmp_path.glob("*.txt"))) >= 3, process)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    if stop == signal.SIGINT:
        assert "stopped; finished files are kept" in stderr and "Traceback" not in stderr
    finished = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("*.txt")}
    assert 3 <= len(finished) < 40
    assert len({text for text, _ in finished.values()}) == 1, "equal pictures have equal captions: all are whole"
    result = cli(*arguments)
    assert (result.code, result.out) == (0, f"{40 - len(finished)} captions written, {len(finished)} were there, 0 failed\n")
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == before for path, before in finished.items())
    assert {path.with_suffix(".txt").read_bytes() for path in pictures} == {text for text, _ in finished.values()}


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_file_is_whole_or_not_there_whenever_it_is_interrupted(monkeypatch, tmp_path, moment):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "old.txt").write_bytes(b"old")
    if moment == "write":
        monkeypatch.setattr(Path, "open", interrupted)
    else:
        monkeypatch.setattr(files.os, moment, interrupted)
    for name in ("old.txt", "new.txt"):
        with pytest.raises(KeyboardInterrupt):
            files.write_text(tmp_path / name, "half")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"] and (tmp_path / "old.txt").read_bytes() == b"old"


def test_what_killed_runs_left_is_removed_but_not_the_files_of_a_running_one(tmp_path):
    stale, fresh = tmp_path / ".blip3o-0123.tmp", tmp_path / ".blip3o-4567.tmp"
    for path in (stale, fresh):
        path.write_text("half")
    os.utime(stale, (time.time() - 3600,) * 2)
    files.remove_stale_files([tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == [fresh.name]


def test_a_full_disk_is_one_line_and_stops_the_run(cli, monkeypatch, odd_pictures, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    fill(tmp_path, odd_pictures / "1x1.png", 3)
    monkeypatch.setattr(files.os, "fsync", full)
    result = cli("caption", tmp_path, *SHORT)
    assert result.code == 1 and "000.txt: can't be written (No space left on device)" in result.err
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".png"]
    with pytest.raises(OutputError, match="No space left"):
        files.write_text(tmp_path / "a.txt", "a")


def test_caption_reads_what_pillow_reads():
    assert {".png", ".jpg", ".jpeg", ".webp"} <= SUFFIXES <= {*Image.registered_extensions(), ".avif"}


def test_letters_that_the_console_lacks_do_not_end_a_run(tiny_checkpoint, tmp_path):
    environment = {**command_environment(), "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command("ask", "hello", "--model", tiny_checkpoint, "--device", "cpu", "--max-new-tokens", 20),
                            env=environment, capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().isascii()


# helpers


def wait_for(condition, process: subprocess.Popen, timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


class Terminal:
    """A process with a pseudo-terminal as its standard input and output."""

    def __init__(self, arguments: list[str], *, stderr: int) -> None:
        self.arguments, self.stderr = arguments, stderr
        self.unread = b""

    def __enter__(self) -> "Terminal":
        import pty

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(self.arguments, env={**command_environment(), "TERM": "dumb"}, stdin=slave, stdout=slave,
                                        stderr=self.stderr)  # fmt: skip
        os.close(slave)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(timeout=30)
        os.close(self.master)

    def write(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read_until(self, expected: bytes) -> None:
        while expected not in self.unread:
            piece = self._read()
            assert piece, f"ended before {expected!r}: {self.unread!r}"
            self.unread += piece
        self.unread = self.unread[self.unread.index(expected) + len(expected) :]

    def wait_for_output(self) -> None:
        self.unread = self.unread or self._read()

    def read_to_end(self) -> list[bytes]:
        pieces = list(iter(self._read, b""))
        self.process.wait(timeout=60)
        return pieces

    def _read(self) -> bytes:
        import select

        assert select.select([self.master], [], [], 90)[0], f"nothing came for 90 s after {self.unread!r}"
        try:
            return os.read(self.master, 4096)
        except OSError:  # Linux: the other end is closed
            return b""
