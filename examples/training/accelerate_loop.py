"""A loop of one's own with accelerate: states with the adapter only, resumed, and the adapter saved at the end."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from task import SPEC, base, collate, groups, loss, rows, run
from torch.utils.data import DataLoader

import fxgraft as fg


def main(folder: Path) -> tuple[float, float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    adapted = fg.rewrite(base(), SPEC)
    model, optimizer, batches = accelerator.prepare(
        adapted, torch.optim.AdamW(groups(adapted)), DataLoader(rows(256), 8, shuffle=True, collate_fn=collate)
    )

    def save_adapters(models: list, weights: list, where: str) -> None:
        for model in models:
            fg.save_adapter(accelerator.unwrap_model(model), Path(where) / "adapter")
        weights.clear()  # accelerate would write the whole model

    def load_adapters(models: list, where: str) -> None:
        while models:  # accelerate would look for the whole model's file
            fg.swap(accelerator.unwrap_model(models.pop()), Path(where) / "adapter")

    accelerator.register_save_state_pre_hook(save_adapters)
    accelerator.register_load_state_pre_hook(load_adapters)

    def epoch() -> None:
        model.train()
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()

    epoch()
    accelerator.save_state(str(folder / "state"))
    first = loss(model)
    epoch()
    accelerator.load_state(str(folder / "state"))
    assert loss(model) == first, "the state is what it was"
    epoch()
    accelerator.unwrap_model(model).save_pretrained(
        folder / "final", is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )
    return loss(model), loss(fg.load_adapter(base(), folder / "final"))


if __name__ == "__main__":
    run(main)
