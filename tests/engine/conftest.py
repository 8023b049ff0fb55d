"""Ignite imports modules of torch that warn of torch.jit while they are imported: let that pass here."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import ignite.engine  # noqa: F401
