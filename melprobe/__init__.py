"""melprobe trains language models that read spectrograms and finds which of their layers listen."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melprobe.listener import Listener, load, load_model

__version__ = "0.1.0"
__all__ = ["Listener", "load", "load_model"]


def __getattr__(name: str) -> Any:
    # Reports are rebuilt without torch, so importing the package must not import it.
    if name in __all__:
        from melprobe import listener

        return getattr(listener, name)
    raise AttributeError(f"module 'melprobe' has no attribute {name!r}")
