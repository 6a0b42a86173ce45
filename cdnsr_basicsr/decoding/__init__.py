"""Files of images to pixels and metadata, in a process of its own. Imports no torch, so that this starts at once."""
