"""Claims about downloads, tried on a web server of this process."""

import functools
import http.server
import socket
import threading
import time

import pytest

from keras_usm_lite.data.corpora.download import CorpusUnavailable, download


@pytest.fixture
def server(tmp_path):
    """Serves `tmp_path / "www"` and records the requests."""
    (tmp_path / "www").mkdir()
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, _format, *args):
            requests.append(args[0])

        def do_GET(self):
            if self.path != "/broken.zip":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")  # and hangs up

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "www")
    ) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", tmp_path / "www", requests
        web.shutdown()


def test_a_file_is_downloaded_once(server, tmp_path):
    address, folder, requests = server
    (folder / "corpus.zip").write_bytes(b"content" * 1000)
    cache = tmp_path / "cache"
    path = download(f"{address}/corpus.zip", str(cache))
    assert path == str(cache / "corpus.zip")
    assert (cache / "corpus.zip").read_bytes() == b"content" * 1000
    count = len(requests)
    assert download(f"{address}/corpus.zip", str(cache)) == path
    assert len(requests) == count > 0


def test_what_an_interrupted_download_left_is_not_used(server, tmp_path):
    address, folder, _ = server
    (folder / "corpus.zip").write_bytes(b"whole")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "corpus.zip.partial").write_bytes(b"wh")
    download(f"{address}/corpus.zip", str(cache))
    assert [path.name for path in cache.iterdir()] == ["corpus.zip"]
    assert (cache / "corpus.zip").read_bytes() == b"whole"


def test_a_refusal_is_reported_with_the_address_and_leaves_nothing(server, tmp_path):
    with pytest.raises(CorpusUnavailable, match=r"nothing\.zip .*404.*`source`"):
        download(f"{server[0]}/nothing.zip", str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_connection_that_breaks_leaves_nothing_that_looks_downloaded(server, tmp_path):
    address, folder, _ = server
    (folder / "broken.zip").write_bytes(b"whole")
    with pytest.raises(CorpusUnavailable, match=r"broken\.zip"):
        download(f"{address}/broken.zip", str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_server_is_reported_at_once_in_one_line(tmp_path):
    start = time.monotonic()
    with pytest.raises(CorpusUnavailable) as caught:
        download("http://127.0.0.1:9/corpus.zip", str(tmp_path))
    assert time.monotonic() - start < 2
    assert "\n" not in str(caught.value) and isinstance(caught.value, OSError)


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_usm_lite.data.corpora.download._PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(CorpusUnavailable, match="timed out"):
            download(f"http://127.0.0.1:{silent.getsockname()[1]}/corpus.zip", str(tmp_path))
    assert socket.getdefaulttimeout() is None
