"""One server for the whole run of this folder; it must stop cleanly and log no traceback."""

from collections.abc import Iterator

import pytest
from server_process import ServerProcess


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    process = ServerProcess()
    yield process
    status = process.stop()
    log = process.log()
    process.close()
    assert status == 0, log
    assert "Traceback" not in log, log
