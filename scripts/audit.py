"""Known vulnerabilities of the installed packages by pip-audit, whose silence is not taken for an answer.

`make audit`, or `python scripts/audit.py [--service pypi|osv]`. Exit code 0: every package was looked up and
none has a known vulnerability; 1: some have, or could not be looked up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

# Versions of ours alone, which no list knows.
NOT_PUBLISHED = ("lopt",)


def main() -> int:
    """Ask, print what was found, and say in a sentence what it means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--service", default="pypi", choices=("pypi", "osv"))
    service = parser.parse_args().service
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run([*command, "--vulnerability-service", service], capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = " ".join((done.stderr.strip().splitlines() or ["no output"])[-1].split())
        print(f"audit: nothing is known: {service} could not be asked ({last[:300]})", file=sys.stderr)
        return 1
    text, code = verdict(found, service)
    print(text, file=sys.stderr if code else sys.stdout)
    return code


def verdict(packages: list[dict[str, Any]], service: str) -> tuple[str, int]:
    """What pip-audit found, in words, and the exit code."""
    asked = [package for package in packages if package["name"] not in NOT_PUBLISHED]
    skipped = [package["name"] for package in asked if "skip_reason" in package]
    known = [(package, bug) for package in asked for bug in package.get("vulns", ())]
    lines = [
        f"{package['name']} {package['version']}: {bug['id']}, "
        f"fixed in {', '.join(bug['fix_versions']) or 'no version'}"
        for package, bug in known
    ]
    lines.append(f"audit: {len(asked) - len(skipped)} of {len(asked)} packages looked up at {service}")
    if skipped:
        some = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        lines.append(f"audit: nothing is known of {len(skipped)} ({some}): check the connection to {service}")
    if known:
        lines.append(f"audit: {len(known)} known vulnerabilities: upgrade, or say in SECURITY.md why not")
    elif asked and not skipped:
        lines.append("audit: no known vulnerability")
    return "\n".join(lines), int(bool(known or skipped or not asked))


if __name__ == "__main__":
    sys.exit(main())
