"""How a format writes calls, as data: what stands around a call's name and arguments. The formats fill it in."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How a format writes calls. Control tokens are spelled out; one that the model lacks is text.

    A reply's calls are `opener` `list_begin` call (`separator` [`opener`] call)* `list_end`, and a call is
    `before_name` name `after_name` arguments `after_arguments`.
    """

    opener: str = ""  # one control token, or its spelling; "": calls begin with a bracket
    before_name: str = ""
    after_name: str = ""
    after_arguments: str = ""
    separator: str = ""
    repeats_opener: bool = True
    may_be_spaced: bool = False  # a space may stand before `list_begin`
    list_begin: str = ""
    list_end: str = ""
    quotes_name: bool = True
    may_have_id: bool = False  # a last member `"id": "..."` of nine letters and digits
    before_code: str | None = None  # what stands before and after the interpreter's code; None: it takes none
    after_code: str = ""
    code_opener: str = ""  # a control token behind which code may stand in place of calls
