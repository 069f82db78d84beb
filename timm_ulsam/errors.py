"""Errors that are the user's to mend: the command line prints them as one line."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what and why, in one sentence."""


class WeightsError(RuntimeError):
    """A weight file is not the one that was published, or cannot be had."""


class KernelError(RuntimeError):
    """The kernels that TIMM_ULSAM_KERNEL asks for cannot run here."""
