"""Keys of stock option files, those of BasicSR's own models and datasets, besides the blocks of schema.py."""
from __future__ import annotations

from typing import Sequence

from .kinds import FLAG, MAX_FREQ, Kind, choice, fitting, integer, list_of, number, optional, whole
from .schema import OptionFile, PairedData, Paths, RoutedValidation, fields_of

MAX_WEIGHT = 1e6  # of a loss
OPTIMIZERS = ('ASGD', 'Adadelta', 'Adagrad', 'Adam', 'AdamW', 'Adamax', 'Muon', 'NAdam', 'RAdam', 'RMSprop', 'Rprop',
              'SGD')
BELOW_ONE = 'numbers from 0 to below 1'
SHARE = fitting(number(0, 1), lambda share: bool(share < 1), BELOW_ONE)
OPTIMIZER = dict(betas=fitting(list_of(number(0, 1), 2), lambda betas: bool(max(betas) < 1), BELOW_ONE))
OPTIMIZER.update(dict.fromkeys(('momentum', 'alpha', 'rho', 'momentum_decay'), SHARE))
OPTIMIZER.update(dict.fromkeys(('dampening', 'weight_decay', 'eps'), number(0, 1)))
SCHEDULERS = ('CosineAnnealingRestartLR', 'MultiStepLR', 'MultiStepRestartLR')
SCHEDULE = dict.fromkeys(('milestones', 'restarts'), list_of(whole(0, MAX_FREQ)))
SCHEDULE.update(periods=list_of(whole(1, MAX_FREQ)), restart_weights=list_of(number(0, MAX_WEIGHT)))
SCHEDULE.update(gamma=number(1e-9, 10), last_epoch=whole(-1, -1))
# BasicSR's models that have a discriminator
GAN_MODELS = ('SRGANModel', 'HiFaceGANModel', 'StyleGAN2Model', 'VideoGANModel', 'VideoRecurrentGANModel')
# what BasicSR's pipelines read, besides what models do; or no longer read, but its option files still say; the last two
# are for `basicsr upscale -opt`
HEAD_KEYS = (*fields_of(OptionFile), 'gpu_ids', 'set_CUDA_VISIBLE_DEVICES', 'tile', 'routing')
TRAIN_KEYS = ('total_iter', 'warmup_iter', 'scheduler', 'fix_iter', 'net_d_iters', 'net_d_init_iters')
TRAIN = {
    **dict.fromkeys(('net_d_iters', 'net_g_reg_every', 'net_d_reg_every'), whole(1)),
    **dict.fromkeys(('tsa_iter', 'fix_flow', 'fix_iter'), optional(whole(0))),
    **dict.fromkeys(('flow_lr_mul', 'dcn_lr_mul', 'r1_reg_weight', 'path_reg_weight'), number(0, MAX_WEIGHT))
}
TRAIN.update(net_d_init_iters=whole(0), path_batch_shrink=whole(1, 2**16), mixing_prob=number(0, 1))
PATH_KEYS = (*fields_of(Paths), 'strict_load')
VAL = dict(num_val_samples=whole(1), flip_seq=FLAG, center_frame_only=FLAG, use_chop=FLAG)
VAL_KEYS = (*fields_of(RoutedValidation), *VAL)
METRIC = dict(better=choice('higher', 'lower'), crop_border=integer(0, 2**16), test_y_channel=FLAG)
# of metrics of BasicSR's, in models that hand over images as it does
METRIC_OF_IMAGES = dict(input_order=choice('HWC'), convert_to=choice('y', 'gray'))
LOSS = {
    'reduction': choice('mean', 'sum', 'none'),
    'criterion': choice('l1', 'l2', 'fro'),
    'gan_type': choice('vanilla', 'lsgan', 'wgan', 'wgan_softplus', 'hinge'),
    'vgg_type': choice(*(f'vgg{depth}{norm}' for depth in (11, 13, 16, 19) for norm in ('', '_bn'))),
    **dict.fromkeys(('temperature', 'eps'), number(1e-12, MAX_WEIGHT))
}
SMALLER_FIRST = 'the smaller number first'


def ordered(span: Sequence[float]) -> bool:
    """Whether the first of two numbers is the smaller one."""
    return span[0] <= span[1]


def shares(*lengths: int) -> Kind:
    """Probabilities of all that can happen; if lengths are given, of so many."""
    return fitting(
        list_of(number(0, 1), *lengths, words='list of probabilities, of sum 1'),
        lambda values: abs(sum(values) - 1) < 1e-3, 'probabilities whose sum is 1')


