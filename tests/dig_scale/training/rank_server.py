"""One rank of a long-lived group: joins once, then runs the jobs that its parent names, one JSON line each way."""

from __future__ import annotations

import json
import sys
import traceback

ANSWER = "ANSWER "


def main() -> None:
    from dig_scale.training import zero
    from tests.dig_scale.training import rank_jobs

    ranks = zero.join_ranks()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(rank_jobs, request["job"])(ranks, **request["arguments"])}
        except Exception as error:  # told to the test, which fails with it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(ANSWER + json.dumps(answer), flush=True)
    zero.leave_ranks()


if __name__ == "__main__":
    main()
