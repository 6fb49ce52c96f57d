"""Every function of another library that qdiff wraps, and every entry that it registers. ``qdiff doctor`` shows their states."""

from __future__ import annotations

from .patches import Entry, Patch, Setup

PACKAGE = "qdiff_diffusers"
LOADING = f"{PACKAGE}.integrations.loading"
IN_THREADS = "loading models in several threads"

REGISTRATION = (
    Entry(
        "diffusers.quantizers.auto",
        "AUTO_QUANTIZER_MAPPING",
        f"{PACKAGE}.integrations.diffusers_quantizer:QDiffQuantizer",
        key="qdiff",
        feature="quantizing and loading with diffusers",
        essential=True,
        upstream="a function of diffusers that registers a quantizer (transformers has one)",
    ),
    Entry(
        "diffusers.quantizers.auto",
        "AUTO_QUANTIZATION_CONFIG_MAPPING",
        f"{PACKAGE}.integrations.registered_config:RegisteredConfig",
        key="qdiff",
        feature="loading quantized checkpoints with diffusers",
        essential=True,
        upstream="a function of diffusers that registers a quantizer (transformers has one)",
    ),
    Entry(
        "diffusers.quantizers.auto",
        "AUTO_QUANTIZER_MAPPING",
        f"{PACKAGE}.integrations.nunchaku_quantizer:NunchakuQuantizer",
        key="qdiff_nunchaku",
        feature="loading Nunchaku folders into qdiff's layers",
    ),
)

TRANSFORMERS = (
    Entry(
        "transformers.quantizers",
        "auto.AUTO_QUANTIZER_MAPPING",
        f"{PACKAGE}.integrations.transformers_quantizer:QDiffTransformersQuantizer",
        key="qdiff",
        feature="quantizing and loading text encoders",
        essential=True,
        upstream="register_quantizer of transformers taking quantizers that diffusers loads too",
    ),
    Entry(
        "transformers.quantizers",
        "auto.AUTO_QUANTIZATION_CONFIG_MAPPING",
        f"{PACKAGE}.integrations.registered_config:RegisteredConfig",
        key="qdiff",
        feature="loading quantized text encoders",
        essential=True,
        upstream="register_quantization_config of transformers taking configs of diffusers",
    ),
)

OLD_TRANSFORMERS = (
    Entry(
        "transformers.quantizers.auto",
        "AUTO_QUANTIZATION_CONFIG_MAPPING",
        f"{PACKAGE}.integrations.registration:Refusal",
        key="qdiff",
        feature="refusing quantized text encoders, which this transformers would fill with random numbers",
    ),
)

