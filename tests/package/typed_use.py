"""What a type checker must accept of a user's code: checked by tests/package/test_typing.py, never run."""

import torch
from torch import nn

import fxgraft as fg


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)


model = Net()
names: list[str] = ["query"]
mixed: list[str | fg.Target] = ["query", fg.Target("q", parts=3, select=(0, 2))]
fg.Spec(fg.LoRA(), targets=mixed, exclude=("a",), overrides={"q": fg.LoRA(rank=4)})
fg.Spec(fg.LoRA(), targets="all-linear", train="head")
fg.Spec(fg.LoRA(), targets=[fg.Target("q", parts=3, select=[0, 2])])
spec = fg.Spec(fg.UniLoRA(rank=4, sampler="uniform"), targets=names)

# every verb gives back the class that it was given
adapted: Net = fg.rewrite(model, spec)
plain: Net = fg.merge(adapted)
loaded: Net = fg.load_adapter(model, "adapter")
lora: Net = fg.to_lora(adapted)
fixed: Net = fg.fix_paths(adapted, {})
banked: Net = fg.bank(adapted, {"a": fg.adapter_state(adapted)})
fast: Net = fg.compile(adapted, kernels="aten")

fg.save_adapter(adapted, "adapter", format="peft")
fg.export_onnx(adapted, "model.onnx", {"x": torch.zeros(2, 8)}, adapters="bank")

# and a mode that does not exist is found before anything runs
fg.save_adapter(adapted, "adapter", format="pef")  # type: ignore[arg-type]
fg.export_onnx(adapted, "model.onnx", (torch.zeros(2, 8),), adapters="swapable")  # type: ignore[arg-type]
fg.UniLoRA(sampler="even")  # type: ignore[arg-type]
fg.compile(adapted, kernels="cuda")  # type: ignore[arg-type]
