"""The command line: options come from the dataclasses, errors are one sentence, and `--help` loads nothing heavy."""

import dataclasses
import subprocess
import sys
from typing import Literal

import pytest

from lmdserve.engine.api import ConfigError
from lmdserve.engine.config import EngineConfig, option
from lmdserve.server import cli
from lmdserve.server.config import ServerConfig
from lmdserve.server.options import OptionParser, add_options, read_options

LMDEPLOY_OPTIONS = """
    --model-name --model-format --quant-policy --cache-max-entry-count --session-len --max-batch-size
    --max-prefill-token-num --cache-block-seq-len --server-name --server-port --tp --api-keys --log-level
    --dtype --device --enable-prefix-caching --no-enable-prefix-caching --chat-template --revision
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One field of every kind that the option dataclasses use."""

    name: str | None = option(None, "a name")
    count: int = option(3, "a count of 100%")
    share: float = option(0.5, "a share")
    bits: Literal[0, 4, 8] = option(0, "bits")
    keys: tuple[str, ...] = option((), "keys")
    fast: bool = option(True, "be fast")


def parse(*arguments: str) -> Example:
    parser = OptionParser(prog="example")
    add_options(parser, Example, title="example")
    return read_options(Example, parser.parse_known(arguments))


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "lmdserve", *arguments], capture_output=True, text=True, timeout=60)


def test_defaults_are_the_dataclass_defaults() -> None:
    assert parse() == Example()


def test_every_kind_of_field_is_read() -> None:
    arguments = ["--name", "n", "--count", "7", "--share", "0.25", "--bits", "8", "--keys", "a", "b", "--no-fast"]
    expected = Example(name="n", count=7, share=0.25, bits=8, keys=("a", "b"), fast=False)
    assert parse(*arguments) == expected


def test_underscores_are_read_as_dashes_in_names_but_not_in_values() -> None:
    parser = OptionParser(prog="example")
    add_options(parser, EngineConfig, title="engine")
    config = read_options(EngineConfig, parser.parse_known(["--quant_policy", "4", "--model=my_model"]))
    assert (config.quant_policy, config.model) == (4, "my_model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantpolicy", "4"], ["--quantpolicy", "--quant-policy"]),
        (["--quant-policy", "5"], ["--quant-policy", "'5'", "0, 4, 8"]),
        (["--dtype", "bfloat"], ["--dtype", "bfloat16"]),
        (["--server-port", "70000"], ["--server-port", "70000", "65535"]),
        (["--max-batch-size", "0"], ["--max-batch-size", "1 or more"]),
        (["--session-len", "many"], ["--session-len", "many"]),
        (["srve"], ["srve", "serve"]),
        (["--model", "/no/such/folder"], ["/no/such/folder"]),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_help_names_every_option_users_of_lmdeploy_type() -> None:
    text = run("--help").stdout
    missing = [name for name in LMDEPLOY_OPTIONS.split() if name not in text]
    assert missing == []


def test_help_and_version_import_neither_torch_nor_aiohttp() -> None:
    program = (
        "import sys\nfrom lmdserve.server.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted(set(sys.modules) & {'torch', 'aiohttp', 'transformers', 'jinja2', 'msgspec', 'uvloop'}))"
    )
    for argument in ("--help", "--version"):
        result = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True, timeout=60)
        assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_bounds_hold_for_python_callers_too() -> None:
    with pytest.raises(ConfigError, match="--session-len is 1; give 2 or more"):
        EngineConfig(session_len=1)
    with pytest.raises(ConfigError, match="--server-port is -1"):
        ServerConfig(server_port=-1)


def test_api_keys_come_from_the_option_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMDSERVE_API_KEYS", "b, c,,a")
    config = cli._with_keys_from_environment(ServerConfig(api_keys=("a",)))
    assert config.api_keys == ("a", "b", "c")


def test_a_hung_step_does_not_keep_the_process_alive() -> None:
    """An engine thread that never returns once made SIGTERM wait for ever at the interpreter's exit."""
    program = (
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from lmdserve.engine.api import ENGINE_THREAD_PREFIX\n"
        "from lmdserve.server.cli import _run\n"
        "async def main():\n"
        "    ThreadPoolExecutor(1, thread_name_prefix=ENGINE_THREAD_PREFIX).submit(threading.Event().wait)\n"
        "    return 3\n"
        "raise SystemExit(_run(main()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert result.returncode == 3, result.stderr
