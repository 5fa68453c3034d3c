"""transformers' Trainer: checkpoints with the adapter only, resumed, the best one loaded at the end.

When it resumes it lists the base's weights as missing from the checkpoint: they are, and the model has them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from task import SPEC, base, collate, groups, loss, rows, run
from transformers import Trainer, TrainingArguments

import fxgraft as fg


def train(folder: Path, steps: int, resume: bool = False) -> Trainer:
    adapted = fg.rewrite(base(), SPEC)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=20,
        load_best_model_at_end=True,
        save_total_limit=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        adapted,
        arguments,
        data_collator=collate,
        train_dataset=rows(256),
        eval_dataset=rows(32, seed=2),
        optimizers=(torch.optim.AdamW(groups(adapted)), None),  # type: ignore[arg-type]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(folder: Path) -> tuple[float, float]:
    train(folder / "run", steps=40)
    trainer = train(folder / "run", steps=60, resume=True)
    trainer.save_model(str(folder / "final"))
    loaded = fg.load_adapter(base(), folder / "final")
    return loss(trainer.model), loss(loaded)


if __name__ == "__main__":
    run(main)
