"""Write the model card of the shipped model from its files and results.

python tools/cards.py          write smooth_foley/weights/mini/README.md
python tools/cards.py check    say whether it is what the files and results say
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from smooth_foley.model_card import model_card, write_model_card  # noqa: E402

MINI = ROOT / "smooth_foley" / "weights" / "mini"
RESULTS = ROOT / "results" / "evaluate"


def is_current():
    "Whether the card is what the files and results say"
    path = MINI / "README.md"
    return path.is_file() and path.read_text(encoding="utf-8") == model_card(MINI, RESULTS)


def main(argv):
    if argv not in ([], ["check"]):
        sys.exit(__doc__)
    if not argv:
        print(write_model_card(MINI, RESULTS).relative_to(ROOT))
    elif not is_current():
        sys.exit("smooth_foley/weights/mini/README.md differs from the files and results: run python tools/cards.py")


if __name__ == "__main__":
    main(sys.argv[1:])
