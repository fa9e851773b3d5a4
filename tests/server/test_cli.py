"""The command line: options come from the dataclasses, errors are one sentence, and `--help` loads nothing heavy."""

import dataclasses
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from lmdserve.clients import bench
from lmdserve.engine.api import ConfigError
from lmdserve.engine.config import EngineConfig, option
from lmdserve.server import cli
from lmdserve.server.config import ServerConfig
from lmdserve.server.foreign_options import NEEDLESS, OUR_NAMES
from lmdserve.server.loading import EngineLoader
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
        (["--host", "0.0.0.0"], ["unknown option --host: here it is --server-name"]),
        (["--max-model-len=4096"], ["unknown option --max-model-len: here it is --session-len"]),
        (["--trust-remote-code"], ["--trust-remote-code: no code of a checkpoint is run; leave it out"]),
        (["bench", "--trust-remote-code"], ["unknown option --trust-remote-code", "bench --help"]),
        (["serve", "api_server", "/no/such/folder"], ["/no/such/folder"]),
        (["--server-name", "no.such.host.invalid"], ["cannot listen on no.such.host.invalid", "--server-name"]),
        (["--chat-template", "/no/such/file"], ["/no/such/file", "--chat-template"]),
        (["--server-name", ""], ["--server-name is empty", "0.0.0.0"]),
        (["--api-keys", ""], ["--api-keys has a key that is empty"]),
        (["--allow-origins", "example.com"], ["--allow-origins example.com", "https://example.com"]),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_a_taken_port_is_noticed_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("--model", "/no/such/folder", "--server-port", str(port))
    assert (result.returncode, result.stdout) == (2, "")
    assert f"cannot listen on 127.0.0.1 port {port} (Address already in use)" in result.stderr


def test_options_of_other_servers_lead_to_options_of_ours() -> None:
    parser, load_generator = OptionParser(prog="lmdserve"), OptionParser(prog="lmdserve bench")
    for config_type in (EngineConfig, ServerConfig):
        add_options(parser, config_type, title="all")
    bench.add_arguments(load_generator)
    ours = set(parser._option_string_actions)
    assert set(OUR_NAMES.values()) <= ours | set(load_generator._option_string_actions)
    assert not (OUR_NAMES.keys() | NEEDLESS.keys()) & ours


def test_a_missing_tokenizer_is_noticed_before_the_weights_are_read(tmp_path: Path) -> None:
    """A folder that a trainer saved without its tokenizer; the weights here would be an error too, read later."""
    (tmp_path / "config.json").write_text("{}")
    result = run("serve", str(tmp_path), "--server-port", "0")
    assert result.returncode == 2
    assert "neither a tokenizer.json nor a tokenizer.model" in result.stderr


@pytest.mark.parametrize(
    ("number", "pid", "status"),
    [
        (signal.SIGINT, 1234, -signal.SIGINT),
        (signal.SIGINT, 1, 128 + signal.SIGINT),  # a container's first process, which default actions do not end
        (signal.SIGTERM, 1, 128 + signal.SIGTERM),
    ],
)
def test_a_signal_while_a_model_is_loaded_ends_the_process_without_a_word(number: int, pid: int, status: int) -> None:
    """Inside of torch's imports Ctrl-C came out as an ImportError with a long traceback."""
    program = (
        "import os, signal\n"
        "from lmdserve.server import cli\n"
        "own_pid = os.getpid()\n"
        f"os.getpid = lambda: {pid}\n"
        "def load(loader):\n"
        "    try:\n"
        f"        os.kill(own_pid, {int(number)})\n"
        "    except BaseException as error:\n"
        "        raise ImportError from error\n"
        "cli.EngineLoader.load_first = load\n"
        "raise SystemExit(cli.main(['--server-port', '0']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (status, "")


def test_a_model_is_called_by_the_last_part_of_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model .` was served under the name "."."""
    (tmp_path / "chat-7b").mkdir()
    monkeypatch.chdir(tmp_path / "chat-7b")
    for model in (".", "../chat-7b/", str(tmp_path / "chat-7b"), "hub/chat-7b"):
        assert EngineLoader(EngineConfig(model=model), ServerConfig())._name == "chat-7b"


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
