"""Forward pass, message and weight gradient by hand, one file for each family of modules.

Every file of this folder registers its kernels as it is imported, so that a new one is a file and nothing else.
"""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
