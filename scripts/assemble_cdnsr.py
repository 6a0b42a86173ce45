"""Makes a CDNSR out of networks that are trained already, to measure with.

Usage, in the repository:
    python scripts/assemble_cdnsr.py arm.pth arm-carn.pth:36 arm-carn.pth:52 arm-carn.pth:64
    python scripts/assemble_cdnsr.py mixed.pth ETDS_M4C32_x4.pth ETDS_M7C48_x4.pth arm-carn.pth:64 \\
        --classifier net_g_latest.pth --shares 61 23 16 --data photographs

Branches are checkpoints that `basicsr convert` reads, cheapest first; :N is a width of an ARM-Net. Other projects'
weights are theirs: not for shipping. The classifier starts random, or is that of another checkpoint. With --shares its
last bias is moved until these percentages of the photographs' tiles (of --patch-size) go to the branches. Beside
CHECKPOINT.pth stands CHECKPOINT.yml, an option file that trains the classifier on datasets/train, with the labels that
`basicsr label --by branches -m CHECKPOINT.pth` makes; it has no validation. Which classifier and which losses says the
option file named with --like.
"""
import argparse
import copy
import torch
import yaml
from pathlib import Path

import cdnsr_basicsr

cdnsr_basicsr.register()

from basicsr.archs import build_network  # noqa: E402
from cdnsr_basicsr.checkpoint import load_checkpoint, save_checkpoint, weights_of  # noqa: E402
from cdnsr_basicsr.conversion.convert import convert, made_plain  # noqa: E402
from cdnsr_basicsr.evaluation import read_pairs, to_tensor  # noqa: E402
from cdnsr_basicsr.inference import TileUpscaler  # noqa: E402
from cdnsr_basicsr.inference.tiling import PATCH_SIZE, Tiling  # noqa: E402
from cdnsr_basicsr.options import read_options  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def branch_of(name):
    """Option block and network of a branch such as arm-carn.pth:36."""
    path, _, width = name.partition(':')
    converted = convert(path, 'arm', num_feat=int(width)) if width else convert(path)
    if converted.block.get('clip'):
        converted = made_plain(converted, path)  # branches are clipped after they have been blended
    return converted.block, converted.net


@torch.no_grad()
def logits_of(net, folder, limit, patch_size):
    engine, rows = TileUpscaler(net, patch_size), []
    for pair in read_pairs(folder, net.upscale, limit):
        lq = to_tensor(pair.lq)
        tiling = Tiling(*lq.shape[2:], engine.patch_size, engine.step)
        for top in tiling.tops:
            rows += [
                net.classifier(lq[:, :, top:top + tiling.size[0], left:left + tiling.size[1]]) for left in tiling.lefts
            ]
    return torch.cat(rows)


def bias_for(logits, shares):
    """What is to be added to the logits, so that these shares of the rows have each argmax."""
    bias = torch.zeros(logits.shape[1])
    for step in range(3000):
        now = (logits + bias).argmax(dim=1).bincount(minlength=len(bias)) / len(logits)
        bias -= 5 / (10 + step) * (now - shares)
    return bias, now


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('output', help='checkpoint to write')
    parser.add_argument('branches', nargs='+', metavar='BRANCH[:WIDTH]', help='checkpoints')
    parser.add_argument('--classifier', help='checkpoint of a CDNSR with the classifier to take')
    parser.add_argument(
        '--like', default=str(ROOT / 'options' / 'train_cdnsr_carn.yml'), metavar='FILE', help='option file')
    parser.add_argument('--shares', type=float, nargs='+', help='percentages')
    parser.add_argument('--data', help='photographs for --shares')
    parser.add_argument('--limit', type=int, help='only the first N of them')
    parser.add_argument('--patch-size', type=int, default=PATCH_SIZE, help='largest side of a tile for --shares')
    args = parser.parse_args()

    blocks, branches = zip(*(branch_of(name) for name in args.branches))
    torch.manual_seed(0)
    scales = {branch.get('upscale') for branch in blocks}
    if len(scales) != 1:
        raise SystemExit(f'the branches differ in scale: {scales}')
    scale = scales.pop()
    opt = copy.deepcopy(read_options(args.like))
    block = dict(type='CDNSR', upscale=scale, branches=list(blocks), classifier=opt['network_g']['classifier'])
    net = build_network(block).eval()
    net.branches = torch.nn.ModuleList(branches)
    if args.classifier:
        state = weights_of(load_checkpoint(args.classifier), args.classifier)
        prefix = 'classifier.'
        net.classifier.load_state_dict({key[len(prefix):]: state[key] for key in state if key.startswith(prefix)})
    if args.shares:
        if not hasattr(net.classifier, 'fc'):
            raise SystemExit(f'--shares: {type(net.classifier).__name__} has no last bias to move; use a budget')
        logits = logits_of(net, args.data, args.limit, args.patch_size)
        bias, now = bias_for(logits, torch.tensor(args.shares) / sum(args.shares))
        with torch.no_grad():
            net.classifier.fc.bias += bias
        print('shares: ' + ' / '.join(f'{100 * share:.1f}' for share in now.tolist()) + ' %')
    save_checkpoint(dict(params=net.state_dict(), network_g=block, scale=scale), args.output)

    opt.update(name=Path(args.output).stem, network_g=block, scale=scale)
    for block_, key in ((opt['path'], 'pretrain_network_branches'), (opt['datasets'], 'val'), (opt, 'val')):
        del block_[key]
    opt['path']['pretrain_network_g'] = args.output
    opt['datasets']['train']['label_file'] = 'datasets/train/labels_branches.txt'
    Path(args.output).with_suffix('.yml').write_text(yaml.safe_dump(opt, sort_keys=False), encoding='utf-8')


if __name__ == '__main__':
    main()
