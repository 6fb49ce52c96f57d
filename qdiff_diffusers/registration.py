"""Makes diffusers and transformers know ``quant_method: qdiff``. Neither has a function for it that fits, both have tables."""

from __future__ import annotations

import functools
import sys
from typing import Any

from diffusers.quantizers import auto as diffusers_auto
from diffusers.utils import is_transformers_available, is_transformers_version, logging
from diffusers.utils.hub_utils import PushToHubMixin

from .casting import guard_casts
from .components import leave_decoders
from .config import QDiffConfig, QDiffMethod
from .copying import install as copy_dense_equivalents
from .errors import ConfigError
from .fusing import guard_method, install_in_models, install_in_pipelines
from .guards import check_files, check_indices
from .hub.cards import write_cards_on_upload
from .imports import after_import
from .nunchaku_quantizer import NunchakuQuantizer, read_nunchaku
from .offloading import bring_back_from_disk
from .quantizer import QDiffQuantizer
from .single_file import explain_failures
from .token_tables import install as widen_dense_tables

logger = logging.get_logger(__name__)

OLD_TRANSFORMERS = "qdiff quantizes and loads text encoders with transformers 5.0 or newer only"


def register() -> None:
    """Register the backend; calling it again changes nothing."""
    name = QDiffMethod.QDIFF.value
    diffusers_auto.AUTO_QUANTIZER_MAPPING[name] = QDiffQuantizer
    diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = QDiffConfig
    diffusers_auto.AUTO_QUANTIZER_MAPPING[QDiffMethod.NUNCHAKU.value] = NunchakuQuantizer
    read_nunchaku(diffusers_auto.DiffusersAutoQuantizer)
    write_cards_on_upload(PushToHubMixin, "_upload_folder")
    after_import("peft.tuners.lora", _register_with_peft)
    after_import("diffusers.loaders.lora_pipeline", _register_with_flux_loras)
    after_import("diffusers.loaders.peft", _register_with_models_loras)
    after_import("diffusers.loaders.lora_base", _register_with_pipelines_loras)
    after_import("diffusers.hooks.group_offloading", _register_with_group_offloading)
    after_import("diffusers.models.controlnets", _register_with_controlnets)
    after_import("diffusers.loaders.single_file_model", _explain_single_files)
    after_import("diffusers.pipelines.pipeline_utils", _guard_pipelines)
    after_import("diffusers.quantizers.pipe_quant_config", _leave_decoders)
    after_import("diffusers.models.modeling_utils", _guard_diffusers)
    after_import("diffusers.loaders.single_file_utils", _guard_single_files)
    after_import("transformers.modeling_utils", _guard_transformers)
    after_import("transformers.utils.hub", _write_cards_of_transformers)
    if not is_transformers_available():
        return
    if is_transformers_version("<", "5.0"):
        logger.warning(f"{OLD_TRANSFORMERS}; please upgrade it")
        after_import("transformers.quantizers.auto", functools.partial(_refuse_with_transformers, name))
        return
    _register_with_transformers(name)


def _register_with_transformers(name: str) -> None:
    from transformers.quantizers import auto as transformers_auto

    from .transformers_quantizer import QDiffTransformersQuantizer

    transformers_auto.AUTO_QUANTIZER_MAPPING[name] = QDiffTransformersQuantizer
    transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = QDiffConfig


def _refuse_with_transformers(name: str) -> None:
    """Without an entry, transformers only warns, and fills a quantized text encoder with random numbers."""
    sys.modules["transformers.quantizers.auto"].AUTO_QUANTIZATION_CONFIG_MAPPING[name] = _Refusal  # type: ignore[attr-defined]


class _Refusal:
    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"this model is quantized, and {OLD_TRANSFORMERS}; please upgrade it")


def _guard_pipelines() -> None:
    guard_casts(sys.modules["diffusers.pipelines.pipeline_utils"], "DiffusionPipeline")


def _leave_decoders() -> None:
    leave_decoders(sys.modules["diffusers.quantizers.pipe_quant_config"])


def _guard_diffusers() -> None:
    check_indices(sys.modules["diffusers.models.modeling_utils"], "_get_checkpoint_shard_files")
    check_files(sys.modules["diffusers.models.modeling_utils"])
    guard_casts(sys.modules["diffusers.models.modeling_utils"], "ModelMixin")
    guard_method(sys.modules["diffusers.models.modeling_utils"].ModelMixin, "save_pretrained")
    copy_dense_equivalents(sys.modules["diffusers.models.modeling_utils"].ModelMixin)


def _guard_single_files() -> None:
    check_files(sys.modules["diffusers.loaders.single_file_utils"])


def _guard_transformers() -> None:
    check_indices(sys.modules["transformers.modeling_utils"], "get_checkpoint_shard_files")
    guard_method(sys.modules["transformers.modeling_utils"].PreTrainedModel, "save_pretrained")
    widen_dense_tables(sys.modules["transformers.modeling_utils"].PreTrainedModel)


def _write_cards_of_transformers() -> None:
    write_cards_on_upload(sys.modules["transformers.utils.hub"].PushToHubMixin, "_upload_modified_files")


def _explain_single_files() -> None:
    explain_failures(sys.modules["diffusers.loaders.single_file_model"])


def _register_with_peft() -> None:
    from .lora import install

    install()


def _register_with_flux_loras() -> None:
    from .flux_lora import install

    install()


def _register_with_models_loras() -> None:
    install_in_models(sys.modules["diffusers.loaders.peft"].PeftAdapterMixin)


def _register_with_pipelines_loras() -> None:
    install_in_pipelines(sys.modules["diffusers.loaders.lora_base"].LoraBaseMixin)


def _register_with_group_offloading() -> None:
    bring_back_from_disk(sys.modules["diffusers.hooks.group_offloading"].GroupOffloadingHook)


def _register_with_controlnets() -> None:
    from .copying import install_in_package

    install_in_package("diffusers.models.controlnets")
