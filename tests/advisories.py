"""Known advisories of what is installed, from pages that a mirror of PyPI has too: those of newest versions.

    python tests/advisories.py

`make audit` asks about each version; a mirror may answer for projects alone, whose page (/pypi/NAME/json)
holds the advisories of the newest version. Versions that are not the newest are listed: they stay unasked.
The exit code is 1 when there is an advisory, a page cannot be had, or the control, a package that has known
weaknesses in its newest version, shows none.
"""

import json
from collections.abc import Iterator
from importlib.metadata import distributions
from urllib.request import urlopen

CONTROL = "pycrypto"


def page(name: str) -> dict:
    with urlopen(f"https://pypi.org/pypi/{name}/json", timeout=60) as answer:
        return json.load(answer)


def advisories(found: dict) -> list[str]:
    return [each["id"] for each in found["vulnerabilities"] if not each.get("withdrawn")]


def installed() -> Iterator[tuple[str, str]]:
    """Yield names and versions without local parts, but for gramian itself."""
    for each in sorted({(one.metadata["Name"].lower(), one.version) for one in distributions()}):
        if each[0] != "gramian":
            yield each[0], each[1].partition("+")[0]


def main() -> None:
    wrong = [] if advisories(page(CONTROL)) else [f"{CONTROL} shows no advisory: this page does not tell"]
    newest, other = 0, []
    for name, version in installed():
        try:
            found = page(name)
        except OSError as error:
            wrong.append(f"{name}: {error}")
            continue
        last = found["info"]["version"]
        if last != version:
            other.append(f"{name} {version} (newest {last})")
            continue
        newest += 1
        wrong += [f"{name} {version}: {said}" for said in advisories(found)]
    print(f"{newest} packages are the newest of their kind")
    print(f"{len(other)} are not, and were not asked about: {', '.join(other)}")
    print(*wrong or ["no advisory"], sep="\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
