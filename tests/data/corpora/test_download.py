"""Claims about downloads, tried on a web server of this process."""

import functools
import http.server
import os
import pathlib
import socket
import threading
import time
import zipfile

import keras
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


def write_zip(path, text="content"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("corpus.txt", text)
    return path.read_bytes()


def test_a_file_is_downloaded_once(server, tmp_path):
    address, folder, requests = server
    content = write_zip(folder / "corpus.zip", "content" * 1000)
    cache = tmp_path / "cache"
    path = download(f"{address}/corpus.zip", str(cache))
    assert path == str(cache / "corpus.zip")
    assert (cache / "corpus.zip").read_bytes() == content
    count = len(requests)
    assert download(f"{address}/corpus.zip", str(cache)) == path
    assert len(requests) == count > 0


def test_what_an_interrupted_download_left_is_not_used(server, tmp_path):
    address, folder, _ = server
    content = write_zip(folder / "corpus.zip")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "corpus.zip").write_bytes(content[:-30])
    download(f"{address}/corpus.zip", str(cache))
    assert [path.name for path in cache.iterdir()] == ["corpus.zip"]
    assert (cache / "corpus.zip").read_bytes() == content


def test_what_is_no_archive_is_refused_and_not_kept(server, tmp_path):
    address, folder, _ = server
    (folder / "corpus.zip").write_text("<html>please log in</html>")
    with pytest.raises(CorpusUnavailable, match=r"corpus\.zip .*no zip or tar file, perhaps a login page.*`source`"):
        download(f"{address}/corpus.zip", str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []
    content = write_zip(folder / "corpus.zip")
    assert pathlib.Path(download(f"{address}/corpus.zip", str(tmp_path / "cache"))).read_bytes() == content


def test_a_process_that_starts_meanwhile_disturbs_nothing(server, tmp_path, monkeypatch):
    address, folder, _ = server
    content, cache, fetch = write_zip(folder / "corpus.zip"), str(tmp_path / "cache"), keras.utils.get_file

    def fetch_with_a_rival(*args, **kwargs):
        monkeypatch.setattr(keras.utils, "get_file", fetch)
        fetched = fetch(*args, **kwargs)
        assert pathlib.Path(download(f"{address}/corpus.zip", cache)).read_bytes() == content
        return fetched

    monkeypatch.setattr(keras.utils, "get_file", fetch_with_a_rival)
    assert pathlib.Path(download(f"{address}/corpus.zip", cache)).read_bytes() == content
    assert os.listdir(cache) == ["corpus.zip"]


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
