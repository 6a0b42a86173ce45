"""Checkpoints of other projects: a file *_family.py for each lineage of code, with its names and what they reveal."""
