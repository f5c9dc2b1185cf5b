"""Every YAML file names a real thing, gives it arguments that it has, and builds."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from torch.nn.parallel import DistributedDataParallel

from ldm.config.components import build_denoiser, build_objective
from ldm.config.composition import CONF_DIR
from ldm.config.guidance import build_guidance
from ldm.config.own_components import DIFFUSION_GROUPS
from ldm.config.registry import validate_file_config
from ldm.diffusion.rng import make_generators
from ldm.inference.components import Components
from ldm.utils.errors import UsageError

LEAVES = sorted(
    path for path in Path(CONF_DIR).glob("*/*.yaml") if path.parent.name != "experiment"
)
EXPERIMENTS = sorted(Path(CONF_DIR, "experiment").glob("*.yaml"))
GROUPS = sorted({path.parent.name for path in LEAVES})
# What ldm/config passes in addition to the YAML.
CPU = torch.device("cpu")
OURS = {"trainer": {"max_hours", "peak_tflops"}}  # what ldm/config takes for itself
HANDED = {
    "model": {"in_channels", "out_channels", "context_dim"},
    "objective": {"schedule", "weighting", "timestep_sampler"},
    "clip": {"tokenizer"},
    "classifier": {"schedule", "in_channels"},
    "logger": {"run_dir", "name", "overrides"},
    "guidance": {"schedule"},
    "data": set(),
    "eval": {"pipeline", "networks", "images", "reference_images", "size", "folder", "settings"},
}


@pytest.fixture(autouse=True)
def hydra_home():
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        yield


def train(*overrides):
    return compose("train", overrides=["name=x", *overrides])


def nodes(cfg):
    if OmegaConf.is_dict(cfg):
        if "_target_" in cfg:
            yield cfg
        for key in cfg:
            yield from nodes(cfg._get_node(key))


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_leaf_binds(path):
    group, option = path.parent.name, path.stem
    root = "sample" if group in ("sampler", "guidance", "task") else "train"
    cfg = compose(root, overrides=[*(["name=x"] if root == "train" else []), f"{group}={option}"])
    assert path.read_text().startswith("# "), "a leaf begins with what it is for"
    for node in nodes(cfg.get(group)):
        if node._target_ == "datetime.timedelta":
            continue  # has no signature to look at
        signature = inspect.signature(get_object(node._target_))
        given = {key for key in node if key not in ("_target_", *OURS.get(group, ()))}
        takes = {p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD}
        if group == "strategy":  # passed on to torch
            takes |= set(inspect.signature(DistributedDataParallel).parameters)
        assert given <= takes, f"{node._target_} has no {given - takes}"
        needed = {
            p.name
            for p in signature.parameters.values()
            if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        }
        assert needed <= given | HANDED.get(group, set()), f"{node._target_} needs {needed}"


@pytest.mark.parametrize(
    "path", sorted(Path(CONF_DIR, "experiment").glob("*.yaml")), ids=lambda p: p.stem
)
def test_experiment_composes_and_names_only_known_keys(path):
    cfg, plain = compose("train", overrides=[f"experiment={path.stem}"]), train()
    assert cfg.name == path.stem
    for key in cfg:
        assert key in plain
    assert set(cfg.trainer) == set(plain.trainer)
    sources = [OmegaConf.load(file) for file in Path(CONF_DIR, "data").glob("*.yaml")]
    assert any(set(cfg.data) == set(source) - {"defaults"} for source in sources)


def options(group):
    return [path.stem for path in LEAVES if path.parent.name == group]


ZERO = [f"{name} scheduler.zero_terminal_snr=true" for name in ("linear", "cosine", "sigmoid")]


def loss(cfg):
    """Of sixteen images somewhere in a run."""
    x = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draws = make_generators(cfg.seed, range(50, 66), stream="noise")
    return build_objective(cfg).loss(lambda x, t, c: x, x, None, generator=draws)


@pytest.mark.parametrize("scheduler", [*options("scheduler"), *ZERO])
@pytest.mark.parametrize("objective", options("objective"))
def test_schedules_and_objectives_combine(scheduler, objective):
    cfg = train(*f"scheduler={scheduler}".split(), f"objective={objective}")
    if objective == "eps" and scheduler in ("flow", "laplace", *ZERO):
        with pytest.raises(Exception, match="take objective=v"):
            build_objective(cfg)
        return
    found = loss(cfg)
    assert found.shape == (16,)
    assert found.isfinite().all()


@pytest.mark.parametrize("objective", ["eps", "v"])
@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={name}"
        for group in ("weighting", "loss", "timestep_sampler")
        for name in options(group)
    ],
)
def test_training_options_combine(choice, objective):
    cfg, default = (
        train("scheduler=linear", f"objective={objective}", "time_power=1", *more)
        for more in ([choice], ["timestep_sampler=power"])
    )
    assert loss(cfg).isfinite().all()
    defaults = (
        "weighting=uniform",
        "loss=squared",
        "timestep_sampler=power",
        "timestep_sampler=uniform",
    )
    assert torch.equal(loss(cfg), loss(default)) == (choice in defaults)


def test_time_power_is_that_of_every_spread():
    for sampler in ("power", "stratified", "sobol"):
        cfg = train(f"timestep_sampler={sampler}", "time_power=2", "data.batch_size=12")
        built = build_objective(cfg).timestep_sampler
        assert (built.power, built.spread) == (2, sampler.replace("power", "independent"))
        assert built.batch == 12
    built = build_objective(train("timestep_sampler=logit_normal", "timestep_sampler.spread=sobol"))
    assert built.timestep_sampler.spread == "sobol"


def test_a_configuration_of_before_these_were_groups_means_what_it_did():
    cfg = train("objective=eps", "time_power=2")
    old = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    for group in ("weighting", "loss", "timestep_sampler"):
        del old[group]
    for key in ("offset_noise", "input_perturbation"):
        del old.objective[key]
    del old.scheduler.zero_terminal_snr
    name = "ldm.diffusion.objective"
    old.objective.weighting = {"_target_": f"{name}.UniformWeighting"}
    old.objective.timestep_sampler = {"_target_": f"{name}.PowerTimes", "power": 2}
    read = validate_file_config(OmegaConf.to_yaml(old), Path("old.ckpt"), needed=DIFFUSION_GROUPS)
    assert read.objective.weighting._target_ == "ldm.diffusion.weightings.UniformWeighting"
    read.seed = cfg.seed
    assert torch.equal(loss(read), loss(cfg))


class Text:
    width, pooled_width = 48, 0


@pytest.mark.parametrize("model", [p.stem for p in LEAVES if p.parent.name == "model"])
@pytest.mark.parametrize("autoencoder", ["tiny", "identity", "sd"])
def test_any_model_fits_any_autoencoder(model, autoencoder):
    cfg = train(f"model={model}", f"autoencoder={autoencoder}")
    if "path" in cfg.autoencoder:
        cfg.autoencoder.path = None
    with torch.device("meta"):
        encoder, task = instantiate(cfg.autoencoder), instantiate(cfg.task)
        net = build_denoiser(cfg, encoder, Text(), None, task)
    assert net.in_channels == encoder.channels
    assert net.out_channels == encoder.channels


def test_sizes_of_pictures_are_in_pixels_of_the_autoencoder():
    words = ["+model.size_embedding=8", "model.heads=[2,4]", "+model.depth=[1,2]"]
    cfg = train("model=nano", "autoencoder=tiny", "autoencoder.path=null", *words)
    with torch.device("meta"):
        encoder = instantiate(cfg.autoencoder)
        net = build_denoiser(cfg, encoder, Text(), None, instantiate(cfg.task))
    assert net.size_factor == encoder.factor == 8
    assert (net.heads, net.depth) == ((2, 4), (1, 2))


def test_base_is_stable_diffusions_shape():
    cfg = train("model=base", "autoencoder=sd", "autoencoder.path=null")
    text = Text()
    text.width = 768
    with torch.device("meta"):
        encoder = instantiate(cfg.autoencoder)
        net = build_denoiser(cfg, encoder, text, None, instantiate(cfg.task))
    assert sum(p.numel() for p in net.parameters()) == 859_520_964
    assert sum(p.numel() for p in encoder.parameters()) == 83_653_863


@pytest.mark.parametrize("option", ["auto", "cpu", "gpu", "ddp"])
def test_trainers_choose_their_strategy(option):
    cfg = train(f"trainer={option}")
    assert bool(cfg.strategy) == (option == "ddp")
    assert not train("trainer=ddp", "strategy=auto").strategy


@pytest.mark.parametrize("option", [p.stem for p in LEAVES if p.parent.name == "sampler"])
def test_all_samplers_take_the_same_bounds_and_grids(option):
    even = option == "pndm"  # which has even spacings alone
    spacing, ends = ("leading", "linspace") if even else ("karras", "leading")
    asked = [f"spacing={spacing}", "clip=1.5", "quantile=0.99", "grid=euler", f"ends={ends}"]
    asked += ["offset=1"]
    cfg = compose("sample", [f"sampler={option}", *(f"sampler.{each}" for each in asked)])
    built = instantiate(cfg.sampler)
    assert (built.spacing, built.clip, built.quantile) == (spacing, 1.5, 0.99)
    assert (built.grid, built.ends, built.offset) == ("euler", ends, 1)
    plain = instantiate(compose("sample", [f"sampler={option}"]).sampler)
    assert (plain.spacing, plain.clip, plain.quantile) == ("trailing", None, None)
    assert (plain.grid, plain.offset, plain.set_alpha_to_one) == (None, 0, True)


@pytest.mark.parametrize("option", ["cfg", "interval", "apg", "compose", "style"])
def test_rescaling_knows_what_the_network_predicts(option):
    """x0_hat where eps is 0 is x_t / alpha."""
    objective = build_objective(train("objective=eps", "scheduler=linear"))
    beside = Components(None, None, None, None, objective, None)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor(0.6)
    cfg = compose("sample", [f"guidance={option}", "guidance.rescale=0.7"])
    found = build_guidance(cfg.guidance, beside, device=CPU).x0_at_zero_output(x_t, t)
    torch.testing.assert_close(found, x_t / objective.schedule(t)[0])
    plain = compose("sample", [f"guidance={option}"])
    assert build_guidance(plain.guidance, beside, device=CPU).x0_at_zero_output is None


def test_data_chooses_what_is_measured_unless_the_user_does():
    assert train("data=scenes").eval.scenes.count == 32
    assert not train("data=scenes", "eval=none").eval
    assert not train("eval=none", "data=scenes").eval
    assert not train("data=coco").eval
    assert train("data=coco", "eval=scenes").eval.scenes.count == 32


def test_every_group_has_a_default_or_is_documented():
    cfg = train()
    for group in GROUPS:
        assert group in cfg, f"train.yaml does not know the group {group}"


def test_a_reward_model_that_is_not_there_is_one_line():
    cfg = compose("sample", ["guidance=clip", "guidance.reward_model=no/such/folder"])
    components = Components(None, None, None, None, None, None)
    with pytest.raises(UsageError, match="there is no such CLIP") as why:
        build_guidance(cfg.guidance, components, device=CPU)
    assert "\n" not in str(why.value)
