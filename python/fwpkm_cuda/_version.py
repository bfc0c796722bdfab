# The one place of the version: the package, the C++ library and the wheel read it from here.
__version__ = "0.1.0"
