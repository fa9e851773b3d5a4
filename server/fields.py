"""The request fields that no record declares: which are harmless, and which would change the answer.

The rule for a field that we do not honour:
* it is known to change nothing in the answer (`HARMLESS`): accepted;
* it is known to change the answer (`REFUSED`): a 400 that names it, unless its value is the one that changes nothing;
* it is unknown but nearly spells a field we know: a 400 that asks for the right spelling;
* anything else: accepted, as clients attach fields of their own.
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from .errors import BadRequestError, UnsupportedFieldError

MAX_FIELDS = 256  # of one request; more are not a client's work, and each unknown one costs a spell check
TYPO_SIMILARITY = 0.85  # difflib's ratio: "temprature" is 0.95 like temperature, "model_name" 0.67 like model

HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "prediction",
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "moderation",
    "spaces_between_special_tokens",
})  # fmt: skip
"""Accepted without effect. They label, bill or speed up a request; none of them changes the answer's text."""


class Refused(NamedTuple):
    """A field that changes the answer: the values under which it does not, and what to do instead."""

    no_op_values: tuple[Any, ...]
    advice: str


_GRAMMAR = Refused((), "use response_format, regex, grammar or choice")
_TEXT_ONLY = Refused((), "this server reads and writes text only")
_USE_TOOLS = Refused((), "it is deprecated; use tools and tool_choice")
_NO_SAMPLER = "this sampling method is not supported; leave it out"

REFUSED: Mapping[str, Refused] = {
    # OpenAI
    "functions": Refused(([],), _USE_TOOLS.advice),
    "function_call": Refused(("none",), _USE_TOOLS.advice),
    "audio": _TEXT_ONLY,
    "modalities": Refused((["text"],), _TEXT_ONLY.advice),
    "reasoning_effort": Refused(("none",), "the served model has no reasoning effort to set"),
    "verbosity": Refused(("medium",), "the served model has no verbosity to set; ask for it in the prompt"),
    "web_search_options": Refused((), "this server does not search the web"),
    "best_of": Refused((1,), "use n and choose among the choices"),
    "suffix": Refused(("",), "inserting before a suffix is not supported"),
    # constrained output, by any of its names
    **dict.fromkeys(
        ("guided_decoding_backend", "guided_whitespace_pattern", "json_schema", "structural_tag", "ebnf"), _GRAMMAR
    ),
    "stop_regex": Refused((), "use stop"),
    # other samplers, at values that change something
    "use_beam_search": Refused((False,), _NO_SAMPLER),
    "length_penalty": Refused((1, 1.0), _NO_SAMPLER),
    "early_stopping": Refused((False,), _NO_SAMPLER),
    "typical_p": Refused((1, 1.0), _NO_SAMPLER),
    "tfs_z": Refused((1, 1.0), _NO_SAMPLER),
    "mirostat": Refused((0,), _NO_SAMPLER),
    "xtc_probability": Refused((0, 0.0), _NO_SAMPLER),
    "dry_multiplier": Refused((0, 0.0), _NO_SAMPLER),
    "repetition_ngram_size": Refused((0,), _NO_SAMPLER),
    "repetition_ngram_threshold": Refused((0,), _NO_SAMPLER),
    "repetition_detection": Refused((), _NO_SAMPLER),
    "no_repeat_ngram_size": Refused((0,), _NO_SAMPLER),
    "do_sample": Refused((True,), "send temperature: 0 for greedy decoding"),
    "logits_processors": Refused(([],), _NO_SAMPLER),
    "bad_words": Refused(([],), "use logit_bias with -100"),
    "bad_token_ids": Refused(([],), "use logit_bias with -100"),
    "allowed_token_ids": Refused((), "use logit_bias"),
    "thinking_token_budget": Refused((), "reasoning has no budget of its own; use max_tokens"),
    "enable_thinking": Refused((), "use chat_template_kwargs"),
    "include_reasoning": Refused((True,), "reasoning is always part of the reply; leave it unread"),
    "separate_reasoning": Refused((True,), "reasoning is never part of the content"),
    "stream_reasoning": Refused((True,), "a stream carries reasoning as it is generated"),
    # other spellings
    "max_new_tokens": Refused((), "use max_tokens"),
    "max_length": Refused((), "use max_tokens"),
    "n_predict": Refused((-1,), "use max_tokens"),
    "n_cmpl": Refused((1,), "use n"),
    "random_seed": Refused((), "use seed"),
    "repeat_penalty": Refused((1, 1.0), "use repetition_penalty"),
    "stop_words": Refused(([],), "use stop"),
    # fields of the other of our two routes
    "messages": Refused((), "use /v1/chat/completions"),
    "tools": Refused(([],), "use /v1/chat/completions"),
    "tool_choice": Refused(("none",), "use /v1/chat/completions"),
    "parallel_tool_calls": Refused((True,), "use /v1/chat/completions"),
    "chat_template_kwargs": Refused(({},), "use /v1/chat/completions"),
    "max_completion_tokens": Refused((), "use max_tokens"),
    "top_logprobs": Refused((0,), "use logprobs"),
    "prompt": Refused((), "use /v1/completions"),
    "echo": Refused((False,), "use /v1/completions"),
    # what the prompt or the answer consists of
    "input_ids": Refused((), "send token ids as the prompt of /v1/completions"),
    "prompt_token_ids": Refused((), "send token ids as the prompt of /v1/completions"),
    "prompt_embeds": _TEXT_ONLY,
    "image_data": _TEXT_ONLY,
    "mm_processor_kwargs": Refused(({},), _TEXT_ONLY.advice),
    "media_io_kwargs": Refused(({},), _TEXT_ONLY.advice),
    "documents": Refused(([],), "put them into a message"),
    "chat_template": Refused((), "the server's template is chosen with --chat-template"),
    "do_preprocess": Refused((True,), "use /v1/completions for a prompt without a template"),
    "add_generation_prompt": Refused((True,), "use /v1/chat/completions"),
    "continue_final_message": Refused((False,), "use /v1/chat/completions"),
    "add_special_tokens": Refused((False,), "send token ids as the prompt of /v1/completions"),
    "truncate_prompt_tokens": Refused((), "shorten the prompt"),
    "skip_special_tokens": Refused((True,), "control tokens are never part of the text"),
    "include_stop_str_in_output": Refused((False,), "stop strings are never part of the text"),
    "prompt_logprobs": Refused((), "use echo and logprobs of /v1/completions"),
    "return_token_ids": Refused((False,), "answers carry text only"),
    "return_tokens_as_token_ids": Refused((False,), "answers carry text only"),
    "return_logprob": Refused((False,), "use logprobs"),
    "return_routed_experts": Refused((False,), "the served model has no experts"),
    # whom the request is served by, and when
    "session_id": Refused((-1,), "send the whole conversation as messages"),
    "priority": Refused((0,), "requests are served in order of arrival"),
    "cache_salt": Refused((), "the prefix cache is shared by all clients"),
    "adapter_name": Refused((), "adapters are not supported"),
    "lora_path": Refused((), "adapters are not supported"),
    "kv_transfer_params": Refused((), "requests cannot be moved between servers"),
}  # fmt: skip
"""Fields of OpenAI, vLLM, SGLang, LMDeploy and llama.cpp that change the answer and that no record declares."""

