"""`lmdserve convert SRC OUT --to FORMAT`: options -> a conversion -> a line that tells what was written.

What is converted into what is `engine/convert.py`'s business.
"""

from collections.abc import Sequence
from pathlib import Path

from lmdserve.engine.convert_options import ConvertOptions
from lmdserve.engine.torch_setup import prepare_torch

from .options import OptionParser, add_options, read_options


def convert(arguments: Sequence[str]) -> int:
    """`lmdserve convert SRC OUT --to FORMAT`."""
    parser = OptionParser(prog="lmdserve convert", usage="lmdserve convert SRC OUT --to FORMAT [options]")
    parser.add_argument("source", metavar="SRC", help="local folder or hub name of a checkpoint")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write, which must not exist yet")
    parser.add_argument("--revision", help="branch, tag or commit, for a hub name")
    add_options(parser, ConvertOptions, title="conversion")
    namespace = parser.parse_known(arguments)
    options = read_options(ConvertOptions, namespace)
    prepare_torch()
    from lmdserve.engine.convert import convert_checkpoint
    from lmdserve.engine.model_folder import resolve_model_folder

    output: Path = namespace.output
    written = convert_checkpoint(resolve_model_folder(namespace.source, namespace.revision), output, options)
    print(
        f"{output}: {options.to}, {written.num_linears} linears converted, {written.num_bytes / 1e9:.2f} GB; "
        f"lmdserve --model {output}"
    )
    return 0
