"""Schedules: functions of the step for weights of terms, temperatures and the learning rate."""

from kdlib.schedules.functions import chain, constant, cosine, linear, linear_warmup, piecewise

__all__ = ["chain", "constant", "cosine", "linear", "linear_warmup", "piecewise"]
