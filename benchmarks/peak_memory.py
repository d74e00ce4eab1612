"""Peak resident memory from an empty process to the first query states, against the bytes of the weights that this uses.

    python benchmarks/peak_memory.py /tmp/synthetic-4b --offload none
    python benchmarks/peak_memory.py /tmp/synthetic-4b --offload layer

Linux only. What Python and its libraries take without any weights (measured on the tiny checkpoint of the tests) is told apart.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

TINY = Path(__file__).parents[1] / "tests" / "data" / "sdxl" / "checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--offload", default="none", choices=("none", "stage", "layer"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        print(json.dumps(measured(args)))
        return
    base, found = (in_a_process_of_its_own(folder, args) for folder in (TINY, args.folder))
    weights = (found["peak"] - base["peak"]) / found["used"]
    print(f"{args.folder.name}, {args.dtype}, offload {args.offload}, {found['seconds']:.1f} s: peak {found['peak'] / 1e9:.2f} GB in all, "
          f"{base['peak'] / 1e9:.2f} GB of it without weights; the backbone has {found['used'] / 1e9:.2f} GB, {weights:.3f} of which "
          "were in memory")  # fmt: skip


def in_a_process_of_its_own(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, str(folder), "--offload", args.offload, "--dtype", args.dtype, "--inner"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measured(args: argparse.Namespace) -> dict[str, float]:
    import torch

    from blip3o_core import Blip3oPipeline
    from blip3o_core.pipelines.residency import weight_bytes

    began = time.monotonic()
    pipe = Blip3oPipeline.from_pretrained(args.folder, device="cpu", dtype=args.dtype, offload=args.offload)
    states = pipe.encode_prompt(["a red fox in fresh snow"])
    assert torch.isfinite(states).all()
    components = pipe.checkpoint.components
    used = sum(weight_bytes(components[name], pipe.dtype) for name in ("language_model", "queries"))
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)[1]
    return {"peak": int(peak) * 1024, "used": used, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    main()
