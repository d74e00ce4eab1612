"""Training data: datasets as people have them -> samples -> prepared examples."""
