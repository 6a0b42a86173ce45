"""Routing between networks that are trained already: `basicsr route`, and what it is made of."""
import cv2
import numpy as np
import pytest
import torch

from basicsr.archs import build_network
from cdnsr_basicsr import cli
from cdnsr_basicsr.checkpoint import save_checkpoint
from cdnsr_basicsr.conversion.convert import convert
from cdnsr_basicsr.inference import TileUpscaler
from cdnsr_basicsr.losses import squared_error
from cdnsr_basicsr.router import Example, Goal, chosen, margin_of, price_for, routed_errors, train_router
from cdnsr_basicsr.routing import Part, Routed, Row, Sample, boxes_in, example_of, farthest, joined, pooled, verdict
from tests.helpers import carn, fsrcnn, photograph

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


@pytest.mark.parametrize('count', [2, 3])
def test_towards_the_hardest_branch_its_own_error_is_zero_and_the_others_are_learnt(count):
    generator, blocks = np.random.default_rng(0), [BICUBIC, fsrcnn(4, 2), fsrcnn(4, 2)][-count:]
    net, block = joined(blocks, [network(block) for block in blocks], 'hardest')
    assert block['classifier']['reference'] == 'hardest'
    examples = [Example(energies, torch.cat([errors[:count - 1], torch.zeros_like(errors[:1])]))
                for energies, errors, _ in synthetic(net, 6, generator)]  # yapf: disable
    train_router(net.classifier, examples[:4], iterations=60, batch=4)
    predicted, errors, _ = routed_errors(net.classifier, examples[4:])
    assert predicted.shape == errors.shape and (predicted[-1] == 0).all() and (predicted[:-1] > 0).all()
    assert float((predicted[0].log() - errors[0].log()).abs().mean()) < 0.3
    with torch.no_grad():
        assert net.classifier(torch.rand(2, 3, 32, 40)).shape == (2, count)


def test_nothing_to_learn_from_is_said():
    net, _ = joined([BICUBIC, BICUBIC], [network(BICUBIC), network(BICUBIC)])
    with pytest.raises(ValueError, match='at least 128 pixels'):
        train_router(net.classifier, [])


@pytest.mark.parametrize('reference', ['gt', 'hardest'])
def test_examples_hold_how_far_each_branch_is_from_what_is_to_be_made(reference):
    nets = [network(BICUBIC), network(fsrcnn(4, 2))]
    torch.nn.init.normal_(next(nets[1].parameters()), std=0.1)
    net, block = joined([BICUBIC, fsrcnn(4, 2)], nets, reference)
    assert block['classifier'] == dict(type='ErrorMap', num_in_ch=3, num_classes=2, reference=reference)
    engine, gt = TileUpscaler(net), photograph(320, 288)
    engine.speed  # takes over the weights
    part = Part(gt[::2, ::2].copy(), gt if reference == 'gt' else None, 2.5)
    example = example_of(engine, part, reference)
    assert example.weight == 2.5
    lq, target = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image in (part.lq, gt))
    with torch.no_grad():
        made = [branch(lq) for branch in nets]
    target = target if reference == 'gt' else made[-1].clamp(0, 1)
    assert example.errors.shape == (2, 18, 16) and example.energies.shape == (2, 15, 18, 16)
    for image, errors in zip(made, example.errors):
        torch.testing.assert_close(errors, squared_error(image, target, 16)[0, 1:-1, 1:-1], rtol=1e-3, atol=1e-3)
    # of the transposed photograph, transposed back: a pattern's partner is found
    for pattern in ((1, 4), (2, 8), (7, 13)):
        torch.testing.assert_close(
            example.energies[0, pattern[0] - 1], example.energies[1, pattern[1] - 1], rtol=1e-3, atol=1e-3)


def test_routed_errors_are_means_over_whole_and_partial_squares():
    net, _ = joined([BICUBIC, BICUBIC], [network(BICUBIC), network(BICUBIC)])
    example = Example(torch.rand(2, 15, 6, 9), torch.rand(2, 6, 9))
    predicted, errors, sizes = routed_errors(net.classifier, [example, example._replace(weight=3.)])
    assert sizes.tolist() == [16, 16, 4, 8, 8, 2, 48, 48, 12, 24, 24, 6] and predicted.shape == errors.shape == (2, 12)
    assert float(errors[1, 2]) == pytest.approx(float(example.errors[1, :4, 8].mean()))
    assert float(errors[0, 4]) == pytest.approx(float(example.errors[0, 4:, 4:8].mean()))


