"""Models of transformers whose parents read weights, route, drop layers or run in part."""

import copy
import warnings

import pytest
import torch
from small_models import perturb
from torch import nn

import fxgraft as fg

LORA = fg.LoRA(rank=2)


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1)), "dt_proj"


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2, pretraining_tp=2, slow_but_exact=True)
    return BloomForCausalLM(config), "dense"


def mobilebert():
    from transformers import MobileBertConfig, MobileBertForMaskedLM

    config = MobileBertConfig(
        vocab_size=16, hidden_size=8, embedding_size=4, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, intra_bottleneck_size=8, true_hidden_size=8,
    )  # fmt: skip
    return MobileBertForMaskedLM(config), "predictions.decoder"


def wavlm():
    from transformers import WavLMConfig, WavLMModel

    config = WavLMConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, conv_dim=(4,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1,
    )  # fmt: skip
    return WavLMModel(config), "q_proj"


@pytest.mark.parametrize("make", [mamba, bloom, mobilebert])
def test_models_whose_parents_read_weights(make):
    model, target = make()
    model.eval()
    with pytest.raises(fg.FxgraftError, match=r"reads (this weight|the base's values)"):
        perturb(fg.rewrite(model, fg.Spec(LORA, [target])))(torch.tensor([[1, 2, 3, 4]]))


def test_a_parent_that_hands_weights_to_the_attention_function_is_followed():
    model, target = wavlm()
    adapted, sound = perturb(fg.rewrite(model.eval(), fg.Spec(LORA, [target])), 1.0), torch.randn(1, 40)
    out = adapted(sound).last_hidden_state
    torch.testing.assert_close(out, fg.merge(adapted)(sound).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, model(sound).last_hidden_state, atol=1e-4)


def test_all_linear_leaves_out_what_a_parent_reads():
    model, _ = mamba()
    with pytest.warns(UserWarning, match="dt_proj"):
        adapted = perturb(fg.rewrite(model.eval(), fg.Spec(LORA)))
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(adapted(ids).logits, fg.merge(adapted)(ids).logits)


def test_one_encoder_of_two_may_run_alone():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 16, "max_position_embeddings": 8, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=4)
    adapted = perturb(fg.rewrite(CLIPModel(config).eval(), fg.Spec(LORA, ["q_proj"])))
    ids = torch.tensor([[1, 3, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.get_text_features(input_ids=ids)
        adapted(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8))
    assert not adapted._forward_hooks


def test_routed_experts_and_dropped_layers_of_transformers():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, conv_dim=(4,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1,
        layerdrop=0.9, mask_time_prob=0.0,
    )  # fmt: skip
    adapted = fg.rewrite(Wav2Vec2Model(config), fg.Spec(LORA, ["q_proj"])).train()
    with pytest.warns(UserWarning, match=r"did not reach \d of 3"):
        torch.manual_seed(3)
        adapted(torch.randn(1, 40))


class Halves(nn.Module):
    """Two blocks of one class, and a function that the model compiles itself where it is told a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        x = self.second(self.first(x))
        return torch.compile(self.own, backend=self.backend)(x) if "backend" in self.__dict__ else self.own(x)

    def own(self, x):
        return self.inner(x)


def test_a_watched_forward_leaves_parts_compiled_on_their_own_compiled():
    """Under a mode of Python's, Dynamo gives up on the code it meets, for good and for every module of the class."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    adapted = perturb(fg.rewrite(Halves().eval(), fg.Spec(fg.LoRA(rank=2), targets=["0", "inner"])))
    x = torch.randn(3, 8)
    with fg.disabled(adapted):
        base = adapted(x)
    want = copy.deepcopy(adapted)(x)
    adapted.__dict__["backend"] = backend
    adapted.first = torch.compile(adapted.first, backend=backend)
    adapted.second.compile(backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="adapter 'default'")
        for _ in range(3):
            torch.testing.assert_close(adapted(x), want)
    assert len(graphs) == 3, "each part is compiled once, also by the forward that is watched"
    assert not torch.allclose(want, base)
