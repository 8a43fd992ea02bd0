"""Fused attention: one call, one description of masks, several backends, chosen by what each declares it can do."""

from genflow.attention.dispatch import Attention, Call, attention, attention_backend, attention_report, choose
from genflow.attention.masks import Mask

__all__ = ["Attention", "Call", "Mask", "attention", "attention_backend", "attention_report", "choose"]
