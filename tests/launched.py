"""What test_distributed.py and test_detect.py launch: $SCRIPT (train or detect) as it is, then what each
process has seen, as JSON in $REPORT/RANK.json.
"""

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import launch

script = importlib.import_module(os.environ.get("SCRIPT", "train"))
written, runs, calls, steps = [], [], [], []
out = str(Path(sys.argv[sys.argv.index("--out") + 1]).resolve())


def remember_writes(event, arguments):
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(out):
            written.append(path)


def fail(teacher, images, original=distill.Teacher.__call__):
    """$FAIL, "raise" or "kill", happens to process 1 in its fourth batch."""
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        if os.environ["FAIL"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("process 1 has had enough")
    return original(teacher, images)


def stop(signals, agreed=launch.Signals.agreed):
    """SIGTERM arrives in the step $STOP_AFTER of this launch."""
    steps.append(1)
    if len(steps) == int(os.environ["STOP_AFTER"]):
        os.kill(os.getpid(), signal.SIGTERM)
    return agreed(signals)


def remember_run(*arguments, original=script.train, **more):
    given = inspect.signature(original).bind(*arguments, **more).arguments
    runs.append((given["students"], given["log"].lead))
    original(*arguments, **more)


sys.addaudithook(remember_writes)
script.train = remember_run
if "FAIL" in os.environ:
    distill.Teacher.__call__ = fail
# shows what check_deepspeed prevents
launch.ELEMENTWISE |= set(os.environ.get("ALSO_ELEMENTWISE", "").split())
if "STOP_AFTER" in os.environ:
    launch.Signals.agreed = stop
    with contextlib.suppress(SystemExit):
        script.main()
else:
    script.main()

students, lead = runs[0]
digests = {}
for student in students:
    digest = hashlib.sha256()
    for tensor in student.distilled.state_dict().values():
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    digests[student.name] = digest.hexdigest()
report = dict(rank=lead.process_index, world=lead.num_processes, kind=lead.distributed_type.value)
report |= dict(digests=digests, written=written)
Path(os.environ["REPORT"], f"{lead.process_index}.json").write_text(json.dumps(report))
