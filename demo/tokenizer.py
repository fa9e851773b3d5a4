"""Trains the demo model's tokenizer: a byte-level BPE in which a word is cut the same way wherever it stands.

Copying is the skill of this model, so the pieces never join a word with its surroundings: spaces, line ends, digits,
Chinese characters and most marks stand alone; runs of letters are cut by BPE; the few marks that JSON writes together
(such as `": "`) are one piece. Everything else falls back to bytes, so any text can be copied.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .corpus.chat import chat_dialogue
from .corpus.dialogue import CONTROL_TOKENS, render
from .corpus.mixture import make_dialogue
from .corpus.source import Source, Split

JSON_MARKS = ('"}, "', '": {"', '": ["', '": "', '": ', '", "', '{"', '"]}', '"}', '"]')
PIECES = "|".join(
    [
        *(mark.replace("{", r"\{").replace("}", r"\}").replace("[", r"\[").replace("]", r"\]") for mark in JSON_MARKS),
        r"[A-Za-z]+",
        r"[\s\S]",
    ]
)
FIRST_IDS = ("<unk>", "<s>", "</s>")  # as in InternLM2; its six control tokens come last, as there too


def train(num_dialogues: int, vocab_size: int) -> Tokenizer:
    """Return a tokenizer trained on fresh dialogues, control tokens at the end of the vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        special_tokens=list(FIRST_IDS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(num_dialogues), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {vocab_size}: train on more dialogues"
        )
    return tokenizer


def _texts(num_dialogues: int) -> Iterator[str]:
    source = Source(0, Split.TRAIN)
    for index in range(num_dialogues):
        # Chat is a small share of the corpus, and most of what its readers see: every third text is Chinese chat.
        text = render(chat_dialogue(source, "zh") if index % 3 == 0 else make_dialogue(source))
        for token in (*CONTROL_TOKENS, "<s>", "</s>"):
            text = text.replace(token, "\n")
        yield text


def tokenizer_config(tokenizer: Tokenizer, chat_template: str) -> dict[str, object]:
    """Return the contents of tokenizer_config.json in the hub's form."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in (*FIRST_IDS, *CONTROL_TOKENS)
    }
    return {
        "added_tokens_decoder": added,
        "additional_special_tokens": [
            "<|im_start|>",
            "<|im_end|>",
            "<|action_start|>",
            "<|action_end|>",
            "<|interpreter|>",
            "<|plugin|>",
        ],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--dialogues", type=int, default=40_000)
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(options.dialogues, options.vocab_size)
    tokenizer.save(str(options.out / "tokenizer.json"), pretty=False)
    config = tokenizer_config(tokenizer, CHAT_TEMPLATE)
    (options.out / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
