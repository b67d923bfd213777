# SPDX-License-Identifier: Apache-2.0
"""Images and text to token ids, and back: image tokenizer, image processors, text tokenizer and processor.

Nothing here depends on the model.
"""

from .audio_codecs_moma import LibraryAudioCodec, MelCodec, load_audio_codec
from .augmentation_moma import augment_images
from .codecs_moma import ModalityCodec, register_codec
from .collation_moma import MomaDataCollator
from .configuration_moma_vq import MomaVQConfig
from .image_processing_moma import MomaImageProcessor, MomaImageProcessorPil
from .modeling_moma_vq import MomaVQModel, MomaVQOutput
from .perceptual_moma_vq import MomaVQPerceptualNetwork
from .processing_moma import MomaProcessor
from .text_tokenizer_moma import DEFAULT_CHAT_TEMPLATE, add_image_tokens, add_modality_tokens, train_text_tokenizer


__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "LibraryAudioCodec",
    "MelCodec",
    "ModalityCodec",
    "MomaDataCollator",
    "MomaImageProcessor",
    "MomaImageProcessorPil",
    "MomaProcessor",
    "MomaVQConfig",
    "MomaVQModel",
    "MomaVQOutput",
    "MomaVQPerceptualNetwork",
    "add_image_tokens",
    "add_modality_tokens",
    "augment_images",
    "load_audio_codec",
    "register_codec",
    "train_text_tokenizer",
]
