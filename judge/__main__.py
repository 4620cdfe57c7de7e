"""The command: `python -m judge FILE_OR_MODULE` judges, `python -m judge` prints the interface."""
import sys

from .interface import INTERFACE, interface


def main(given: list) -> int:
    """Prints the table of verdicts: 0 if nothing fails, 1 if a theorem does, 2 for no verdict."""
    if not given or given[0] in ("-h", "--help"):
        print(interface())
        return 0
    try:
        from .judging import Unusable, judged, load
    except ModuleNotFoundError as error:
        return refuse(f"it needs torch and hypothesis: {error}")
    if len(given) > 1:
        return refuse(f"one file or module at a time, not {len(given)}: {' '.join(given)}")
    try:
        judge = judged(load(given[0]))
    except Unusable as error:
        return refuse(f"{given[0]}: {error}")
    verdicts = {row["verdict"] for row in judge.rows.values()}
    if verdicts == {"not offered"}:
        offered = [name for name in INTERFACE if hasattr(judge.module, name)]
        return refuse(f"{given[0]}: no theorem can be judged, as it offers "
                      f"{' and '.join(offered) + ' alone' if offered else 'no function'} of the "
                      f"interface, which python -m judge prints")
    print(judge.table())
    return int("fails" in verdicts)


def refuse(why: str) -> int:
    """One line on stderr, and the status 2."""
    print(f"judge: {' '.join(why.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")               # a terminal without Greek letters
    sys.exit(main(sys.argv[1:]))
