"""Decodes image files to pixels and metadata, in a separate process. Imports no torch, so that it starts at once."""
