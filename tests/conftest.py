"""Settings of all tests, the flag for the long forms, and a web server for downloads."""
import http.server
import threading
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # the networks are tiny, and sums in the same order are the same bits

hypothesis.settings.register_profile("ddpm", deadline=None, derandomize=True, database=None,
                                     max_examples=50)
hypothesis.settings.load_profile("ddpm")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long forms of the tests too")


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with `files[path]`: bytes, a status, an address to go to, or a function that writes."""
    files: dict = {}
    asked: list = []

    def do_GET(self):
        self.asked.append(self.path)
        answer = self.files.get(self.path, 404)
        if callable(answer):
            answer(self)
        elif isinstance(answer, bytes):
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        else:
            self.send_response(answer if isinstance(answer, int) else 302)
            if isinstance(answer, str):
                self.send_header("Location", answer)
            self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A web server on this machine: its address, the files that it has, what it was asked for."""
    handler = type("Handler", (Server,), {"files": {}, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        handler.address = f"http://127.0.0.1:{httpd.server_port}"
        yield handler
        httpd.shutdown()


@pytest.fixture
def long(request):
    return request.config.getoption("--long")
