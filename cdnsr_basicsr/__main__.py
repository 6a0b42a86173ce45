import sys

# absolute: spawned data loader workers run this file by its path, and so have this package before they import BasicSR
from cdnsr_basicsr.cli import main

if __name__ == '__main__':
    __spec__ = None  # spawn passes over a main module called "*.__main__", and its workers would import BasicSR first
    sys.exit(main())
