import pytest

LOSSES = {
    'pixel_opt': {
        'type': 'L1Loss',
        'loss_weight': 100
    },
    'class_opt': {
        'type': 'ClassLoss'
    },
    'average_opt': {
        'type': 'AverageLoss',
        'loss_weight': 6
    },
    'flops_opt': {
        'type': 'FLOPsLoss',
        'target': 0.1
    }
}


@pytest.fixture
def opt(tmp_path, tiny_net):
    """Options of a small CDNSR, as BasicSR hands them to a model."""
    folders = {name: tmp_path / name for name in ('models', 'training_states', 'visualization')}
    for folder in folders.values():
        folder.mkdir()
    return {
        'name': 'tiny',
        'model_type': 'CDNSRModel',
        'scale': 4,
        'num_gpu': 0,
        'dist': False,
        'rank': 0,
        'world_size': 1,
        'is_train': True,
        'auto_resume': False,
        'root_path': str(tmp_path),
        'network_g': tiny_net(),
        'tile': {
            'patch_size': 16,
            'step': 12
        },
        'path': {
            key: str(folder)
            for key, folder in folders.items()
        },
        'train': {
            'total_iter': 10,
            'optim_g': {
                'type': 'Adam',
                'lr': 0.001
            },
            'scheduler': {
                'type': 'MultiStepLR',
                'milestones': [5],
                'gamma': 0.5
            },
            **LOSSES
        },
        'val': {
            'save_img': False,
            'suffix': None,
            'metrics': {
                'psnr': {
                    'type': 'calculate_psnr',
                    'crop_border': 4
                }
            }
        }
    }
