"""Folders of pictures and pipelines of diffusers, as they lie on users' disks."""

import json
import shutil
from pathlib import Path

import peers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from PIL import Image

from ldm.data.image_decoding import ImageError, pil_to_tensor, read_image, resize_short_side
from ldm.evaluation.external import DiffusersPipeline, ImageFolder
from ldm.utils.images import to_uint8_tensor

CPU = torch.device("cpu")


def picture(path: Path, size: tuple[int, int], colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.paste(colour, (0, 0, 3, 3))
    image.save(path)
    return path


def test_pictures_come_in_order_of_name_and_lose_nothing(tmp_path):
    paths = [picture(tmp_path / name, (16, 16), name[:-5]) for name in ("red1.png", "blue0.png")]
    folder = ImageFolder(tmp_path)
    assert [path.name for path in folder.paths] == ["blue0.png", "red1.png"]
    assert (len(folder), folder.size, folder.captions) == (2, 16, None)
    pixels = [pil_to_tensor(read_image(path)) for path in reversed(paths)]
    assert torch.equal(to_uint8_tensor(folder([0, 1])), torch.stack(pixels))
    assert torch.equal(folder([1]), folder([0, 1])[1:])


def test_the_centre_is_measured_at_the_size_asked_for(tmp_path):
    """As real pictures are: cut to the short side first, then scaled, bicubic and antialiased."""
    wide = picture(tmp_path / "wide.png", (48, 32))
    picture(tmp_path / "tall.jpg", (20, 30))
    with pytest.raises(ValueError, match=r"has 20 pixels and .*wide.png' 32: give the size"):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="give the size"):
        ImageFolder(tmp_path, usual_size=lambda: None)
    assert ImageFolder(tmp_path, usual_size=lambda: 24).size == 24
    folder = ImageFolder(tmp_path, size=24)
    assert folder([0, 1]).shape == (2, 3, 24, 24)
    wanted = resize_short_side(read_image(wide).crop((8, 0, 40, 32)), 24)
    assert torch.equal(to_uint8_tensor(folder([1]))[0], pil_to_tensor(wanted))


