"Run a script in two processes, as `accelerate launch` does, or a command on a terminal"

import fcntl
import pty
import struct
import sys
import termios


def in_two_processes(
    script: list,  # Script and its arguments
    port: int,  # Of the main process; each test has its own
    how: str = "--multi_gpu",  # Or "--use_fsdp"; both start processes without a GPU, and "--cpu" starts a single one
) -> list:  # Words of a command
    "The command that runs a script in two processes, on the CPU where there is no GPU"
    options = {"num_processes": 2, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    options["main_process_port"] = port
    words = [sys.executable, "-m", "accelerate.commands.launch", how]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return [*words, *map(str, script)]


def terminal() -> tuple:  # Our end and the program's, as file descriptors
    "A terminal of 24 lines and 100 columns"
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    return ours, theirs
