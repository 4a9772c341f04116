"""Long rows: the planner says what is live on fake tensors to half a percent."""

from __future__ import annotations

import pytest

from long_rows import counted, planner, setting_of

SHAPE = dict(
    model_type="qwen2", hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, vocab_size=4096, tie_word_embeddings=False,
)  # fmt: skip
PREFETCH = 0.01


CASES = [("end to end", False), pytest.param("LoPT k=2", True, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_plan_and_live_bytes(name: str, checkpointing: bool) -> None:
    setting, of_head = setting_of(SHAPE, name, checkpointing), []
    for tokens in (1024, 16384):
        plan = planner(SHAPE, tokens, PREFETCH).plan(setting)
        assert plan.total == pytest.approx(counted(SHAPE, tokens, setting, PREFETCH).total, rel=0.005)
        of_head.append(plan.peak.head_and_loss > 0)
    assert of_head == [True, False]  # the largest of a long row is a layer's backward