@pytest.mark.parametrize('goal', [*(Goal('gt', loss) for loss in (0.01, 0.1, 1.)), Goal('hardest', 36.)], ids=str)
def test_the_price_is_the_highest_that_keeps_to_the_goal(goal):
    errors = torch.rand(1, 400).double() * 50 * torch.tensor([[1.], [0.7], [0.5]]) + 3 * torch.rand(3, 400)
    if goal.reference == 'hardest':
        errors[-1] = 0
    sizes, costs = torch.randint(1, 17, (400, )).double(), torch.tensor([0.1, 0.4, 1.]).double()

    def lacks(price):  # dB
        spent = (errors.gather(0, chosen(errors, price, costs)[None])[0] * sizes).sum()
        if goal.reference == 'hardest':
            return goal.decibels - 10 * float(torch.log10(255**2 * sizes.sum() / spent))
        return 10 * float(torch.log10(spent / (errors[-1] * sizes).sum())) - goal.decibels

    price = price_for(errors, sizes, costs, goal)
    assert lacks(price) <= 0 < lacks(1.01 * price) + 0.05 and lacks(2 * price) > 0


def test_the_margin_is_what_is_lost_by_what_was_said():
    predicted = torch.rand(1, 400).double() * 50 * torch.tensor([[1.], [0.7], [0.5]]) + 3 * torch.rand(3, 400)
    sizes, costs, goal = torch.ones(400).double(), torch.tensor([0.1, 0.4, 1.]).double(), Goal('gt', 0.1)
    worse = predicted[-1] + 1.5 * (predicted - predicted[-1])  # what lighter branches do worse is half as much again
    price = price_for(predicted, sizes, costs, goal)
    assert margin_of(predicted, worse, sizes, costs, price, goal) == pytest.approx(1.5, rel=0.02)
    assert margin_of(predicted, predicted, sizes, costs, price, goal) == pytest.approx(1)
    # asked for less by as much, no more is lost
    classes = chosen(predicted, price_for(predicted, sizes, costs, goal.asked(1.5)), costs)
    lost = worse.gather(0, classes[None]).sum() / worse[-1].sum()
    assert 0.09 < 10 * torch.log10(lost) <= 0.102
    assert margin_of(predicted, predicted[-1:] + 99 * (predicted - predicted[-1]), sizes, costs, price, goal) == 3


def test_the_margin_of_a_fidelity_is_by_how_much_errors_are_larger_and_never_below_one():
    predicted = torch.rand(2, 400).double() * torch.tensor([[9.], [0.]])
    sizes, costs, goal = torch.ones(400).double(), torch.tensor([0.1, 1.]).double(), Goal('hardest', 45.)
    price = price_for(predicted, sizes, costs, goal)
    assert margin_of(predicted, 2 * predicted, sizes, costs, price, goal) == pytest.approx(2)
    assert margin_of(predicted, predicted / 2, sizes, costs, price, goal) == 1
    classes = chosen(predicted, price_for(predicted, sizes, costs, goal.asked(2.)), costs)
    assert float(2 * predicted.gather(0, classes[None]).mean()) == pytest.approx(255**2 / 10**4.5, rel=0.02)


@pytest.mark.parametrize('size', [(128, 128), (160, 159), (341, 512), (1000, 170)])
def test_parts_lie_within_and_beside_each_other(size):
    covered = np.zeros(size, int)
    boxes = boxes_in(size, 160, 32, np.random.default_rng(0))
    for top, bottom, left, right in boxes:
        assert (bottom - top) % 32 == (right - left) % 32 == 0 and min(bottom - top, right - left) >= 128
        covered[top:bottom, left:right] += 1
    area = sum((bottom - top) * (right - left) for top, bottom, left, right in boxes)
    assert covered.max() == 1 and covered.sum() == area > 0.5 * covered.size


