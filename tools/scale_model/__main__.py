"""python -m tools.scale_model draw      # docs/lab/scale.svg and the tables of docs/lab/scale.md
python -m tools.scale_model check     # the model beside processes of gloo that run here"""

from __future__ import annotations

import argparse

from tools.scale_model import measure, pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("draw", "check"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.what == "draw":
        pages.draw()
        return
    print("| ranks | tokens | method | measured, s | modelled, s | modelled / measured | one process / P / measured |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in measure.check(given.ranks, given.tokens, given.rounds):
        share = row["modelled"] / row["measured"]
        efficiency = row["one process"] / row["ranks"] / row["measured"]
        cells = (row["ranks"], row["tokens"], row["method"], f"{row['measured']:.3f}", f"{row['modelled']:.3f}")
        print(f"| {' | '.join(map(str, cells))} | {share:.2f} | {efficiency:.2f} |")


if __name__ == "__main__":
    main()
