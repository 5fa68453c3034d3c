"""Random models x specs x operations: whatever is done in whatever order, the answer is the formula's or a refusal.

`pytest -m campaign tests/campaigns/test_sequences.py`: 1,000 lives; `FXGRAFT_CAMPAIGN_SCALE=3` for three times as many.
"""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from sequences import live, lives

SCALE = float(os.environ.get("FXGRAFT_CAMPAIGN_SCALE", "1"))
COMMON = {"deadline": None, "database": None, "phases": (Phase.generate, Phase.shrink),
          "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}  # fmt: skip


def test_a_few_lives():
    @settings(max_examples=25, derandomize=True, **COMMON)
    @given(lives())
    def run(drawn):
        live(*drawn, count=lambda what: None)

    run()


@pytest.mark.campaign
def test_a_thousand_lives():
    seen: Counter[str] = Counter()

    @settings(max_examples=int(1000 * SCALE), **COMMON)
    @given(lives())
    def run(drawn):
        live(*drawn, count=lambda what: seen.update([what]))

    run()
    print("\n" + "\n".join(f"{count:6d} {what}" for what, count in sorted(seen.items())))
    assert seen["rewrite"] > 500 * SCALE, "most lives must really be lived"
