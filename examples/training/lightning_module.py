"""Lightning: a checkpoint with what requires grad, resumed, and the adapter saved at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from task import SPEC, base, collate, groups, loss, rows, run
from torch.utils.data import DataLoader

import fxgraft as fg


class Tuning(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = fg.rewrite(base(), SPEC)
        self.strict_loading = False  # the base is not in a checkpoint

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups(self.model))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: t for k, t in checkpoint["state_dict"].items() if k in trained}


def fit(folder: Path, epochs: int, resume: Path | None = None) -> tuple[Tuning, Path]:
    module = Tuning()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(rows(256), 8, collate_fn=collate), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module, folder / f"{epochs}.ckpt"


def main(folder: Path) -> tuple[float, float]:
    _, checkpoint = fit(folder, 1)
    module, _ = fit(folder, 2, resume=checkpoint)
    fg.save_adapter(module.model, folder / "final")
    return loss(module.model), loss(fg.load_adapter(base(), folder / "final"))


if __name__ == "__main__":
    run(main)
