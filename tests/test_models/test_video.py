"""BasicSR's video models where there is no GPU."""
import torch

from basicsr.archs import build_network
from basicsr.models import build_model
from tests.helpers import fsrcnn


def test_a_recurrent_video_model_validates_on_a_cpu(opt):
    """Two clips of three frames; the network enlarges frame by frame."""

    class Frames(torch.nn.Module):

        def __init__(self):
            super().__init__()
            self.net = build_network(fsrcnn())

        def forward(self, x):
            return torch.stack([self.net(frame) for frame in x.unbind(1)], dim=1)

    class Clips(torch.utils.data.Dataset):
        opt = {'name': 'clips'}
        data_info = {'folder': ['000'] * 3 + ['001'] * 3}

        def __len__(self):
            return 2

        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(index)
            lq, gt = (torch.rand(3, 3, 12 * scale, 9 * scale, generator=generator) for scale in (1, 4))
            return {'lq': lq, 'gt': gt, 'folder': f'00{index}'}

    opt.update(model_type='VideoRecurrentModel', network_g=fsrcnn())
    opt['train'].update(pixel_opt=dict(type='CharbonnierLoss'))
    for key in ('class_opt', 'average_opt', 'flops_opt'):
        del opt['train'][key]
    model = build_model(opt)
    model.net_g = Frames()
    model.validation(torch.utils.data.DataLoader(Clips()), 1, None)
    assert set(model.metric_results) == {'000', '001'} and model.best_metric_results['clips']['psnr']['val'] > 3
