"""Turn a checkpoint folder into files in ComfyUI's folders of models, or such files into a folder."""

import argparse
from pathlib import Path

from ..errors import InputError
from .inspect import size
from .progress import ProgressBars

EXAMPLES = """examples:
  blip3o convert BLIP3o-Model-8B --comfyui ComfyUI/models
  blip3o convert ComfyUI/models/blip3o/BLIP3o-Model-8B --qwen ComfyUI/models/text_encoders/BLIP3o-Model-8B_qwen2.5_vl.safetensors \\
      --vision-encoder ComfyUI/models/clip_vision/BLIP3o-Model-8B_eva_clip.safetensors --output BLIP3o-Model-8B-again

The first writes

  text_encoders/BLIP3o-Model-8B_qwen2.5_vl.safetensors   the language model, as Qwen2.5-VL-Instruct is stored in one file: for the input
                                                         qwen of Load BLIP3-o Checkpoint, and for other nodes that read such a file
  clip_vision/BLIP3o-Model-8B_eva_clip.safetensors       for Load BLIP3-o Vision Encoder
  blip3o/BLIP3o-Model-8B/                                queries, diffusion transformer, tokenizer, decoder: for the other loaders

which together take the place of the folder. Who has the file of Qwen2.5-VL-Instruct already can delete one of the two: fingerprints of
the language model are compared whenever it is put together with the queries. The second makes a complete folder again, for other programs.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, in its original precision; with --output, a split")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--comfyui", type=Path, metavar="MODELS", help="write the parts into this folder of models of ComfyUI")
    where.add_argument("--output", type=Path, metavar="DIR", help="write a complete folder")
    parser.add_argument("--name", help="with --comfyui: what files and folder are called (default: as MODEL)")
    parser.add_argument("--qwen", metavar="PATH", help="with --output: file or folder of the language model of the split")
    parser.add_argument("--vision-encoder", metavar="PATH", help="with --output: file or folder of the EVA-CLIP tower, to be put into the "
                        "folder (default: without)")  # fmt: skip
    parser.add_argument("--decoder", metavar="PATH", help="folder of the SDXL decoder (default: diffusion-decoder/ of MODEL, if there)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace) -> None:
    """Raises CheckpointError, InputError, OutputError."""
    from ..variants import convert
    from ..variants.blip3o import Blip3oCheckpoint
    from ..variants.eva_clip import EvaClipCheckpoint
    from ..variants.sdxl_decoder import SdxlDecoderCheckpoint, find_sdxl_decoder

    misplaced = {"--qwen": args.qwen, "--vision-encoder": args.vision_encoder} if args.comfyui else {"--name": args.name}
    for option, value in misplaced.items():
        if value is not None:
            raise InputError(f"{option} {value} goes with {'--output' if args.comfyui else '--comfyui'}. Leave it out.")
    checkpoint = Blip3oCheckpoint.open(args.model, qwen=args.qwen)
    source = args.decoder or find_sdxl_decoder(checkpoint.folder)
    decoder = None if source is None else SdxlDecoderCheckpoint.open(source).folder
    options = {"decoder": decoder, "overwrite": args.overwrite}
    if args.output:
        tower = None if args.vision_encoder is None else EvaClipCheckpoint.open(args.vision_encoder)
        with ProgressBars() as bars:
            convert.write_folder(checkpoint, args.output, vision_encoder=tower, on_write=bars.on_write, **options)
        print(f"{args.output}: {_size(args.output)}, a complete folder; use it with --model {args.output}")
        return
    with ProgressBars() as bars:
        written = convert.write_comfyui(checkpoint, args.comfyui, args.name if args.name is not None else checkpoint.folder.name,
                                        on_write=bars.on_write, **options)  # fmt: skip
    for place in written:
        print(f"{place}: {_size(place)}")


def _size(place: Path) -> str:
    return size(sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()))