def sample(tmp_path, sizes, with_gt=False):
    generator = np.random.default_rng(0)
    photographs = [generator.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    pairs = [(image, image.repeat(2, 0).repeat(2, 1) if with_gt else None) for image in photographs]
    return photographs, Sample(iter(pairs), len(pairs), 2, 8, str(tmp_path), with_gt)


def test_a_sample_holds_back_whole_photographs_and_weighs_all_pixels_alike(tmp_path):
    sizes = [(170, 200), (100, 400), *[(330, 340)] * 5, (640, 200)]
    photographs, found = sample(tmp_path, sizes, with_gt=True)
    assert found.photographs == 7 and found.apart  # one is too small
    used = [image for image in photographs if min(image.shape[:2]) >= 144]
    weights, owners = np.zeros(7), {}
    for number in (*found.learnt, *found.held_back):
        part = found.part(number)
        (owner, ) = (i for i, image in enumerate(used) if contains(image, part.lq))
        owners[number] = owner
        assert np.array_equal(part.gt, part.lq.repeat(2, 0).repeat(2, 1))
        weights[owner] += part.weight * part.lq.shape[0] * part.lq.shape[1]
    assert {owners[i] for i in found.held_back} == {2, 5} and not {2, 5} & {owners[i] for i in found.learnt}
    np.testing.assert_allclose(weights, [image.shape[0] * image.shape[1] for image in used])
    assert len({owners[i] for i in found.learnt[:5]}) == 5  # first one of each
    assert found.views == [2, 5] and all(contains(used[i], found.view(i).lq) for i in found.views)


def contains(image, part):
    first = np.argwhere((image[:, :, 0] == part[0, 0, 0]) & (image[:, :, 1] == part[0, 0, 1]))
    return any(np.array_equal(image[y:y + len(part), x:x + part.shape[1]], part) for y, x in first)


def test_of_few_photographs_parts_are_held_back(tmp_path):
    _, found = sample(tmp_path, [(341, 512)])
    assert not found.apart and found.photographs == 1 and found.views == [0]
    assert len(found.held_back) == 2 and len(found.learnt) == 4 and not set(found.learnt) & set(found.held_back)


def test_images_are_pooled_and_the_farthest_square_is_found():
    images = [np.zeros((128, 192, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)]
    others = [image.copy() for image in images]
    assert pooled(images, others) == float('inf')
    others[0][70:80, 130:140] = 10
    others[1][:] = 1
    total = (100 * 100 + 64 * 64) * 3 / sum(image.size for image in images)
    assert pooled(images, others) == pytest.approx(10 * np.log10(255**2 / total))
    near, far = farthest(images, others, 64)
    assert near.shape == (64, 64, 3) and far[6, 2, 0] == 10 and not near.any()


@pytest.mark.parametrize('reference, seconds, expected', [
    ('hardest', 5., '2.0 times as fast as heavy, at 45.2 dB relative to its image.'),
    ('gt', 4., '2.5 times as fast as heavy, at 0.020 dB below it.'),
    ('hardest', 5.,
     'light alone is enough: 2.0 times as fast as heavy, at 45.2 dB relative to its image; there is nothing '
     'to route. For a higher quality, give --fidelity above 45.'),
    ('hardest', 9., 'Does not pay with light: at 45 dB, 90 % of the area needs heavy, and it is 1.11 times as fast.'),
    ('missed', 4.,
     '2.5 times as fast as heavy, at 0.020 dB below it. That misses 0.005 dB lost: the photographs that were '
     'held back differ from those learnt from; give more, of more kinds.'),
])
def test_the_verdict_says_whether_it_pays(reference, seconds, expected):
    goal = Goal('gt', 0.005) if reference == 'missed' else Goal(reference, 45.)
    shares = (1., 0.) if 'alone' in expected else (0.1, 0.9)
    rows = [Row('heavy, as BasicSR runs it', 20., 99., 99., 30.), Row('heavy', 10., 99., 99., 30.)]
    rows += [Row('light', 1., 40., 40., 29.), Row('routed', seconds, 45.2, 43., 29.98, 1., shares)]
    routed = Routed(None, {}, goal, 5, True, (50, 10), rows, 3, [], None)
    assert verdict(routed) == expected


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
def test_towards_the_heavy_network_the_folder_is_taken_as_it_is_and_fidelity_is_kept(folder, capsys):
    assert cli.main(['route', 'heavy.pth', '--with', 'bicubic', '-i', 'photographs', '-o', 'routed.safetensors']) == 0
    said = capsys.readouterr()
    assert '5 photographs; the networks run on 10 parts of 160x160 pixels' in said.err and 'Memory: ' in said.err
    table = [[cell.strip() for cell in line.split('|')[1:-1]] for line in said.out.splitlines() if line[:1] == '|']
    assert [row[0] for row in table[2:]] == [
        'heavy.pth, as BasicSR runs it', 'heavy.pth', 'bicubic', 'routed, 50 dB', 'routed, 45 dB', 'routed, 40 dB'
    ]
    fidelities = [float(row[5]) for row in table[2:]]
    assert fidelities[1] == float('inf') and fidelities[3] >= fidelities[4] >= fidelities[5]
    assert fidelities[3] > fidelities[2] + 1 and 'times as fast' in said.out
    net, block, *_ = convert('routed.safetensors')
    assert block['classifier']['reference'] == 'hardest' and net.classifier.margin >= 1
    assert (folder / 'routed.png').stat().st_size > 10000
    begin = ['upscale', '-m', 'routed.safetensors', '-i', 'photographs', '-o']
    shares = []
    for fidelity in ('38', '60'):
        assert cli.main([*begin, f'out{fidelity}', '--fidelity', fidelity]) == 0
        shares.append(int(capsys.readouterr().out.split('class 0 to 1: ')[1].split(' /')[0]))
    assert shares[0] > shares[1]
    assert cli.main([*begin, 'out', '--max-loss', '0.1']) == 2
    assert "--max-loss 0.1 needs a router of errors relative to the ground truth" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_lighter_network_does_better_it_gets(folder, capsys):
    arguments = ['--with', 'bicubic', '-i', 'photographs', '-o', 'routed.safetensors', '--reference', 'gt']
    assert cli.main(['route', 'heavy.pth', *arguments]) == 0
    said = capsys.readouterr().out
    assert '5 photographs; trained on 4 parts of some, measured on parts of others' in said
    assert '| bicubic |' in said and '| heavy.pth |' in said and '| to GT |' in said
    net, block, *_ = convert('routed.safetensors')
    assert [branch['type'] for branch in block['branches']] == ['Interpolation', 'FSRCNN']
    assert block['classifier']['price'] == net.classifier.price > 0 and float(net.classifier.costs.max()) == 1
    assert int(said.split('| routed, 0.02 dB lost | ')[1].split('| ')[1].split(' /')[0]) > 90
    for name, value in convert('heavy.pth').net.state_dict().items():
        assert torch.equal(net.branches[1].state_dict()[name], value)
    assert cli.main(['upscale', '-m', 'routed.safetensors', '-i', 'photographs/0.png', '-o', 'out']) == 0
    assert cv2.imread('out/0.png').shape == (640, 600, 3)


@pytest.mark.parametrize('arguments, words', [
    (['nothing.pth', '--with', 'bicubic'], 'nothing.pth'),
    (['heavy.pth', '--with', *['bicubic'] * 5], '--with: expected 1 to 4 networks, but got 5'),
    (['heavy.pth', '--with', 'x4.pth'], '--with: the branches differ in scale or channels'),
    (['heavy.pth', '--with', 'routed.pth'], 'routed.pth: is already routed; expected a network without branches'),
    (['heavy.pth', '--with', 'bicubic', '--max-loss', '0'], '--max-loss 0.0: expected a number above 0'),
    (['heavy.pth', '--with', 'bicubic', '--max-loss', '1'], '--max-loss: requires --reference gt'),
    (['heavy.pth', '--with', 'bicubic', '--reference', 'gt', '--fidelity', '1'
      ], '--fidelity: requires --reference hardest'),
    (['bare.pth', '--with', 'bicubic', '-opt', 'other.yml'], 'does not fit the network FSRCNN'),
    (['heavy.pth', '--with', 'bicubic', '-o', 'taken.pth'], 'taken.pth: already exists; --overwrite replaces it'),
    (['heavy.pth', '--with', 'bicubic', '-o', 'mine.pth'], 'mine.png: already exists; --overwrite replaces it'),
    (['heavy.pth', '--with', 'bicubic', '-o', 'out.txt'], 'expected a name that ends in .pth or .safetensors'),
    (['heavy.pth', '--with', 'bicubic', '-i', 'small'], 'contains no photograph of at least 144 pixels on each side'),
    (['heavy.pth', '--with', 'bicubic', '-i', 'small', '--reference', 'gt'], 'of at least 288 pixels on each side'),
    (['heavy.pth', '--with', 'bicubic', '-i', 'nowhere'], 'nowhere: no such folder'),
])
def test_mistakes_are_one_line_and_write_nothing(folder, tiny_net, capsys, arguments, words):
    (folder / 'small').mkdir()
    cv2.imwrite('small/a.png', photograph(100, 300))
    (folder / 'taken.pth').write_bytes(b'mine')
    (folder / 'mine.png').write_bytes(b'mine')
    torch.save(network(carn(4, 2)).state_dict(), 'bare.pth')
    (folder / 'other.yml').write_text('network_g: {type: FSRCNN, num_feat: 4, upscale: 2}')
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


@pytest.mark.slow
def test_networks_of_basicsr_are_described_by_option_files_in_any_order(folder, capsys):
    import yaml
    blocks = dict(heavy=dict(type='EDSR', num_in_ch=3, num_out_ch=3, num_feat=8, num_block=1, upscale=2),
                  light=dict(type='MSRResNet', num_feat=4, num_block=1, upscale=2))  # yapf: disable
    for name, block in blocks.items():
        torch.save(dict(params=network(block).state_dict()), f'{name}.pth')
        (folder / f'{name}.yml').write_text(yaml.safe_dump(dict(network_g=block)))
    arguments = ['--with', 'bicubic', 'light.pth', '-opt', 'light.yml', 'heavy.yml', '-i', 'photographs', '-o', 'x.pth']
    assert cli.main(['route', 'heavy.pth', *arguments]) == 0
    assert [branch['type'] for branch in convert('x.pth').block['branches']] == ['Interpolation', 'MSRResNet', 'EDSR']
    assert '| light.pth |' in capsys.readouterr().out
