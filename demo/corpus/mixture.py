"""The mixture the model is trained on: how much of each kind of dialogue, in which language."""

from collections.abc import Callable

from .arithmetic import arithmetic_dialogue
from .chat import add_system, chat_dialogue, named_dialogue, plain_dialogue
from .dialogue import Dialogue
from .errands import chain_dialogue, tool_dialogue
from .source import Language, Source

Maker = Callable[[Source, Language], Dialogue]

WEIGHTS: dict[str, tuple[Maker, float]] = {
    "tools": (tool_dialogue, 0.56),
    "chain": (chain_dialogue, 0.09),
    "arithmetic": (arithmetic_dialogue, 0.10),
    "chat": (chat_dialogue, 0.205),
    "named": (named_dialogue, 0.01),
    "plain": (plain_dialogue, 0.035),
}
CHINESE_SHARE = 0.45


def make_dialogue(source: Source) -> Dialogue:
    """Return one fresh dialogue of the mixture."""
    makers = [maker for maker, _ in WEIGHTS.values()]
    weights = [weight for _, weight in WEIGHTS.values()]
    language = "zh" if source.chance(CHINESE_SHARE) else "en"
    dialogue = source.random.choices(makers, weights)[0](source, language)
    if dialogue.tools:
        add_system(source, dialogue, share=0.3)
    return dialogue
