"""Benchmarks: things to draw or answer, a judge for each, and what came out.

items.py what a benchmark is made of; run.py draws and asks, on one process or many; scores.py numbers, table and sheet; shapes.py the
benchmark of the drawn world; prompt_files.py public benchmarks, whose scorers are programs of their own.
"""
