"""ComfyUI finds the pack here. Everything is imported relative to this folder, whatever its name."""

if __package__:  # absent when a tool such as pytest reads this file by itself
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
