"""Servers for the tests: a real vLLM in processes of its own on a CPU, or one in a thread."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "64")
MEMORY = ("--kv-cache-memory-bytes", str(64 << 20))
FAST = {"TORCHDYNAMO_DISABLE": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}


@contextlib.contextmanager
def listening(server):
    """An HTTP server of this process, in a thread until the block ends; it looks every 10 ms
    whether it shall stop."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class VllmProcess(subprocess.Popen):
    """Of ``python -m MODULE ...``; its address is ``url``, what it prints is in ``log``."""

    def __init__(self, log, module, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        given = (*arguments, *FLAGS, *MEMORY, "--host", "127.0.0.1", "--port", str(port))
        with open(log, "wb") as file:
            super().__init__(
                [sys.executable, "-m", module, *given],
                env=os.environ | FAST,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def signal(self, number):
        """Its workers too: they are in its process group."""
        os.killpg(self.pid, number)

    def wait_until_it_answers(self):
        """Or fail with what it said last."""
        while not self.answers():
            assert self.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def answers(self):
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except (OSError, urllib.error.URLError):
            return False

    def requests(self, path):
        """How many requests to a path it has answered with 200, by its log."""
        return self.log.read_text().count(f'"POST {path} HTTP/1.1" 200')


@contextlib.contextmanager
def served_by_vllm(log, module, *arguments):
    """The process; it is killed in the end."""
    process = VllmProcess(log, module, *arguments)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.signal(signal.SIGKILL)
        process.wait()
