"""The command: `python -m judge FILE_OR_MODULE` judges, `python -m judge` prints the interface."""
import sys

from .interface import INTERFACE, interface


def main(given: list) -> int:
    """Prints the verdicts. Returns 0 if nothing fails, 1 if a theorem does, 2 without verdicts."""
    if not given or given[0] in ("-h", "--help"):
        print(interface())
        return 0
    try:
        from .judging import Unusable, judged, load
    except ModuleNotFoundError as error:
        return refuse(f"torch and hypothesis are required: {error}")
    if len(given) > 1:
        return refuse(f"give one file or module, not {len(given)}: {' '.join(given)}")
    try:
        judge = judged(load(given[0]))
    except Unusable as error:
        return refuse(f"{given[0]}: {error}")
    verdicts = {row["verdict"] for row in judge.rows.values()}
    if verdicts == {"not offered"}:
        offered = [name for name in INTERFACE if hasattr(judge.module, name)]
        return refuse(f"{given[0]}: nothing to judge: it has "
                      f"{'only ' + ' and '.join(offered) if offered else 'no function'} of the "
                      "interface, which python -m judge prints")
    print(judge.table())
    return int("fails" in verdicts)


def refuse(why: str) -> int:
    """Prints one line on stderr. Returns status 2."""
    print(f"judge: {' '.join(why.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")               # for a terminal without Greek letters
    sys.exit(main(sys.argv[1:]))
