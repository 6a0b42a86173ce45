from pathlib import Path
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# onnx writes exported networks, the others run them; the newest for Python 3.9 are onnx 1.19.1, onnxruntime 1.19.2 and
# openvino 2025.3.0
ONNX = ['onnx>=1.17', 'onnxruntime>=1.19']
OPENVINO = ['onnx>=1.17', 'openvino>=2025.0']
# reads checkpoints of the community; its newest versions need Python 3.10
SPANDREL = ['spandrel>=0.4; python_version>="3.10"']
# of those whose findings change between versions, one; mypy's newest do not run on Python 3.9, where test.sh needs none
LINTERS = [
    'flake8>=6.0', 'isort>=5.12', 'mypy==2.4.1; python_version>="3.11"', 'ruff==0.17.6', 'types-PyYAML', 'types-tqdm',
    'yapf==0.43.0'
]
TESTS = ['pypng>=0.20220715', 'pytest>=7.0', 'pytest-xdist>=3.5', 'playwright>=1.40']
DEMO = ['gradio>=6.31; python_version>="3.10"']  # the page of basicsr demo
# upscaling on many machines
RAY = [f'{package}; python_version>="3.10"' for package in ('ray[data]>=2.51', 'pyarrow>=17.0', 'fsspec>=2024.6')]
FORMATS = ['pillow-heif>=1.1', 'pillow-jxl-plugin>=1.3.4']  # HEIC and JPEG XL


def read_version() -> str:
    for line in (ROOT / 'cdnsr_basicsr' / '__init__.py').read_text(encoding='utf-8').splitlines():
        if line.startswith('__version__'):
            return line.split("'")[1]
    raise RuntimeError('cdnsr_basicsr/__init__.py defines no __version__')


setup(
    name='cdnsr-basicsr',
    version=read_version(),
    description='Difficulty-routed super-resolution (CDNSR) as a BasicSR plugin',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='super-resolution, BasicSR, dynamic network, CDNSR, ClassSR',
    packages=find_packages(include=['cdnsr_basicsr', 'cdnsr_basicsr.*']),
    package_data={
        'cdnsr_basicsr': [
            'py.typed', 'demo/*.css', 'demo/*.html', 'demo/*.js', 'options/schema.json',
            'pretrained_models/models.json', *(f'pretrained_models/*.{kind}' for kind in ('pth', 'safetensors'))
        ]
    },
    python_requires='>=3.9',  # from 3.13 on, basicsr 1.4.2 is built with scripts/python313
    install_requires=[
        'basicsr>=1.4.2',
        'torch>=2.6',  # the first release whose torch.load is weights_only by default, also inside BasicSR
        'torchvision>=0.21',
        'numpy>=1.24',
        'opencv-python>=4.8',
        'pillow>=11.3',  # with AVIF, and XMP in JPEG; the newest for Python 3.9
        'pyyaml>=6.0.1',
        'lmdb>=1.4',
        'matplotlib>=3.7',
        'packaging>=24.0',
        'safetensors>=0.4',
        'tqdm>=4.60',
        'tifffile>=2024.8.30',
        'imagecodecs>=2024.12.30',  # what tifffile decompresses with
        # TensorBoard itself comes with basicsr, as tb-nightly. Declaring tensorboard too would install both, and
        # then the tensorboard command stops with "Duplicate plugins for name projector".
    ],
    extras_require={
        'dev': [*LINTERS, 'pre-commit>=3.5', *TESTS, *DEMO, *FORMATS, *ONNX, *OPENVINO, *RAY, *SPANDREL],
        'demo': DEMO,
        'docs': ['mkdocs-material>=9.6'],  # of mkdocs.yml
        'formats': FORMATS,
        'onnx': ONNX,
        'openvino': OPENVINO,
        'ray': RAY,
        'spandrel': SPANDREL,
    },
    entry_points={
        'console_scripts': ['basicsr = cdnsr_basicsr.cli:main'],
        'basicsr.plugins': ['cdnsr = cdnsr_basicsr:register'],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Typing :: Typed',
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
    zip_safe=False,
)
