"""Right samples, and what five easy mistakes make of them: the strip of the README.

    pip install pillow
    python tools/strip.py --out wrong.png       from the pictures of page/mistakes.py
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.command import Parser, command, say, written

SHOWN = [  # control and mistake of page/mistakes.py, what one sees, the cause
    ("sampling/right", "right", "Algorithm 2"),
    ("sampling/σ_t² instead of σ_t", "grey, all alike", "variance, not its root"),
    ("sampling/Eq. 15 divided by ᾱ_t", "too dark", "Eq. 15 without a root"),
    ("training/1 − ᾱ_t instead of its root in Eq. 4", "specks", "Eq. 4 without a root"),
    ("eta/DDIM's noise and direction not balanced", "only noise", "DDIM not balanced"),
    ("training/images in [0, 1]", "washed out", "images in [0, 1]")]
SIDE, EDGE, TEXT = 200, 8, 48
KEPT = ROOT / "page" / "images" / "mistakes"

@command
def main(argv=None) -> int:
    """Puts six pictures side by side, with captions."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("wrong.png"), help="(default: wrong.png)")
    args = parser.parse_args(argv)
    from PIL import Image, ImageDraw, ImageFont
    strip = Image.new("RGB", ((SIDE + EDGE) * len(SHOWN) - EDGE, SIDE + TEXT), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(18)
    runs = json.loads((KEPT / "results.json").read_text(encoding="utf-8"))
    for i, (run, *captions) in enumerate(SHOWN):
        x = (SIDE + EDGE) * i
        picture = Image.open(KEPT / runs[run]["picture"]).convert("RGB")
        strip.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, 0))
        for line, text in enumerate(captions):
            pen.text((x + 2, SIDE + 3 + 20 * line), text, "black", font)
    with written(args.out) as file:
        strip.save(file, format="PNG", optimize=True)
    say(f"{args.out} shows {len(SHOWN)} pictures")
    return 0

if __name__ == "__main__":
    sys.exit(main())
