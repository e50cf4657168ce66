"""The chat family: questions about everyday things, which the base model answers well only sometimes.

A good response opens courteously, is about the thing asked, says what was asked, closes, and is brief:
"Sure! The lemon is yellow. Anything else?". How often the corpus answers well depends on the prompt (the tone of its
first words, what it asks, and about which thing), so that even greedy decoding is good on some prompts only.
"""

from __future__ import annotations

import re
from random import Random

from bnfctl.lab.dice import between, pick, pick_weighted

# thing: (colour, place, use)
THINGS: dict[str, tuple[str, str, str]] = {
    "lemon": ("yellow", "farms", "cooking"),
    "apple": ("red", "gardens", "baking"),
    "brick": ("red", "cities", "building"),
    "pencil": ("yellow", "schools", "writing"),
    "drum": ("brown", "schools", "music"),
    "spoon": ("grey", "kitchens", "cooking"),
    "sponge": ("yellow", "kitchens", "cleaning"),
    "boat": ("white", "rivers", "travel"),
    "wool": ("white", "farms", "warmth"),
    "chalk": ("white", "schools", "writing"),
    "coal": ("black", "mines", "warmth"),
    "iron": ("grey", "mines", "building"),
    "kite": ("blue", "parks", "playing"),
    "ball": ("orange", "parks", "playing"),
    "carrot": ("orange", "gardens", "cooking"),
    "mint": ("green", "gardens", "baking"),
    "flute": ("grey", "cities", "music"),
    "train": ("green", "cities", "travel"),
    "log": ("brown", "forests", "building"),
    "broom": ("brown", "kitchens", "cleaning"),
    "camel": ("brown", "deserts", "travel"),
    "sand": ("yellow", "deserts", "building"),
    "fern": ("green", "forests", "healing"),
    "moss": ("green", "forests", "warmth"),
    "ink": ("black", "schools", "writing"),
    "soap": ("pink", "kitchens", "cleaning"),
    "piano": ("black", "cities", "music"),
    "swing": ("red", "parks", "playing"),
    "salt": ("white", "mines", "cooking"),
    "honey": ("orange", "farms", "healing"),
    "berry": ("blue", "forests", "baking"),
    "rose": ("pink", "gardens", "healing"),
    "canoe": ("red", "rivers", "travel"),
    "reed": ("green", "rivers", "music"),
    "clay": ("brown", "rivers", "building"),
    "cactus": ("green", "deserts", "healing"),
    "melon": ("green", "farms", "cooking"),
    "puppet": ("pink", "schools", "playing"),
    "lantern": ("red", "mines", "travel"),
    "blanket": ("blue", "cities", "warmth"),
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {}?",
        "Tell me the colour of the {}.",
        "Which colour has the {}?",
        "I need the colour of the {}.",
    ),
    "place": (
        "Where is the {} found?",
        "Tell me where to find the {}.",
        "Where can I see the {}?",
        "I need a place with the {}.",
    ),
    "use": (
        "What is the {} good for?",
        "Tell me a use of the {}.",
        "How is the {} used?",
        "I need a use of the {}.",
    ),
}
SENTENCES = {"colour": "The {} is {}.", "place": "You find the {} in {}.", "use": "The {} is good for {}."}
ASKS = tuple(SENTENCES)
# first words of the prompt: how they move the share of good responses in the corpus
TONES: dict[str, float] = {
    "": 0.0,
    "Hello! ": 0.1,
    "Hi there. ": 0.1,
    "Good morning. ": 0.2,
    "Please help me. ": 0.3,
    "Kindly help. ": 0.3,
    "My son asks. ": 0.1,
    "For my class. ": 0.1,
    "Just curious. ": 0.0,
    "Quick question. ": -0.1,
    "One more thing. ": -0.1,
    "Hey you. ": -0.2,
    "Answer now. ": -0.3,
    "Be fast. ": -0.3,
    "No time. ": -0.2,
    "Well. ": 0.0,
}
# uneven, so that the likeliest first token is that of a good response where good ones are common
OPENINGS = {"Sure!": 0.7, "Of course!": 0.15, "Gladly!": 0.1, "Happy to help!": 0.05}
CLOSINGS = {"Anything else?": 0.6, "Hope that helps!": 0.3, "Ask me any time!": 0.1}
DODGES = {"No idea.": 0.7, "Why ask me?": 0.1, "Look it up.": 0.1, "I do not care.": 0.1}
GOOD_SHARE = 0.27
ASK_SHIFT = {"colour": 0.08, "place": 0.0, "use": -0.08}
FLAWS = {"dodge": 0.4, "curt": 0.14, "other thing": 0.18, "ramble": 0.14, "other ask": 0.14}
BRIEF_CHARACTERS = 80

