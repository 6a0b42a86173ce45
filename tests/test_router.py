"""Routing between networks that are trained already: `basicsr route`, and what it is made of."""
import cv2
import numpy as np
import pytest
import torch

from basicsr.archs import build_network
from cdnsr_basicsr import cli
from cdnsr_basicsr.checkpoint import load_described, save_checkpoint
from cdnsr_basicsr.evaluation import Pair
from cdnsr_basicsr.losses import squared_error
from cdnsr_basicsr.router import Example, chosen, examples_of, joined, margin_of, price_for, routed_errors, train_router
from tests.helpers import fsrcnn, photograph

BICUBIC = dict(type='Interpolation', upscale=2)


def network(block):
    return build_network(dict(block)).eval()


def synthetic(net, count, generator):
    """Photographs whose errors follow their energies: the second branch saves half where there is much of the first."""
    examples = []
    for _ in range(count):
        energies = torch.from_numpy(generator.normal(0, 0.5, (1, 15, 20, 24))).float() + torch.linspace(0, 5, 24)
        first = energies[0, 0].exp()
        errors = torch.stack([first, first * torch.where(energies[0, 0] > 2.5, 0.5, 1.)])
        examples.append(Example(energies.repeat(2, 1, 1, 1), errors))
    return examples


def test_what_follows_from_energies_is_learnt_and_the_same_each_time():
    generator = np.random.default_rng(0)
    net, _ = joined([BICUBIC, fsrcnn(4, 2)], [network(BICUBIC), network(fsrcnn(4, 2))])
    learnt, others = synthetic(net, 6, generator), synthetic(net, 2, generator)

    def misfit():
        predicted, errors, _ = routed_errors(net.classifier, others)
        return float((predicted[0].log() - errors[0].log()).abs().mean())

    start = {key: value.clone() for key, value in net.classifier.state_dict().items()}
    before, weights = misfit(), []
    for _ in range(2):
        net.classifier.load_state_dict(start)
        train_router(net.classifier, learnt, iterations=60, batch=4)
        weights.append({key: value.clone() for key, value in net.classifier.state_dict().items()})
    assert misfit() < before / 2 and not net.classifier.training
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    predicted, errors, _ = routed_errors(net.classifier, others)
    saves = errors[1] < 0.8 * errors[0]  # the router knows where
    assert float((predicted[1] / predicted[0])[saves].mean()) < float(
        (predicted[1] / predicted[0])[~saves].mean()) - 0.1


def test_nothing_to_learn_from_is_said():
    net, _ = joined([BICUBIC, BICUBIC], [network(BICUBIC), network(BICUBIC)])
    with pytest.raises(ValueError, match='at least 128 pixels'):
        train_router(net.classifier, [])


def test_examples_hold_what_each_branch_gets_wrong():
    nets = [network(BICUBIC), network(fsrcnn(4, 2))]
    torch.nn.init.normal_(nets[1].tail.weight if hasattr(nets[1], 'tail') else next(nets[1].parameters()), std=0.1)
    net, block = joined([BICUBIC, fsrcnn(4, 2)], nets)
    assert block['classifier'] == dict(type='ErrorMap', num_in_ch=3, num_classes=2) and block['upscale'] == 2
    gt = photograph(300, 340)
    pairs = [Pair('large', gt[::2, ::2].copy(), gt), Pair('small', gt[:200:2, ::2].copy(), gt[:200])]
    (example, ) = examples_of(net, pairs)
    lq, target = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image in (pairs[0].lq, gt))
    assert example.errors.shape == (2, 18, 21) and example.energies.shape == (2, 15, 18, 21)
    for branch, errors in zip(nets, example.errors):
        with torch.no_grad():  # by tiles, and as a whole
            torch.testing.assert_close(errors, squared_error(branch(lq), target, 16)[0], rtol=0.2, atol=2.)
    # of the transposed photograph, transposed back: a pattern's partner is found
    for pattern in ((1, 4), (2, 8), (7, 13)):
        torch.testing.assert_close(
            example.energies[0, pattern[0] - 1], example.energies[1, pattern[1] - 1], rtol=1e-3, atol=1e-3)


def test_routed_errors_are_means_over_whole_and_partial_squares():
    net, _ = joined([BICUBIC, BICUBIC], [network(BICUBIC), network(BICUBIC)])
    example = Example(torch.rand(2, 15, 6, 9), torch.rand(2, 6, 9))
    predicted, errors, sizes = routed_errors(net.classifier, [example, example])
    assert sizes.tolist() == 2 * [16, 16, 4, 8, 8, 2] and predicted.shape == errors.shape == (2, 12)
    assert float(errors[1, 2]) == pytest.approx(float(example.errors[1, :4, 8].mean()))
    assert float(errors[0, 4]) == pytest.approx(float(example.errors[0, 4:, 4:8].mean()))


@pytest.mark.parametrize('max_loss', [0.01, 0.1, 1.])
def test_the_price_is_the_highest_that_costs_no_more(max_loss):
    errors = torch.rand(1, 400).double() * 50 * torch.tensor([[1.], [0.7], [0.5]]) + 3 * torch.rand(3, 400)
    sizes, costs = torch.randint(1, 17, (400, )).double(), torch.tensor([0.1, 0.4, 1.]).double()

    def loss(price):
        spent = (errors.gather(0, chosen(errors, price, costs)[None])[0] * sizes).sum()
        return 10 * float(torch.log10(spent / (errors[-1] * sizes).sum()))

    price = price_for(errors, sizes, costs, max_loss)
    assert loss(price) <= max_loss < loss(1.01 * price) + 0.05 and loss(2 * price) > max_loss


