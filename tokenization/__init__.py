# SPDX-License-Identifier: Apache-2.0
"""Pictures and words in, token ids out, and back. Knows nothing of the transformer."""

from .augmentation_moma import augment_pictures
from .chat_template_moma import DEFAULT_CHAT_TEMPLATE
from .codecs_moma import ModalityCodec, register_codec
from .collation_moma import MomaDataCollator
from .configuration_moma_vq import MomaVQConfig
from .image_processing_moma import MomaImageProcessor
from .image_processing_pil_moma import MomaImageProcessorPil
from .modeling_moma_vq import MomaVQModel, MomaVQOutput
from .perceptual_moma_vq import MomaVQPerceptualNetwork
from .processing_moma import MomaProcessor
from .text_tokenizer_moma import add_modality_tokens, add_picture_tokens, train_text_tokenizer


__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "ModalityCodec",
    "MomaDataCollator",
    "MomaImageProcessor",
    "MomaImageProcessorPil",
    "MomaProcessor",
    "MomaVQConfig",
    "MomaVQModel",
    "MomaVQOutput",
    "MomaVQPerceptualNetwork",
    "add_modality_tokens",
    "add_picture_tokens",
    "augment_pictures",
    "register_codec",
    "train_text_tokenizer",
]
