from .labeled_patch_dataset import LabeledPatchDataset

__all__ = ['LabeledPatchDataset']
