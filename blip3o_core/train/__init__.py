"""The trainer: python -m blip3o_core.train CONFIG.toml."""
