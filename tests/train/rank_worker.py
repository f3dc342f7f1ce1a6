"""What every rank does in `test_train_ranks`: run by torchrun, writes what it saw into the folder it is given."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from train_cases import Steps, strong, tiny, with_moe

from moestro.core.errors import UserError
from moestro.train import files
from moestro.train.run import run


def config(folder: Path):
    """Seven sequences on two ranks in parts of two: unequal shares, and a balance loss that matters."""
    return with_moe(tiny(folder, batch_size=7, micro_batch=2, steps=20, eval_every=10), **strong(0.5))


def counted(folder: Path, out: str, **kwargs):
    """Train, and write the counts of every step."""
    seen = Steps(kwargs.pop("then", None))
    result = run(config(folder), out=folder / out, progress=seen, **kwargs)
    if seen.infos:
        counts = [{path: c.tolist() for path, c in info.counts.items()} for info in seen.infos]
        (folder / f"{out}-counts.json").write_text(json.dumps(counts))
    return result


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    said = {}
    counted(folder, "ranks")

    # one rank is asked to stop; both stop after the same step, save, and go on later
    import moestro.train.stop as stops

    class After(stops.Stop):
        """Rank 1 gets SIGTERM while it works on step 4."""

        reads = 0

        @property
        def requested(self):
            self.reads += 1
            if rank == 1 and self.reads == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return self._asked

        @requested.setter
        def requested(self, value):
            self._asked = value

    stops.Stop, true = After, stops.Stop
    said["stopped"] = counted(folder, "stopped").step
    stops.Stop = true
    resumed = run(out=folder / "stopped", resume=True)
    said["resumed"] = resumed.complete

    # the first rank cannot write: every rank says so
    true_save = files.save_file

    def full(tensors, path, metadata):
        if "step-00000010" in str(path):
            raise OSError(28, "No space left on device", str(path))
        true_save(tensors, path, metadata)

    files.save_file = full
    try:
        run(config(folder), out=folder / "full")
        said["full"] = "nothing was raised"
    except UserError as error:
        said["full"] = str(error)
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