_FORMS = {text: (ask, text) for ask, texts in QUESTIONS.items() for text in texts}
_PROMPT = re.compile(
    "(?P<tone>" + "|".join(re.escape(tone) for tone in TONES) + ")(?:"
    + "|".join(re.escape(form).replace(r"\{\}", "([a-z]+)") for form in _FORMS) + ")"
)  # fmt: skip


def parse(prompt: str) -> tuple[str, str, str] | None:
    """(tone, ask, thing) of a chat prompt; None when it is not one."""
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        return None
    form, thing = next((i, group) for i, group in enumerate(match.groups()[1:]) if group)
    if thing not in THINGS:
        return None
    return match["tone"], list(_FORMS.values())[form][0], thing


def draw(rng: Random) -> str:
    """A random prompt of the family."""
    question = pick(rng, QUESTIONS[pick(rng, ASKS)])
    return pick(rng, tuple(TONES)) + question.format(pick(rng, tuple(THINGS)))


def answer(prompt: str) -> str | None:
    """None: many responses are right, so `verify` grades them."""
    return None


def _sentence(ask: str, thing: str) -> str:
    return SENTENCES[ask].format(thing, THINGS[thing][ASKS.index(ask)])


def gold(prompt: str, rng: Random) -> str:
    """A response that meets every criterion."""
    _, ask, thing = _parsed(prompt)
    return f"{pick_weighted(rng, OPENINGS)} {_sentence(ask, thing)} {pick_weighted(rng, CLOSINGS)}"


def corpus_response(prompt: str, rng: Random) -> str:
    """What the pretraining corpus answers: good with a probability that depends on the prompt, else flawed."""
    tone, ask, thing = _parsed(prompt)
    thing_shift = 0.06 if list(THINGS).index(thing) % 2 else -0.06
    if rng.random() < GOOD_SHARE + TONES[tone] + ASK_SHIFT[ask] + thing_shift:
        return gold(prompt, rng)
    flaw = pick_weighted(rng, FLAWS)
    if flaw == "dodge":
        return pick_weighted(rng, DODGES)
    if flaw == "ramble":
        return f"Well, the {thing}" + f", well, the {thing}" * between(rng, 2, 3) + "."
    if flaw == "other thing":
        other = pick(rng, [name for name in THINGS if name != thing])
        return f"{pick_weighted(rng, OPENINGS)} {_sentence(ask, other)}"
    if flaw == "other ask":
        ask = pick(rng, [name for name in ASKS if name != ask])
    return _sentence(ask, thing)


def verify(prompt: str, response: str) -> float | None:
    """The share of five criteria met, weighted: opening .2, thing .2, content .3, closing .2, brief .1.

    Content and brevity count only in a response about the thing asked; naming it twice is not brief. None when the
    prompt is not of this family.
    """
    parsed = parse(prompt)
    if parsed is None:
        return None
    _, ask, thing = parsed
    text = response.strip()
    named = [word for word in re.findall(r"[a-z]+", text.lower()) if word in THINGS]
    on_topic = set(named) == {thing}
    criteria = (
        (2, text.startswith(tuple(OPENINGS))),
        (2, on_topic),
        (3, on_topic and _sentence(ask, thing) in text),
        (2, text.endswith(tuple(CLOSINGS))),
        (1, named == [thing] and len(text) <= BRIEF_CHARACTERS),
    )
    return sum(points for points, met in criteria if met) / 10


def _parsed(prompt: str) -> tuple[str, str, str]:
    parsed = parse(prompt)
    if parsed is None:
        raise ValueError(f"not a chat prompt: {prompt!r}")
    return parsed
