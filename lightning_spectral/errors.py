"""What can go wrong, as one small tree.

.. code-block:: text

    SpectralError
    ├── BlocksNotFoundError      no residual block was found in the model
    ├── ExampleInputError        the model could not be run on an example input
    ├── CheckpointError          a checkpoint file cannot be read, or not understood
    └── ConfigurationError       an argument cannot be used (also a ValueError)
"""

__all__ = ["BlocksNotFoundError", "CheckpointError", "ConfigurationError", "ExampleInputError", "SpectralError"]


class SpectralError(Exception):
    """Base of every error that this package raises on purpose.

    Example:
        >>> try:
        ...     find_blocks(torch.nn.Linear(2, 2))
        ... except SpectralError as error:
        ...     print(type(error).__name__)
        BlocksNotFoundError
    """


class BlocksNotFoundError(SpectralError):
    """No residual block was found; the message lists what was tried and shows ``hints``."""


class ExampleInputError(SpectralError):
    """Structure is read from one traced forward pass, and no example input could be run."""


class CheckpointError(SpectralError):
    """A checkpoint cannot be read or understood; the message says which file, what was found and what was expected."""


class ConfigurationError(SpectralError, ValueError):
    """An argument cannot be used; the message says what came and what was expected."""