def test_the_margin_is_what_is_lost_by_what_was_said():
    predicted = torch.rand(1, 400).double() * 50 * torch.tensor([[1.], [0.7], [0.5]]) + 3 * torch.rand(3, 400)
    sizes, costs = torch.ones(400).double(), torch.tensor([0.1, 0.4, 1.]).double()
    worse = predicted[-1] + 1.5 * (predicted - predicted[-1])  # what lighter branches do worse is half as much again
    price = price_for(predicted, sizes, costs, 0.1)
    assert margin_of(predicted, worse, sizes, costs, price) == pytest.approx(1.5, rel=0.02)
    assert margin_of(predicted, predicted, sizes, costs, price) == pytest.approx(1)
    # asked for less by as much, no more is lost
    classes = chosen(predicted, price_for(predicted, sizes, costs, 0.1 / 1.5), costs)
    lost = worse.gather(0, classes[None]).sum() / worse[-1].sum()
    assert 0.09 < 10 * torch.log10(lost) <= 0.102
    assert margin_of(predicted, predicted[-1:] + 99 * (predicted - predicted[-1]), sizes, costs, price) == 3


def picture(path, seed):
    """Left smooth, right busy."""
    noise = np.random.default_rng(seed).integers(0, 255, (320, 300, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 3)
    image[:, 150:] = cv2.GaussianBlur(noise[:, 150:], (0, 0), 1)
    cv2.imwrite(str(path), image)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photographs').mkdir()
    for i in range(5):
        picture(tmp_path / 'photographs' / f'{i}.png', i)
    block = fsrcnn(4, 2)  # untrained it is bilinear: bicubic is better everywhere
    save_checkpoint(dict(params=network(block).state_dict(), network_g=block, scale=2), 'heavy.pth')
    return tmp_path


@pytest.mark.slow
def test_what_a_lighter_network_does_better_it_gets(folder, capsys):
    assert cli.main(['route', 'heavy.pth', '--with', 'bicubic', '-i', 'photographs', '-o', 'routed.safetensors']) == 0
    said = capsys.readouterr().out
    assert '4 photographs learnt from; on 1 others' in said and '| bicubic |' in said and '| heavy.pth |' in said
    net, block = load_described('routed.safetensors')
    assert [branch['type'] for branch in block['branches']] == ['Interpolation', 'FSRCNN']
    assert block['classifier']['price'] == net.classifier.price > 0 and float(net.classifier.costs.max()) == 1
    assert float(said.split('| bicubic | ')[1].split('| ')[1].split(' %')[0]) > 90
    for name, value in load_described('heavy.pth')[0].state_dict().items():
        assert torch.equal(net.branches[1].state_dict()[name], value)
    assert cli.main(['upscale', '-m', 'routed.safetensors', '-i', 'photographs/0.png', '-o', 'out']) == 0
    assert cv2.imread('out/0.png').shape == (640, 600, 3)


@pytest.mark.parametrize('arguments, words', [
    (['nothing.pth', '--with', 'bicubic'], 'nothing.pth'),
    (['heavy.pth', '--with', *['bicubic'] * 5], '--with: expected 1 to 4 networks, but got 5'),
    (['heavy.pth', '--with', 'x4.pth'], '--with: the branches differ in scale or channels'),
    (['heavy.pth', '--with', 'routed.pth'], 'routed.pth: routes already; a branch is a network without branches'),
    (['heavy.pth', '--with', 'bicubic', '--max-loss', '0'], '--max-loss 0.0: expected a number above 0'),
    (['heavy.pth', '--with', 'bicubic', '-o', 'taken.pth'], 'taken.pth: is there already; --overwrite replaces it'),
    (['heavy.pth', '--with', 'bicubic', '-o', 'out.txt'], 'expected a name that ends in .pth or .safetensors'),
    (['heavy.pth', '--with', 'bicubic', '-i', 'small'], 'holds no photograph of at least 256 pixels on each side'),
    (['heavy.pth', '--with', 'bicubic', '-i', 'nowhere'], 'nowhere: no such folder'),
])
def test_mistakes_are_one_line_and_write_nothing(folder, tiny_net, capsys, arguments, words):
    (folder / 'small').mkdir()
    cv2.imwrite('small/a.png', photograph(100, 300))
    (folder / 'taken.pth').write_bytes(b'mine')
    for name, block, scale in (('x4.pth', fsrcnn(4), 4), ('routed.pth', tiny_net(2), 2)):
        save_checkpoint(dict(params=network(block).state_dict(), network_g=block, scale=scale), name)
    before = sorted(folder.rglob('*'))
    given = [*arguments]
    given += [] if '-i' in given else ['-i', 'photographs']
    given += [] if '-o' in given else ['-o', 'routed_network.pth']
    assert cli.main(['route', *given]) == 2
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if not line.startswith('photographs')]  # the progress bar
    assert len(lines) == 1 and words in lines[0]
    assert sorted(folder.rglob('*')) == before and (folder / 'taken.pth').read_bytes() == b'mine'
