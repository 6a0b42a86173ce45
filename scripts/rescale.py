"""Makes a SPANV2 of another scale of one that is trained: the blocks are kept, the upsampler is solved for.

Usage:
    python scripts/rescale.py CHECKPOINT --scale 4 --photographs FOLDER ... -o start.pth

What the blocks see is nearly the same at all scales. From their features the image is made by a linear map, so the best
one needs no training: its last conv is the least-squares solution on 800 patches of the photographs, with the depthwise
filters of the old upsampler for the features, and bilinear upsampling of the image. The result is a start for a
training, and nearly as good as one already.
"""
import argparse
import torch
from torch.nn import functional as F
from train_on_gpu import Photographs, pairs

import cdnsr_basicsr
from basicsr.archs import build_network
from cdnsr_basicsr.conversion.convert import convert, save
from cdnsr_basicsr.options import OptionError

PATCHES, SIDE = 800, 64  # of LR pixels
BORDER = 8  # LR pixels of a patch that are left out, because the blocks see padding there
RIDGE = 1e-6  # of the mean square of a feature


@torch.no_grad()
def rescaled(network, block, photographs):
    """A SPANV2 of another scale.

    Args:
        network (SPANV2): A trained one.
        block (dict): network_g of the new one: as of the old one, of another scale.
        photographs (Photographs): Of the new scale.

    Returns:
        SPANV2: The new one.
    """
    scale = block['upscale']
    made = build_network(dict(block)).eval()
    made.body.load_state_dict(network.body.state_dict())
    old, new = (net.conv_near.out_channels for net in (network, made))
    made.conv_depthwise.weight[new:] = network.conv_depthwise.weight[old:]

    device = photographs.height.device
    made.to(device)
    generator = torch.Generator(device).manual_seed(0)
    inputs = made.conv_last.in_channels
    square, product = (torch.zeros(inputs, size, dtype=torch.float64, device=device) for size in (inputs, new))
    inside = slice(BORDER, -BORDER)
    for _ in range(PATCHES):
        lq, gt = photographs.patches(1, SIDE, True, True, False, generator)
        features = made.conv_depthwise(torch.cat([made.conv_near(lq), made.body(lq)], dim=1))
        features, wanted = (
            x[0, :, inside, inside].flatten(1).double() for x in (features, F.pixel_unshuffle(gt, scale)))
        square += features @ features.T
        product += features @ wanted.T
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    made.conv_last.weight.copy_(torch.linalg.solve(square, product).T[..., None, None])
    return made.cpu()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint')
    parser.add_argument('--scale', type=int, required=True, help='of the new network')
    parser.add_argument('--photographs', nargs='+', required=True, metavar='FOLDER', help='HR photographs')
    parser.add_argument('-o', dest='out', required=True, metavar='CHECKPOINT', help='the new network')
    args = parser.parse_args()
    cdnsr_basicsr.register()
    try:
        converted = convert(args.checkpoint)
    except OptionError as error:
        parser.error(str(error))
    if converted.block['type'] != 'SPANV2':
        parser.error(f'{args.checkpoint}: expected a SPANV2, but it is of type {converted.block["type"]}')
    if args.scale < 1:
        parser.error(f'--scale: expected at least 1, but got {args.scale}')
    photographs = Photographs(pairs(args.photographs, args.scale), args.scale)
    photographs.check(SIDE)
    block = dict(converted.block, upscale=args.scale)
    save(converted._replace(net=rescaled(converted.net, block, photographs), block=block), args.out)
    print(f'Wrote {args.out}.')


if __name__ == '__main__':
    main()
