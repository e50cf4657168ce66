"""GSM8K, the test set: word problems of primary school whose answer is a number (Cobbe et al. 2021)."""

from __future__ import annotations

from bnfctl.tasks.items import Source
from bnfctl.tasks.mathematics import NumberTask


class GSM8K(NumberTask):
    """1,319 items; the rows of `openai/gsm8k` do too, whose answers are worked solutions."""

    name = "gsm8k"
    source = Source(
        "yuchenlin/zero-eval", "gsm", "test", 1319, ("gsm8k", "gsm"),
        "67adef26f74286be16d7dd93935fa5a08cf9ae7468bb5091f1aaa21645a45630",
    )  # fmt: skip
    columns = (("question", "prompt"), ("answer",))
    id_prefix = "gsm8k-main-test-#"
