# SPDX-License-Identifier: Apache-2.0
"""Names that modules of this package had before, for one release: importing one says where its contents are."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


PACKAGE = __name__.partition(".")[0]
# old name to new, both without the package
MOVED = {
    "attention_moma": "modeling_moma",
    "auxiliary_moma": "routing_moma",
    "batch_routing_moma": "token_groups_moma",
    "cache_moma": "depth_cache_moma",
    "capacity_moma": "routing_moma",
    "configuration_checks_moma": "configuration_moma",
    "convert.fields": "convert.transfer",
    "convert.new_rows": "convert.embedding_rows",
    "convert.probe": "convert.output_comparison",
    "convert.receipt": "convert.report",
    "convert.refusals": "convert.unsupported",
    "data.corpus": "data.sources",
    "data.engines": "data.executors",
    "data.pictures": "data.images",
    "data.running": "data.workers",
    "data.segments": "data.kinds.interleaved",
    "decoder_layers_moma": "modeling_moma",
    "demo.caption_tab": "demo.tabs",
    "demo.draw_tab": "demo.tabs",
    "demo.examples": "demo.inputs",
    "demo.interleaved_tab": "demo.tabs",
    "demo.partial_pictures": "demo.studio",
    "demo.refusals": "demo.inputs",
    "demo.routing_tab": "demo.tabs",
    "demo.showing": "demo.tabs",
    "demo.streaming": "demo.studio",
    "demo.uploads": "demo.inputs",
    "depth_packing_moma": "depth_cache_moma",
    "dispatch_moma": "experts_implementations_moma",
    "document_lengths_moma": "documents_moma",
    "evaluation.features": "evaluation.drawings",
    "evaluation.measuring": "evaluation.evaluate",
    "evaluation.sources": "evaluation.held_out",
    "expert_forms_moma": "routing_moma",
    "experts_in_turn_moma": "cpu_moma",
    "experts_moma": "modeling_moma",
    "growing_cache_moma": "cpu_moma",
    "host_moma": "cpu_moma",
    "logits_process_moma": "generation_moma",
    "modality_split_moma": "token_groups_moma",
    "model_card_moma": "compat_moma",
    "norms_moma": "modeling_moma",
    "onlookers_moma": "cpu_moma",
    "padded_experts_moma": "experts_implementations_moma",
    "parameter_counts_moma": "configuration_moma",
    "presets_moma": "configuration_moma",
    "rotary_moma": "modeling_moma",
    "router_base_moma": "routing_moma",
    "router_updates_moma": "routing_moma",
    "routing_context_moma": "token_groups_moma",
    "routing_rules_moma": "configuration_moma",
    "selection_moma": "routing_moma",
    "serving_http": "serving.http",
    "serving_vllm": "serving.vllm",
    "step_attention_moma": "cpu_moma",
    "step_experts_moma": "cpu_moma",
    "step_products_moma": "cpu_moma",
    "thresholds_moma": "routing_moma",
    "tools.auxiliary_training": "calibration.auxiliary_training",
    "tools.calibration": "calibration.thresholds",
    "tools.callbacks": "training.metrics_callback",
    "tools.checkpoint_checks": "hub.loading",
    "tools.code_embeddings": "training.code_embeddings",
    "tools.costs": "planning.costs",
    "tools.expert_colors": "evaluation.routing_images",
    "tools.freezing": "training.freezing",
    "tools.import_notices": "utils.messages",
    "tools.layouts": "planning.layouts",
    "tools.memory": "planning.memory",
    "tools.observation": "calibration.observation",
    "tools.planning": "planning.plans",
    "tools.quantization": "export.quantization",
    "tools.routed_tokens": "evaluation.routing_images",
    "tools.selection_counts": "calibration.selection_counts",
    "tools.traffic": "planning.traffic",
    "tools.upcycling": "upcycling.upcycle",
    "tools.upcycling_receipt": "upcycling.report",
    "tools.upcycling_sources": "upcycling.tensor_sources",
    "training.allocator": "utils.hardware",
    "training.changed_routers": "calibration.auxiliary_training",
    "training.chat": "data.encoding",
    "training.disk": "utils.errors",
    "training.evaluation_data": "evaluation.held_out",
    "training.examples": "data.examples",
    "training.feeding": "training.throughput_callback",
    "training.files": "utils.atomic_files",
    "training.measures": "evaluation.measures",
    "training.picture_sources": "training.image_sources",
    "training.picture_store": "training.image_store",
    "training.precision": "utils.hardware",
    "training.router_table": "evaluation.report",
    "training.runs": "training.loss_curves",
    "training.saved": "hub.loading",
    "training.tables": "utils.messages",
    "transformers_gaps_moma": "compat_moma",
    "unseen_layers_moma": "cpu_moma",
}


class MovedModules(MetaPathFinder):
    """Raises at old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`.

        Args:
            fullname (`str`):
                name of the module.
            path (`Sequence[str] | None`):
                not used.
            target (`ModuleType`, *optional*):
                not used.

        Raises:
            ModuleNotFoundError: the name is an old one.
        """
        package, _, name = fullname.partition(".")
        # an empty package, so that its modules are asked for by their own names
        if package == PACKAGE and name == "tools":
            return ModuleSpec(fullname, loader=None, is_package=True)
        if package == PACKAGE and name in MOVED:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: what it held is in `{PACKAGE}.{MOVED[name]}` now.", name=fullname
            )
        return None


def find_moved_modules() -> None:
    """Let imports of old names say the new ones; a second call changes nothing."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        # first in the list: finders of editable installations may know an older checkout
        sys.meta_path.insert(0, MovedModules())


__all__ = ["MOVED", "find_moved_modules"]
