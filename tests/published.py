"""Weights of other projects under this package's names, for tests against recorded outputs."""
from cdnsr_basicsr.conversion import rename

SRRESNET = [(r'^recon_trunk\.', 'body.'), (r'^HRconv\.', 'conv_hr.')]
RCAN = [(r'^(sub|add)_mean\..*', None), (r'^head\.0\.', 'conv_first.'),
        (r'^body\.(\d)\.body\.(\d)\.body\.3\.conv_du\.0\.', r'body.\1.residual_group.\2.rcab.3.attention.1.'),
        (r'^body\.(\d)\.body\.(\d)\.body\.3\.conv_du\.2\.', r'body.\1.residual_group.\2.rcab.3.attention.3.'),
        (r'^body\.(\d)\.body\.(\d)\.body\.', r'body.\1.residual_group.\2.rcab.'),
        (r'^body\.(\d)\.body\.3\.', r'body.\1.conv.'), (r'^body\.2\.', 'conv_after_body.'),
        (r'^tail\.0\.', 'upsample.'), (r'^tail\.1\.', 'conv_last.')]
CLASSIFIER = [(r'^lastOut\.', 'fc.')] + [(rf'^CondNet\.{2 * i}\.', f'convs.{i}.') for i in range(5)]


def rename_cdnsr(state, table):
    renamed = {}
    for prefix, new, keys in (('classifier.', 'classifier.', CLASSIFIER), ('net1.', 'branches.0.', table),
                              ('net2.', 'branches.1.', table), ('net3.', 'branches.2.', table)):
        part = {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}
        renamed.update({new + key: value for key, value in rename(part, keys).items()})
    return renamed
