"""The process with the device: reads one scenario per line from stdin and writes its result to stdout, as JSON."""

import json
import os
import sys
import traceback
from pathlib import Path

from tests.cuda.device import load_device


def main() -> None:
    load_device(Path(sys.argv[1]))
    from tests.cuda import scenarios

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not come between the answers
    for line in sys.stdin:
        call = json.loads(line)
        try:
            answer = {"result": getattr(scenarios, call["scenario"])(**call["arguments"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
