"""Fused attention: one call, several backends, chosen by what each declares it can do."""

from genflow.attention.dispatch import Attention, Call, attention, attention_report

__all__ = ["Attention", "Call", "attention", "attention_report"]
