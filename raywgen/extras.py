"""Says how a package is installed that raywgen itself does not need."""


def hub_needed(what: str, package: str) -> str:
    """Returns the message where a package of the extra `hub` is missing.

    Pip takes the raywgen that is installed, from a clone or a wheel, and adds what the extra names.

    Args:
        what: What needs it.
        package: `huggingface_hub` or `transformers`.
    """
    return f"{what} needs {package}; install it by `pip install 'raywgen[hub]'`"
