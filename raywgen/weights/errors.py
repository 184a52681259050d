"""Errors about weights that a user can fix; each message names the file or tensor and the remedy."""


class WeightsError(ValueError):
    """Weights that cannot be used as they are."""


class LayoutMismatchError(WeightsError):
    """A state_dict whose names, shapes or dtypes are not those of the layout."""


class NonFiniteWeightsError(WeightsError):
    """A state_dict with NaN or infinite values."""


class UnsafeFileError(WeightsError):
    """A weights file that could run code when read, or that is no weights file."""


class NotWeightsError(UnsafeFileError):
    """A file that is sound and holds no network: an optimizer's state, another format."""
