"""A worker that does what `worker.json` in the model's folder says, a step after another, instead of quantizing.

Steps: ["say", object] prints a line, ["print", text] too, ["complain", text] on stderr, ["write", name, text] a file in
the output, ["copy", name] one from the model, ["wait", path] until that exists, ["ignore_sigterm"], ["exit", status],
["kill"] itself. A file `attempts` in the model's folder gets a line with the arguments of each run.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    parent, *limit, model = sys.argv[1 : 5 if "--gpu-bytes" in sys.argv else 3]
    folder, output = Path(model), Path(next(a for a in sys.argv if a.startswith("--work-dir=")).partition("=")[2])
    assert int(parent) == os.getppid()
    with (folder / "attempts").open("a") as file:
        file.write(json.dumps([os.getpid(), *limit, *sys.argv[3 + len(limit) :]]) + "\n")
    output.mkdir(exist_ok=True)
    for action, *values in json.loads((folder / "worker.json").read_text()):
        perform(action, values, folder, output)


def perform(action: str, values: list[str], folder: Path, output: Path) -> None:
    match action:
        case "say":
            print(json.dumps(values[0]), flush=True)
        case "print":
            print(values[0], flush=True)
        case "complain":
            print(values[0], file=sys.stderr, flush=True)
        case "write":
            (output / values[0]).write_text(values[1])
        case "copy":
            shutil.copy(folder / values[0], output)
        case "wait":
            while not Path(values[0]).exists():
                time.sleep(0.01)
        case "ignore_sigterm":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "exit":
            sys.exit(int(values[0]))
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


main()
