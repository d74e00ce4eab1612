"""The only files that import comfy: what the host needs to run our networks as its own."""
