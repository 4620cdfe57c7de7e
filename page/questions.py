"""The pictures of docs/questions.md from those that its commands have drawn.

    python page/questions.py FOLDER            needs Pillow

A PNG of sample.py shows each pixel as a square; page/images/questions keeps one pixel for each.
"""
from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support import data
from support.command import Parser, command, say, written

OUT = ROOT / "page" / "images" / "questions"

@command
def main(argv=None) -> int:
    """Writes the pictures: see the text at the head of this file."""
    from PIL import Image
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="with eps.png and the other pictures")
    args = parser.parse_args(argv)
    OUT.mkdir(exist_ok=True)
    text = (ROOT / "docs/questions.md").read_text(encoding="utf-8")
    for name in re.findall(r"images/questions/(\S+\.png)", text):
        found = data.pixels(Image.open(args.folder / name))
        k = found.shape[2] // 64  # 4×4 samples of 16×16
        with written(OUT / name) as file:
            file.write(data.png(found[:, ::k, ::k]))
    say(f"{OUT} holds the pictures of docs/questions.md")
    return 0

if __name__ == "__main__":
    sys.exit(main())
