"""Write schemas and vectors of every protocol into protocols/ (or into the folder given).

    python tests/protocols/generator

Run it after a deliberate change of the wire, look at the difference, and commit both: a test
compares the folder with what this makes. Signatures come from libp2p's own envelope code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import affinity
import announce
import ledger
import loss
import membership
import parting
import tokens
import tunnel

ROOT = Path(__file__).resolve().parents[3] / "protocols"


def main(target: Path) -> None:
    for protocol in (announce, membership, tokens, ledger, loss, affinity, tunnel, parting):
        for name, content in protocol.files().items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=1, ensure_ascii=True)
            path.write_text(text + "\n", encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
