"""ClassSR is CDNSRModel with other options; here they are followed by the paper's formulas."""
import copy
import pytest
import torch
from pathlib import Path

from cdnsr_basicsr.models import CDNSRModel
from cdnsr_basicsr.options import read_options
from tests.helpers import batch

OPTIONS = Path(__file__).resolve().parent.parent.parent / 'options'


@pytest.mark.parametrize('path', sorted(OPTIONS.glob('train_classsr_*.yml')), ids=lambda path: path.stem)
def test_a_step_minimises_the_papers_loss(opt, tiny_net, path):
    published = read_options(str(path))
    network_g = tiny_net(mixture=published['network_g']['mixture'])
    paths = dict(opt['path'], pretrain_network_g=None)
    model = CDNSRModel(dict(opt, network_g=network_g, path=paths, train=copy.deepcopy(published['train'])))
    net = model.net_g
    data = batch(6)
    with torch.no_grad():  # Eqs. 3 to 6 of ClassSR, one patch after the other
        image = class_loss = 0
        shares = torch.zeros(3)
        for lq, gt in zip(data['lq'], data['gt']):
            p = torch.softmax(net.classifier(lq[None])[0], dim=0)
            sr = sum(p[i] * branch(lq[None])[0] for i, branch in enumerate(net.branches))
            image += (sr - gt).abs().mean() / 6
            # 2 is what a sure decision makes of the sum: a constant beside the paper's
            class_loss += (2 - sum((p[i] - p[j]).abs() for i in range(3) for j in range(i + 1, 3))) / 6
            shares += p
        average = (shares - 6 / 3).abs().sum() / (4 * 6 / 3)
    before = copy.deepcopy(net.state_dict())
    model.feed_data(data)
    model.optimize_parameters(1)
    log = model.get_current_log()
    assert log['l_pixel'] == pytest.approx(2000 * image.item(), rel=1e-4)
    assert log['l_class'] == pytest.approx(class_loss.item(), rel=1e-4)
    assert log['l_average'] == pytest.approx(6 * average.item(), rel=1e-4)
    assert {name for name in log if name.startswith('l_')} == {'l_pixel', 'l_class', 'l_average'}
    moved = {key.split('.')[0] for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {'classifier'}
