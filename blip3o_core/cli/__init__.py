"""The command `blip3o`: one file per subcommand."""
