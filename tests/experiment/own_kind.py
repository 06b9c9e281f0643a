"""A kind of run of the tests' own: writes down that it was executed, and does as its options say."""

import os
import signal
import time
from pathlib import Path


class Noted:
    def __init__(self, setting):
        self.setting = setting
        self._note(f"start {setting.seed} {setting.start}")

    def __call__(self, name, options):
        self._note(name)
        time.sleep(options.get("sleep", 0.0))
        marker = self.setting.folder / "mended"
        if options.get("do") == "fail" and not marker.exists():
            raise ValueError("not today\nand more")
        if options.get("do") == "die" and not marker.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        print("what it prints")
        values = [0.1 * options["value"] + 0.01 * user for user in range(5)]
        result = {"metric": "m", "mean": sum(values) / 5, "units": list(range(5)), "values": values}
        return {"results": [result], "steps": 3, "rollouts": 7}

    def _note(self, text):
        with Path(self.setting.folder, "executed").open("a") as file:
            file.write(f"{text}\n")
