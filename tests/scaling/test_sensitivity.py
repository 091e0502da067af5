from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ggufkit.checkpoint.index import open_checkpoint
from ggufkit.progress import SILENT
from ggufkit.scaling.families import family_of
from ggufkit.scaling.groups import all_groups
from ggufkit.scaling.sensitivity import token_weights
from ggufkit.scaling.statistics import visit_blocks
from tests.factory import make_checkpoint

TOKENS = torch.randint(3, 290, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_weights_are_the_squared_gradients_of_the_whole_model(arch: str, tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "model", arch))
    family = family_of(index.config)
    found = token_weights(index, family, TOKENS, SILENT, scratch=tmp_path)
    groups = [g for g in all_groups(index, family) if g.expert is None]
    assert set(found) == {g.name for g in groups if g.kind != "moe_in"}

    model = AutoModelForCausalLM.from_pretrained(index.path, dtype=torch.float32)
    expected: dict[str, torch.Tensor] = {}
    for group in groups:
        for name in group.consumers:
            if ".experts." in name or name.endswith(".mlp.gate.weight"):
                continue
            module = model.get_submodule(name.removesuffix(".weight"))
            module.register_full_backward_hook(
                lambda _, __, g, name=group.name: expected.__setitem__(
                    name, expected.get(name, 0) + g[0].reshape(-1, g[0].shape[-1]).square().sum(1)
                )
            )
    logits = model(TOKENS).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum"
    ).backward()
    assert set(expected) == set(found)
    for name, weights in expected.items():
        # bfloat16 factors, where the processor multiplies those faster.
        wanted = weights / weights.mean()
        assert float((found[name] - wanted).norm() / wanted.norm()) < 0.1
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_each_token_counts_by_its_weight(tmp_path: Path) -> None:
    index = open_checkpoint(make_checkpoint(tmp_path / "model"))
    family = family_of(index.config)
    once = torch.zeros(TOKENS.numel())
    once[:40] = 3.0  # the first of three sequences alone
    names = [g.name for g in all_groups(index, family)]
    grams: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for tokens, weights in ((TOKENS, dict.fromkeys(names, once)), (TOKENS[:1], None)):
        visit_blocks(
            index,
            family,
            tokens,
            lambda visit: [grams[g.name].append(visit.statistics(g).gram) for g in visit.groups],
            scratch=tmp_path,
            token_weights=weights,
        )
    for weighted, alone in grams.values():
        torch.testing.assert_close(weighted, alone, rtol=2e-2, atol=2e-2)
