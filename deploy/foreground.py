"""Runs a command as the terminal's foreground job: python deploy/foreground.py COMMAND...

make ends with an error, whatever its command returns, if Ctrl-C reaches make too. So the command
gets a process group, as a shell's jobs do: only the command gets Ctrl-C, and make returns its exit
code. Ctrl-Z stops make too. SIGTERM and SIGHUP are passed on. Without a terminal, or in the
background, the command just replaces this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def foreground_terminal() -> int | None:
    """The terminal, if this process is in its foreground; else None."""
    with contextlib.suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDWR)
        if os.tcgetpgrp(terminal) == os.getpgrp():
            return terminal
    return None


def start(command: list[str], terminal: int) -> int:
    """Start the command in the foreground, in a separate group. Returns its process id."""
    pid = os.fork()
    # Both do it, whichever runs first; refused if the child has already executed the command.
    with contextlib.suppress(PermissionError):
        os.setpgid(pid, 0)
    os.tcsetpgrp(terminal, pid or os.getpid())
    if pid == 0:
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.execvp(command[0], command)
    return pid


def wait(pid: int, terminal: int) -> int:
    """The exit code of the command, which may be stopped and continued meanwhile."""
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED)
        os.tcsetpgrp(terminal, os.getpgrp())
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        os.killpg(0, signal.SIGTSTP)
        # Continued by the shell's fg.
        os.tcsetpgrp(terminal, pid)
        os.killpg(pid, signal.SIGCONT)


def main(command: list[str]) -> int:
    terminal = foreground_terminal()
    if terminal is None:
        os.execvp(command[0], command)
    # For a process in the background, which this one becomes.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    pid = start(command, terminal)
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, lambda number, frame: os.kill(pid, number))
    code = wait(pid, terminal)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
