"""An argument called as another library calls it is answered with the name it has here."""

import copy
import pickle

import pytest

import fxgraft as fg


@pytest.mark.parametrize(
    ("make", "given", "ours"),
    [
        (fg.LoRA, {"r": 8}, "rank"),
        (fg.LoRA, {"lora_alpha": 16}, "alpha"),
        (fg.LoRA, {"lora_dropout": 0.1}, "dropout"),
        (fg.LoRA, {"use_rslora": True}, "rslora"),
        (fg.LoRA, {"rnak": 8}, "rank"),
        (fg.LoRAXS, {"r": 8}, "rank"),
        (fg.LoRASB, {"r": 8}, "rank"),
        (fg.HydraLoRA, {"lora_nums": 3}, "experts"),
        (fg.UniLoRA, {"theta_d_length": 9}, "vector_length"),
        (fg.UniLoRA, {"proj_seed": 9}, "seed"),
        (fg.PRoLoRA, {"unshared_rank": 1}, "unshared"),
        (fg.GLoRA, {"r": 4}, "rank"),
        (fg.Target, {"pattern": "q", "part": 3}, "parts"),
        (fg.Spec, {"method": fg.LoRA(), "target_modules": ["q"]}, "targets"),
        (fg.Spec, {"method": fg.LoRA(), "modules_to_save": ["q"]}, "train"),
        (fg.Spec, {"method": fg.LoRA(), "exclude_modules": ["q"]}, "exclude"),
    ],
)
def test_another_librarys_name_is_answered_with_ours(make, given, ours):
    wrong = next(name for name in given if name not in ("pattern", "method"))
    with pytest.raises(fg.SpecError, match=rf"{make.__name__}\({wrong}=.*called '{ours}'"):
        make(**given)


def test_a_name_like_none_of_ours_lists_the_arguments():
    with pytest.raises(fg.SpecError, match="no such argument; the arguments are 'rank', 'alpha', 'dropout', 'rslora'"):
        fg.LoRA(init_lora_weights=False)


def test_configs_are_still_made_copied_and_pickled_as_dataclasses():
    spec = fg.Spec(fg.LoRA(4, alpha=2), ["q", fg.Target("k", 2, (1,))])
    assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))
    assert spec.targets == ("q", fg.Target("k", parts=2, select=(1,)))
    with pytest.raises(TypeError):
        fg.Spec()
