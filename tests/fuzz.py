"""The long form of fuzzing, by atheris: `make fuzz` runs it; `test_fuzz.py` has a small sample.

    python tests/fuzz.py                      every target, SECONDS each, one after the other
    python tests/fuzz.py --target head        one of them
    python tests/fuzz.py --run head           inside the process that atheris takes over

An input that breaks a promise, or takes over TIMEOUT_S, is written to tests/fuzz_corpus/, where
each later run of the tests reads it again. What atheris learns stays in build/fuzz/. Ends with 1
if anything was found; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "fuzz_corpus"
LEARNED = ROOT / "build" / "fuzz"
TIMEOUT_S = 5
MAX_BYTES = 4_096


def main() -> int:
    """Run what the command line asks for; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=120, help="time of each target")
    parser.add_argument("--target", help="one target instead of all")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if options.run:
        fuzz(options.run, options.seconds)
    from support.fuzz_targets import TARGETS

    names = [options.target] if options.target else list(TARGETS)
    results = [supervise(name, options.seconds) for name in names]
    print(json.dumps({"seconds_each": options.seconds, "targets": results}))
    return int(any(result["found"] for result in results))


def supervise(name: str, seconds: int) -> dict[str, object]:
    """One target in a process of its own; what it found by name, and how it ended."""
    before = set(CORPUS.glob(f"{name}/*"))
    began = time.monotonic()
    command = [sys.executable, __file__, "--run", name, "--seconds", str(seconds)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stderr.splitlines()
    found = sorted(path.name for path in set(CORPUS.glob(f"{name}/*")) - before)
    if result.returncode and not found:
        raise SystemExit(f"{name} ended with {result.returncode}:\n" + "\n".join(lines[-30:]))
    runs = [
        line.split("stat::number_of_executed_units:")[1] for line in lines if "executed" in line
    ]
    summary: dict[str, object] = {
        "target": name,
        "runs": int(runs[-1]) if runs else None,
        "seconds": round(time.monotonic() - began, 1),
        "found": found,
    }
    print(summary, flush=True)
    if found:
        print("\n".join(lines[-30:]), flush=True)
    return summary


def fuzz(name: str, seconds: int) -> None:
    """Never returns: atheris ends the process."""
    import atheris

    with atheris.instrument_imports(include=["vlmserve.server", "vlmserve.router.processes.wire"]):
        from support.fuzz_targets import TARGETS

    target = TARGETS[name]
    learned, findings = LEARNED / name, CORPUS / name
    learned.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (learned / f"seed-{number}").write_bytes(seed)
    words = learned.with_suffix(".words")
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    arguments = [
        *(f"-max_total_time={seconds}", f"-timeout={TIMEOUT_S}", f"-max_len={MAX_BYTES}"),
        *(f"-artifact_prefix={findings}/", f"-dict={words}", "-rss_limit_mb=2048"),
        *("-print_final_stats=1", "-verbosity=1", str(learned)),
    ]
    atheris.Setup([sys.argv[0], *arguments], target.check)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    sys.exit(main())
