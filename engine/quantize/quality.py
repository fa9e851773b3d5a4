"""What a checkpoint answers compared with the 16-bit model: figures, their errors, and how people are shown them.

Who measures is `evaluation.py`. Ratios are fractions (0.01 is one percent); a number that was not finite is null, so a
gate must refuse null. Errors are standard errors of the mean over windows of text, null when there was one. No torch.
"""

import msgspec

QUALITY_HEAD = ("weights", "KV bits", "perplexity", "increase", "KL nats/token", "same top token")
NUM_OWN_CELLS = 3  # of QUALITY_HEAD, which need no other model


class QualityRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one combination of weights and KV cache answers, against 16-bit weights with a 16-bit cache."""

    weights: str  # "16-bit" or "4-bit"
    kv_bits: int
    perplexity: float | None
    # null, too, where nothing was compared with
    perplexity_increase: float | None = None  # perplexity / the 16-bit model's - 1
    perplexity_increase_error: float | None = None
    kl_divergence: float | None = None  # nats a token, of this model's next-token distribution from the 16-bit model's
    kl_divergence_error: float | None = None
    top1_agreement: float | None = None  # share of tokens whose likeliest next token is the 16-bit model's


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, and on how much text."""

    text: str
    num_tokens: int
    rows: list[QualityRow]


def quality_cells(row: QualityRow) -> tuple[str, ...]:
    """Return a row's numbers as QUALITY_HEAD names them."""
    return (
        row.weights,
        str(row.kv_bits),
        _number(row.perplexity, ".4f"),
        with_error(row.perplexity_increase, row.perplexity_increase_error, "+.2%", ".2%"),
        with_error(row.kl_divergence, row.kl_divergence_error, ".2e", ".0e"),
        _number(row.top1_agreement, ".2%"),
    )


def with_error(value: float | None, error: float | None, form: str, error_form: str) -> str:
    """Return a number with its error where that is known."""
    return _number(value, form) + ("" if value is None or error is None else f" ± {error:{error_form}}")


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
