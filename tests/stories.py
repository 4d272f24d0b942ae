"""A folder of small texts that a small model can learn from."""

from pathlib import Path


def write_story(folder: Path) -> Path:
    folder.mkdir()
    for number in range(12):
        lines = [
            f"the {kind} number {n} is {(n * 7 + number) % 10}" for n in range(60) for kind in ("cat", "dog")
        ]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder
