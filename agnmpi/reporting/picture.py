"""A page as a picture, as a browser draws it."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
_MEASURE = "<script>document.title = document.documentElement.scrollHeight</script>"
_LIMIT = 120  # seconds


def picture(html: str, folder: Path, width: int = 1200) -> bytes:
    """Draw a whole page, as PNG of twice `width` pixels.

    Args:
        html: the page.
        folder: for files that are removed again; of the user's, since Chromium as a snap has a /tmp of its own.
        width: of the window, in pixels of the page.

    Raises:
        ValueError: no browser is found, or it fails.
    """
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise ValueError(
            "a picture needs Chromium, Chrome or Edge in PATH, without a display: install chromium, or open the page "
            "in any browser and print it"
        )
    with tempfile.TemporaryDirectory(prefix="picture-", dir=folder, ignore_cleanup_errors=True) as name:
        file, shot = Path(name).resolve() / "page.html", Path(name).resolve() / "page.png"
        file.write_text(html + _MEASURE, encoding="utf-8")
        measured = _run(browser, file, width, 100, "--dump-dom")
        height = re.search(r"<title>(\d+)</title>", measured)
        file.write_text(html, encoding="utf-8")
        _run(browser, file, width, int(height[1]) if height else 3000, f"--screenshot={shot}")
        return shot.read_bytes()


def _run(browser: str, file: Path, width: int, height: int, *options: str) -> str:
    profile = f"--user-data-dir={file.parent / 'profile'}"
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses root with it; the page is ours
    size = [f"--window-size={width},{height}", "--force-device-scale-factor=2", "--hide-scrollbars"]
    command = [browser, "--headless", "--disable-gpu", profile, *sandbox, *size, *options, file.as_uri()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        why = str(getattr(error, "stderr", "") or error).strip()[-500:]
        raise ValueError(f"{browser} drew no picture: {why}; open the page in a browser and print it") from error
    return done.stdout
