"""For the build of basicsr 1.4.2 on Python 3.13 and newer only: Python imports it at its start where this folder is in
PYTHONPATH.

The setup.py of basicsr executes a file within a function and then takes `__version__` from locals(), which from
Python 3.13 on (PEP 667) are a new dictionary at every call. Names that an exec() without namespaces defines are kept
for the function here, as before.
"""
import builtins
import sys

execute = builtins.exec


def exec_in_the_function(code, *namespaces, **kwargs):
    if not namespaces and not kwargs:
        frame = sys._getframe(1)
        namespaces = (frame.f_globals, frame.f_locals)  # this writes through; what a function calls locals() does not
    execute(code, *namespaces, **kwargs)


builtins.exec = exec_in_the_function
