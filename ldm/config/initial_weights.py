"""The first weights of a training: those of another run or of a published model, `init=`."""

from collections.abc import Sequence

from omegaconf import DictConfig

from ldm.config.published import open_checkpoint
from ldm.inference.components import Components
from ldm.models.warm_start import warm_start
from ldm.utils.errors import UsageError


def warm_start_from_run(
    init: str,
    components: Components,
    *,
    cfg: DictConfig | None = None,
    trust: Sequence[str] | None = None,
    may_add: bool = True,
) -> str:
    """Copies the weights of a run or a published model into the denoiser; a line that says so.

    cfg: the settings of `components`, if they are known. may_add: whether the denoiser may have
    layers and channels that the weights lack. Raises UsageError where the components are
    other ones than those that the weights were trained with.
    """
    source = open_checkpoint(init, name="init", trust=trust)
    if others := source.list_differences(components, cfg):
        raise UsageError(
            f"init={init} was trained with another {' and '.join(others)}: "
            f"{source.format_remedy(others)}"
        )
    new = warm_start(components.denoiser, source.read_weights(), source=init)
    if new and not may_add:
        raise UsageError(
            f"init={init} lacks {', '.join(new)}, which adapters of LoRA cannot learn: train these "
            "without lora.rank first, then give that run as init"
        )
    more = f"; new, and without effect as yet: {', '.join(new)}" if new else ""
    return f"init: the weights of {source.path}{more}"
