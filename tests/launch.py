"Run a script in two processes, as `accelerate launch` does"

import sys


def in_two_processes(
    script: list,  # Script and its arguments
    port: int,  # Of the main process; each test has its own
) -> list:  # Words of a command
    "The command that runs a script in two processes on the CPU"
    options = {"num_processes": 2, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    options["main_process_port"] = port
    words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return [*words, *map(str, script)]
