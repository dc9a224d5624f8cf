"""Each node's available bytes as JSON, a line every so many seconds, until standard input is closed.

Runs in the head's container: `python3 memory.py SECONDS`.
"""

import json
import select
import sys

from gauge import gauges, sample


def watch(pause):
    asked = gauges()
    sample(asked, "available", 30)
    while True:
        print(json.dumps(sample(asked, "available", 3)), flush=True)
        if select.select([sys.stdin], [], [], pause)[0]:
            return


if __name__ == "__main__":
    watch(float(sys.argv[1]))
