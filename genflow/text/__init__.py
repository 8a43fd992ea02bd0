"""Text encoders behind one interface."""

from genflow.text.base import TextEncoder, cuts_told_at_once

__all__ = ["TextEncoder", "cuts_told_at_once"]
