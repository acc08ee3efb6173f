"""Dialects of image models' adapters: one weights file without a configuration, whose keys say everything.

=============  =====================================================================================================
lycoris        LoHa, LoKr, full differences, LoCon with a Tucker core
kohya          sd-scripts, musubi-tuner: ``lora_unet_…lora_down.weight``, alpha beside the factors
xlabs          the processors of Flux: ``double_blocks.0.processor.qkv_lora1.down.weight``
diffusers      attention processors, PEFT's names behind a model's; ``lora_adapter_metadata`` in the header
comfyui        every ending under every prefix: ai-toolkit, Wan, Qwen-Image, LTX, HunyuanVideo, Flux control
=============  =====================================================================================================
"""

from __future__ import annotations

from mapconv.formats.image.comfyui import COMFYUI
from mapconv.formats.image.diffusers import DIFFUSERS
from mapconv.formats.image.files import ImageFiles
from mapconv.formats.image.kohya import KOHYA
from mapconv.formats.image.lycoris import LYCORIS
from mapconv.formats.image.xlabs import XLABS

#: The first that has all keys of a file is its dialect; XLabs' endings are in those of diffusers' old processors.
IMAGE_FILES = ImageFiles((KOHYA, LYCORIS, DIFFUSERS, XLABS, COMFYUI))
