from basicsr.utils.registry import DATASET_REGISTRY
from ..registration import beside_others

with beside_others(DATASET_REGISTRY):
    from .labeled_patch_dataset import LabeledPatchDataset
    from .photograph_dataset import PhotographDataset

__all__ = ['LabeledPatchDataset', 'PhotographDataset']
