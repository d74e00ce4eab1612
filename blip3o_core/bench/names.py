"""Names of the stages, apart from what measures them, so that --help loads nothing."""

STAGES = ("load", "encode", "dit-step", "dit-sample", "decode-step", "decode", "ask-prefill", "ask-tokens")
