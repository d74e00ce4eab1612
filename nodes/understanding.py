"""Questions and conversations -> text."""

from comfy_api.v0_0_2 import io, ui

from ..blip3o_core.images import to_rgb_images
from ..blip3o_core.pipelines.chat import MAX_NEW_TOKENS, MAX_PIXELS, MIN_PIXELS, Chat
from ..blip3o_core.presets import PRESETS, build_question
from .adapters import io_types
from .adapters.memory import LESS_MEMORY, memory_advice
from .adapters.progress import TokenProgress

NO_PRESET = "none"
PIXELS_PER_TOKEN = 28 * 28


def writing_inputs() -> list[io.Input]:
    """What asking and chatting share."""
    return [
        io.Int.Input(
            "max_new_tokens", default=MAX_NEW_TOKENS, min=1, max=8192, tooltip="Longest answer, in tokens of about four letters."
        ),
        io.Float.Input(
            "temperature", default=0.0, min=0.0, max=2.0, step=0.05,
            tooltip="0 always gives the likeliest answer; higher is more varied.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
            tooltip="Only matters with a temperature above 0: the same seed gives the same answer.",
        ),
        io.Float.Input(
            "top_p", default=1.0, min=0.01, max=1.0, step=0.01, advanced=True,
            tooltip="Draws only from the likeliest tokens that together have this probability; 1 is all.",
        ),
        io.Int.Input(
            "top_k", default=0, min=0, max=100000, advanced=True, tooltip="Draws only from so many of the likeliest tokens; 0 is all."
        ),
        io.Int.Input(
            "min_pixels", default=MIN_PIXELS, min=28 * 28, max=MAX_PIXELS, step=28 * 28, advanced=True,
            tooltip="Smaller pictures are enlarged to this area.",
        ),
        io.Int.Input(
            "max_pixels", default=1280 * 28 * 28, min=28 * 28, max=MAX_PIXELS, step=28 * 28, advanced=True,
            tooltip="Larger pictures are scaled down to this area. Each 28 x 28 pixels are one token: more shows finer detail and "
            "takes more memory and time.",
        ),
        io.String.Input(
            "system", default="", multiline=True, advanced=True,
            tooltip="How the assistant should behave. Empty: You are a helpful assistant.",
        ),
    ]  # fmt: skip


def sampling(temperature: float, top_p: float, top_k: int, seed: int, min_pixels: int, max_pixels: int, max_new_tokens: int) -> dict:
    """Widget values as arguments of `Chat.say`."""
    return dict(temperature=temperature, top_p=top_p if top_p < 1 else None, top_k=top_k or None, seed=seed, min_pixels=min_pixels,
                max_pixels=max_pixels, max_new_tokens=max_new_tokens)  # fmt: skip


class Blip3oAsk(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oAsk",
            display_name="BLIP3-o Ask",
            category="BLIP3-o/understanding",
            description="Answers a question about pictures, or about nothing but text, with the backbone that also draws.",
            search_aliases=["BLIP3o caption", "image to text", "VQA", "describe image", "OCR"],
            is_output_node=True,
            inputs=[
                io_types.Backbone.Input("backbone", tooltip="From Load BLIP3-o Checkpoint."),
                io.String.Input(
                    "question", default="Describe this image.", multiline=True, dynamic_prompts=True,
                    tooltip="What you want to know. With a preset it may stay empty, or add to the preset.",
                ),
                io.Combo.Input(
                    "preset", options=[NO_PRESET, *PRESETS], default=NO_PRESET,
                    tooltip="A ready-made question: captions, tags, a prompt for text to image, OCR, tables, counting and so on.",
                ),
                io.Image.Input("images", optional=True, tooltip="Pictures that the question is about."),
                io.Boolean.Input(
                    "one_answer_per_image", default=False,
                    tooltip="Off: one question about all pictures of the batch. On: the question is asked for each of them.",
                ),
                *writing_inputs(),
            ],
            outputs=[
                io.String.Output(
                    display_name="answer", is_output_list=True, tooltip="The answer; one per picture if one_answer_per_image is on."
                )
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, backbone, question: str, preset: str, one_answer_per_image: bool, max_new_tokens: int, temperature: float, seed: int,
        top_p: float, top_k: int, min_pixels: int, max_pixels: int, system: str, images=None,
    ) -> io.NodeOutput:  # fmt: skip
        io_types.require_connected(backbone=backbone)
        text = question if preset == NO_PRESET else build_question(preset, question.strip() or None)
        settings = sampling(temperature, top_p, top_k, seed, min_pixels, max_pixels, max_new_tokens)
        answers = []
        with memory_advice("answering", LESS_MEMORY):
            pictures = [] if images is None else to_rgb_images(images, channels_last=True)
            groups = [[picture] for picture in pictures] if one_answer_per_image and pictures else [pictures]
            for group in groups:
                backbone.load(max_new_tokens + len(group) * max_pixels // PIXELS_PER_TOKEN)
                answers.append(Chat(backbone, system or None).say(text, group, on_token=TokenProgress(max_new_tokens), **settings))
        return io.NodeOutput(answers, ui=ui.PreviewText("\n\n".join(answers)))


class Blip3oChat(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oChat",
            display_name="BLIP3-o Chat",
            category="BLIP3-o/understanding",
            description="One turn of a conversation. Chain several: each continues what the one before returns. Generated pictures "
            "can be shown to the next turn.",
            search_aliases=["BLIP3o conversation", "multi turn chat", "assistant"],
            is_output_node=True,
            inputs=[
                io_types.Backbone.Input("backbone", tooltip="From Load BLIP3-o Checkpoint."),
                io.String.Input("message", multiline=True, dynamic_prompts=True, tooltip="What you say in this turn."),
                io_types.Conversation.Input(
                    "conversation", optional=True, tooltip="The turns so far, from another BLIP3-o Chat. Nothing connected: a new one."
                ),
                io.Image.Input("images", optional=True, tooltip="Pictures shown in this turn, also ones that were just generated."),
                *writing_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="answer", tooltip="What the model says in this turn."),
                io_types.Conversation.Output(display_name="conversation", tooltip="All turns including this one."),
            ],
        )

    @classmethod
    def execute(
        cls, backbone, message: str, max_new_tokens: int, temperature: float, seed: int, top_p: float, top_k: int, min_pixels: int,
        max_pixels: int, system: str, conversation: str | None = None, images=None,
    ) -> io.NodeOutput:  # fmt: skip
        io_types.require_connected(backbone=backbone)
        chat = Chat(backbone, system or None) if conversation is None else Chat.from_json(backbone, conversation)
        settings = sampling(temperature, top_p, top_k, seed, min_pixels, max_pixels, max_new_tokens)
        with memory_advice("answering", LESS_MEMORY):
            pictures = [] if images is None else to_rgb_images(images, channels_last=True)
            shown = len(pictures) + sum(len(turn.images) for turn in chat.messages)
            backbone.load(max_new_tokens + shown * max_pixels // PIXELS_PER_TOKEN)
            answer = chat.say(message, pictures, on_token=TokenProgress(max_new_tokens), **settings)
        return io.NodeOutput(answer, chat.to_json(), ui=ui.PreviewText(answer))
