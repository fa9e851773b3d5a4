"""Before any test imports torch: its threads wait as they do in the server."""

from lmdserve.engine.cpu_threads import wait_patiently

wait_patiently()
