"""Checkpoints of other projects: a file *_family.py per lineage of code, with its names and what they tell."""