def test_captions_lie_beside_all_pictures_or_none(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png", (8, 8))
    (tmp_path / "a.txt").write_text("two\n lines\n")
    with pytest.raises(ValueError, match=r"b\.txt' is missing, and 0 more"):
        ImageFolder(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b\.txt is neither UTF-8 nor UTF-16"):
        ImageFolder(tmp_path)
    for text in (b"\xef\xbb\xbfcaf\xc3\xa9", "café".encode("utf-16")):
        (tmp_path / "b.txt").write_bytes(text)
        assert ImageFolder(tmp_path).captions == ["two lines", "café"]
    picture(tmp_path / "._a.png", (8, 8))  # of macOS
    assert len(ImageFolder(tmp_path)) == 2


def test_another_folder_has_another_digest(tmp_path):
    picture(tmp_path / "a" / "x.png", (8, 8))
    picture(tmp_path / "b" / "x.png", (8, 8))
    picture(tmp_path / "c" / "y.png", (8, 8))
    picture(tmp_path / "d" / "x.png", (8, 8), "blue")
    a, b, c, d = (ImageFolder(tmp_path / name).digest for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_what_is_no_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images in"):
        ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ImageFolder(tmp_path / "nowhere")
    whole = picture(tmp_path / "whole.png", (64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"cut\.png': damaged PNG"):
        ImageFolder(tmp_path)([0])
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"notes\.png': no JPEG, PNG"):
        ImageFolder(tmp_path)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> Path:
    return peers.stable_diffusion(tmp_path_factory.mktemp("sd") / "sd")


def test_a_peer_paints_what_diffusers_paints(diffusion):
    peer = DiffusersPipeline(diffusion, CPU)
    assert peer.size == peers.SIDE
    images = peer(peers.CAPTIONS, seeds=[3, 4, 5], size=16, steps=3, scale=4.0)
    pipe = StableDiffusionPipeline.from_pretrained(diffusion)
    wanted = pipe(
        peers.CAPTIONS,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4, 5)],
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="pt",
    ).images
    assert torch.equal(to_uint8_tensor(images), (255 * wanted).round().byte())
    assert images.std() > 0.05, "a blank picture shows nothing"
    again = peer(peers.CAPTIONS[1:2], seeds=[4], size=16, steps=3, scale=4.0)
    torch.testing.assert_close(again, images[1:2], atol=1e-4, rtol=0)  # whatever its batch


def test_a_scale_of_one_is_no_guidance(diffusion):
    peer = DiffusersPipeline(diffusion, CPU)
    rows = []
    peer.pipe.unet.register_forward_pre_hook(lambda unet, inputs: rows.append(len(inputs[0])))
    for scale in (1.0, 2.0):
        peer(["a red circle"], seeds=[0], size=16, steps=1, scale=scale)
    assert rows == [1, 2]
    with pytest.raises(ValueError, match="1 is none"):
        peer(["a red circle"], seeds=[0], size=16, steps=1, scale=0.5)


def test_what_a_peer_is_can_be_written_down(diffusion, tmp_path):
    facts = DiffusersPipeline(diffusion, CPU).facts
    assert json.loads(json.dumps(facts)) == facts
    assert facts["pipeline"] == "StableDiffusionPipeline"
    assert facts["sampler"]["name"] == "DDIMScheduler"
    assert facts["sampler"]["prediction_type"] == "epsilon"
    other = peers.pixart(tmp_path / "other")
    assert DiffusersPipeline(other, CPU).facts["digest"] != facts["digest"]


def test_a_peer_may_be_a_transformer(tmp_path):
    peer = DiffusersPipeline(peers.pixart(tmp_path / "pixart"), CPU)
    assert peer.size == 256
    images = peer(["a red circle"], seeds=[0], size=peer.size, steps=1, scale=2.0)
    assert images.shape == (1, 3, 256, 256)


def test_pictures_are_not_blackened(tmp_path):
    folder = peers.stable_diffusion(tmp_path / "checked", checker=True)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    once = {"num_inference_steps": 1, "output_type": "pt"}
    assert not pipe("a red circle", **once).images.any(), "the checker of this test is too lenient"
    images = DiffusersPipeline(folder, CPU)(
        ["a red circle"], seeds=[0], size=16, steps=1, scale=1.0
    )
    assert images.std() > 0.05


def test_weights_in_half_precision_are_found(tmp_path):
    peer = DiffusersPipeline(peers.stable_diffusion(tmp_path / "half", variant="fp16"), CPU)
    assert peer.pipe.unet.dtype == torch.float32


def test_nothing_that_a_folder_brings_is_run(diffusion, tmp_path, monkeypatch):
    """Pipelines, parts and pickles: each would leave a file behind."""
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n"
    index = json.loads((diffusion / "model_index.json").read_text())
    for name, change in {
        "pipeline": {"_class_name": ["evil", "Evil"]},
        "part": {"unet": ["evil", "Evil"]},
    }.items():
        folder = tmp_path / name
        shutil.copytree(diffusion, folder)
        (folder / "model_index.json").write_text(json.dumps(index | change))
        for place in (folder / "evil.py", folder / "unet" / "evil.py"):
            place.write_text(code)
        with pytest.raises(ValueError, match=r"has code of its own \(evil.py\)"):
            DiffusersPipeline(folder, CPU)
    (tmp_path / "evil.py").write_text(code)  # where python -m would find it
    folder = tmp_path / "imported"
    shutil.copytree(diffusion, folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["evil", "Evil"]}))
    with pytest.raises((ValueError, OSError)):
        DiffusersPipeline(folder, CPU)
    assert not ran.exists()
    folder = tmp_path / "kernel"
    shutil.copytree(diffusion, folder)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["_attn_implementation"] = "stranger/kernel"
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"asks for remote code \(stranger/kernel\)"):
        DiffusersPipeline(folder, CPU)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickles_are_left_shut(diffusion, tmp_path, part):
    shutil.copytree(diffusion, tmp_path / "pickled")
    [weights] = (tmp_path / "pickled" / part).glob("*.safetensors")
    torch.save({"x": torch.zeros(1)}, weights.with_suffix(".bin"))
    weights.rename(tmp_path / "elsewhere")
    if part == "text_encoder":
        weights.with_suffix(".bin").rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises((ValueError, OSError), match="safetensors"):
        DiffusersPipeline(tmp_path / "pickled", CPU)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_pipeline_of_another_kind_is_refused(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"a DDPMPipeline, which does not generate from prompts"):
        DiffusersPipeline(tmp_path / "plain", CPU)
