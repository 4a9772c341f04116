"""`make audit`: silence is no answer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "audit.py"
SPEC = importlib.util.spec_from_file_location("audit", SCRIPT)
assert SPEC is not None and SPEC.loader is not None
audit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit)

FINE = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


def test_it_passes_only_when_every_package_was_looked_up() -> None:
    own = {"name": "lopt", "skip_reason": "not found"}
    assert audit.verdict([FINE, own], "pypi") == (
        "audit: 1 of 1 packages looked up at pypi\naudit: no known vulnerability",
        0,
    )
    text, code = audit.verdict([FINE, UNKNOWN], "pypi")
    assert code == 1 and "nothing is known of 1 (c): check the connection" in text
    text, code = audit.verdict([FINE, BAD], "pypi")
    assert code == 1 and text.startswith("b 2: CVE-1, fixed in 3\n")
    assert audit.verdict([], "pypi")[1] == 1
