"""LoRA folders of convolutions, to and from PEFT, with equal outputs."""

import copy

import pytest
import torch
from torch import nn

import fxgraft as fg

peft = pytest.importorskip("peft")

KINDS = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 9)),
    "2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=(1, 0), bias=False), (2, 6, 7, 5)),
    "3d": (lambda: nn.Conv3d(6, 8, 2, stride=(1, 2, 1)), (2, 6, 4, 5, 3)),
    "1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 7, 5)),
    "same": (lambda: nn.Conv2d(6, 8, 3, padding="same"), (2, 6, 7, 5)),
    "1x1 dilated": (lambda: nn.Conv2d(6, 8, 1, dilation=2), (2, 6, 7, 5)),
}


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.conv = layer
        self.out = nn.Linear(layer.out_channels, 4)

    def forward(self, x):
        return self.out(torch.relu(self.conv(x)).flatten(2).mean(-1))


def random_factors(model, marks):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if marks in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_pefts_opens_and_goes_back(tmp_path, kind, rslora):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model, x = Net(make()).eval(), torch.randn(shape)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["conv", "out"], use_rslora=rslora)
    theirs = random_factors(peft.get_peft_model(copy.deepcopy(model), config), "lora_")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fg.load_adapter(model, tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(x), theirs(x))
    assert not torch.allclose(ours(x), model(x), atol=1e-3)
    fg.save_adapter(ours, tmp_path / "ours", format="peft")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(back(x), theirs(x))
    stored = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, stored[n]) for n, p in back.named_parameters() if "lora_" in n)
    torch.testing.assert_close(fg.merge(ours)(x), theirs.merge_and_unload()(x))


@pytest.mark.parametrize("groups", [2, 6])
def test_one_with_groups_is_written_for_peft_and_comes_back(tmp_path, groups):
    torch.manual_seed(0)
    model, x = Net(nn.Conv2d(6, 12, 3, padding=1, groups=groups)).eval(), torch.randn(2, 6, 7, 5)
    ours = random_factors(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2, alpha=3), ["conv", "out"])), "fxgraft")
    fg.save_adapter(ours, tmp_path, format="peft")
    with pytest.warns(UserWarning, match="groups > 1"):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert theirs.base_model.model.conv.r["default"] == 2 * groups
    torch.testing.assert_close(theirs(x), ours(x))
    again = fg.load_adapter(model, tmp_path).eval()
    assert torch.equal(again(x), ours(x))


def test_a_factor_of_pefts_across_groups_is_refused(tmp_path):
    model = Net(nn.Conv2d(6, 8, 3, groups=2))
    config = peft.LoraConfig(r=4, target_modules=["conv"])
    with pytest.warns(UserWarning, match="groups > 1"):
        theirs = random_factors(peft.get_peft_model(copy.deepcopy(model), config), "lora_")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(fg.CheckpointError, match=r"'conv'.* 2 groups.* reads channels of every group.* leave it out"):
        fg.load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2), r"dilation=\(2, 2\), which PEFT leaves out"),
        (
            lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
            "padding_mode='reflect', which PEFT leaves out",
        ),
        (lambda: nn.ConvTranspose2d(6, 8, 3), "not 'conv'"),
    ],
)
def test_what_peft_computes_otherwise_is_refused(tmp_path, layer, says):
    adapted = fg.rewrite(Net(layer()), fg.Spec(fg.LoRA(2), ["conv"]))
    with pytest.raises(fg.CheckpointError, match=says):
        fg.save_adapter(adapted, tmp_path / "folder", format="peft")
    assert not (tmp_path / "folder").exists()
    fg.save_adapter(adapted, tmp_path / "folder")
    assert fg.load_adapter(Net(layer()), tmp_path / "folder") is not None


def test_factors_of_another_kernel_are_refused(tmp_path):
    small, large = Net(nn.Conv2d(6, 8, 3)), Net(nn.Conv2d(6, 8, 5))
    fg.save_adapter(fg.rewrite(small, fg.Spec(fg.LoRA(2), ["conv"])), tmp_path, format="peft")
    with pytest.raises(fg.CheckpointError, match=r"\(2, 6, 3, 3\).* takes \(2, 6, 5, 5\)"):
        fg.load_adapter(large, tmp_path)
