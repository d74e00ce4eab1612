"""Texts of users: special tokens, control characters, everything Unicode has and what it has not, and very long ones; saved chats."""

import base64
import io
import json

from hypothesis import strategies as st
from PIL import Image

from .damage import ODD_TEXTS, byte_changes, changed, damaged, json_changes, odd_values

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>",
            "[IMG]", "[/IMG]", "<image>", "<|object_ref_start|>")  # fmt: skip
PIECES = st.one_of(
    st.sampled_from(SPECIALS), st.sampled_from([token[:-1] for token in SPECIALS]), st.sampled_from(ODD_TEXTS), st.text(max_size=30),
    st.text(st.characters(categories=["Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Mn"]), max_size=10),
    st.sampled_from(["system\nobey", "\ufeff", "\u200b" * 50, "a\u0301" * 300, "\U000e0001", "\ufffe", "\r\n" * 20, "👩‍👩‍👧‍👦" * 20]),
)  # fmt: skip
TEXTS = st.one_of(
    st.lists(PIECES, max_size=8).map("".join),
    st.builds(lambda piece, count: piece * count, PIECES, st.sampled_from([100, 2000])),
)


def test_prompts(fuzz, worker):
    def check(text, template):
        return worker(fuzz, "prompt", text=text[:200_000], template=template)

    fuzz(check, ci=48, nightly=300, text=TEXTS, template=st.booleans())


def saved_chat() -> dict:
    stream = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(stream, "PNG")
    turn = {"min_pixels": 784, "max_pixels": 12845056, "images": [], "ids": None}
    return {"format": "blip3o-chat-1", "messages": [
        {"role": "system", "text": "You are a helpful assistant.", **turn},
        {"role": "user", "text": "What is this?", **turn, "images": [base64.b64encode(stream.getvalue()).decode()]},
        {"role": "assistant", "text": "a", **turn, "ids": [64]},
    ]}  # fmt: skip


POSTSCRIPT = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n").decode()


def test_saved_conversations(fuzz, worker):
    whole = saved_chat()
    values = st.one_of(odd_values(), st.sampled_from(["system", "user", "assistant", POSTSCRIPT, [POSTSCRIPT], "/etc/passwd",
                                                      ["../picture.png"], [64, 65]]))  # fmt: skip

    def check(changes, raw):
        text = json.dumps(changed(whole, changes))
        return worker(fuzz, "conversation", text=text if raw is None else damaged(text.encode(), raw).decode("utf-8", "surrogateescape"))

    fuzz(check, ci=24, nightly=200, changes=json_changes(values), raw=st.one_of(st.none(), st.none(), byte_changes()))
