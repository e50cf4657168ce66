"""MATH-L5: the problems of MATH's hardest level whose answer is an integer (Hendrycks et al. 2021)."""

from __future__ import annotations

from bnfctl.tasks.items import Source
from bnfctl.tasks.mathematics import NumberTask


class MathL5(NumberTask):
    """721 items.  By ZeroEval's grader no LaTeX is compared, only the first number."""

    name = "math-l5"
    source = Source(
        "AI-MO/aimo-validation-math-level-5@f6a57be5b8b7818f6abc1b91ada912f474466abc", None, "train", 721, ("math-l5",),
        "a83ec01b3b1187c3792105cdb5f55da7d0c9f1d73431a0e3ee824d31c7ea654f",
    )  # fmt: skip
    columns = (("problem", "question", "prompt"), ("answer",))
    id_prefix = ""
