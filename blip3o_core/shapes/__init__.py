"""A world of coloured shapes: pictures, words about them, and judges that know what is right.

world.py scenes and pictures; facts.py what a text says about a scene; holdout.py what training never sees; language.py the words;
detector.py picture -> scene; judge.py right or wrong; datasets.py training data in the formats of the trainer.
"""
