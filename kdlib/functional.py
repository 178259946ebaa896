"""Losses: every loss as a function of tensors. Touches nothing but `kdlib.losses`, where each is defined."""

from kdlib.losses.angular import angular_distill
from kdlib.losses.attention import attention_map, attention_transfer
from kdlib.losses.hint import hint
from kdlib.losses.soft_target import soft_target

__all__ = ["angular_distill", "attention_map", "attention_transfer", "hint", "soft_target"]
