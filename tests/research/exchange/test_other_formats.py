"""Checkpoints of other programs are told apart by their names, without opening a file, and answered in one sentence."""

from pathlib import Path

import pytest

from parallel.errors import Mistake
from research.cli import import_

FOLDERS = {
    "Megatron-LM": (
        ["latest_checkpointed_iteration.txt", "iter_0005000/mp_rank_00/model_optim_rng.pt", "iter_0005000/mp_rank_01/model_optim_rng.pt"],
        r"a checkpoint of Megatron-LM, .* \(latest_checkpointed_iteration.txt: 5000\) → Megatron Bridge",
    ),
    "one iteration of Megatron-LM": (["mp_rank_00_000/model_optim_rng.pt"], r"a checkpoint of Megatron-LM, .* \(mp_rank_00_000\) → "),
    "one rank of Megatron-LM": (["model_optim_rng.pt"], r"a checkpoint of Megatron-LM, .* \(model_optim_rng.pt\) → "),
    "Megatron Core": (["common.pt", "metadata.json", "__0_0.distcp"], r"a distributed checkpoint of torch .* \(__0_0.distcp\) → "),
    "GPT-NeoX": (
        ["latest", "global_step100/layer_00-model_00-model_states.pt", "global_step100/mp_rank_00_model_states.pt"],
        r"a checkpoint of GPT-NeoX or .* \(global_step100/layer_00-model_00-model_states.pt\) → .*convert_neox_to_hf.py",
    ),
    "a step of GPT-NeoX": (["layer_00-model_states.pt"], r"a checkpoint of GPT-NeoX or .* \(layer_00-model_states.pt\) → "),
    "DeepSpeed": (
        ["latest", "zero_to_fp32.py", "global_step7/mp_rank_00_model_states.pt", "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        r"a checkpoint of DeepSpeed, .* → load it with the program that wrote it",
    ),
    "peft": (["adapter_config.json", "adapter_model.safetensors"], r"an adapter \(peft\).* → .*merge_and_unload"),
    "Meta": (["params.json", "consolidated.00.pth", "tokenizer.model"], r"in the format of its makers .* \(consolidated.00.pth\) → "),
    "flax": (["flax_model.msgpack"], r"for another framework than torch"),
    "a run of ours": (
        ["run.json", "config.json", "checkpoints/step_000001/manifest.json"],
        r"a run or a checkpoint of this program .* init_from",
    ),
    "a checkpoint of ours": (["manifest.json", "rank_0.safetensors"], r"a run or a checkpoint of this program \(manifest.json\)"),
}


def made(place: Path, names: list[str]) -> Path:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("5000\n")
    return place


@pytest.mark.parametrize("what", FOLDERS)
def test_a_checkpoint_of_another_program_is_recognised(what, tmp_path):
    names, words = FOLDERS[what]
    with pytest.raises(Mistake, match=words) as caught:
        import_.check_exists(made(tmp_path, names))
    assert "→" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names", [["config.json", "model.safetensors"], ["config.json", "pytorch_model.bin", "adapter_config.json", "params.json"], []]
)
def test_a_hugging_face_folder_is_left_to_its_reader(names, tmp_path):
    import_.check_exists(made(tmp_path, names))


def test_a_pointer_to_a_step_may_hold_anything(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"\x1b[31m\n" * 10**6)
    with pytest.raises(Mistake, match=r"a checkpoint of Megatron-LM, .* \(latest_checkpointed_iteration.txt\) → "):
        import_.check_exists(tmp_path)
