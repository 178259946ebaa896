"""Online distillation: a running-mean teacher, students that teach each other, and a student that teaches itself."""

from kdlib.online.ema_teacher import EMATeacher
from kdlib.online.mutual import MutualDistiller
from kdlib.online.self_teacher import AuxiliaryHeads, SelfTeacher

__all__ = ["AuxiliaryHeads", "EMATeacher", "MutualDistiller", "SelfTeacher"]
