"""ARM-Net (ECCV 2022): one slimmable network whose first channels are the smaller branches.

The names inside are those of ClassSR's and CDNSR's code, which ARM-Net's is built on.
"""
CARN_M = [(r'^(sub|add)_mean\..*', None), (r'^entry\.', 'conv_first.'), (r'^exit\.', 'conv_last.'),
          (r'^b(\d)\.b1\.body\.0\.', r'body.bodies.<\1>.bodies.0.conv1.'),
          (r'^b(\d)\.b1\.body\.2\.', r'body.bodies.<\1>.bodies.0.conv2.'),
          (r'^b(\d)\.b1\.body\.4\.', r'body.bodies.<\1>.bodies.0.conv3.'),
          (r'^b(\d)\.c(\d)\.0\.', r'body.bodies.<\1>.fusions.<\2>.'), (r'^c(\d)\.0\.', r'body.fusions.<\1>.'),
          (r'^upsample\.up\.body\.0\.', 'upconvs.0.'), (r'^upsample\.up\.body\.3\.', 'upconvs.1.')]
FSRCNN = [(r'^head_conv\.', 'extract.'), (r'^tail_conv\.', 'deconv.'), (r'^body_conv\.0\.', 'shrink.'),
          (r'^body_conv\.([1-5])\.', r'map.<\1>.'), (r'^body_conv\.6\.', 'expand.')]
