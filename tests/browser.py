"""Opening a page in a headless browser and listing what it complains of or asks the network for."""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--dump-dom",
)


def check_page(path: Path, seconds: float = 60.0) -> list[str]:
    """Open an HTML file and return its problems: messages on the console and requests to a network.

    Requests that the browser itself makes (updates, clock, accounts) have the initiator "not an origin" in
    its log; those of a page never have, and only the former are left out. Messages of every severity are
    logged alike, so each counts: a page without scripts has none.
    """
    if BROWSER is None:
        raise FileNotFoundError("no chromium, chromium-browser or google-chrome on the path")
    if not Path(path).is_file():
        raise FileNotFoundError(path)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "net.json"
        command = [BROWSER, *_FLAGS, f"--user-data-dir={folder}/profile", f"--log-net-log={log}"]
        opened = subprocess.run(
            [*command, Path(path).resolve().as_uri()],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
        if opened.returncode or "</html>" not in opened.stdout:
            return [f"browser: did not show the page (status {opened.returncode}): {opened.stderr[-500:]}"]
        net = json.loads(log.read_text(encoding="utf-8"))
    problems = [f"console: {line}" for line in re.findall(r":CONSOLE[:(].*", opened.stderr)]
    kinds = {number: name for name, number in net["constants"]["logEventTypes"].items()}
    for event in net["events"]:
        request = event.get("params", {})
        asked = kinds[event["type"]].startswith("URL_REQUEST") and request.get("initiator") != "not an origin"
        if asked and re.match(r"(https?|wss?|ftp):", request.get("url", "")):
            problems.append(f"network: {request['url']}")
    return problems
