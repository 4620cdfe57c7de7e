"""Settings of all tests, the flag for the long forms, and a web server for downloads."""
import contextlib
import http.server
import multiprocessing
import os
import signal
import threading
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import simulated_cuda  # noqa: F401  (before torch)

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("helpers")
import helpers
from support import checkpoint, data
from unet import build_network

torch.backends.cudnn.allow_tf32 = False  # float32 is compared with the decimals of float32
torch.set_num_threads(1)  # the networks are tiny, and sums in the same order are the same bits

hypothesis.settings.register_profile("ddpm", deadline=None, derandomize=True, database=None,
                                     max_examples=50)
hypothesis.settings.load_profile("ddpm")


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long forms of the tests too")
    parser.addoption("--skipped-to", metavar="FILE", help="write the names of skipped tests to FILE")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: a test that runs only with --long")


def pytest_collection_modifyitems(config, items):
    """Without --long, the tests that are marked so are no part of the run."""
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("long")])
        items[:] = [i for i in items if not i.get_closest_marker("long")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """With two cores, two processes take the files of tests in turn: this one and a copy of it, which
    sends its reports. (Each test computes in one thread.)"""
    config, files = session.config, {}
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    if (not hasattr(os, "fork") or (os.cpu_count() or 1) < 2 or len(files) < 5 or session.testsfailed
            or config.option.collectonly or config.option.maxfail or config.option.usepdb):
        return None
    files = sorted(files.values(), key=lambda items: -items[0].path.stat().st_size)
    taken, (here, there) = multiprocessing.Value("i", 0), multiprocessing.Pipe(duplex=False)
    child = os.fork()

    def run(after) -> None:
        while True:
            with taken:
                taken.value += 1
                i = taken.value - 1
            if i >= len(files):
                return
            for item, following in zip(files[i], [*files[i][1:], None]):
                config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                after()

    if not child:
        class Sends:
            def pytest_runtest_logreport(self, report):
                there.send(config.hook.pytest_report_to_serializable(config=config, report=report))
        capture = config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()
        capture.start_global_capturing()
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(Sends())
        try:
            run(lambda: None)
            there.send(None)
        finally:
            os._exit(0)
    there.close()

    def receive() -> bool:
        if (sent := here.recv()) is not None:
            report = config.hook.pytest_report_from_serializable(config=config, data=sent)
            config.hook.pytest_runtest_logreport(report=report)
        return sent is not None
    going = [True]

    def look() -> None:
        while going[0] and here.poll():
            going[0] = receive()
    try:
        run(look)
        while going[0]:  # EOFError if it died
            going[0] = receive()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return True


def pytest_terminal_summary(terminalreporter, config):
    """What was skipped here can be run where the packages are that it needs (see .ci/run)."""
    if path := config.getoption("--skipped-to"):
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{r.nodeid}\n" for r in terminalreporter.stats.get("skipped", []))


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
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        handler.address = f"http://127.0.0.1:{httpd.server_port}"
        yield handler
        httpd.shutdown()


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """The folder of the test is a new one, with small images in it."""
    monkeypatch.chdir(tmp_path)
    torch.save(data.shapes(64, 8), "images.pt")


@pytest.fixture
def run(in_a_folder_of_its_own):
    """A run whose networks are random, in that folder."""
    return helpers.random_run()


@pytest.fixture(scope="session")
def small():
    """A network that no training has touched."""
    settings = helpers.SMALL_NET
    return checkpoint.Trained(build_network(settings).eval(), checkpoint.build_schedule(settings), settings, "a source")


@pytest.fixture
def long(request):
    return request.config.getoption("--long")
