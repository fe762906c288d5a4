"""WARC archives as servers and crawlers fill them: odd charsets, coded bodies, damage."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import pytest

from data_prep import warc
from data_prep.config import Source
from data_prep.readers import Damaged, read_records

pytest.importorskip("fastwarc")
pytest.importorskip("resiliparse")

TEXT = "A paragraph of words. " * 20
PAGE = f"<html><body><main><p>{TEXT}</p></main></body></html>".encode()


def response(body: bytes, *headers: str, name: str = "1") -> bytes:
    if not any(header.startswith("Content-Type") for header in headers):
        headers = ("Content-Type: text/html", *headers)
    payload = "".join(f"{line}\r\n" for line in ("HTTP/1.1 200 OK", *headers, "")).encode() + body
    lines = ("WARC/1.0", "WARC-Type: response", f"WARC-Record-ID: <urn:uuid:{name}>")
    lines += ("Content-Type: application/http; msgtype=response", f"Content-Length: {len(payload)}", "", "")
    return "\r\n".join(lines).encode() + payload + b"\r\n\r\n"


def read(path: Path) -> tuple[list[str | None], Damaged | None]:
    texts: list[str | None] = []
    try:
        for record in read_records(path, Source(name="s", path="x", format="warc")):
            texts.append(record.text and record.text.strip())
    except Damaged as error:
        return texts, error
    return texts, None


def chunked(body: bytes) -> bytes:
    first = b"%x;note=1\r\n%s\r\n" % (20, body[:20])
    return first + b"%X\r\n%s\r\n0\r\n\r\n" % (len(body) - 20, body[20:])


def bare_deflate(body: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(body) + stream.flush()


CHARSETS = ["none", "foo-bar", "'utf-8, utf-8'", "utf-8, utf-8", "hex", "base64", "unicode_escape", "utf-7", "é"]


@pytest.mark.parametrize("charset", CHARSETS)
def test_a_charset_that_no_browser_knows_is_utf8(tmp_path, charset):
    page = PAGE.replace(b"words", b"words \\ud800 +2AA- \xc3\xa9")
    path = tmp_path / "f.warc"
    path.write_bytes(response(page, f"Content-Type: text/html; charset={charset}") + response(PAGE))
    texts, damage = read(path)
    assert damage is None and texts[1] == TEXT.strip()
    assert texts[0] is not None and texts[0].encode() and "words \\ud800 +2AA- é" in texts[0]


GZIP, DEFLATE, CHUNKED = "Content-Encoding: gzip", "Content-Encoding: deflate", "Transfer-Encoding: chunked"
CODED = {
    "gzip": (gzip.compress(PAGE), GZIP),
    "two members": (gzip.compress(PAGE[:90]) + gzip.compress(PAGE[90:]), "Content-Encoding: x-gzip"),
    "deflate": (zlib.compress(PAGE), DEFLATE),
    "bare deflate": (bare_deflate(PAGE), DEFLATE),
    "chunked": (chunked(PAGE), CHUNKED),
    "gzip, chunked": (chunked(gzip.compress(PAGE)), GZIP, CHUNKED),
    "gzip twice": (gzip.compress(gzip.compress(PAGE)), "content-encoding: gzip, gzip"),
    "identity": (PAGE, "Content-Encoding: identity"),
    "decoded by the crawler": (PAGE, GZIP, CHUNKED),
    "inflated by the crawler": (PAGE, DEFLATE),
    "a charset as the coding": (PAGE, "Content-Encoding: utf-8"),
    "decoded br": (PAGE, "Content-Encoding: br"),
}


@pytest.mark.parametrize("coding", CODED)
def test_bodies_are_decoded(tmp_path, coding):
    body, *headers = CODED[coding]
    path = tmp_path / "f.warc.gz"
    path.write_bytes(gzip.compress(response(body, *headers)) + gzip.compress(response(PAGE)))
    assert read(path) == ([TEXT.strip()] * 2, None)


BAD = {
    "a cut gzip": (gzip.compress(PAGE)[:-12], GZIP),
    "a damaged gzip": (gzip.compress(PAGE)[:20] + b"\xff" * 20, GZIP),
    "a cut deflate": (zlib.compress(PAGE)[:-6], DEFLATE),
    "what is no deflate": (b"\xff" * 40, DEFLATE),
    "cut chunks": (chunked(PAGE)[:-20], CHUNKED),
    "an unknown coding": (b"\x8b\x03\x80abc\x03", "Content-Encoding: br"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_body_that_cannot_be_decoded_is_a_bad_record(tmp_path, case):
    body, *headers = BAD[case]
    path = tmp_path / "f.warc"
    path.write_bytes(response(body, *headers) + response(PAGE))
    assert read(path) == ([None, TEXT.strip()], None)


def test_a_body_that_unpacks_to_too_much_is_a_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(warc, "_BODY_BYTES", 10_000)
    path = tmp_path / "f.warc"
    path.write_bytes(response(gzip.compress(PAGE + b" " * 10**6), GZIP) + response(gzip.compress(PAGE), GZIP))
    assert read(path) == ([None, TEXT.strip()], None)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_what_is_no_warc_is_damage(tmp_path, pack):
    path = tmp_path / ("f.warc" if pack is bytes else "f.warc.gz")
    path.write_bytes(pack(b"hello\nworld\n" * 100))
    texts, damage = read(path)
    assert texts == [] and "bad warc data" in str(damage)
    path.write_bytes(pack(response(PAGE)) + pack(b"GARBAGE" * 20 + b"\r\n\r\n") + pack(response(PAGE)))
    texts, damage = read(path)
    assert texts == [TEXT.strip()] and "bad warc data" in str(damage)


def test_a_record_cut_at_any_byte_is_damage(tmp_path):
    """A short page would be taken for the whole one; a short head would be passed over."""
    path = tmp_path / "f.warc"
    image = response(b"x" * 50, "Content-Type: image/png")
    whole = response(PAGE)
    for last in (image, whole):
        for size in range(1, len(last) - 4):
            path.write_bytes(whole + last[:size])
            texts, damage = read(path)
            assert texts == [TEXT.strip()] and damage is not None, size
    path.write_bytes(whole + image)
    assert read(path) == ([TEXT.strip()], None)


def test_a_fault_of_the_disk_is_no_damage(tmp_path, monkeypatch):
    def broken(*_: object):
        yield response(PAGE)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("data_prep.readers.blocks", broken)
    (tmp_path / "f.warc").write_bytes(b"x")
    with pytest.raises(OSError, match="Input/output"):
        read(tmp_path / "f.warc")
