"""Weights of other projects under this package's names, for tests against recorded outputs."""
import re

CARN = [(r'^(sub|add)_mean\..*', None), (r'^entry\.', 'conv_first.'), (r'^exit\.', 'conv_last.'),
        (r'^b(\d)\.b1\.body\.0\.', r'body.bodies.<\1>.bodies.0.conv1.'),
        (r'^b(\d)\.b1\.body\.2\.', r'body.bodies.<\1>.bodies.0.conv2.'),
        (r'^b(\d)\.b1\.body\.4\.', r'body.bodies.<\1>.bodies.0.conv3.'),
        (r'^b(\d)\.c(\d)\.0\.', r'body.bodies.<\1>.fusions.<\2>.'), (r'^c(\d)\.0\.', r'body.fusions.<\1>.'),
        (r'^upsample\.up\.body\.0\.', 'upconvs.0.'), (r'^upsample\.up\.body\.3\.', 'upconvs.1.')]
FSRCNN = [(r'^head_conv\.', 'extract.'), (r'^tail_conv\.', 'deconv.'), (r'^body_conv\.0\.', 'shrink.'),
          (r'^body_conv\.([1-5])\.', r'map.<\1>.'), (r'^body_conv\.6\.', 'expand.')]
SRRESNET = [(r'^recon_trunk\.', 'body.'), (r'^HRconv\.', 'conv_hr.')]
RCAN = [(r'^(sub|add)_mean\..*', None), (r'^head\.0\.', 'conv_first.'),
        (r'^body\.(\d)\.body\.(\d)\.body\.3\.conv_du\.0\.', r'body.\1.residual_group.\2.rcab.3.attention.1.'),
        (r'^body\.(\d)\.body\.(\d)\.body\.3\.conv_du\.2\.', r'body.\1.residual_group.\2.rcab.3.attention.3.'),
        (r'^body\.(\d)\.body\.(\d)\.body\.', r'body.\1.residual_group.\2.rcab.'),
        (r'^body\.(\d)\.body\.3\.', r'body.\1.conv.'), (r'^body\.2\.', 'conv_after_body.'),
        (r'^tail\.0\.', 'upsample.'), (r'^tail\.1\.', 'conv_last.')]
CLASSIFIER = [(r'^lastOut\.', 'fc.')] + [(rf'^CondNet\.{2 * i}\.', f'convs.{i}.') for i in range(5)]


def rename(state, table):
    """Renames by the first pattern that fits; <n> in a new name is n - 1; None drops the key."""
    renamed = {}
    for key, value in state.items():
        for pattern, new in table:
            if re.match(pattern, key):
                if new is not None:
                    name = re.sub(pattern, new, key)
                    renamed[re.sub(r'<(\d)>', lambda match: str(int(match.group(1)) - 1), name)] = value
                break
        else:
            renamed[key] = value
    return renamed


def rename_cdnsr(state, table):
    renamed = {}
    for prefix, new, keys in (('classifier.', 'classifier.', CLASSIFIER), ('net1.', 'branches.0.', table),
                              ('net2.', 'branches.1.', table), ('net3.', 'branches.2.', table)):
        part = {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}
        renamed.update({new + key: value for key, value in rename(part, keys).items()})
    return renamed


def slice_to(state, net):
    """The first channels of a slimmable network's weights, as many as `net` has."""
    return {key: state[key][tuple(slice(0, size) for size in target.shape)] for key, target in net.state_dict().items()}
