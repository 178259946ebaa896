"""Terms of a distillation objective and their weighted sum."""

from kdlib.objective.objective import Objective, ObjectiveOutput
from kdlib.objective.term import Term

__all__ = ["Objective", "ObjectiveOutput", "Term"]