WRAPPED = (
    Patch(
        "diffusers.quantizers.auto",
        "DiffusersAutoQuantizer.merge_quantization_configs",
        f"{PACKAGE}.integrations.nunchaku_quantizer:merge_configs",
        feature="loading Nunchaku folders into qdiff's layers, and saying that a config is ignored for a model that is quantized",
        upstream="diffusers letting the config that is passed choose the backend",
    ),
    Patch(
        "transformers.quantizers.auto",
        "AutoHfQuantizer.merge_quantization_configs",
        f"{PACKAGE}.integrations.passed_config:obey_or_refuse",
        feature="saying that a config is ignored for a text encoder that is quantized already",
        upstream="transformers refusing a config of another backend than the stored one",
    ),
    Patch(
        "diffusers.quantizers.pipe_quant_config",
        "PipelineQuantizationConfig._resolve_quant_config",
        f"{PACKAGE}.integrations.pipeline_config:leave_decoders",
        feature="leaving the VAE of a pipeline unquantized when no components are listed",
        upstream="diffusers leaving VAEs alone, or asking the backend",
    ),
    *(
        Patch(
            module,
            f"{kind}.num_parameters",
            f"{PACKAGE}.integrations.counting:num_parameters",
            feature=f"counting packed weights as the dense ones that they stand for ({kind}.num_parameters)",
            upstream="the libraries asking a quantizer how many weights a packed parameter holds",
        )
        for module, kind in (("diffusers.models.modeling_utils", "ModelMixin"), ("transformers.modeling_utils", "PreTrainedModel"))
    ),
    Patch(
        "diffusers.pipelines.pipeline_utils",
        "DiffusionPipeline.from_pretrained",
        f"{PACKAGE}.integrations.pipeline_config:from_pretrained",
        feature="telling of patterns without effect once for a pipeline, instead of for each of its components",
        upstream="none: this is about our own messages",
    ),
    Patch(
        "diffusers.models.modeling_utils",
        "ModelMixin.to",
        f"{PACKAGE}.integrations.casting:model_to",
        feature="casting a quantized model to the dtype it has (load_ip_adapter, save_lora_adapter)",
        upstream="diffusers refusing another dtype only",
    ),
    Patch(
        "diffusers.pipelines.pipeline_utils",
        "DiffusionPipeline.to",
        f"{PACKAGE}.integrations.casting:pipeline_to",
        feature="casting the dense components of a quantized pipeline, all or none",
        upstream="diffusers checking all components before it casts the first",
    ),
    Patch(
        "diffusers.models.modeling_utils",
        "_get_checkpoint_shard_files",
        f"{PACKAGE}.integrations.checkpoint_checks:shard_files",
        feature="checking the index of sharded checkpoints before they are read",
        upstream="diffusers checking an index before it follows it",
    ),
    Patch(
        "transformers.modeling_utils",
        "get_checkpoint_shard_files",
        f"{PACKAGE}.integrations.checkpoint_checks:shard_files",
        feature="checking the index of sharded text encoders before they are read",
        upstream="transformers checking an index before it follows it",
    ),
    Patch(
        "diffusers.models.modeling_utils",
        "load_state_dict",
        f"{PACKAGE}.integrations.checkpoint_checks:state_dict",
        feature="saying what is wrong with a damaged file",
        upstream="diffusers passing on what safetensors says",
    ),
    Patch(
        "diffusers.loaders.single_file_utils",
        "load_state_dict",
        f"{PACKAGE}.integrations.single_file:load_state_dict",
        feature="saying what is wrong with a damaged single file, and reading the formats of its weights from its metadata",
        upstream="diffusers passing on what safetensors says, metadata included",
    ),
    Patch(
        "transformers.modeling_utils",
        "convert_and_load_state_dict_in_model",
        f"{PACKAGE}.integrations.checkpoint_checks:decode_sources",
        feature="applying the scales of text encoders in 8 bits",
        upstream="transformers showing its quantizers the state dict, as diffusers does",
    ),
    *(
        Patch(
            module,
            f"{kind}.save_pretrained",
            f"{PACKAGE}.integrations.checkpoint_checks:refuse_pickles",
            feature=f"refusing to write quantized models as pickles ({kind})",
            upstream="the libraries telling a quantizer how a model is about to be saved",
        )
        for module, kind in (
            ("diffusers.models.modeling_utils", "ModelMixin"),
            ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
            ("transformers.modeling_utils", "PreTrainedModel"),
        )
    ),
    Patch(
        "diffusers.loaders.single_file_model",
        "FromOriginalModelMixin.from_single_file",
        f"{PACKAGE}.integrations.single_file:from_single_file",
        feature="loading self-contained single files, and saying what is wrong with others",
        upstream="diffusers reading the settings of a model from a single file's header",
    ),
    Patch(
        "diffusers.loaders.single_file_model",
        "_should_convert_state_dict_to_diffusers",
        f"{PACKAGE}.integrations.single_file:should_convert",
        feature="loading packed single files",
        upstream="diffusers 0.42, which shows a single file to the quantizer before it converts it",
        versions="<0.42",
    ),
    Setup(
        "diffusers.models.modeling_utils",
        "ModelMixin",
        f"{PACKAGE}.integrations.controlnets:install",
        feature="ControlNets and motion models that copy a quantized model",
        upstream="diffusers copying models in strict mode, or asking the quantizer",
    ),
    Setup(
        "diffusers.models.controlnets",
        "",
        f"{PACKAGE}.integrations.controlnets:install_in_package",
        feature="parts of ControlNets that copy those of a quantized model",
        upstream="diffusers copying models in strict mode, or asking the quantizer",
    ),
    *(
        Patch(
            module,
            f"{kind}.{name}",
            f"{PACKAGE}.integrations.fusing:on_offloaded",
            feature=f"{name} of {kind} while a quantized model is offloaded",
            upstream="offloading of diffusers and accelerate being taken off while adapters are changed or a model is saved",
        )
        for module, kind, names in (
            (
                "diffusers.loaders.peft",
                "PeftAdapterMixin",
                ("add_adapter", "load_lora_adapter", "save_lora_adapter", "fuse_lora", "unfuse_lora"),
            ),
            ("diffusers.loaders.lora_base", "LoraBaseMixin", ("fuse_lora", "unfuse_lora")),
            ("diffusers.models.modeling_utils", "ModelMixin", ("save_pretrained",)),
            ("transformers.modeling_utils", "PreTrainedModel", ("save_pretrained",)),
            (
                "peft.tuners.tuners_utils",
                "BaseTuner",
                ("merge_adapter", "unmerge_adapter", "_unload_and_optionally_merge"),
            ),
        )
        for name in names
    ),
    Patch(
        "diffusers.hooks.group_offloading",
        "GroupOffloadingHook.deinitalize_hook",
        f"{PACKAGE}.layers.offloading:deinitialize_hook",
        feature="changing the adapters of a model that is offloaded to disk",
        upstream="diffusers reading back from disk what its hook wrote, when it is taken off",
    ),
    Patch(
        "transformers.modeling_utils",
        "PreTrainedModel.resize_token_embeddings",
        f"{PACKAGE}.integrations.token_tables:resize_token_embeddings",
        feature="adding tokens to a text encoder whose token table is packed",
        upstream="transformers asking the quantizer for a table that can be written",
    ),
    Patch(
        "diffusers.loaders.lora_pipeline",
        "FluxLoraLoaderMixin._maybe_expand_lora_state_dict",
        f"{PACKAGE}.integrations.flux_lora:expand_without_packed",
        feature="LoRA files on a quantized Flux",
        upstream="diffusers taking a layer's shape from the module instead of from its weight",
    ),
    Patch(
        "peft.tuners.lora",
        "LoraModel._create_new_module",
        f"{PACKAGE}.integrations.peft_lora:create_new_module",
        feature="fusing LoRA adapters into packed layers",
        upstream="dispatchers of PEFT that are registered once for all configs (huggingface/peft#1875 is for one)",
    ),
    Patch(
        "peft.tuners.tuners_utils",
        "BaseTuner._replace_module",
        f"{PACKAGE}.integrations.peft_lora:refuse_to_fuse",
        feature="refusing to fuse LoKr, OFT and other adapters, which packed layers cannot absorb",
        upstream="PEFT asking the base layer to absorb the difference",
    ),
    Patch(
        "diffusers.utils.hub_utils",
        "PushToHubMixin._upload_folder",
        f"{PACKAGE}.hub.cards:write_cards_on_upload",
        feature="writing a model card on push_to_hub of diffusers (`qdiff push` writes one too)",
        upstream="a quantizer's own model card in diffusers",
    ),
    Patch(
        "transformers.utils.hub",
        "PushToHubMixin._upload_modified_files",
        f"{PACKAGE}.hub.cards:write_cards_on_upload",
        feature="writing a model card on push_to_hub of transformers (`qdiff push` writes one too)",
        upstream="a quantizer's own model card in transformers",
    ),
    Patch(
        "transformers.modeling_utils",
        "PreTrainedModel.from_pretrained",
        f"{LOADING}:from_pretrained_encoder",
        feature="saying that qdiff does not know the installed transformers",
    ),
    Patch(
        "diffusers.models.modeling_utils",
        "ModelMixin.from_pretrained",
        f"{LOADING}:from_pretrained",
        feature=IN_THREADS,
        upstream="torch.set_default_dtype of a thread's own (pytorch/pytorch#29720)",
    ),
    Patch(
        "diffusers.models.modeling_utils",
        "ModelMixin._set_default_torch_dtype",
        f"{LOADING}:set_default_dtype",
        feature=IN_THREADS,
        upstream="torch.set_default_dtype of a thread's own (pytorch/pytorch#29720)",
    ),
    Patch(
        "diffusers.models.modeling_utils",
        "ModelMixin._load_pretrained_model",
        f"{LOADING}:read_weights",
        feature="reading weights in several threads side by side",
        upstream="torch.set_default_dtype of a thread's own (pytorch/pytorch#29720)",
    ),
    Patch(
        "diffusers.models.modeling_utils",
        "no_init_weights",
        f"{LOADING}:one_at_a_time",
        feature=IN_THREADS,
        upstream="diffusers constructing models without replacing torch.nn.init",
    ),
    Patch(
        "diffusers.configuration_utils",
        "ConfigMixin.from_config",
        f"{LOADING}:call_alone",
        feature=IN_THREADS,
        upstream="torch.set_default_dtype of a thread's own (pytorch/pytorch#29720)",
    ),
    Patch(
        "transformers.modeling_utils",
        "local_torch_dtype",
        f"{LOADING}:one_at_a_time",
        feature=f"{IN_THREADS} (text encoders)",
        upstream="torch.set_default_dtype of a thread's own (pytorch/pytorch#29720)",
    ),
    Patch(
        "transformers.modeling_utils",
        "PreTrainedModel.initialize_weights",
        f"{LOADING}:call_alone",
        feature=f"{IN_THREADS} (text encoders)",
        upstream="transformers initializing missing weights without replacing torch.nn.init",
    ),
    Patch(
        "transformers.modeling_utils",
        "PreTrainedModel.tie_weights",
        f"{LOADING}:tie_weights",
        feature=f"{IN_THREADS} (tied text encoders)",
        upstream="huggingface/transformers#44940",
    ),
    Patch(
        "transformers.initialization",
        "no_tie_weights",
        f"{LOADING}:no_tie_weights",
        feature=f"{IN_THREADS} (tied text encoders)",
        upstream="huggingface/transformers#44940",
        versions=">=5.1",
    ),
    Patch(
        "accelerate.big_modeling",
        "init_on_device",
        f"{LOADING}:init_on_device",
        feature=IN_THREADS,
        upstream="accelerate keeping init_on_device to its thread (huggingface/diffusers#4296)",
    ),
    Patch(
        "peft.utils.integrations",
        "_init_on_device",
        f"{LOADING}:init_on_device",
        feature="loading LoRA adapters in several threads",
        upstream="huggingface/peft#3605",
    ),
    Patch(
        "peft.utils.integrations",
        "_skip_init_on_device",
        f"{LOADING}:skip_init_on_device",
        feature="loading LoRA adapters of attention modules in several threads",
        upstream="huggingface/peft#3605",
    ),
)

TABLE = (*REGISTRATION, *TRANSFORMERS, *WRAPPED)
