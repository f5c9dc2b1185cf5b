"""What one file of weights is, by its names, and what its network predicts."""

import pickle
import zipfile

import pytest
import torch
from original_files import collect_original_state, make_pipeline
from safetensors.torch import save_file

from ldm.models.original_configs import derive_scheduler_config
from ldm.models.original_file import find_prediction, identify_original_kind, read_original_file
from ldm.utils.checkpoint_file import CheckpointError

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
WHOLE = {
    f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
    f"{TEXT}final_layer_norm.weight": (8,),
}
OPEN_CLIP = {"cond_stage_model.model.ln_final.weight": (8,)}
SD2 = {name: shape for name, shape in WHOLE.items() if name[:4] != "cond"} | OPEN_CLIP


def write(path, shapes, **metadata):
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=metadata or None)
    else:
        torch.save({"state_dict": tensors} | metadata, path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"lora_unet_down.lora_down.weight": (4, 8)}, "a LoRA: give it as lora=FILE"),
        ({"unet.mid_block.attn1.to_q.lora_A.weight": (4, 8)}, "a LoRA: give it as lora=FILE"),
        ({"unet.mid_block.attn1.to_q.lora.down.weight": (4, 8)}, "a LoRA: give it as lora=FILE"),
        ({"control_model.time_embed.0.weight": (8, 8)}, "a ControlNet"),
        ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": (8, 8)}, "Flux"),
        ({"conditioner.embedders.0.model.ln_final.weight": (8,)}, "the refiner of SDXL"),
        (WHOLE | {"edm_mean": (4,)}, "Playground 2.5"),
        ({"emb_params": (1, 8)}, "a textual inversion"),
        ({"encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3)}, "an autoencoder alone"),
        ({"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)}, "an autoencoder alone"),
        ({"down_blocks.0.resnets.0.norm1.weight": (8,)}, "one network of diffusers"),
        ({"down.0.blocks.0.norm1.weight": (8,)}, "weights of ldm"),
        ({"some.weight": (1,)}, "no Stable Diffusion in the original layout; it has some.weight"),
        ({f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3)}, "it has no text encoder"),
        ({name: WHOLE[name] for name in list(WHOLE)[::2]}, "it has no autoencoder"),
        (WHOLE | {f"{UNET}input_blocks.0.0.weight": (8, 5, 3, 3)}, "the depth model"),
        (WHOLE | {f"{UNET}input_blocks.0.0.weight": (8, 7, 3, 3)}, "the x4 upscaler"),
        (WHOLE | {f"{UNET}input_blocks.0.0.weight": (8, 8, 3, 3)}, "InstructPix2Pix"),
        (SD2 | {f"{UNET}label_emb.0.0.weight": (8, 8)}, "a Stable unCLIP"),
    ],
)
def test_other_files_are_refused_by_name(path, shapes, words):
    with pytest.raises(ValueError, match=words):
        identify_original_kind(read_original_file(write(path, shapes)))


@pytest.mark.parametrize(("shapes", "kind"), [(WHOLE, "sd1"), (SD2, "sd2")])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_kinds_by_the_text_encoder(tmp_path, shapes, kind, suffix):
    path = write(tmp_path / f"model{suffix}", shapes)
    assert identify_original_kind(read_original_file(path)) == kind


def test_a_file_with_objects_is_not_opened(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "callbacks": {pickle.Pickler: 1}}, path)
    with pytest.raises(
        CheckpointError, match=r"holds more than tensors \(pickle.Pickler\).*take the"
    ):
        read_original_file(path)


def test_a_damaged_file_is_named(path):
    data = write(path, WHOLE).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        read_original_file(path)
    path = write(path.with_suffix(".ckpt"), WHOLE)
    with zipfile.ZipFile(path.with_name("empty.ckpt"), "w"):
        pass
    with pytest.raises(CheckpointError, match=r"empty.ckpt is damaged"):
        read_original_file(path.with_name("empty.ckpt"))


def predict(path, shapes, **metadata):
    file = read_original_file(write(path, shapes, **metadata))
    return find_prediction(file, identify_original_kind(file))


def test_prediction_of_stable_diffusion_1_is_eps(path):
    assert predict(path, WHOLE) == ("eps", None)
    assert predict(path, WHOLE | {"v_pred": (0,)}) == ("v", None)
    spec = {"modelspec.prediction_type": "v"}
    assert predict(path, WHOLE, **spec) == ("v", None)


def test_prediction_of_stable_diffusion_2_follows_its_steps_or_is_said(tmp_path, path):
    pickled = path.with_suffix(".ckpt")
    assert predict(pickled, SD2, global_step=875_000) == ("eps", None)
    assert predict(pickled, SD2, global_step=110_000) == ("v", None)
    prediction, line = predict(path, SD2)
    assert prediction == "v"
    assert "If it is eps, write 'model: {params: {parameterization: eps}}' to model.yaml" in line
    inpainting = SD2 | {f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3)}
    assert predict(path, inpainting) == ("eps", None)


def test_prediction_by_the_config_next_to_the_file(path):
    config = path.with_suffix(".yaml")
    config.write_text("model: {params: {parameterization: eps}}")
    assert predict(path, SD2, **{"modelspec.prediction_type": "v"}) == ("eps", None)
    config.write_text("model: {params: {linear_start: 0.00085}}")
    assert predict(path, WHOLE) == ("eps", None)
    config.write_text("model: {params: {parameterization: x0}}")
    with pytest.raises(ValueError, match="has parameterization x0: give eps or v"):
        predict(path, SD2)


def test_the_schedule_in_a_file_is_checked():
    how = {"kind": "sd1", "prediction": "v", "zero_snr": False}
    plain = make_pipeline("sd1").scheduler.alphas_cumprod
    assert "rescale_betas_zero_snr" not in derive_scheduler_config(plain, **how)
    root = plain.sqrt()
    zero = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    config = derive_scheduler_config(zero.half(), **how)
    assert config["rescale_betas_zero_snr"]
    assert (config["_class_name"], config["timestep_spacing"]) == ("DDIMScheduler", "trailing")
    with pytest.raises(ValueError, match="alphas_cumprod, 1000 steps"):
        derive_scheduler_config(torch.linspace(1, 0, 1000), **how)


def test_the_names_of_a_whole_model_are_all_known():
    state = collect_original_state(make_pipeline("sd1"))
    assert all(name.startswith((UNET, "first_stage_model.", TEXT)) for name in state)


@pytest.mark.parametrize("payload", [[UNET], 3, {"state_dict": [UNET]}, {3: torch.zeros(1)}])
def test_a_pickle_that_is_no_mapping_of_names_is_refused(tmp_path, payload):
    torch.save(payload, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"model.ckpt is no file of weights by name"):
        read_original_file(tmp_path / "model.ckpt")


@pytest.mark.parametrize("data", [b"{", b"- 1", b"\0", b"\xff\xfe"])
def test_a_damaged_config_next_to_a_file_is_named(path, data):
    path.with_suffix(".yaml").write_bytes(data)
    with pytest.raises(ValueError, match=r"of .*model.yaml: "):
        find_prediction(read_original_file(write(path, WHOLE)), "sd1")