REFUSED_IN_MESSAGES: Mapping[str, Refused] = {
    "audio": _TEXT_ONLY,
    "function_call": Refused((), "it is deprecated; use tool_calls"),
}


def check_undeclared(body: Mapping[str, Any], declared: Collection[str]) -> None:
    """Raise a BadRequestError for the first field of `body` that is neither declared nor safe to accept."""
    if len(body) > MAX_FIELDS:
        raise BadRequestError(f"the body has {len(body)} fields, and at most {MAX_FIELDS} are read", param="body")
    for name, value in body.items():
        if name in declared or name in HARMLESS:
            continue
        if name in REFUSED:
            _refuse_unless_no_op(name, value, REFUSED[name])
        else:
            _refuse_typo(name, declared)
    messages = body.get("messages")
    for position, message in enumerate(messages if isinstance(messages, list) else ()):
        for name in REFUSED_IN_MESSAGES.keys() & (message if isinstance(message, dict) else {}).keys():
            _refuse_unless_no_op(f"messages[{position}].{name}", message[name], REFUSED_IN_MESSAGES[name])


def _refuse_unless_no_op(param: str, value: Any, refused: Refused) -> None:
    if value is None or any(type(value) is type(no_op) and value == no_op for no_op in refused.no_op_values):
        return
    raise UnsupportedFieldError(f"{param} is not supported: {refused.advice}", param=param)


def _refuse_typo(name: str, declared: Collection[str]) -> None:
    nearest = difflib.get_close_matches(name, declared, n=1, cutoff=TYPO_SIMILARITY)
    if nearest:
        raise BadRequestError(
            f"{name[:80]} is not a field of this request; did you mean {nearest[0]}?", param=name[:80]
        )
