"""Models: loading, pruning, exporting, and what is trained of the teacher."""

from promptkd.models.gguf_format import cache_folder
from promptkd.models.load import (
    count_parameters,
    generation_config_of,
    load_adapted,
    load_model,
    load_tokenizer,
    model_record,
)
from promptkd.models.merge import merged_parts
from promptkd.models.positions import check_positions, check_rows_fit, position_limit
from promptkd.models.prune import block_influence, evenly_spaced, most_influential, prune_layers
from promptkd.models.soft_prompt import SoftPrompt
from promptkd.models.source import resolve_model
from promptkd.models.vocabulary import SharedVocabulary, shared_vocabulary, shared_vocabulary_size, vocabulary_size

__all__ = ["SharedVocabulary", "SoftPrompt", "block_influence", "cache_folder", "count_parameters"]
__all__ += ["evenly_spaced", "load_adapted", "load_model", "load_tokenizer", "merged_parts", "model_record"]
__all__ += ["most_influential", "prune_layers", "resolve_model", "shared_vocabulary", "shared_vocabulary_size"]
__all__ += ["vocabulary_size"]
__all__ += ["generation_config_of"]
__all__ += ["check_positions", "check_rows_fit", "position_limit"]
