"""Files hold data, whoever made them: no pickle, no code beside a model and no other program is run, wherever a file comes in."""

import ast
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from blip3o_core.data.webdataset import WebDataset
from blip3o_core.errors import Blip3oError, CheckpointError, TrainingError
from blip3o_core.lora.files import read_lora
from blip3o_core.lora.peft_folder import read_peft_folder
from blip3o_core.train.state import OPTIMIZER, load_optimizer
from blip3o_core.variants.eva_clip import EvaClipCheckpoint
from blip3o_core.variants.sdxl_decoder import SdxlDecoderCheckpoint

from ..conftest import REPOSITORY
from .payload import PICKLES, Payload, write_pickle

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


@pytest.fixture
def ran(tmp_path) -> Path:
    """Is there once a payload has run. A payload that can't run would show nothing, so it is tried first."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    (tmp_path / "ran").rmdir()
    return tmp_path / "ran"


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "tower.pt", "tower.pth"])
def test_a_vision_tower(tmp_path, ran, name, kind):
    with pytest.raises(CheckpointError, match="Nothing in it was run"):
        EvaClipCheckpoint.open(write_pickle(tmp_path / name, kind, ran))
    assert not ran.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_lora_a_checkpoint_a_decoder_and_a_resumed_run(tmp_path, ran, checkpoint_copy, kind):
    write_pickle(tmp_path / "lora.bin", kind, ran).rename(tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_lora(tmp_path / "lora.safetensors")

    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}', "utf-8")
    write_pickle(peft / "adapter_model.bin", kind, ran)
    with pytest.raises(CheckpointError, match="missing"):
        read_peft_folder(peft)

    unet = checkpoint_copy / "diffusion-decoder" / "unet"
    (unet / "diffusion_pytorch_model.bf16.safetensors").unlink()
    write_pickle(unet / "diffusion_pytorch_model.bin", kind, ran)
    with pytest.raises(CheckpointError, match="Pickled .bin weights are not read"):
        SdxlDecoderCheckpoint.open(checkpoint_copy)

    write_pickle(tmp_path / OPTIMIZER, kind, ran)
    with pytest.raises(TrainingError, match="damaged"):
        load_optimizer(tmp_path)
    assert not ran.exists()


def test_members_of_a_tar(tmp_path, ran):
    """The webdataset library would unpickle .pyd and .pickle, and run pipe: commands."""
    pytest.importorskip("webdataset", reason="reading tars needs the extra train")
    files = {"a.jpg": b"", "a.txt": b"a cat", "a.pyd": pickle.dumps(Payload(ran)), "a.pickle": pickle.dumps(Payload(ran)), "a.pth": b""}
    Image.new("RGB", (20, 20)).save(tmp_path / "a.jpg")
    files["a.jpg"] = (tmp_path / "a.jpg").read_bytes()
    with tarfile.open(tmp_path / "it.tar", "w") as tar:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
            tar.add(tmp_path / name, name)
    [sample] = WebDataset(str(tmp_path / "it.tar"), "text_to_image", samples=0, shuffle_buffer=1, seed=0).stream(0, 0, 1)
    assert sample.text == "a cat"
    with pytest.raises(Blip3oError, match="no addresses and no pipe: commands"):
        WebDataset(f"pipe:mkdir {ran}", "text_to_image", samples=0, shuffle_buffer=1, seed=0)
    assert not ran.exists()


def test_code_beside_a_model(blip3o, checkpoint_copy, tmp_path, ran):
    """The published decoder comes with a pipeline file, and configurations may name classes in files: neither is touched."""
    code = f"import os\nos.mkdir({str(ran)!r})\n"
    for file in ("modeling_blip3o.py", "tokenization_blip3o.py", "diffusion-decoder/pipeline_llava_gen.py", "__init__.py", "config.py"):
        (checkpoint_copy / file).write_text(code, "utf-8")
    automatic = {"auto_map": {"AutoModel": "modeling_blip3o.Model", "AutoConfig": "modeling_blip3o.Config",
                              "AutoTokenizer": ["tokenization_blip3o.Tokenizer", "tokenization_blip3o.Tokenizer"]}}  # fmt: skip
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((checkpoint_copy / file).read_text("utf-8"))
        (checkpoint_copy / file).write_text(json.dumps(content | automatic), "utf-8")
    small = ["--steps", 1, "--decoder-steps", 1, "--width", 64, "--height", 64, "--negative", "zeros", "--device", "cpu"]
    blip3o("generate", "a cat", "--model", checkpoint_copy, "--output", tmp_path / "cat.png", *small, check=True, cwd=checkpoint_copy)
    assert (tmp_path / "cat.png").is_file() and not ran.exists()


@pytest.mark.parametrize("option", ["--lora", "--vision-encoder"])
def test_a_pickle_on_the_command_line(blip3o, tiny_checkpoint, tmp_path, ran, option):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    file = write_pickle(tmp_path / "it.bin", "torch zip", ran)
    result = blip3o("vary", tmp_path / "a.png", "--model", tiny_checkpoint, option, file, "--output", tmp_path / "b.png")
    assert result.returncode == 1 and "it.bin" in result.stderr and "Traceback" not in result.stderr
    assert not ran.exists()


FORBIDDEN = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "pickle.load", "pickle.loads",
             "pickle.Unpickler", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "joblib.load", "dill.load",
             "runpy.run_path", "importlib.import_module", "AutoModel.from_pretrained", "AutoTokenizer.from_pretrained")  # fmt: skip
ALLOWED = {"blip3o_core/runtime.py": {"importlib.import_module"}}
"""`require_package`: names of packages that stand in the code."""


def test_no_code_of_this_package_can_run_what_it_reads():
    """Calls that run data are not there; what reads tensors says that it wants nothing else."""
    files = [*(REPOSITORY / "blip3o_core").rglob("*.py"), *(REPOSITORY / "nodes").rglob("*.py"), REPOSITORY / "__init__.py"]
    assert len(files) > 100
    loads = 0
    for file in files:
        path = file.relative_to(REPOSITORY).as_posix()
        for call in (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)):
            name, arguments = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name not in FORBIDDEN or name in ALLOWED.get(path, ()), f"{path}:{call.lineno} calls {name}"
            assert arguments.get("trust_remote_code") is None and arguments.get("shell") is None, f"{path}:{call.lineno}"
            assert arguments.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"
            if name == "torch.load":
                loads += 1
                assert arguments.get("weights_only") == "True", f"{path}:{call.lineno}"
            if name in ("subprocess.run", "subprocess.Popen"):
                assert path == "blip3o_core/nano/training.py", f"{path}:{call.lineno} starts a program"  # itself, to train
    assert loads == 2, "the vision tower and the optimizer of a run"


def test_an_editor_of_pictures_is_not_started(tmp_path):
    """Pillow hands drawings in PostScript to Ghostscript; they are refused by their kind, before anything is read."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\nmkdir {tmp_path / 'ran'}\n", "utf-8")
    (tools / "gs").chmod(0o755)
    code = "import sys; from blip3o_core.images import load_image\ntry: load_image(sys.argv[1])\nexcept Exception as error: print(error)"
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], cwd=REPOSITORY, env=environment, capture_output=True,
                            text=True, check=True)  # fmt: skip
    assert "an EPS drawing" in result.stdout and not (tmp_path / "ran").exists()
    eager = "from PIL import Image; import sys\ntry: Image.open(sys.argv[1]).load()\nexcept Exception: pass"
    subprocess.run([sys.executable, "-c", eager, str(tmp_path / "a.png")], env=environment, check=True)
    assert (tmp_path / "ran").exists(), "Pillow itself would have started it"
