"""Exercise checkers that name the mistake, and predictions that answer a wrong guess; one module a notebook.

    from minilora.check import nb02
    nb02.merged_weight(merged_weight)   # prints "ok: ..." or fails with "not yet: <the likely mistake>", on one line
    nb02.first_step.reveal("c")         # prints the misconception behind the guess, then the answer
"""

from .choices import Estimate, Prediction, brief
from .compare import is_number
from .exercise import Case, CheckFailed, Exercise, Outcome

__all__ = ["Case", "CheckFailed", "Estimate", "Exercise", "Outcome", "Prediction", "brief", "is_number"]
