"""C++ that runs on CPUs: built at first use with the machine's own compiler, kept in a cache, loaded with ctypes.

Nothing here is needed: what it computes has a plain PyTorch twin that runs where there is no compiler.
"""
