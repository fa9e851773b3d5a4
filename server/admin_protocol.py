"""The records of orders to the server: quantize, swap, roll back. `parsing.py` turns bytes into these records.

The options of quantizing are the fields of `QuantizeOptions`: their names, defaults, limits and help exist only there.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

from msgspec import Meta, Struct, defstruct

from lmdserve.engine.quantize.options import QuantizeOptions

from .gate import Gate

DrainTimeout = Annotated[
    float,
    Meta(ge=0, le=3600, description="seconds that running requests get before a swap that drains is given up"),
]
How = Annotated[
    Literal["auto", "beside", "drain"],
    Meta(description="load beside the running checkpoint, or after it is gone; auto: beside where memory allows"),
]
ModelPath = Annotated[str, Meta(min_length=1, max_length=4096)]

NOT_IN_ORDERS = ("work_dir", "resume", "overwrite")  # jobs always resume, and never replace anything


class SwapFields(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every order that may change the checkpoint says about the change. Null is the same as absent."""

    gate: Gate | None = None
    how: How | None = None
    drain_timeout: DrainTimeout | None = None


class SwapOrder(SwapFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /admin/models/swap"""

    model: Annotated[ModelPath, Meta(description="folder of the checkpoint in --models-dir, or demo")]
    dry_run: Annotated[bool, Meta(description="only say what would be done")] | None = None


class RollbackOrder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /admin/models/rollback"""

    how: How | None = None
    drain_timeout: DrainTimeout | None = None


class _QuantizeFields(SwapFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    work_dir: Annotated[ModelPath, Meta(description="new folder in --models-dir for the quantized checkpoint")]
    model: (
        Annotated[ModelPath, Meta(description="folder of the checkpoint in --models-dir, or demo; default: as served")]
        | None
    ) = None
    then: Annotated[Literal["swap"], Meta(description="serve the result, if it passes the gate")] | None = None


def _option_fields() -> list[tuple[str, Any, Any]]:
    """Return the options as optional fields of a record, with their limits and help."""
    kinds = get_type_hints(QuantizeOptions)
    options = [option for option in dataclasses.fields(QuantizeOptions) if option.name not in NOT_IN_ORDERS]
    return [(option.name, _annotated(kinds[option.name], option) | None, None) for option in options]


def _annotated(kind: Any, option: "dataclasses.Field[Any]") -> Any:
    """Return the type of an option's value, None left out, with what is known about it."""
    if type(None) in get_args(kind):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    is_number = kind in (int, float)
    return Annotated[
        kind,
        Meta(
            ge=option.metadata["at_least"] if is_number else None,
            le=option.metadata["at_most"] if is_number else None,
            description=option.metadata["help"] + ("" if option.default is None else f"; default: {option.default}"),
        ),
    ]


if TYPE_CHECKING:

    class QuantizeOrder(_QuantizeFields, frozen=True, kw_only=True):
        """POST /admin/quantize"""
else:
    QuantizeOrder = defstruct(
        "QuantizeOrder", _option_fields(), bases=(_QuantizeFields,), frozen=True, kw_only=True,
        forbid_unknown_fields=True, namespace={"__doc__": "POST /admin/quantize"}, module=__name__,
    )  # fmt: skip


def options_of(order: "QuantizeOrder") -> dict[str, Any]:
    """Return the options of quantizing that an order gives, by name."""
    names = [name for name, _, _ in _option_fields()]
    return {name: value for name in names if (value := getattr(order, name)) is not None}
