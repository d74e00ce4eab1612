"""Networks that the host keeps partly in system memory give the same numbers: every layer casts its weights on use.

Without an accelerator the host loads everything, so its own low-memory loading is called here directly, in the host's process.
"""

import json
import subprocess

import pytest

from .hosts import REPOSITORY, Host

TINY_CHECKPOINT = REPOSITORY / "tests" / "data" / "sdxl" / "checkpoint"

SCRIPT = """
import importlib.util, json, sys
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, ".")
import comfy.options
comfy.options.enable_args_parsing()
import torch
root, checkpoint, part = {arguments}
spec = importlib.util.spec_from_file_location("blip3o_pack", root + "/__init__.py", submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules["blip3o_pack"] = pack
spec.loader.exec_module(pack)
from blip3o_pack.blip3o_core.pipelines.language import encode_prompts
from blip3o_pack.blip3o_core.variants.blip3o import Blip3oCheckpoint
from blip3o_pack.blip3o_core.variants.sdxl_decoder import SdxlDecoderCheckpoint
from blip3o_pack.nodes.adapters import loading

opened = Blip3oCheckpoint.open(checkpoint)
generator = torch.Generator().manual_seed(0)
if part == "backbone":
    backbone = loading.load_backbone(opened)
    patcher, run = backbone.patcher, lambda: encode_prompts(backbone, ["a cat", "two dogs on a red sofa"], max_tokens=1000)
elif part == "dit":
    patcher = loading.load_dit(opened)
    x, z = torch.randn(2, 48, 8, 8, generator=generator), torch.randn(2, 64, 64, generator=generator)
    run = lambda: patcher.model.diffusion_model(x, torch.tensor([600.0, 33.0]), context=z)
else:
    vae = loading.load_sdxl_vae(SdxlDecoderCheckpoint.open(checkpoint))
    z = torch.randn(1, 4, 16, 16, generator=generator)
    patcher, run = vae.patcher, lambda: patcher.model.decode(z)
with torch.inference_mode():
    full = run()
    patcher.load(torch.device("cpu"), lowvram_model_memory=patcher.model_size() // 3)
    streamed = run()
print("RESULT", json.dumps({{
    "partly": bool(patcher.model.model_lowvram), "resident": patcher.model.model_loaded_weight_memory, "size": patcher.model_size(),
    "difference": ((streamed - full).abs().max() / full.abs().max()).item(),
}}))
"""


@pytest.mark.parametrize("part", ["backbone", "dit", "vae"])
def test_a_partly_loaded_network_gives_the_same_numbers(host: Host, part: str):
    code = SCRIPT.format(arguments=repr((str(REPOSITORY), str(TINY_CHECKPOINT), part)))
    result = subprocess.run([str(host.python), "-c", code], cwd=host.tree, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    measured = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("RESULT")).removeprefix("RESULT"))
    assert measured["partly"], "the host must have left weights behind, or nothing is tested"
    assert measured["resident"] < measured["size"]
    assert measured["difference"] <= 1e-6  # measured 0
