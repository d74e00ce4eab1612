"""Downloads of published models by name: the only code that reaches the network."""
