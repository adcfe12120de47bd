"""The page as a browser shows it: light and dark, and no wider than a phone. Skipped where there is no Chromium."""

import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from veritune.report import page

BROWSER = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
PHONE = 390


def browse(*flags: str) -> str:
    """Runs headless Chromium and gives what it prints."""
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def corner(png: Path) -> tuple[int, ...]:
    """Red, green and blue of a PNG's first pixel, which no filter changes."""
    data, at, packed = png.read_bytes(), 8, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += length + 12
    return tuple(zlib.decompress(packed)[1:4])


@pytest.fixture(scope="module")
def html(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    page.report([finished], out)
    return out


@pytest.mark.parametrize(
    ("scheme", "colour"), [(1, (0xF6, 0xF6, 0xF3)), (0, (0x14, 0x14, 0x13))], ids=["light", "dark"]
)
def test_it_follows_the_readers_scheme(html: Path, tmp_path: Path, scheme: int, colour: tuple[int, ...]) -> None:
    shot = tmp_path / "shot.png"
    flags = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1000,800", f"--screenshot={shot}")
    browse(*flags, html.as_uri())
    assert corner(shot) == colour


def test_nothing_is_wider_than_a_phone_and_every_chart_is_seen(html: Path, tmp_path: Path) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"""<iframe src="{html.as_uri()}" width="{PHONE}" height="800" style="border:0"></iframe><p></p><script>
        onload = () => {{
          const of = document.querySelector("iframe").contentDocument;
          const charts = [...of.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
          const hidden = charts.filter(box => box.width < 200 || box.height < 40).length;
          document.querySelector("p").textContent = "found " + of.documentElement.scrollWidth + " " + charts.length +
            " " + hidden;
        }}</script>""",
        encoding="utf-8",
    )
    flags = ("--disable-web-security", "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}")
    text = browse(*flags, "--dump-dom", frame.as_uri())
    width, charts, hidden = (int(part) for part in text.partition("<p>found ")[2].partition("<")[0].split())
    assert width <= PHONE
    assert charts >= 12
    assert hidden == 0
