"""TRL's SFTTrainer: give it the adapted model and no `peft_config`; it saves as transformers' Trainer does."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from task import SPEC, VOCABULARY, base, groups, loss, rows, run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import fxgraft as fg


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, `t7` being number 7."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def main(folder: Path) -> tuple[float, float]:
    adapted = fg.rewrite(base(), SPEC)
    arguments = SFTConfig(
        str(folder / "run"),
        max_steps=80,
        per_device_train_batch_size=8,
        max_length=32,
        save_steps=20,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    texts = [" ".join(f"t{token}" for token in row["input_ids"]) for row in rows(256)]
    trainer = SFTTrainer(
        adapted,
        arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        optimizers=(torch.optim.AdamW(groups(adapted)), None),
    )
    trainer.train()
    trainer.save_model(str(folder / "final"))
    return loss(adapted), loss(fg.load_adapter(base(), folder / "final"))


if __name__ == "__main__":
    run(main)
