"""LoRA file -> patched MODEL and backbone."""

from comfy_api.v0_0_2 import io

from ..blip3o_core.lora.files import read_lora
from .adapters import folders, io_types
from .adapters.lora import apply_lora


class Blip3oLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oLoraLoader",
            display_name="Load BLIP3-o LoRA",
            category="BLIP3-o/loaders",
            description="Applies a LoRA to the BLIP3-o diffusion model and, if connected, to the language backbone and its queries. "
            "Refuses files that were trained on another base, and reports what was applied. Several can be chained.",
            search_aliases=["BLIP3o LoRA", "apply LoRA", "DoRA", "LoRA loader BLIP3-o"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model of Load BLIP3-o Checkpoint, or of another LoRA loader."),
                io.Combo.Input(
                    "lora_name", options=folders.list_loras(),
                    tooltip="A .safetensors file in models/loras, from this package's trainer, core's Save LoRA or peft. Press R "
                    "after adding one.",
                ),
                io.Float.Input(
                    "strength_model", default=1.0, min=-100.0, max=100.0, step=0.01,
                    tooltip="How strongly it changes the diffusion model: 1 as trained, 0 not at all, below 0 the opposite.",
                ),
                io_types.Backbone.Input(
                    "backbone", optional=True,
                    tooltip="The backbone of the same checkpoint, for files that also change the language model or its queries. "
                    "Nothing connected: that part is left out, and the report says so.",
                ),
                io.Float.Input(
                    "strength_backbone", default=1.0, min=-100.0, max=100.0, step=0.01,
                    tooltip="How strongly it changes the language model and the learned queries.",
                ),
                io.Boolean.Input(
                    "allow_other_base", default=False, advanced=True,
                    tooltip="Use a file that was trained on another base model. 4B and 8B have diffusion models of the same shapes, so "
                    "it would load, but what it does is undefined.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The diffusion model with the LoRA; the one that came in stays as it was."),
                io_types.Backbone.Output(display_name="backbone", tooltip="The backbone with the LoRA; empty if none was connected."),
                io.String.Output(
                    display_name="report",
                    tooltip="Base model, rank, alpha and trigger word of the file, and how many of its keys were matched; the "
                    "others by name.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return folders.is_offered(lora_name, folders.list_loras(), "models/loras")

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others) -> str:
        return folders.fingerprint(folders.resolve_lora(lora_name))

    @classmethod
    def execute(
        cls, model, lora_name: str, strength_model: float, strength_backbone: float = 1.0, allow_other_base: bool = False, backbone=None
    ) -> io.NodeOutput:
        lora = read_lora(folders.resolve_lora(lora_name))
        return io.NodeOutput(*apply_lora(
            lora, lora_name, model, backbone, strength_model=strength_model, strength_backbone=strength_backbone,
            allow_other_base=allow_other_base,
        ))  # fmt: skip
