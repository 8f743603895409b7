"""What test_distributed.py launches: train.py as it is, then what each process has seen, as JSON in $REPORT/RANK.json."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

written, runs = [], []
out = str(Path(sys.argv[sys.argv.index("--out") + 1]).resolve())


def remember_writes(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(out):
            written.append(path)


def fail(run, images, original=train.teach):
    """$FAIL, "raise" or "kill", happens to process 1 at step 3."""
    if run.step == 3 and run.lead.process_index == 1:
        if os.environ["FAIL"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("process 1 has had enough")
    return original(run, images)


def remember_run(run, original=train.train):
    runs.append(run)
    original(run)


sys.addaudithook(remember_writes)
train.train = remember_run
if "FAIL" in os.environ:
    train.teach = fail
train.ELEMENTWISE |= set(os.environ.get("ALSO_ELEMENTWISE", "").split())  # to show what check_deepspeed prevents
train.main()

digests = {}
for trainee in runs[0].trainees:
    digest = hashlib.sha256()
    for tensor in trainee.distilled.state_dict().values():
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    digests[trainee.settings.name] = digest.hexdigest()
lead = runs[0].lead
report = dict(
    rank=lead.process_index, world=lead.num_processes, kind=lead.distributed_type.value, digests=digests, written=written
)
Path(os.environ["REPORT"], f"{lead.process_index}.json").write_text(json.dumps(report))
