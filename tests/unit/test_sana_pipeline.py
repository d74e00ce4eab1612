"""A SigLIP2 + SANA decoder in the pipeline and on the command line."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blip3o_core import Blip3oPipeline
from blip3o_core.cli.inspect import describe
from blip3o_core.errors import InputError

SANA = Path(__file__).parents[1] / "data" / "sana"
PICTURE = SANA.parent / "sdxl" / "image.png"
DECODER = SANA / "checkpoint"


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    return load_file(SANA / "expected.safetensors")


@pytest.fixture(scope="module")
def sana_pipe(tiny_checkpoint) -> Blip3oPipeline:
    return Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32, decoder=DECODER)


@pytest.mark.parametrize(("steps", "guidance_scale"), [(30, 3.0), (10, 1.5)])
def test_a_reconstruction_is_that_of_the_reference(sana_pipe, numbers, steps, guidance_scale):
    with Image.open(PICTURE) as picture:
        z = sana_pipe.embed_for_decoder(picture)
    settings = {} if steps == 30 else {"steps": steps, "guidance_scale": guidance_scale}  # 30 and 3.0 are the decoder's own
    found = sana_pipe.decode_embeddings(z, noise=numbers["noise"], output_type="pt", **settings)
    assert (found - numbers[f"sample.steps{steps}.cfg{guidance_scale}.image"]).abs().max() <= 1e-4


def test_reconstruct_needs_nothing_of_the_model(sana_pipe, numbers):
    with Image.open(PICTURE) as picture:
        (drawn,) = sana_pipe.reconstruct(picture, seeds=[3], steps=4)
        again = sana_pipe.reconstruct([picture, picture], seeds=[3, 4], steps=4)
    assert drawn.size == (16, 16) and drawn.tobytes() == again[0].tobytes() != again[1].tobytes()
    assert sana_pipe._backbone is sana_pipe._dit is sana_pipe._vision_encoder is None


def test_what_a_decoder_can_not_read_is_refused_before_anything_is_loaded(tiny_checkpoint):
    pipe = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", decoder=DECODER)
    with pytest.raises(InputError, match="this SANA decoder draws SigLIP2 embeddings of width 64.* makes EVA-CLIP embeddings of width 48"):
        pipe.generate(["a cat"])
    with pytest.raises(InputError, match=r"shape \(1, 48, 8, 8\).*draws SigLIP2 embeddings of width 64"):
        pipe.decode_embeddings(torch.zeros(1, 48, 8, 8))
    with pytest.raises(InputError, match="negative is 'null_prompt'; pass an embedding, or one of black_image, zeros"):
        pipe.decode_embeddings(torch.zeros(1, 64, 8, 8), negative="null_prompt")
    assert pipe._decoder is pipe._dit is None
    with pytest.raises(InputError, match="no SANA decoder, so it has no choice of positions"):
        Blip3oPipeline.from_pretrained(tiny_checkpoint, decoder=tiny_checkpoint, sana_positions="none")


def test_reconstruct_on_the_command_line(cli, sana_pipe, tmp_path):
    result = cli("reconstruct", PICTURE, "--decoder", DECODER, "--decoder-steps", 3, "--seed", 5, "--json", "--output",
                 tmp_path / "a.png")  # fmt: skip
    assert result.code == 0, result.err
    with Image.open(PICTURE) as picture, Image.open(tmp_path / "a.png") as drawn:
        assert drawn.tobytes() == sana_pipe.reconstruct(picture, seeds=[5], steps=3)[0].tobytes()
    recipe = json.loads(result.out)
    assert recipe["negative"] == "black_image" and recipe["width"] == 16 and recipe["decoder_guidance_scale"] == 3.0
    plain = cli("reconstruct", PICTURE, "--decoder", DECODER, "--decoder-steps", 3, "--seed", 5, "--sana-positions", "none",
                "--decoder-scheduler", "euler", "--output", tmp_path / "b.png")  # fmt: skip
    assert plain.code == 0
    with Image.open(tmp_path / "a.png") as one, Image.open(tmp_path / "b.png") as other:
        assert one.tobytes() != other.tobytes()


def test_inspect_tells_what_a_sana_decoder_holds(tiny_checkpoint):
    described = describe(str(tiny_checkpoint), str(DECODER))
    assert described["tasks"].keys() == {"understanding", "reconstruction"}
    assert described["tasks"]["reconstruction"]["components"] == [
        "decoder_encoder", "decoder_connector", "decoder_transformer", "decoder_vae"]
    assert not described["tasks"]["reconstruction"]["missing"]
