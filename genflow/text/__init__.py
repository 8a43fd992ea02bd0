"""Text encoders behind one interface."""

from genflow.text.base import TextEncoder

__all__ = ["TextEncoder"]