SPAN = fitting(list_of(number(0, 2**16), 2), ordered, SMALLER_FIRST)
PROBABILITIES = fitting(list_of(number(0, 1)), any, 'probabilities of which one is above 0')
KERNELS = choice('iso', 'aniso', 'generalized_iso', 'generalized_aniso', 'plateau_iso', 'plateau_aniso')
# RealESRGANDataset's first blur; the second has the same keys with a 2
BLUR = dict(blur_kernel_size=integer(1, 2**16), kernel_list=list_of(KERNELS), kernel_prob=PROBABILITIES)
BLUR.update(sinc_prob=number(0, 1), blur_sigma=SPAN, betag_range=SPAN, betap_range=SPAN)
BLUR.update({f'{name}2': kind for name, kind in BLUR.items()}, final_sinc_prob=number(0, 1))
# the degradation of RealESRGANModel and RealESRNetModel, at the top of their option files
DEGRADATION = dict(resize_prob=PROBABILITIES, resize_range=SPAN, gaussian_noise_prob=number(0, 1))
DEGRADATION.update(noise_range=SPAN, poisson_scale_range=SPAN, gray_noise_prob=number(0, 1), jpeg_range=SPAN)
DEGRADATION.update({f'{name}2': kind for name, kind in DEGRADATION.items()}, second_blur_prob=number(0, 1))
DEGRADATION.update(gt_size=integer(1, 2**16))
# what these models take besides
REAL = dict.fromkeys(('gt_usm', 'l1_gt_usm', 'percep_gt_usm', 'gan_gt_usm', 'high_order_degradation'), FLAG)
REAL.update(DEGRADATION, queue_size=integer(1, 2**16))
# what BasicSR's datasets read, or leave unread in option files of its own
DATASET = dict(BLUR, num_frame=integer(-1, 2**16), interval_list=list_of(integer(1, 2**10)))
DATASET.update(val_partition=choice('REDS4', 'official'))
DATASET.update(padding=choice('replicate', 'reflection', 'reflection_circle', 'circle'))
OF_CLIPS = ('use_flip', 'random_reverse', 'flip_sequence', 'test_mode', 'cache_data', 'use_duf_downsampling')
DATASET.update(dict.fromkeys((*OF_CLIPS, 'use_shuffle'), FLAG))
DATASET_KEYS = (*fields_of(PairedData), *DATASET, 'dataroot_flow', 'meta_info')
AUGMENTED = ('gt_size', 'use_hflip', 'use_rot')
CLIPS = ('meta_info_file', 'num_frame', 'random_reverse', *AUGMENTED)
# keys without which BasicSR's datasets stop: always, and besides where they are trained with
NEEDED = {
    'PairedImageDataset': (('dataroot_gt', 'dataroot_lq'), AUGMENTED),
    'SingleImageDataset': (('dataroot_lq', ), ()),
    'FFHQDataset': (('dataroot_gt', 'mean', 'std', 'use_hflip'), ()),
    'RealESRGANDataset': (('dataroot_gt', 'use_hflip', 'use_rot', *BLUR), ()),
    'RealESRGANPairedDataset': (('dataroot_gt', 'dataroot_lq'), AUGMENTED),
    'REDSDataset': (('dataroot_gt', 'dataroot_lq', 'dataroot_flow', 'val_partition', 'interval_list', *CLIPS), ()),
    'REDSRecurrentDataset': (('dataroot_gt', 'dataroot_lq', 'val_partition', 'test_mode', *CLIPS), ()),
    'Vimeo90KDataset': (('dataroot_gt', 'dataroot_lq', *CLIPS), ()),
    'Vimeo90KRecurrentDataset': (('flip_sequence', ), ()),
    'VideoTestDataset': (('dataroot_gt', 'dataroot_lq', 'cache_data'), ()),
    'VideoTestVimeo90KDataset': (('dataroot_gt', 'dataroot_lq', 'cache_data', 'meta_info_file', 'num_frame'), ()),
    'VideoTestDUFDataset': (('use_duf_downsampling', 'num_frame', 'padding'), ()),
    'VideoRecurrentTestDataset': ((), ()),
}
# the keys of an io_backend, by its type
BACKENDS = {
    'disk': (),
    'lmdb': ('readonly', 'lock', 'readahead', 'db_paths', 'client_keys'),
    'memcached': ('server_list_cfg', 'client_cfg', 'sys_path')
}
