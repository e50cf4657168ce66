"""What refusals mean, as servers word them."""

from __future__ import annotations

from typing import Any

import pytest

from bnfctl.client.requests import about_content, too_long, wants_new_limit, with_code

AZURE = (
    "The response was filtered due to the prompt triggering Azure OpenAI's content management policy. Please modify your"
    " prompt and retry. To learn more about our content filtering policies please read our documentation"
)
NEWER = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (AZURE, {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}),
        (AZURE, {}),
        ("Filtered.", {"code": None, "innererror": {"code": "ResponsibleAIPolicyViolation"}}),
        ("Invalid prompt.", {"type": "invalid_request_error", "code": "invalid_prompt"}),
        ("Invalid prompt: your prompt was flagged as potentially violating our usage policy.", {}),
        ("Your request was rejected as a result of our safety system.", {"type": "image_generation_user_error"}),
        ("Rejected.", {"type": "content_policy_violation"}),
        ("Output blocked by content filtering policy", {"type": "invalid_request_error"}),
        ("Content Exists Risk", {"type": "invalid_request_error", "code": "invalid_request_error"}),
        ("Input data may contain something.", {"code": "DataInspectionFailed"}),
        ("Unknown reason, ask the owner of your account.", {"code": "content_filter"}),
    ],
)
def test_a_refusal_of_a_text(message: str, error: dict[str, Any]) -> None:
    assert about_content("400 " + with_code(message, error))


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("temperature must be 1", {"code": "invalid_value", "type": "invalid_request_error"}),
        ("Unsupported parameter: 'safety_settings'", {"code": "unsupported_parameter"}),
        ("Unrecognized request argument supplied: content_filter", {}),
        ("Your account was flagged: see our usage policies", {"code": "account_deactivated"}),
        ("maximum context length is 9", {"code": "context_length_exceeded"}),
        ("the content of a message is a list", {"code": 400}),
        ("no such model", "text"),
        ("no such model", None),
        (NEWER, {"code": "unsupported_parameter", "param": "max_tokens"}),
    ],
)
def test_a_refusal_of_something_else(message: str, error: Any) -> None:
    assert not about_content("400 " + with_code(message, error))


def test_the_name_of_the_limit_is_not_its_size() -> None:
    assert wants_new_limit(NEWER) and not too_long(NEWER)
    for size in ("max_tokens is too large: 9. This model supports at most 5", "max_completion_tokens is 9, at most 5"):
        assert too_long(size) and not wants_new_limit(size)
    assert not wants_new_limit("Unsupported parameter: 'max_completion_tokens'")
