"""The formats of other programs: a file is a format, and a folder is in one of them."""

import sys
from pathlib import Path

from fxgraft.exporters.checkpoints import formats

READER = """
from dataclasses import replace
from .peft_lora import FORMAT as LORA

FORMAT = replace(LORA, peft_type={peft_type!r}, key={key!r}, names="", method=None, write=None)
"""


def known(config, tensors=()):
    """The file of the format that a folder with these config entries and keys is read by."""
    for format in formats.FORMATS:
        if format.knows(config, dict.fromkeys(tensors)):
            return format.read.__module__.rpartition(".")[2]
    return None


def test_every_file_is_a_format_and_what_can_be_written_is_peft_s_own():
    assert len(formats.FORMATS) == len([f for f in Path(formats.__file__).parent.glob("*.py") if f.stem != "__init__"])
    types = [format.peft_type for format in formats.FORMATS if format.peft_type]
    assert len(set(types)) == len(types) > 3
    assert all(format.peft_type and format.method for format in formats.FORMATS if format.write)


def test_a_fork_is_known_though_it_kept_the_type_of_what_it_was_made_of():
    lora, unilora = {"peft_type": "LORA"}, {"peft_type": "UNILORA"}
    assert known(lora) == "peft_lora"
    assert known({**lora, "lora_nums": 3}) == known(lora, ["x.lora_route.weight"]) == "authors_hydralora"
    assert known({**lora, "lora_nums": None}) == "peft_lora"
    assert known(lora, ["x.default_lora_latent_mapping.weight"]) == "authors_lora_xs"
    assert known({**lora, "unshared_r": 0}) == known(lora, ["x.lora_A_vec"]) == "authors_prolora"
    assert known(unilora, ["base_model.unilora_theta_d"]) == "peft_unilora"
    assert known(unilora, ["base_model.unilora_vector_bank"]) == known(unilora, ["x.unilora_logits_A"])
    assert known(unilora, ["base_model.unilora_vector_bank"]) == "authors_unilora"
    assert known({"method": "unilora"}) == known({}, ["a.vector_bank"]) == known({}, ["vector_bank"])
    assert known({}, ["vector_bank"]) == "authors_unilora_glue"
    assert known({"method": "glora"}) == "authors_glora"
    assert known({}, ["x_vector_bank", "vector_bank.x", ""]) is known({"peft_type": "IA3"}) is known({}) is None


def test_a_new_file_is_a_new_format(tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text(READER.format(peft_type="OWN", key="(?!)"))
    (tmp_path / "own_fork.py").write_text(READER.format(peft_type="", key="lora_fork"))
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    try:
        monkeypatch.setattr(formats, "FORMATS", formats.find_formats())
    finally:
        for name in ("own_method", "own_fork"):
            sys.modules.pop(f"{formats.__name__}.{name}", None)
            formats.__dict__.pop(name, None)
    own = [format for format in formats.FORMATS if format.knows({"peft_type": "OWN"}, {})]
    assert [format.peft_type for format in own] == ["OWN"]
    first = next(format for format in formats.FORMATS if format.knows({"peft_type": "LORA"}, {"x.lora_fork": None}))
    assert first.key == "lora_fork"
